"""Aligning the projector of a LLaVA-style model: the stage before any task trains.

The language model stays frozen; the projector learns to say what is in an image in "words" that it understands.
Three steps: whitened principal components (`start_projector`), a few seconds of classifying the records' answers from
the projected tokens without the language model (`point_at_words`), then captions made of the answers through it.
Afterwards the projector is frozen for good: all tasks share it (SEMANTICS section 2), and cached features depend on it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contextlora.data.examples import Example
from contextlora.data.images import open_image
from contextlora.errors import ConfigError, RunError
from contextlora.models.hub import stamp
from contextlora.models.projector import point_at_words, scale_projector, start_projector

PROMPTS = ("Describe it.", "Describe the picture.", "What do you see?", "What is in this image?")
MIN_WORD_STEPS = 200  # of `point_at_words`, for small data; else six passes
MAX_TASKS = 4  # named in one caption: time goes by tokens
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Alignment:
    """What an alignment did: the loss of every step (mean over answer tokens, in nats), its size and its time."""

    losses: tuple[float, ...]
    images: int
    seconds: float


def align(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    epochs: float = 1.0,
    batch_size: int = 16,
    lr: float = 2e-4,
    seed: int = 0,
    fresh: bool = True,
    progress: Progress | None = None,
) -> Alignment:
    """Trains the projector alone, in place, and leaves all other weights as they were. To be done before `attach`.

    Args:
        model: a LLaVA-style model from `load_model`.
        processor: its processor.
        examples: training records; those without an image or an answer are passed over.
        epochs: passes over the captions; a fraction is fine, and 0 leaves out the language model altogether: nearly as
            good in a fraction of the time.
        batch_size: images in a step.
        lr: peak learning rate of AdamW; 5 % warm-up, then cosine to zero.
        seed: of the initial projector, the order and the captions.
        fresh: start from `start_projector` and count the channel statistics anew, instead of going on from the
            projector that the model has. Needs the embedded model's tower; ignored for others.
        progress: called with ("images" | "align", done, total).

    Raises:
        ConfigError: E113 if the model has no LLaVA projector, or no example has both image and answer.
        RunError: E518 if the loss stops being finite; the projector is then as it was before.
    """
    began = time.perf_counter()
    shown = [e for e in examples if e.image is not None and e.answers]
    if not hasattr(getattr(model, "model", None), "multi_modal_projector"):
        raise ConfigError("E113", "only LLaVA-style models have a projector to align", where=type(model).__name__)
    if not shown:
        raise ConfigError("E113", "no example has both an image and an answer", where="align")
    tower = model.model.vision_tower
    tokens = projector_input(model, processor, shown, progress)
    projector = deepcopy(model.model.multi_modal_projector).float().cpu()
    fresh = fresh and hasattr(tower, "channel_mean")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if fresh:
            tokens, mean, std = _renormalise(tokens, tower)
            _start(model, processor.tokenizer, projector, tokens, shown)
        losses = _train(
            model, processor, projector.to(model.device), tokens, shown, _Plan(epochs, batch_size, lr, seed), progress
        )
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    if fresh:
        tower.channel_mean.copy_(mean)
        tower.channel_std.copy_(std)
    stamp(model)  # it is another base now
    return Alignment(tuple(losses), len(shown), time.perf_counter() - began)


@torch.no_grad()
def projector_input(
    model: Any, processor: Any, examples: Sequence[Example], progress: Progress | None = None, batch_size: int = 16
) -> Tensor:
    """What the projector receives for each example's image, (N, tokens, channels) in the model's dtype, on the CPU."""
    seen: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].cpu()))
    try:
        for i in range(0, len(examples), batch_size):
            part = examples[i : i + batch_size]
            images = [open_image(e.image) for e in part if e.image is not None]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            model.get_image_features(pixel_values=pixels.to(model.device))
            if progress:
                progress("images", i + len(part), len(examples))
    finally:
        hook.remove()
    return torch.cat(seen)


def caption(example: Example, rng: random.Random) -> str:
    """Up to four of a record's answers in one line, in random order: ``"road: wet; weather: rain"``."""
    tasks = rng.sample(sorted(example.answers), min(len(example.answers), MAX_TASKS))
    return "; ".join(f"{t.replace('_', ' ')}: {', '.join(example.answers[t])}" for t in tasks)


def _renormalise(tokens: Tensor, tower: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the tower's channel statistics by those of these images; returns the tokens, mean and std.

    The standard deviation gets a floor of a tenth of the median: channels that hardly fire here would otherwise be
    blown up by whatever makes them fire later.
    """
    old_mean, old_std = tower.channel_mean.float().cpu(), tower.channel_std.float().cpu()
    raw_mean = tokens.float().mean((0, 1)) * old_std + old_mean
    raw_std = tokens.float().std((0, 1)) * old_std
    raw_std = raw_std.clamp_min(0.1 * raw_std.median())
    mean, std = (t.to(tower.channel_mean.dtype).float() for t in (raw_mean, raw_std))  # as the buffers will hold them
    return ((tokens.float() * old_std + old_mean - mean) / std).to(tokens.dtype), mean, std


def _start(model: Any, tokenizer: Any, projector: Any, tokens: Tensor, examples: Sequence[Example]) -> None:
    """The two steps before captions: principal components, then words."""
    norm = float(model.get_input_embeddings().weight.float().norm(dim=1).median())
    start_projector(projector, tokens, norm)
    options = _options(examples)
    if options:
        words = [_word_vectors(model, tokenizer, found) for found in options.values()]
        targets = [_targets(examples, task, found) for task, found in options.items()]
        projector.requires_grad_(True)
        point_at_words(projector, tokens, words, targets, steps=max(MIN_WORD_STEPS, 6 * len(examples) // 32))
        scale_projector(projector, tokens, norm)


def _options(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Task -> its answers in the data. Tasks with one answer, or more than 64, leave nothing to tell apart."""
    options: dict[str, set[str]] = {}
    for example in examples:
        for task, answers in example.answers.items():
            options.setdefault(task, set()).update(answers)
    return {task: sorted(found) for task, found in sorted(options.items()) if 1 < len(found) <= 64}


@torch.no_grad()
def _word_vectors(model: Any, tokenizer: Any, options: Sequence[str]) -> Tensor:
    """(options, hidden): the mean embedding of each option's words."""
    table = model.get_input_embeddings().weight
    ids = [tokenizer(f" {o}", add_special_tokens=False).input_ids for o in options]
    return torch.stack([table[i].float().mean(0) for i in ids]).cpu()


def _targets(examples: Sequence[Example], task: str, options: Sequence[str]) -> Tensor:
    """(N, options): equal shares for the correct ones; a row of zeros where the task is not answered."""
    found = torch.tensor([[o in e.answers.get(task, ()) for o in options] for e in examples]).float()
    return found / found.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class _Plan:
    epochs: float
    batch_size: int
    lr: float
    seed: int


def _train(
    model: Any,
    processor: Any,
    projector: Any,
    tokens: Tensor,
    examples: Sequence[Example],
    plan: _Plan,
    progress: Progress | None,
) -> list[float]:
    """Trains the projector on captions, in place."""
    rng = random.Random(plan.seed)
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), plan.lr, betas=(0.9, 0.98), weight_decay=0.0)
    steps = max(1, round(plan.epochs * len(examples) / plan.batch_size)) if plan.epochs > 0 else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _cosine(k, steps))
    prompts = [_prompt(processor, p, tokens.shape[1]) for p in PROMPTS]
    order: list[int] = []
    losses: list[float] = []
    for step in range(steps):
        while len(order) < plan.batch_size:
            order += rng.sample(range(len(examples)), len(examples))
        picked, order = order[: plan.batch_size], order[plan.batch_size :]
        texts = [(rng.choice(prompts), caption(examples[i], rng)) for i in picked]
        loss = _loss(model, processor, projector(tokens[picked].float().to(model.device)), texts)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RunError("E518", f"the loss became {losses[-1]} in step {step + 1}; try a lower lr", where="align")
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress:
            progress("align", step + 1, steps)
    return losses


def _cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (0.05 * steps + 1)) * (0.5 + 0.5 * math.cos(math.pi * step / max(1, steps)))


def _prompt(processor: Any, text: str, image_tokens: int) -> str:
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    chat: str = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return chat.replace(processor.image_token, processor.image_token * image_tokens)


def _loss(model: Any, processor: Any, seen: Tensor, texts: Sequence[tuple[str, str]]) -> Tensor:
    """Mean cross-entropy of the answer tokens.

    Args:
        seen: (B, T, hidden) projected image tokens.
        texts: for each sample the prompt, with T image tokens in it, and the answer.
    """
    tokenizer, body = processor.tokenizer, model.model.language_model
    ids, mask, answer = _pad(tokenizer, texts, model.device)
    words = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id).unsqueeze(-1)
    embeds = words.masked_scatter(places, seen.to(words.dtype))
    hidden = body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    # Only the answer's positions, gathered into 2-D first: lm_head on a 3-D slice is a hundred times slower on CPUs.
    logits = model.lm_head(hidden[:, :-1][answer[:, 1:]]).float()
    return cross_entropy(logits, ids[:, 1:][answer[:, 1:]])


def _pad(tokenizer: Any, texts: Sequence[tuple[str, str]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded (ids, attention mask, answer mask), each (B, L)."""
    prompts = tokenizer([p for p, _ in texts], add_special_tokens=False).input_ids
    answers = tokenizer([a + tokenizer.eos_token for _, a in texts], add_special_tokens=False).input_ids
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(texts), length), tokenizer.pad_token_id)
    at = torch.arange(length).expand_as(ids)
    starts = torch.tensor([[len(p)] for p in prompts])
    ends = starts + torch.tensor([[len(a)] for a in answers])
    for row, p, a in zip(ids, prompts, answers, strict=True):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    return ids.to(device), (at < ends).long().to(device), ((at >= starts) & (at < ends)).to(device)

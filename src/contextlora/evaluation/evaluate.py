"""Asking a model: the likeliest option set, or a generated answer; and how often it is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contextlora.data.collate import Batch, Encoder, Sample, collate
from contextlora.data.examples import Example, load_examples
from contextlora.errors import DataError
from contextlora.evaluation.metrics import Accuracy, parse_answer, score
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attached_state, going_on
from contextlora.models.inputs import ImageFeatures, at_least_float32, log_likelihood, logits_at

Method = Literal["likelihood", "generate"]
Answers = dict[str, tuple[str, ...]]  # by example id
OptionSets = list[tuple[str, ...]]
MAX_ROWS = 256  # candidate answers scored at once
MAX_SETS = 4096  # a task with more option sets (some of 64 options, eight at once, make 5 x 10^9) writes its answer
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Evaluation:
    """Accuracy by task, and what was answered.

    Attributes:
        accuracy: the paper's metric with its 95 % interval over items, by task.
        answers: by task, then by example id.
    """

    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    processor: Any,
    graph: TaskGraph,
    *,
    data: str | Path,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    method: Method = "likelihood",
    context: str | Mapping[str, str] = "none",
    features: ImageFeatures | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures accuracy per task on one split of a data folder.

    Args:
        model: attached (each task under its own gate) or plain (the base model answers).
        processor: the model's processor or tokenizer.
        graph: whose tasks are asked.
        data: the data folder.
        split: "train", "valid" or "test".
        tasks: which tasks; None means all.
        method: "likelihood" picks the likeliest option set, "generate" writes an answer and checks its format.
        context: "none", "gold" (prerequisites' labels in the prompt) or "predicted" (their own answers); by task where
            tasks differ.
        features: reused image features.
        progress: called with (asked, total).

    Raises:
        DataError: E230 when the split has no example. ConfigError: E104 for a task that the graph has not.
    """
    examples = load_examples(data, graph, split=split)
    if not examples:
        raise DataError("E230", f"no record of split '{split}'", where=data)
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    wanted = [t for t in (graph.names if tasks is None else tasks) if graph.task(t)]
    ways = dict.fromkeys(graph.names, context) if isinstance(context, str) else context
    result = Evaluation()
    total, done = sum(1 for t in wanted for e in examples if t in e.answers), 0
    for task in (t for level in graph.levels() for t in level if t in wanted):
        asked = [e for e in examples if task in e.answers]
        known = context_for(reader, asked, task, ways, result.answers)
        seen = None if progress is None else partial(_onward, progress, done, total)
        result.answers[task] = answer(reader, asked, task, method=method, known=known, progress=seen)
        result.accuracy[task] = Accuracy.of([score(result.answers[task][e.id], e.answers[task]) for e in asked])
        done += len(asked)
    return result


def _onward(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def context_for(
    reader: ImageFeatures, examples: Sequence[Example], task: str, ways: Mapping[str, str], given: dict[str, Answers]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """What the prompt of `task` says of its prerequisites, by example id.

    Args:
        ways: "none", "gold" or "predicted" by task; prerequisites that it leaves out are left out of the prompt.
        given: answers so far, by task; those found here are added.
    """
    way = ways.get(task, "none")
    if way == "none":
        return {}
    before = [p for p in reader.encoder.graph.prerequisites(task) if p in ways]
    if way == "gold":
        return {e.id: {p: e.answers[p] for p in before if p in e.answers} for e in examples}
    for p in before:
        missing = [e for e in examples if e.id not in given.get(p, {})]
        if missing:
            known = context_for(reader, missing, p, ways, given)
            given[p] = {**given.get(p, {}), **answer(reader, missing, p, known=known)}
    return {e.id: {p: given[p][e.id] for p in before} for e in examples}


@torch.no_grad()
def answer(
    reader: ImageFeatures,
    examples: Sequence[Example],
    task: str,
    *,
    method: Method = "likelihood",
    known: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Answers one task for each example, by example id. Without options, or with too many sets, it is generated.

    `progress` is called with the number of examples answered so far.
    """
    encoder, own = reader.encoder, [e.options.get(task) for e in examples]
    shared = option_sets(encoder.graph, task)
    sets = [shared if o is None else option_sets(encoder.graph, task, o) for o in own]
    samples = [encoder.sample(e, task, known=(known or {}).get(e.id)) for e in examples]
    writes = [method == "generate" or not s for s in sets]
    found: Answers = {}
    with under(reader.model, task):
        for part in _alike(samples, sets, writes):
            batch = collate([samples[i] for i in part], encoder.pad)
            if writes[part[0]]:
                said = _generate(reader, batch, _longest(encoder, task, [own[i] or () for i in part]))
                options = [own[i] or encoder.graph.task(task).options for i in part]
                chosen = [parse_answer(text, o) for text, o in zip(said, options, strict=True)]
            else:
                chosen = _likeliest(reader, batch, [sets[i] for i in part])
            found |= {examples[i].id: c for i, c in zip(part, chosen, strict=True)}
            if progress:
                progress(len(found))
    return found


def _alike(samples: Sequence[Sample], sets: Sequence[OptionSets], writes: Sequence[bool]) -> Iterator[list[int]]:
    """Indices in batches of equal prompt length that are all written or all compared."""
    for kind in (True, False):
        mine = [i for i, w in enumerate(writes) if w is kind]
        most = max((len(sets[i]) for i in mine), default=0)
        rows = MAX_ROWS // 4 if kind else max(1, MAX_ROWS // max(most, 1))
        for part in same_length([samples[i] for i in mine], rows):
            yield [mine[i] for i in part]


def _likeliest(reader: ImageFeatures, batch: Batch, sets: Sequence[OptionSets]) -> list[tuple[str, ...]]:
    """The likeliest of each prompt's own option sets."""
    if all(s is sets[0] for s in sets):
        candidates, allowed = sets[0], None
    else:
        candidates = list(dict.fromkeys(c for s in sets for c in s))
        allowed = torch.tensor([[c in s for c in candidates] for s in map(set, sets)])
    scores = score_options(reader, batch, candidates, allowed, likeliest=True)
    return [candidates[b] for b in scores.argmax(1).tolist()]


def option_sets(graph: TaskGraph, task: str, options: Sequence[str] | None = None) -> OptionSets:
    """Every answer a task allows: the sets of 1 to `choose` options, each in declared order; none if over 4096.

    `options` are an example's own, of which one is right; None takes the graph's.
    """
    t = graph.task(task)
    options = options or t.options or ()
    if sum(comb(len(options), n) for n in range(1, t.choose + 1)) > MAX_SETS:
        return []
    return [c for n in range(1, t.choose + 1) for c in combinations(options, n)]


def score_options(
    reader: ImageFeatures,
    batch: Batch,
    candidates: Sequence[Sequence[str]],
    allowed: Tensor | None = None,
    *,
    likeliest: bool = False,
) -> Tensor:
    """Log-likelihood of each candidate answer after each prompt, its end token included: (samples, candidates).

    The prompt runs once and its keys and values serve every candidate. All prompts must have one length. A candidate
    that is not `allowed` (samples, candidates) is none of that prompt's, and minus infinite. With `likeliest` only the
    largest of a row is sure to be exact: a candidate whose first token alone is less likely than another's whole answer
    is not read to its end, and keeps its first token's value.
    """
    model, encoder = reader.model, reader.encoder
    ids = [torch.tensor(encoder.answer_ids(c)) for c in candidates]
    answers = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=encoder.pad)
    real = nn.utils.rnn.pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True)
    inputs = reader.inputs(batch)
    last = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    last[:, -1] = True
    with logits_at(model, last):
        out = reader.prompts.run(batch, inputs) if reader.prompts else model(**inputs, use_cache=True)
    first: Tensor = at_least_float32(out.logits).log_softmax(-1)[:, answers[:, 0].to(out.logits.device)].cpu()
    allowed = torch.ones_like(first, dtype=torch.bool) if allowed is None else allowed
    first = first.masked_fill(~allowed, -torch.inf)
    if answers.shape[1] == 1:
        return first
    rest = partial(_rest, model, out.past_key_values, answers, real, _positions_after(model, inputs))
    if not likeliest:
        return rest(first, allowed)
    guess = nn.functional.one_hot(first.argmax(1), len(candidates)).bool()
    scores = rest(first, guess)
    return rest(scores, (first >= scores[guess][:, None]) & ~guess & allowed)


def _rest(
    model: nn.Module, cache: Any, answers: Tensor, real: Tensor, starts: Tensor, scores: Tensor, wanted: Tensor
) -> Tensor:
    """`scores` (prompts, answers) with the log-likelihood of all but the first token added wherever `wanted`."""
    length, scores, left = cache.get_seq_length(), scores.clone(), wanted.nonzero()
    for pairs in [left[i : i + MAX_ROWS] for i in range(0, len(left), MAX_ROWS)]:
        prompts, chosen = pairs.T
        own = copy.deepcopy(cache)
        own.batch_select_indices(prompts.to(starts.device))
        fed, predicts = answers[chosen].to(starts.device), real[chosen, 1:].to(starts.device)
        more = {}
        if _image_positions(model):
            more["position_ids"] = starts[prompts] + torch.arange(fed.shape[1] - 1, device=starts.device)
        with logits_at(model, predicts), going_on(model, prompts):
            logits = model(
                input_ids=fed[:, :-1],
                attention_mask=torch.ones(len(fed), length + fed.shape[1] - 1, dtype=torch.long, device=starts.device),
                past_key_values=own,
                use_cache=True,
                **more,
            ).logits
        picked = log_likelihood(logits, fed[:, 1:][predicts]).cpu()
        sums = picked.new_zeros(len(fed)).index_add_(0, predicts.nonzero(as_tuple=True)[0].cpu(), picked)
        scores[prompts, chosen] += sums
    return scores


def _image_positions(model: nn.Module) -> list[nn.Module]:
    """The modules that count an image's positions in rows and columns (Qwen2-VL and its like)."""
    return [m for m in model.modules() if hasattr(m, "rope_deltas")]


def _positions_after(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The position that follows each prompt of the model's last forward pass, (n, 1).

    Such a model keeps the difference to the number of tokens; after a batch without images it is an older batch's.
    """
    ids: Tensor = inputs["input_ids"]
    starts = torch.full((len(ids), 1), ids.shape[1], device=ids.device)
    if "mm_token_type_ids" in inputs:
        for module in _image_positions(model):
            starts = starts + module.rope_deltas.view(-1, 1).to(ids.device)  # type: ignore[operator]
    return starts


def same_length(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Indices in batches of equal prompt length, so that a batch needs no padding."""
    by_length: dict[int, list[int]] = {}
    for i, s in enumerate(samples):
        by_length.setdefault(len(s.prompt), []).append(i)
    for group in by_length.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def under(model: nn.Module, task: str) -> AbstractContextManager[None]:
    """The task's gate on an attached model; nothing on a plain one."""
    return model.tasks(task) if attached_state(model) is not None else nullcontext()  # type: ignore[operator]


def _longest(encoder: Encoder, task: str, own: Iterable[Sequence[str]]) -> int:
    """Tokens that any answer fits in, of the task's options or of examples' own."""
    t = encoder.graph.task(task)
    lengths = (sorted((len(encoder.answer_ids([o])) + 1 for o in s), reverse=True) for s in (t.options or (), *own))
    return max(MAX_NEW_TOKENS, *(sum(found[: t.choose]) for found in lengths))


def _generate(reader: ImageFeatures, batch: Batch, tokens: int) -> list[str]:
    """Greedy answers as text, end token and what follows it cut off."""
    tokenizer = reader.encoder.tokenizer
    out = reader.model.generate(  # type: ignore[operator]
        **reader.inputs(batch),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=reader.encoder.pad,
        eos_token_id=reader.encoder.end,
    )
    new = out[:, batch.input_ids.shape[1] :]
    return [str(t).strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]

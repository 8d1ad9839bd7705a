"""The embedded model's projector: how it starts, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contextlora.errors import AdapterError
from contextlora.models.hub import stamp

_BATCH = 32


def projector_state(model: Any) -> dict[str, Tensor]:
    """The parts of "smol" that alignment makes: projector and channel statistics, named as in its state dict."""
    state = model.state_dict()
    return {k: v for k, v in state.items() if ".multi_modal_projector." in k or ".channel_" in k}


def save_projector(model: Any, path: str | Path) -> None:
    """Writes an aligned projector (2 MB) as safetensors, to be put into another "smol" by `load_projector`."""
    save_file({k: v.detach().cpu().to(torch.bfloat16).contiguous() for k, v in projector_state(model).items()}, path)


def load_projector(model: Any, path: str | Path) -> None:
    """Puts a saved projector into "smol", in place, before adapters are attached.

    Raises:
        AdapterError: E334 if the file cannot be read or is not a projector of this model.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise AdapterError("E334", f"cannot be read as a projector: {e}", where=path) from None
    mine = projector_state(model)
    if not mine or {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in mine.items()}:
        raise AdapterError("E334", "is not a projector of this model", where=path)
    model.load_state_dict(found, strict=False)
    stamp(model)  # it is another base now


@torch.no_grad()
def start_projector(projector: Any, tokens: Tensor, norm: float) -> None:
    """Sets the projector to a whitened principal-component projection with rows as long as word embeddings.

    With k components P and orthonormal columns R, linear_1 = [P; -P] and linear_2 = c [R, -R]; as
    gelu(x) - gelu(-x) = x, the projector starts exactly linear, loses nothing to its activation, and no feature is
    louder than another.

    Args:
        projector: a LlavaMultiModalProjector in fp32.
        tokens: (N, T, channels) of normalised vision tokens.
        norm: the length that projected tokens should have on average.
    """
    first, second = projector.linear_1, projector.linear_2
    rows = _some(tokens)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    k = min(first.out_features // 2, int((values > 1e-6 * values[-1]).sum()))
    whiten = (vectors[:, -k:] / values[-k:].sqrt()).T
    spread = torch.linalg.qr(torch.randn(second.out_features, k))[0]
    for layer in (first, second):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    first.weight[: 2 * k].copy_(torch.cat([whiten, -whiten]))
    second.weight[:, : 2 * k].copy_(torch.cat([spread, -spread], 1))
    scale_projector(projector, tokens, norm)


def point_at_words(
    projector: Any,
    tokens: Tensor,
    words: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int,
    lr: float = 3e-4,
) -> list[float]:
    """Makes the answers the loudest thing in the projected tokens, without a pass through the language model.

    One linear classifier a task reads all projected tokens of an image. It starts at the word embeddings of the task's
    options, so that the projector is drawn towards tokens that resemble the right words, and is thrown away afterwards.
    On smartcity-rad this takes seconds and lifts a linear probe on the first 16 principal components of the projected
    tokens from .91/.69/.66 (event, extent, place) to .99/.89/.88.

    Args:
        projector: trained in place, fp32.
        tokens: (N, T, channels), normalised.
        words: for each task (options, hidden), the mean embedding of each option's words.
        targets: for each task (N, options), equal shares for the correct ones; zeros where it is not answered.

    Returns:
        The mean cross-entropy over tasks at each step, in nats.
    """
    heads = nn.ModuleList(_Reader(w, tokens.shape[1]) for w in words)
    optimizer = torch.optim.AdamW([*projector.parameters(), *heads.parameters()], lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    losses = []
    for _ in range(steps):
        picked = torch.randint(len(tokens), (_BATCH,))
        seen = tokens[picked].float()
        seen = projector(seen + 0.7 * torch.randn_like(seen))  # a few thousand images overfit without noise
        seen = nn.functional.dropout(seen, 0.3)
        faults = [_cross_entropy(head(seen), t[picked]) for head, t in zip(heads, targets, strict=True)]
        loss = torch.stack(faults).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def scale_projector(projector: Any, tokens: Tensor, norm: float) -> None:
    """Rescales linear_2 so that projected tokens are `norm` long on average."""
    factor = norm / projector(_some(tokens)).norm(dim=-1).mean()
    for parameter in projector.linear_2.parameters():
        parameter.mul_(factor)


class _Reader(nn.Module):
    """A linear classifier over T tokens whose classes start at word vectors."""

    def __init__(self, words: Tensor, tokens: int):
        super().__init__()
        self.weight = nn.Parameter(((words - words.mean(0)) / tokens)[:, None].repeat(1, tokens, 1))
        self.bias = nn.Parameter(torch.zeros(len(words)))

    def forward(self, seen: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, options)."""
        return torch.einsum("bth,oth->bo", seen, self.weight) + self.bias


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum() / target.sum().clamp_min(1)


def _some(tokens: Tensor) -> Tensor:
    """At most 16384 of the token rows, fp32."""
    rows = tokens.flatten(0, 1)
    return rows[:: max(1, len(rows) // 16384)].float()

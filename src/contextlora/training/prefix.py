"""The frozen prefix: decoder layers below the lowest block always give the same activations, so compute them once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from contextlora.data.collate import Batch, Sample, collate
from contextlora.lora.attach import decoder_layers
from contextlora.models.inputs import ImageFeatures
from contextlora.models.prompts import lowest_block, standing_in

GROUP = 16


class _Reached(Exception):
    """Ends a forward pass at the first layer with a block, carrying what enters it."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def hidden_before(model: nn.Module, depth: int, inputs: dict[str, Any]) -> Tensor:
    """What enters decoder layer `depth`, or leaves the last one, in a forward pass over `inputs`, which ends there."""
    stack = decoder_layers(model)[1]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def left(_: nn.Module, __: Any, out: Any) -> None:
        raise _Reached(out[0] if isinstance(out, tuple) else out)

    if depth == len(stack):
        hook = stack[-1].register_forward_hook(left)
    else:
        hook = stack[depth].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise AssertionError("the model never reached its own decoder layers")


def together(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows (tokens, d) of several lengths as one batch (rows, width, d), zeros behind their ends."""
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return nn.functional.pad(padded, (0, 0, 0, width - padded.shape[1]))


class FrozenPrefix:
    """Activations that enter the first decoder layer with a block, by sample, within a memory budget.

    Exact: the layers below carry no block and are frozen, and attention is causal, so what comes after a sample's own
    tokens (padding) cannot change them. Samples are always computed in the same groups, whatever asks for them first,
    so that a resumed run sees the same bits although matrix products may round differently for another batch size. For
    the same reason each stage of a run has a prefix of its own, unless several runs share one that has admitted all
    their samples at once: what is kept must not depend on what ran before.

    Args:
        reader: of a model with blocks attached.
        budget_bytes: memory for kept activations; batches with a sample beyond it are computed each time.
    """

    def __init__(self, reader: ImageFeatures, budget_bytes: int):
        self.model, self.reader = reader.model, reader
        self.stack, self.depth = decoder_layers(self.model)[1], lowest_block(self.model)
        self._left = budget_bytes
        self._group_of: dict[str, list[Sample]] = {}
        self._kept: dict[str, Tensor] = {}
        self._ahead: dict[tuple[str, ...], Tensor] = {}

    def admit(self, samples: Sequence[Sample]) -> None:
        """Decides which of `samples` will be kept: in groups of similar length while the budget lasts."""
        if not self.depth:
            return
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        width = embedding.shape[1] * embedding.element_size()
        new = {s.key: s for s in samples if s.key not in self._group_of}  # tasks may ask the same of an example
        order = sorted(new.values(), key=lambda s: (len(s), s.key))
        for group in (order[i : i + GROUP] for i in range(0, len(order), GROUP)):
            size = sum(map(len, group)) * width
            if size <= self._left:
                self._left -= size
                self._group_of |= {s.key: group for s in group}

    @contextmanager
    def replay(self, batch: Batch, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, a forward pass over `inputs` starts at the first layer with a block."""
        if not self.depth:
            yield
            return
        with standing_in(list(self.stack[: self.depth]), self._hidden(batch, inputs)):
            yield

    def run_ahead(self, batch: Batch) -> None:
        """Computes now what `replay` of this very batch will ask for next, once; it is kept until then."""
        hidden = self._hidden(batch, self.reader.inputs(batch))
        self._ahead[tuple(s.key for s in batch.samples)] = hidden

    def fill(self) -> None:
        """Computes all that was admitted now, instead of when it is first asked for."""
        for group in {id(g): g for g in self._group_of.values()}.values():
            if group[0].key not in self._kept:
                self._compute_group(group)

    @torch.no_grad()
    def _hidden(self, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        if (ready := self._ahead.pop(tuple(s.key for s in batch.samples), None)) is not None:
            return ready
        if any(s.key not in self._group_of for s in batch.samples):
            return self._compute(inputs)
        for s in batch.samples:
            if s.key not in self._kept:
                self._compute_group(self._group_of[s.key])
        return together([self._kept[s.key] for s in batch.samples], batch.input_ids.shape[1])

    @torch.no_grad()
    def _compute_group(self, group: list[Sample]) -> None:
        batch = collate(group, self.reader.encoder.pad)
        rows = self._compute(self.reader.inputs(batch))
        self._kept |= {s.key: row[: len(s)].clone() for s, row in zip(batch.samples, rows, strict=True)}

    def _compute(self, inputs: dict[str, Any]) -> Tensor:
        return hidden_before(self.model, self.depth, inputs)

"""Prompts that are asked again and again: what the layers below the lowest block make of them is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from contextlora.data.collate import Batch
from contextlora.lora.attach import adapted_layers, decoder_layers


def lowest_block(model: nn.Module) -> int:
    """The index of the first decoder layer that carries blocks; all below are frozen. 0 of a plain model."""
    path, _ = decoder_layers(model)
    return min((int(name.removeprefix(f"{path}.").split(".")[0]) for name in adapted_layers(model)), default=0)


@contextmanager
def standing_in(layers: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Inside, these decoder layers compute nothing and hand on `hidden`."""
    own = [vars(layer).get("forward") for layer in layers]  # offloading sets one
    for layer in layers:
        layer.forward = lambda *_, **__: hidden  # no hook: a recompute of the layer above must be given it too
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def entering(layers: Sequence[nn.Module], first: int, hidden: Tensor) -> Iterator[None]:
    """Inside, `hidden` enters decoder layer `first`; the layers below compute nothing."""
    if first:
        with standing_in(layers[:first], hidden):
            yield
        return

    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    hook = layers[0].register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Kept:
    hidden: Tensor  # enters the lowest layer with a block
    below: list[tuple[Tensor, Tensor]]  # keys and values of the layers below


class KnownPrompts:
    """Runs batches of prompts, and the frozen part of those it has run before not again.

    Exact: a batch that is asked again, of the same prompts in the same order, gets the very same numbers below the
    blocks, whatever the blocks above have become. For comparisons, which ask one test set under many adapters.

    Args:
        model: may carry other blocks each time; while it carries none, nothing is kept.
        budget_bytes: memory for what is kept.
    """

    def __init__(self, model: nn.Module, budget_bytes: int):
        self.model, self._left = model, budget_bytes
        self._kept: dict[tuple[Any, ...], _Kept] = {}

    def run(self, batch: Batch, inputs: dict[str, Any]) -> Any:
        """The model's output on a batch of prompts, with keys and values."""
        depth, stack = lowest_block(self.model), decoder_layers(self.model)[1]
        if not depth:
            return self.model(**inputs, use_cache=True)
        name = (depth, *(s.key for s in batch.samples))
        if (found := self._kept.get(name)) is None:
            return self._first(name, list(stack)[depth], depth, inputs)
        with standing_in(list(stack)[:depth], found.hidden):
            out = self.model(**inputs, use_cache=True)
        for i, (keys, values) in enumerate(found.below):
            out.past_key_values.update(keys, values, i)
        return out

    def _first(self, name: tuple[Any, ...], lowest: nn.Module, depth: int, inputs: dict[str, Any]) -> Any:
        entering: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(args[0] if args else kwargs["hidden_states"])

        hook = lowest.register_forward_pre_hook(look, with_kwargs=True)
        try:
            out = self.model(**inputs, use_cache=True)
        finally:
            hook.remove()
        below = [(layer.keys, layer.values) for layer in out.past_key_values.layers[:depth]]
        size = sum(t.nbytes for t in (entering[0], *(t for pair in below for t in pair)))
        if size <= self._left:
            self._left -= size
            self._kept[name] = _Kept(entering[0], below)
        return out

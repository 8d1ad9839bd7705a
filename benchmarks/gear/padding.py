"""Emulated devices: every unit's forward and backward pass is padded by sleep to the seconds that a profile says.

Compute is real but thin, so that two cores can stand for several slow devices. A unit that took longer than it should
(a sleep that overshot, a core that was busy) is made up for by the next one, unless the device had to wait for others
meanwhile; `late` says what could not be made up for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contextlora.gear.cost import Problem


class Device:
    """One emulated device.

    Args:
        problem: its profile, speed, and which units have a backward pass.
        name: which one.
        scale: how many of the profile's seconds pass in one.

    Attributes:
        on: pads; off while gradients are checked.
        share: of every unit's time that this device takes: below 1 where tensor parallelism splits units.
        samples: of the batch that is under way.
        late: the most seconds that it has been behind its profile at any moment.
    """

    def __init__(self, problem: Problem, name: str, scale: float):
        self.problem, self.name, self.scale = problem, name, scale
        self.on, self.share, self.samples = False, 1.0, 0
        self.late = self._behind = self._ended = self._began = 0.0

    def seconds(self, unit: int, back: bool, samples: int | None = None) -> float:
        """Of a unit's forward or backward pass, here."""
        one = self.problem.backward if back else self.problem.forward
        return one(self.name, unit, unit + 1, samples or self.samples) * self.share / self.scale

    def begin(self) -> None:
        """Compute begins."""
        self._began = time.perf_counter()
        if self._began - self._ended > self._behind:
            self._behind = 0.0  # it has waited for longer than it was behind

    def end(self, seconds: float) -> None:
        """Compute ends; sleeps for the rest of what it should have taken."""
        if not self.on:
            return
        left = seconds - (time.perf_counter() - self._began) - self._behind
        if left > 0:
            time.sleep(left)
        self._ended = time.perf_counter()
        self._behind = max(0.0, self._behind + self._ended - self._began - seconds)
        self.late = max(self.late, self._behind)


class _Enter(torch.autograd.Function):
    """Stands where a unit begins: there its backward pass ends. `root` makes it owe a gradient, even of a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor | None, device: Device, seconds: float) -> Tensor:
        ctx.device, ctx.seconds = device, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        ctx.device.end(ctx.seconds)
        return dy, None, None, None


class _Leave(torch.autograd.Function):
    """Stands where a unit ends: there its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device) -> Tensor:
        ctx.device = device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        ctx.device.begin()
        return dy, None


def padded(run: Callable[..., Any], device: Device, unit: int, lowest: int, part: float = 1.0) -> Callable[..., Any]:
    """`run(hidden, ...)`, padded in both directions; `part` of a unit, where it has several."""
    root = torch.zeros((), requires_grad=unit == lowest)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        learns = torch.is_grad_enabled() and unit >= lowest
        if learns:
            hidden = _Enter.apply(hidden, root, device, device.seconds(unit, True) * part)  # type: ignore[no-untyped-call]
        device.begin()
        out = run(hidden, *args, **kwargs)
        if learns:
            out = _Leave.apply(out, device)  # type: ignore[no-untyped-call]
        device.end(device.seconds(unit, False) * part)
        return out

    return forward


def emulate(model: Any, device: Device, *, inputs: bool = True, remember: bool = False, layers: bool = True) -> None:
    """Pads a causal LM's embedding, decoder layers and output head, in place.

    Args:
        inputs: this device runs the first unit; others embed too, since that is nothing, and drop it.
        remember: what it made of a sample is kept for later epochs, as images' features are.
        layers: False where something else pads these.
    """
    stack, lowest = list(model.model.layers), device.problem.work.lowest
    for i, layer in enumerate(stack if layers else ()):
        layer.forward = padded(layer.forward, device, i + 1, lowest)
    first, embed, seen = stack[0].forward, model.model.embed_tokens.forward, set[tuple[int, ...]]()

    def embedded(ids: Tensor) -> Tensor:
        device.begin()
        device.samples = len(ids)
        out: Tensor = embed(ids)
        fresh = len({tuple(row) for row in ids.tolist()} - seen) if remember else len(ids)
        if inputs and fresh and stack[0].forward == first:  # else something stands in for the lowest layers
            device.end(device.seconds(0, False, fresh))
            seen.update(tuple(row) for row in ids.tolist() if remember)
        return out

    model.model.embed_tokens.forward = embedded
    model.lm_head.forward = padded(model.lm_head.forward, device, len(stack) + 1, lowest)

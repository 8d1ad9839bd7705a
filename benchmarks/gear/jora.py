"""Tensor-parallel LoRA as in JoRA (JAX), re-implemented on torch: every layer split by heads and inner features.

Projections into heads and inner features are split by their outputs, those out of them by their inputs, and so are
their A and B; what they share (A of the former, B of the latter) has its gradients summed at the end of an update.
Hidden states are summed after attention and MLP in forward, their gradients before them in backward. Shares are equal,
as sharded arrays have them. Embedding and head are taken to be split for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from model import Setting
from padding import Device, emulate, padded
from plain import Masked, apart
from rivals import Alone
from torch import Tensor, nn

from contextlora.models.inputs import ImageFeatures

ATTENTION = 1 / 3  # of a layer's work; the MLP has the rest


class _Together(torch.autograd.Function):
    """Sums over all devices in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = x.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


class _Apart(torch.autograd.Function):
    """Sums over all devices in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        whole = dy.clone()
        dist.all_reduce(whole)
        return whole


class TensorParallel(Alone):
    """A device's share of every layer."""

    def __init__(self, setting: Setting, reader: ImageFeatures, device: Device):
        super().__init__(setting, reader, device, pad=False)
        self.count, self.place = len(setting.fleet.devices), list(setting.fleet.devices).index(device.name)
        self.shared: list[nn.Parameter] = []  # held by all, each with a part of the gradient
        self.cut: dict[str, Callable[[Tensor], Tensor]] = {}  # of each parameter, which part is here
        lowest, stack = setting.problem.work.lowest, list(self.model.model.layers)  # type: ignore[union-attr, arg-type]
        for i, layer in enumerate(stack):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self._split(layer.self_attn, name, f"model.layers.{i}.self_attn", name == "o_proj")
            for name in ("gate_proj", "up_proj", "down_proj"):
                self._split(layer.mlp, name, f"model.layers.{i}.mlp", name == "down_proj")
            layer.self_attn.forward = _attention(layer.self_attn.forward, device, i + 1, lowest)
            mlp = padded(layer.mlp.forward, device, i + 1, lowest, 1 - ATTENTION)
            layer.mlp.forward = lambda x, mlp=mlp: _Together.apply(mlp(_Apart.apply(x)))  # type: ignore[no-untyped-call]
        device.share = 1 / self.count
        emulate(self.model, device, layers=False)
        self.learn()

    def _split(self, parent: nn.Module, name: str, path: str, by_inputs: bool) -> None:
        """Keeps this device's share of a linear's outputs, or of its inputs."""
        old = getattr(parent, name)
        base = old.base if isinstance(old, Masked) else old
        size = (base.in_features if by_inputs else base.out_features) // self.count
        mine = slice(self.place * size, (self.place + 1) * size)
        linear = nn.Linear(1, 1, bias=False)
        weight = base.weight[:, mine] if by_inputs else base.weight[mine]
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if not isinstance(old, Masked):
            setattr(parent, name, linear)
            return
        a, b = (old.A[:, mine], old.B) if by_inputs else (old.A, old.B[:, mine])
        new = Masked(linear, a.detach(), b.detach(), old.mask)
        self.shared.append(new.B if by_inputs else new.A)
        self.cut[f"{path}.{name}.{'A' if by_inputs else 'B'}"] = lambda g: g[:, mine]
        setattr(parent, name, new)

    def gradients(self, update: int) -> None:
        super().gradients(update)
        grads = [p.grad for p in self.shared if p.grad is not None]
        message = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(message)
        for g, whole in zip(grads, message.split([g.numel() for g in grads]), strict=True):  # type: ignore[no-untyped-call]
            g.copy_(whole.view_as(g))

    def apart(self, reference: Mapping[str, Tensor]) -> float:
        here = {n: self.cut.get(n, lambda g: g)(g) for n, g in reference.items()}
        return apart({n: p.grad for n, p in self.parameters.items()}, here)


def _attention(run: Callable[..., Any], device: Device, unit: int, lowest: int) -> Callable[..., Any]:
    inner = padded(lambda x, **more: run(hidden_states=x, **more)[0], device, unit, lowest, ATTENTION)

    def forward(hidden_states: Tensor, **more: Any) -> tuple[Tensor, None]:
        return _Together.apply(inner(_Apart.apply(hidden_states), **more)), None  # type: ignore[no-untyped-call]

    return forward

"""Learned scales, a variant of ContextLoRA: how loud each prerequisite's frozen block is, layer by layer.

    y = W x + s_v B_v A_v x + sum over p in P(v) of c_lvp s_p B_p A_p x

The child v learns its block and, in every layer l, one number c_lvp for each prerequisite p, which starts at 1 as in
the literal method. So features of the roots in some layers can be kept and their answers in others suppressed. One
number learns slower than a matrix at the same rate, so c = 1 + SPEED theta, theta learned at the configured rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make, layers_of
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import GatedLinear
from contextlora.lora.sharing import Plan, Sharing, level_by_level, own_alone

SPEED = 25.0  # times the configured rate; at 0.002 Adam then moves a scale by up to 0.05 an update


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """The tasks of a level side by side, each with its own block and its scales; the layer adds the frozen blocks."""
    own = own_alone(graph)
    learns = {t: {**own.learns[t], _scales(t): 1} for t in graph.names}
    return level_by_level(graph, tasks, Sharing(own.active, learns))


def layers(seed: int) -> Make:
    """What `attach` needs to put gated layers with learned scales on a model."""
    return layers_of(ScaledLinear, seed=seed)


def _scales(task: str) -> str:
    return f"scales of {task}"


class ScaledLinear(GatedLinear):
    """A gated layer, theta (1, |P(v)|) for every task v beside it."""

    def __init__(self, base: nn.Module, state: GateState, name: str, *, seed: int = 0):
        super().__init__(base, state, name, seed=seed)
        self.theta = nn.ParameterDict()
        for t in self.graph.names:
            if before := self.graph.prerequisites(t):
                self.theta[t] = nn.Parameter(torch.zeros(1, len(before), device=self.A.device), requires_grad=False)

    def open(self, counts: Mapping[str, int]) -> None:
        super().open({t: n for t, n in counts.items() if t in self.graph.names})
        for t, theta in self.theta.items():
            theta.requires_grad_(_scales(t) in counts)

    def owned(self, owner: str) -> list[nn.Parameter]:
        return super().owned(owner) + [p for t, p in self.theta.items() if owner == _scales(t)]

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"theta {t}": p.data for t, p in self.theta.items()}

    def forward(self, x: Tensor) -> Tensor:
        y, gate = super().forward(x), self._state.read()
        if gate is None:
            return y
        for task, before in self._with_prerequisites(gate):
            y = y + self._frozen(x.to(y.dtype), gate, task, before)
        return y

    def _with_prerequisites(self, gate: Gate) -> Iterator[tuple[str, tuple[str, ...]]]:
        for task in dict.fromkeys(gate.tasks):
            if before := self.graph.prerequisites(task):
                yield task, before

    def _frozen(self, x: Tensor, gate: Gate, task: str, before: Sequence[str]) -> Tensor:
        """What the prerequisites' blocks add for the samples of one task, 0 for all others."""
        rows = [self.graph.block(p) for p in before]
        owned = torch.tensor([r for block in rows for r in block], device=x.device)
        sizes = torch.tensor([len(block) for block in rows], device=x.device)
        scale = self.theta[task].new_tensor([self.graph.scale_of(p) for p in before])
        by_rank = ((1 + SPEED * self.theta[task][0]) * scale).repeat_interleave(sizes)
        mine = gate.fit(torch.tensor([[float(t == task)] for t in gate.tasks]), x)
        h = x @ self.A[owned].to(x.dtype).T * by_rank.to(x.dtype)
        added: Tensor = (h * mine) @ self.B[owned].to(x.dtype)
        return added

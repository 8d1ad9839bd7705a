"""A small shared block, a variant of ContextLoRA: one rank of every task's block goes to a block that all tasks use.

The shared block is on for every task. The tasks of the first level train it together, each beside its own block, and
it is frozen with them; all else is as in the literal method. Its ranks, one for each task of the graph, are taken from
the tasks' own blocks (whose last rank stays zero), so that the parameters are as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from contextlora.baselines.beside import SCALE
from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make, layers_of
from contextlora.lora.gates import GateState
from contextlora.lora.layer import GatedLinear, first_values
from contextlora.lora.sharing import Plan, Sharing, along_graph, level_by_level

OWNER = "shared block"


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Along the graph; the first run of the first level also steps the shared block.

    The samples of all its tasks pass in one mixed batch, so the gradient that this run steps with is from all of them.

    Raises ConfigError E117 for a block of one rank, which has none to give.
    """
    if poor := [t for t in tasks if graph.rank_of(t) < 2]:
        raise ConfigError("E117", f"'{poor[0]}' has one rank and would give it to the shared block; raise `rank`")
    literal = along_graph(graph, 1.0)
    learns = {t: {t: graph.rank_of(t) - 1} for t in graph.names}
    plain = level_by_level(graph, tasks, Sharing(literal.active, learns))
    first, *later = plain.phases
    whose = first.tasks[0]
    with_shared = Sharing(literal.active, {**learns, whose: {**learns[whose], OWNER: 1}})
    return replace(plain, phases=(replace(first, sharing=with_shared), *later))


def layers(seed: int) -> Make:
    """What `attach` needs to put gated layers with a shared block on a model."""
    return layers_of(SharedLinear, seed=seed)


class SharedLinear(GatedLinear):
    """A gated layer, with A (n, d_in) and B (n, d_out) for all n tasks beside it."""

    def __init__(self, base: nn.Module, state: GateState, name: str, *, seed: int = 0):
        super().__init__(base, state, name, seed=seed)
        a = first_values(seed, name, OWNER, (len(self.graph.names), self.in_features))
        self.shared = nn.ParameterDict({"A": a.to(self.A), "B": torch.zeros(len(a), self.out_features).to(self.B)})
        self.shared.requires_grad_(False)

    def open(self, counts: Mapping[str, int]) -> None:
        super().open({t: n for t, n in counts.items() if t in self.graph.names})
        self.shared.requires_grad_(OWNER in counts)

    def owned(self, owner: str) -> list[nn.Parameter]:
        return list(self.shared.values()) if owner == OWNER else super().owned(owner)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"shared {side}": p.data for side, p in self.shared.items()}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self._state.read() is None:
            return y
        a, b = (self.shared[side].to(y.dtype) for side in "AB")
        added: Tensor = SCALE * (x.to(y.dtype) @ a.T) @ b
        return y + added

"""Blocks placed by depth, two variants of ContextLoRA: what a layer holds depends on how high it is in the model.

* `low-prerequisites`: in the lower half of the adapted layers a task has its prerequisites' blocks on, in the upper
  half only its own. What prerequisites found out about the picture may help; the answers they push, higher up, may not.
* `by-depth`: the levels S_1..S_L of the graph own the adapted layers from bottom to top, an L-th each. A child learns
  on top of what its prerequisites left, and all below its first layer only runs forward while it trains. A block has
  ranks in an L-th of the layers, so that equal parameters take L times the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import GatedLinear
from contextlora.lora.sharing import Plan, along_graph, level_by_level, own_alone


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """As ContextLoRA trains with everything below frozen."""
    return level_by_level(graph, tasks, along_graph(graph, 1.0))


def low(seed: int) -> Make:
    """What `attach` needs for `low-prerequisites`."""

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, LeveledLinear]:
        part = _parts(found, 2)
        return {p: LeveledLinear(m, state, p, seed=seed, alone=part[p] == 1) for p, m in found.items()}

    return make


def placed(seed: int) -> Make:
    """What `attach` needs for `by-depth`."""

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, LeveledLinear]:
        levels = state.graph.levels()
        part = _parts(found, len(levels))
        return {p: LeveledLinear(m, state, p, seed=seed, owners=levels[part[p]]) for p, m in found.items()}

    return make


def _parts(found: Iterable[str], count: int) -> dict[str, int]:
    """By path, in which of `count` equal parts of the adapted decoder layers a linear lies, 0 at the bottom."""
    heights = list(dict.fromkeys(map(_decoder_layer, found)))
    return {path: heights.index(_decoder_layer(path)) * count // len(heights) for path in found}


def _decoder_layer(path: str) -> int:
    """The number of the decoder layer in a linear's path, e.g. 3 of model.layers.3.mlp.up_proj."""
    return int(next(part for part in path.split(".") if part.isdecimal()))


class LeveledLinear(GatedLinear):
    """A gated layer at some height.

    Args:
        base, state, name, seed: as in `GatedLinear`.
        alone: a task uses its own block here, and none of its prerequisites'.
        owners: the tasks whose blocks learn here; None is all of them. What never learns stays zero.
    """

    def __init__(
        self,
        base: nn.Module,
        state: GateState,
        name: str,
        *,
        seed: int = 0,
        alone: bool = False,
        owners: Sequence[str] | None = None,
    ):
        super().__init__(base, state, name, seed=seed)
        self.alone, self.owners = alone, owners

    def open(self, counts: Mapping[str, int]) -> None:
        super().open({t: n for t, n in counts.items() if self.owners is None or t in self.owners})

    def forward(self, x: Tensor) -> Tensor:
        gate = self._state.read()
        if gate is None or not self.alone:
            return super().forward(x)
        with self._state.use(Gate(self.graph, gate.tasks, own_alone(self.graph))):
            return super().forward(x)

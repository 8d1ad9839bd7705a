"""LoRI (Zhang et al. 2025): A is random and frozen, B learns, in LoRI-S only where a mask lets it.

    y = W x + s (B . M) A x                                                          (SEMANTICS section 1)

LoRI-D trains all of B. LoRI-S trains B once on trial, keeps the positions of the largest |B| over all layers together
(one global threshold), sets B back to zero and trains these alone. One adapter serves all tasks.

Since A does not count as trained, ranks are higher until the trained parameters are as many as the graph's blocks have.
Deviation: the paper's LoRI-S keeps 10 %, to have fewer parameters; at equal parameters that would take ranks beyond
d_in, so half are kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from contextlora.baselines.beside import SCALE, BesideLinear, budget, even_ranks, sizes
from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import first_values
from contextlora.lora.sharing import Phase, Plan, Sharing, all_at_once, all_for_all

KEPT = 0.5  # of B in LoRI-S


def dense(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """LoRI-D: one run over all tasks."""
    sharing = _sharing(graph)
    return all_at_once(tasks, sharing)


def sparse(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """LoRI-S: a trial run that finds the mask, then the run that counts."""
    sharing, runs = _sharing(graph), (tuple(tasks),)
    return Plan((Phase(runs, sharing, trial=True), Phase(runs, sharing, prepare=keep_largest, share=KEPT)), sharing)


def _sharing(graph: TaskGraph) -> Sharing:
    return all_for_all(graph, {"lori": 1})


def layers(seed: int, kept: float = 1.0) -> Make:
    """What `attach` needs to put LoRI on a model, `kept` of whose B will learn."""

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, LoriLinear]:
        ranks = even_ranks({path: sizes(m)[1] for path, m in found.items()}, budget(state.graph, found) / kept)
        return {path: LoriLinear(m, state, path, ranks[path], seed) for path, m in found.items()}

    return make


@torch.no_grad()
def keep_largest(layers: Iterable[LoriLinear]) -> None:
    """M: the round(KEPT x entries) largest |B| over all layers, earlier ones first where equal; B back to 0."""
    found = list(layers)
    sizes = torch.cat([layer.weights["lori_B"].abs().flatten() for layer in found])
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[sizes.argsort(descending=True, stable=True)[: round(KEPT * len(sizes))]] = True
    for layer, part in zip(found, torch.split(chosen, [layer.mask.numel() for layer in found]), strict=True):
        layer.mask.copy_(part.view_as(layer.mask))
        layer.weights["lori_B"].zero_()


class LoriLinear(BesideLinear):
    """A frozen random A (r, d_in), B (r, d_out) and its mask beside a frozen linear."""

    A: Tensor
    mask: Tensor

    def __init__(self, base: nn.Module, state: GateState, name: str, rank: int, seed: int):
        super().__init__(base, state, name)
        device = next(base.parameters()).device
        first = first_values(seed, name, "lori", (rank, self.in_features))
        self.register_buffer("A", first.to(device, torch.float32))
        self.register_buffer("mask", torch.ones(rank, self.out_features, dtype=torch.bool, device=device))
        self.add("lori_B", torch.zeros(rank, self.out_features))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "mask": self.mask}

    def delta(self, x: Tensor, gate: Gate) -> Tensor:
        b = (self.weights["lori_B"] * self.mask).to(x.dtype)  # a masked entry gets no gradient and stays zero
        y: Tensor = x @ self.A.to(x.dtype).T @ b
        return SCALE * y

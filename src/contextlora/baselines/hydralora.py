"""HydraLoRA (Tian et al. 2024): one A for all, several heads of B, and a router that mixes them for every token.

    y = W x + s sum_i w_i B_i A x,    w = softmax(W_r x)            (its eq. 5 and 6; SEMANTICS section 1)

All is trained together on the samples of all tasks, every B starts at zero, and no loss balances the heads. There is a
head for each task of the graph, but nothing ties a head to a task. Ranks are chosen so that A, all B and W_r together
have as many parameters as the graph's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from contextlora.baselines.beside import SCALE, BesideLinear, budget, even_ranks, sizes
from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import first_values
from contextlora.lora.sharing import Plan, all_at_once, all_for_all


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """One run over all tasks; everything learns."""
    sharing = all_for_all(graph, {"hydra": 1})
    return all_at_once(tasks, sharing)


def layers(seed: int) -> Make:
    """What `attach` needs to put HydraLoRA on a model."""

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, HydraLinear]:
        heads = len(state.graph.names)
        routers = sum(heads * sizes(m)[0] for m in found.values())
        costs = {path: sizes(m)[0] + heads * sizes(m)[1] for path, m in found.items()}
        ranks = even_ranks(costs, budget(state.graph, found) - routers)
        return {path: HydraLinear(m, state, path, ranks[path], seed) for path, m in found.items()}

    return make


class HydraLinear(BesideLinear):
    """A (r, d_in), B (N r, d_out) and W_r (N, d_in) beside a frozen linear."""

    def __init__(self, base: nn.Module, state: GateState, name: str, rank: int, seed: int):
        super().__init__(base, state, name)
        heads = len(state.graph.names)
        self.add("hydra_A", first_values(seed, name, "hydra", (rank, self.in_features)))
        self.add("hydra_B", torch.zeros(heads * rank, self.out_features))
        self.add("hydra_router", first_values(seed, name, "router", (heads, self.in_features)))

    def delta(self, x: Tensor, gate: Gate) -> Tensor:
        a, b, router = (self.weights[f"hydra_{n}"].to(x.dtype) for n in ("A", "B", "router"))
        share = (x @ router.T).float().softmax(-1).to(x.dtype)
        mixed = share.unsqueeze(-1) * (x @ a.T).unsqueeze(-2)  # (..., N, r)
        y: Tensor = mixed.flatten(-2) @ b
        return SCALE * y

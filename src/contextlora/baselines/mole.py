"""MoLE, Mixture of LoRA Experts (Wu et al. 2024): trained LoRAs are frozen and a learned gate mixes their outputs.

    E_i = s B_i A_i x,    g = softmax(norm(E_1 + ... + E_N) . e / tau),    y = W x + sum_i g_i E_i      (+ concatenates)

with norm to unit length, the gate's e (N d_out, N), starting at zero, and the temperature tau learned in every layer,
and the loss alpha (-log prod_i q_i), q_i the mean of g_i over layers, that keeps experts from dying out (SEMANTICS
section 1). alpha is the configuration's `penalty`, 0.5 unless told otherwise.

Deviation: the paper flattens E over the fixed number of a picture's tokens. A text has no fixed length, so the gate
reads E at the prompt's last token, which has seen all of it: one g a sequence, which the answer, unseen by it, goes on
with. (The mean over the prompt's tokens, most of them a picture's, hardly tells one question from another: its gates
chose alike for all tasks.)

Two ways: experts trained one for each task and then frozen (the paper), or everything together (`joint`). Ranks are
chosen so that experts and gates together have as many parameters as the graph's blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from contextlora.baselines.beside import SCALE, BesideLinear, budget, even_ranks, sizes
from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import first_values
from contextlora.lora.sharing import Phase, Plan, all_for_all, own_alone


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """First an expert for each task, side by side; then the gate alone, over the samples of all tasks.

    The experts divide the batch, so that they take as many updates as the gate.
    """
    own, mixed = own_alone(graph), all_for_all(graph, {"gate": 1})
    phases = (Phase(tuple((t,) for t in tasks), own, divided=True), Phase((tuple(tasks),), mixed, balance, gates=True))
    return Plan(phases, mixed)


def joint(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Experts and gate together."""
    learns = {"gate": 1, **{t: graph.rank_of(t) for t in graph.names}}
    mixed = all_for_all(graph, learns)
    return Plan((Phase((tuple(tasks),), mixed, balance),), mixed)


def balance(layers: Iterable[MoleLinear], tasks: tuple[str, ...]) -> Tensor:
    """-sum_i log q_i of the last forward pass; least, N log N, where all experts are used alike."""
    q = torch.stack([layer.used for layer in layers]).mean(0)
    return -q.log().sum()


def layers(seed: int) -> Make:
    """What `attach` needs to put MoLE on a model."""

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, MoleLinear]:
        n = len(state.graph.names)
        gates = sum(n * n * sizes(m)[1] + 1 for m in found.values())
        costs = {path: n * sum(sizes(m)) for path, m in found.items()}
        ranks = even_ranks(costs, budget(state.graph, found) - gates)
        return {path: MoleLinear(m, state, path, ranks[path], seed) for path, m in found.items()}

    return make


class MoleLinear(BesideLinear):
    """N experts and a gate over them beside a frozen linear.

    Attributes:
        used: mean of g over the samples of the last forward pass that had a gradient, (N,).
    """

    used: Tensor

    def __init__(self, base: nn.Module, state: GateState, name: str, rank: int, seed: int):
        super().__init__(base, state, name)
        self.experts, self.mixing = state.graph.names, True
        for t in self.experts:
            self.add(f"{t}_A", first_values(seed, name, t, (rank, self.in_features)))
            self.add(f"{t}_B", torch.zeros(rank, self.out_features))
        self.add("gate_e", torch.zeros(len(self.experts) * self.out_features, len(self.experts)))
        self.add("gate_tau", torch.ones(1))
        self._held = torch.empty(0)  # g of the last prompts, for their answers

    def open(self, counts: Mapping[str, int]) -> None:
        super().open(counts)
        self.mixing = not counts or "gate" in counts  # else the experts train, each alone

    def delta(self, x: Tensor, gate: Gate) -> Tensor:
        a = torch.stack([self.weights[f"{t}_A"] for t in self.experts]).to(x.dtype)  # (N, r, d_in)
        b = torch.stack([self.weights[f"{t}_B"] for t in self.experts]).to(x.dtype)
        h = (x @ a.flatten(0, 1).T).view(*x.shape[:-1], *a.shape[:2])  # (samples, tokens, N, r)
        share = self._share(h, b, gate) if self.mixing else self._own(gate, x)
        mixed: Tensor = (h * share[:, None, :, None]).flatten(-2) @ b.flatten(0, 1)
        return SCALE * mixed

    def _share(self, h: Tensor, b: Tensor, gate: Gate) -> Tensor:
        """g of each sample, (samples, N)."""
        if gate.prompt is None and (gate.rows is not None or h.shape[1] == 1):  # generation goes on token by token
            rows = torch.arange(len(h)) // (len(h) // len(self._held)) if gate.rows is None else gate.rows
            held: Tensor = self._held[rows.to(h.device)]
            return held
        length = torch.full((len(h),), h.shape[1]) if gate.prompt is None else gate.prompt.sum(1)
        asked = h[torch.arange(len(h), device=h.device), length.to(h.device) - 1]
        said = SCALE * torch.einsum("snr,nro->sno", asked, b)  # E of the last token that asks
        seen = normalize(said.flatten(1).float(), dim=-1)
        share = ((seen @ self.weights["gate_e"]) / self.weights["gate_tau"]).softmax(-1)
        if torch.is_grad_enabled():
            self.used = share.mean(0)
        self._held = share.detach().to(h.dtype)
        cast: Tensor = share.to(h.dtype)
        return cast

    def _own(self, gate: Gate, x: Tensor) -> Tensor:
        """1 for the expert of each sample's task, (samples, N)."""
        rows = torch.tensor([[t == e for e in self.experts] for t in gate.tasks], dtype=x.dtype, device=x.device)
        return rows.repeat_interleave(len(x) // len(rows), 0)

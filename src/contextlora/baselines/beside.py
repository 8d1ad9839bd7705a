"""What the rivals with layers of their own share: plain weights beside a frozen linear, and a budget to share out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.layer import AdaptedLinear

SCALE = 2.0  # alpha / r, as every block of a graph has it by default


class BesideLinear(AdaptedLinear):
    """y = W x + delta(x), in plain autograd; slower than the gated layer, and as flexible as a rival needs.

    Attributes:
        weights: by "owner_name"; float32 masters, cast to the activations' type where they are used.
    """

    def __init__(self, base: nn.Module, state: GateState, name: str):
        super().__init__(base, state, name)
        self.weights = nn.ParameterDict()

    def add(self, key: str, values: Tensor) -> None:
        """Adds a weight, frozen until its owner is opened."""
        device = next(self.base.parameters()).device
        self.weights[key] = nn.Parameter(values.to(device, torch.float32), requires_grad=False)

    def open(self, counts: Mapping[str, int]) -> None:
        for key, weight in self.weights.items():
            weight.requires_grad_(_owner(key) in counts)

    def owned(self, owner: str) -> list[nn.Parameter]:
        return [w for key, w in self.weights.items() if _owner(key) == owner and w.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        return {key: weight.data for key, weight in self.weights.items()}

    def forward(self, x: Tensor) -> Tensor:
        gate = self._state.read()
        y: Tensor = self.base(x)
        return y if gate is None else y + self.delta(x.to(y.dtype), gate)

    def delta(self, x: Tensor, gate: Gate) -> Tensor:
        """What the method adds to the frozen layer's output, (..., d_out) for x (..., d_in)."""
        raise NotImplementedError


def _owner(key: str) -> str:
    return key.rpartition("_")[0]


def budget(graph: TaskGraph, found: Mapping[str, nn.Module]) -> int:
    """The parameters of the graph's blocks on these linears, R (d_in + d_out) each: what every rival may have."""
    return sum(graph.total_rank * (d_in + d_out) for d_in, d_out in map(sizes, found.values()))


def sizes(linear: nn.Module) -> tuple[int, int]:
    """d_in and d_out."""
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def even_ranks(costs: Mapping[str, int], total: float) -> dict[str, int]:
    """Ranks by layer, as even as whole numbers allow, whose parameters together come nearest to `total`.

    Args:
        costs: parameters of one rank, by layer.
        total: parameters to share out.

    Raises:
        ConfigError: E117 if `total` does not pay for one rank a layer.
    """
    each = total / sum(costs.values())
    if each < 1:
        raise ConfigError("E117", f"the graph's ranks pay for {each:.2f} ranks a layer of this method; raise `rank`")
    ranks, spent, wanted = dict[str, int](), 0.0, 0.0
    for layer, cost in costs.items():  # what rounding loses on one layer goes to the next
        wanted += each * cost
        ranks[layer] = max(1, round((wanted - spent) / cost))
        spent += ranks[layer] * cost
    return ranks

"""Layers of the rivals that train more than a slice of B: both sides of a LoRA, or the weights themselves.

What learns is always a difference to what every device knows (the shared seed's A, the base model's weights), so that
the same messages carry it: it is zero at first, and blocks of int8 resolve it as finely as they do B. AdamW moves a
difference as it would move the sum; weight decay, if any, pulls towards the start instead of zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from contextlora.errors import PeerError
from contextlora.federated.layer import SparseLinear
from contextlora.federated.slices import A_SIDE, Layer, Mask, complete
from contextlora.lora.attach import Make, layers_of
from contextlora.lora.gates import GateState
from contextlora.lora.layer import AdaptedLinear
from contextlora.models.inputs import at_least_float32


class PairLinear(SparseLinear):
    """A gated layer whose A learns too: LoRA as it is usually trained (SO-LoRA eq. 9 and 10, before averaging).

    Attributes:
        seeded: (R, d_in), A as the shared seed gives it.
        moved: (R, d_in), how far A has been moved from there.
    """

    seeded: Tensor
    moved: Tensor

    def __init__(
        self, base: nn.Module, state: GateState, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__(base, state, name, seed=seed, dtype=dtype)
        self.register_buffer("seeded", self.A.clone())
        self.register_buffer("moved", torch.zeros_like(self.A))

    def open(self, counts: Mapping[str, int]) -> None:
        super().open(counts)
        for task, rows in self._rows.items():
            self.learning[f"{task}_A"] = nn.Parameter(self.moved[rows.start : rows.stop])

    def owned(self, owner: str) -> list[nn.Parameter]:
        return [self.learning[f"{owner}_{side}"] for side in "AB"] if owner in self._rows else []

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "moved": self.moved}

    @torch.no_grad()
    def settle(self) -> None:
        """Puts A and B where the learning values say; `moved` is the Parameter's own memory."""
        super().settle()
        for rows in self._rows.values():
            at = slice(rows.start, rows.stop)
            self.A.data[at] = self.seeded[at] + self.moved[at]

    def _learning(self, task: str) -> tuple[Tensor, Tensor]:
        return self.learning[f"{task}_A"], super()._learning(task)[1]

    def parts(self) -> dict[Layer, SparseLinear | ASide | FullLinear]:
        return {self.name: self, self.name + A_SIDE: ASide(self)}


class ASide:
    """The A of a `PairLinear` as one more thing that learns, is sent and is averaged."""

    def __init__(self, layer: PairLinear):
        self.layer = layer

    def shape(self, owner: str) -> tuple[int, int]:
        """r and d_in."""
        return self.layer.graph.rank_of(owner), self.layer.in_features

    def active(self, owner: str) -> Mask:
        """All of it."""
        return complete(self.shape(owner))

    def owned(self, owner: str) -> list[nn.Parameter]:
        """What is open of it."""
        return self.layer.owned(owner)[:1]

    def values(self, owner: str, mask: Mask) -> NDArray[np.float32]:
        """How far A has been moved, in the entries of `mask`."""
        rows = self.layer.graph.block(owner)
        return _picked(self.layer.moved[rows.start : rows.stop], mask)

    @torch.no_grad()
    def load(self, owner: str, values: NDArray[np.float32], learns: Mask) -> None:
        """Moves A to its seed plus these values (r, d_in)."""
        layer, rows = self.layer, self.layer.graph.block(owner)
        at = slice(rows.start, rows.stop)
        layer.moved[at] = torch.from_numpy(values).to(layer.moved)
        layer.A[at] = layer.seeded[at] + layer.moved[at]


class FullLinear(AdaptedLinear):
    """y = (W + D) x + b with D learning, float32: full fine-tuning of a linear, the same weights for all tasks.

    Gradients and AdamW's steps are those of W itself, in float32 whatever the model's precision.

    Args:
        base, state, name: as in `AdaptedLinear`; the base must hold plain weights.

    Raises:
        PeerError: E607 for weights that are quantised.
    """

    moved: Tensor

    def __init__(self, base: nn.Module, state: GateState, name: str):
        super().__init__(base, state, name)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise PeerError("E607", "full fine-tuning needs plain weights, and these are quantised", where=name)
        self.register_buffer("moved", torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))
        self.learning = nn.ParameterDict()

    def open(self, counts: Mapping[str, int]) -> None:
        self.learning = nn.ParameterDict({owner: nn.Parameter(self.moved) for owner in counts})

    def owned(self, owner: str) -> list[nn.Parameter]:
        return [self.learning[owner]] if owner in self.learning else []

    def tensors(self) -> dict[str, Tensor]:
        return {"moved": self.moved}

    def forward(self, x: Tensor) -> Tensor:
        if self._state.read() is None:
            return self.base(x)  # type: ignore[no-any-return]
        moved = next(iter(self.learning.values()), self.moved)
        weight = at_least_float32(self.base.weight) + moved  # type: ignore[arg-type]
        return F.linear(x, weight.to(x.dtype), self.base.bias)  # type: ignore[arg-type]

    def parts(self) -> dict[Layer, SparseLinear | ASide | FullLinear]:
        """What learns of it, by the name it is sent under."""
        return {self.name: self}

    def shape(self, owner: str) -> tuple[int, int]:
        """d_out and d_in."""
        return self.out_features, self.in_features

    def active(self, owner: str) -> Mask:
        """All of it."""
        return complete(self.shape(owner))

    def values(self, owner: str, mask: Mask) -> NDArray[np.float32]:
        """D in the entries of `mask`."""
        return _picked(self.moved, mask)

    @torch.no_grad()
    def load(self, owner: str, values: NDArray[np.float32], learns: Mask) -> None:
        """Makes D these values (d_out, d_in)."""
        self.moved.copy_(torch.from_numpy(values))


def pairs(seed: int) -> Make:
    """What `attach` needs to put layers on a model whose A and B both learn."""
    return layers_of(PairLinear, seed=seed)


def whole_weights(found: Mapping[str, nn.Module], state: GateState) -> dict[str, FullLinear]:
    """What `attach` needs for full fine-tuning of the linears that it is given."""
    return {path: FullLinear(m, state, path) for path, m in found.items()}


def _picked(values: Tensor, mask: Mask) -> NDArray[np.float32]:
    """The entries of a mask, a copy."""
    flat = values.detach().reshape(-1).float().cpu().numpy()
    return flat.copy() if mask.whole else flat[mask.indices]

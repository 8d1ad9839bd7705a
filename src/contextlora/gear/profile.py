"""What a model costs, unit by unit: read from JSON, interpolated between batch sizes. No torch here; see `measure`.

Units are the model's parts in the order that data runs through them: "inputs" (vision tower, projector, embedding),
every decoder layer, and "head" (last norm, output head, loss). A plan cuts between units.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from contextlora.errors import PlanError
from contextlora.strict import Strict, validate

FORMAT = 1
Amount = Annotated[float, Field(ge=0)]
Times = Annotated[tuple[Amount, ...], Field(strict=False)]


class Unit(Strict):
    """One part of the model.

    Attributes:
        name: "inputs", "layer 7" or "head".
        weights: bytes of frozen weights.
        saved: bytes a sample that forward keeps for backward.
        width: parameters of one rank of LoRA on all its linears, sum of d_in + d_out; 0 where no block can be.
        forward, input_grad, weight_grad: seconds for a batch of each of the profile's sizes; weight_grad is the
            blocks' share alone, frozen weights have none.
    """

    name: str
    weights: Amount
    saved: Amount
    width: Annotated[int, Field(ge=0)] = 0
    forward: Times
    input_grad: Times
    weight_grad: Times


class Profile(Strict):
    """A model's units as measured on one machine.

    Attributes:
        batches: batch sizes that were timed, ascending.
        tokens: of one sample.
        cut: bytes a sample that cross any boundary between units: its hidden states.
        ranks: active while it was measured: costs of other numbers of ranks differ little.
        synthetic: computed from shapes and an assumed speed, not measured.
        machine: what it was measured on, and when.
    """

    format: int = FORMAT
    model: str
    dtype: str
    tokens: Annotated[int, Field(ge=1)]
    cut: Amount
    ranks: Annotated[int, Field(ge=0)] = 0
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
    units: Annotated[tuple[Unit, ...], Field(strict=False, min_length=3)]
    synthetic: bool = False
    machine: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a profile. Raises PlanError E403 for a file that is none."""
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise PlanError("E403", f"no profile can be read: {e}", where=path) from None
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            text = f"a profile of format {data['format']!r}, and this version reads {FORMAT}; measure again"
            raise PlanError("E403", text, where=path)
        return validate(cls, data, path).checked(path)

    def checked(self, where: object = "") -> Profile:
        """Itself. Raises PlanError E403 if its lists do not fit together."""
        wanted = len(self.batches)
        if list(self.batches) != sorted(set(self.batches)):
            raise PlanError("E403", f"batch sizes must ascend, got {list(self.batches)}", where=where)
        for u in self.units:
            for name in ("forward", "input_grad", "weight_grad"):
                if len(getattr(u, name)) != wanted:
                    text = f"unit '{u.name}': {name} has {len(getattr(u, name))} times for {wanted} batch sizes"
                    raise PlanError("E403", text, where=where)
        return self

    def save(self, path: str | Path) -> None:
        """Writes it."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def seconds(self, what: str, k: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Seconds of every unit for a batch of k samples, (units,).

        Linear between measured sizes; beyond the largest by the time a sample of it; below the smallest its own time.
        """
        return _seconds(self, what, k)


@lru_cache(maxsize=4096)
def _seconds(profile: Profile, what: str, k: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    table = np.array([getattr(u, what) for u in profile.units])
    sizes = np.array(profile.batches, dtype=float)
    if k > sizes[-1]:
        found: np.ndarray[Any, np.dtype[np.float64]] = table[:, -1] * (k / sizes[-1])
        return found
    return np.array([np.interp(k, sizes, row) for row in table])

"""Profiles from shapes alone, for models that no machine at hand can hold. Synthetic, and marked so in every plan.

Times are matrix products at an assumed rate; real devices differ, most at small batches. Measure when you can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contextlora.gear.profile import Profile, Unit


@dataclass(frozen=True)
class Shape:
    """A language model's shape and what sees for it.

    Attributes:
        name: of the model.
        layers, hidden, inner, heads, vocabulary: of a LLaMA-like decoder; kv is the width of keys and values.
        vision: parameters of tower and projector.
        patches: tokens that a picture passes the tower as.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    vision: float
    patches: int

    @property
    def parameters(self) -> float:
        """Of one decoder layer."""
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.inner)

    @property
    def width(self) -> int:
        """Parameters of one rank of LoRA on a layer's seven linears."""
        square, thin = 2 * (2 * self.hidden), 2 * (self.hidden + self.kv)
        return square + thin + 3 * (self.hidden + self.inner)


LLAVA_7B = Shape("llava-1.5-7b", 32, 4096, 11008, 4096, 32064, 0.33e9, 577)
LLAVA_13B = Shape("llava-1.5-13b", 40, 5120, 13824, 5120, 32064, 0.34e9, 577)


def synthetic(
    shape: Shape,
    *,
    flops: float,
    tokens: int = 640,
    answers: int = 16,
    ranks: int = 32,
    batches: Sequence[int] = (1, 2, 4, 8),
    itemsize: int = 2,
    overhead: float = 2e-4,
) -> Profile:
    """A profile at `flops` floating-point operations a second.

    Args:
        tokens: of one sample, a picture's among them.
        answers: of these, whose logits are taken.
        overhead: seconds that a unit's passes take however small the batch.
    """

    def seconds(parameters: float, rows: float, attended: float = 0.0) -> tuple[float, ...]:
        each = 2 * rows * parameters + 4 * rows * attended * shape.hidden
        return tuple(overhead + k * each / flops for k in batches)

    none = tuple(0.0 for _ in batches)
    forward = seconds(shape.parameters + ranks * shape.width, tokens, tokens)
    slices = tuple(k * 2 * tokens * ranks * shape.width / flops for k in batches)
    per_token = 2 * shape.hidden * 6 + shape.kv * 2 + 3 * shape.inner  # what an eager layer keeps for backward
    embedding = shape.vocabulary * shape.hidden * itemsize
    units = [
        Unit(
            name="inputs",
            weights=embedding + shape.vision * itemsize,
            saved=0.0,
            forward=seconds(shape.vision, shape.patches),
            input_grad=none,
            weight_grad=none,
        )
    ]
    units += [
        Unit(
            name=f"layer {i}",
            weights=shape.parameters * itemsize,
            saved=float(tokens * per_token * itemsize),
            width=shape.width,
            forward=forward,
            input_grad=forward,
            weight_grad=slices,
        )
        for i in range(shape.layers)
    ]
    head = seconds(shape.vocabulary * shape.hidden, answers)
    units.append(
        Unit(
            name="head",
            weights=embedding,
            saved=float(answers * shape.vocabulary * 4),
            forward=head,
            input_grad=head,
            weight_grad=none,
        )
    )
    return Profile(
        model=shape.name,
        dtype="bfloat16",
        tokens=tokens,
        cut=float(tokens * shape.hidden * itemsize),
        ranks=ranks,
        batches=tuple(batches),
        units=tuple(units),
        synthetic=True,
        machine=f"synthetic, {flops:.3g} FLOP/s",
    ).checked()

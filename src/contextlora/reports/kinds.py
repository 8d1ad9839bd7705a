"""What is measured, told without torch: the unit of each measure, its look, and which arms it can be taken of.

How it is measured stands in `measures.py` and `probes.py`, what its page shows in `views/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How a number is written.

    Attributes:
        scale: what it is multiplied with, 100 for percent.
        digits: behind the point.
        higher: whether more is better.
        signed: with its sign.
        against: the value that means no difference: where an interval excludes it, it is marked. None marks nothing.
    """

    scale: float
    digits: int
    higher: bool
    signed: bool = False
    against: float | None = None


@dataclass(frozen=True)
class Kind:
    """A measure.

    Attributes:
        unit: the column of results.csv that holds it.
        label: of a figure's axis.
        style: of its numbers.
        part: the column of results.csv that tells the parts of one job's result from each other; "" if it has none.
        whole: what stands there for the result's own scores.
        arms: kinds of arms that it can be taken of.
        costs: what the job's costs are of, where it is not all of the job.
        version: raise it with every change of this measure alone that makes its old results wrong.
    """

    unit: str
    label: str
    style: Style
    part: str = ""
    whole: str = ""
    arms: tuple[str, ...] = ("trained",)
    costs: str = ""
    version: int = 1


_SMALL, _PLAIN = Style(100, 2, higher=False), Style(1, 3, higher=True)
_SHARE, _SECONDS = Style(100, 1, higher=True), Style(1, 3, higher=False)
KINDS: Mapping[str, Kind] = {
    "accuracy": Kind("accuracy", "accuracy", _SHARE, arms=("trained", "zero_shot", "answers")),
    "inference": Kind(
        "seconds",
        "seconds a batch",
        _SECONDS,
        part="model",
        whole="arm",
        arms=("trained", "zero_shot"),
        version=2,
    ),
    "masks": Kind("accuracy", "accuracy", _SHARE, part="masked", whole="nothing"),
    "federated": Kind("accuracy", "accuracy", _SHARE, arms=("trained", "zero_shot"), version=2),
    "layers": Kind("share", "share of B that learns", _SHARE, part="what", whole="budget"),
    "collisions": Kind("rate", "collision rate", _SMALL, part="devices", whole="all"),
    "radio": Kind("value", "value", _PLAIN, part="what", whole="reached"),
    "repair": Kind("accuracy", "accuracy", _SHARE, part="step", whole="clean", costs="Of the clean training. "),
    "mechanism": Kind(
        "loss",
        "loss, nats a token",
        _SECONDS,
        part="blocks",
        whole="all",
    ),
}

"""The multiple-choice metric of the ContextLoRA paper (section VI-D) and intervals around its mean."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


def score(chosen: Collection[str], key: Collection[str]) -> float:
    """1 if the chosen set equals the key, 0.5 if it is a non-empty proper subset of it, else 0."""
    picked, right = set(chosen), set(key)
    if picked == right:
        return 1.0
    return 0.5 if picked and picked < right else 0.0


def parse_answer(text: str, options: Sequence[str] | None) -> tuple[str, ...]:
    """The options named in a generated answer, in declared order; empty when the answer has no valid format.

    Valid is exactly what training teaches: options separated by ", ", nothing else, case and spaces apart.
    """
    said = text.strip()
    if options is None:
        return (said,) if said else ()
    for read in (str, _fold):  # options may differ in nothing but case: as it is written comes first
        known = {read(o): o for o in reversed(options)}
        if read(said) in known:  # an option may itself hold ", "
            return (known[read(said)],)
        parts = [known.get(p) for p in read(said).split(", ")]
        if None not in parts and len(set(parts)) == len(parts):
            return tuple(o for o in options if o in parts)
    return ()


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Accuracy:
    """A mean score with its 95 % interval over items."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Accuracy:
        """Wilson's interval (scores of one half count as half a success): sensible at 0 and 1 and for few items."""
        n = len(scores)
        if not n:
            return cls(math.nan, math.nan, math.nan, 0)
        p, z = sum(scores) / n, 1.959964
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
        return cls(p, min(p, max(0.0, low)), max(p, min(1.0, high)), n)  # p = 1 rounds to a bound just below it

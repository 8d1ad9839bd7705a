"""Means over seeds and items with bootstrap intervals. Plain numpy; a table of scores is (seeds, items).

Seeds and items are both samples of something larger (other runs, other pictures), so both are drawn anew: the
pigeonhole bootstrap (Owen 2007). Where neither a seed nor an item has an effect of its own its intervals are wider than
need be, by up to a factor of 1.7; they are never narrower than those over one of the two alone. With one seed only the
items are drawn: such an interval says nothing about another run, and `seeds` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

RESAMPLES = 10_000
CHUNK = 500  # resamples at once: 500 x 400 items x 8 bytes are 1.6 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean, low, high: in the scores' unit.
        seeds, items: how many of each it rests on; with one seed the interval covers items alone.
    """

    mean: float
    low: float
    high: float
    seeds: int
    items: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside: of a difference and 0, whether it is told from chance. One never does."""
        return self.seeds * self.items > 1 and not self.low <= value <= self.high


def mean(scores: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of `scores` (seeds, items) with its interval. Raises ValueError for an empty table."""
    seeds, items = scores.shape
    if not scores.size:
        raise ValueError(f"no scores: {seeds} seeds, {items} items")
    low, high = np.quantile(_resampled(scores, resamples, seed), [0.025, 0.975])
    return Interval(float(scores.mean()), float(low), float(high), seeds, items)


def difference(ours: Scores, other: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of ours - other, paired: row s and column i of both belong to one seed and one item.

    A table of a single row (a model that no seed changes) is compared with every row of the other.
    """
    return mean(np.subtract(ours, other), resamples=resamples, seed=seed)


def _resampled(scores: Scores, resamples: int, seed: int) -> Scores:
    """The means of `resamples` tables drawn from `scores` with replacement, rows and columns independently."""
    rng = np.random.default_rng(seed)
    seeds, items = scores.shape
    found = np.empty(resamples)
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        rows, columns = _shares(rng, count, seeds), _shares(rng, count, items)
        found[start : start + count] = ((rows @ scores) * columns).sum(1)
    return found


def _shares(rng: np.random.Generator, count: int, size: int) -> Scores:
    """(count, size): how often each of `size` things is in a draw of `size` with replacement, over `size`."""
    drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size) / size

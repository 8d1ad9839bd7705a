"""How many entries of B learn in each layer, and which (SO-LoRA eq. 18 and 20 to 22).

Deviations from the paper: the score is |sum of gradients| at B = 0, since after one step of Adam all |B| are equal; a
layer's share is cut off at d r and what is cut goes to the others (eq. 22 has max for min and loses the rest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError
from contextlora.federated.slices import Layer, Mask, Slice

Allocation = Literal["entropy", "uniform", "global"]


@dataclass(frozen=True)
class Calibration:
    """What the first mini-batches of a task say of each layer.

    Attributes:
        task: whose.
        scores: |sum of the gradients of B at B = 0| over the mini-batches, by layer, (r, d_out) float32.
        entropies: of the singular values of W0 X / sqrt N, over log R (eq. 21): 0 if one direction holds all, 1 if
            all directions hold as much; by layer, empty if nobody asked.
        tokens: N.
    """

    task: str
    scores: Mapping[Layer, NDArray[np.float32]]
    entropies: Mapping[Layer, float]
    tokens: int

    @property
    def entries(self) -> int:
        """Entries of B over all layers: what a total of 1.0 would be."""
        return sum(s.size for s in self.scores.values())


def first_slice(
    found: Calibration,
    total: int,
    *,
    allocation: Allocation = "entropy",
    temperature: float = 1.0,
    floor: int = 1,
) -> Slice:
    """The slice that a task starts from: masks of `total` entries, and zeros in them.

    Args:
        found: the task's calibration.
        total: Q, entries that learn over all layers; exactly so many do.
        allocation: "entropy" gives a layer softmax(entropy / temperature) of the total (eq. 22), "uniform" every layer
            the same share of its entries, "global" whatever the highest scores of all layers together take.
        temperature: of "entropy"; higher is more even.
        floor: n_min, the fewest entries of a layer, of "entropy" and "uniform".

    Raises:
        PeerError: E604 for a total that no layers can take, "entropy" without entropies.
    """
    sizes = np.array([s.size for s in found.scores.values()])
    if not 1 <= total <= sizes.sum():
        raise PeerError("E604", f"{total} entries to learn of {sizes.sum()}", where=found.task)
    if not temperature > 0:
        raise PeerError("E604", f"temperature {temperature}; use one above zero", where=found.task)
    if allocation == "global":
        counts = _global(found, total)
    elif allocation == "uniform":
        counts = water_fill(total, sizes.astype(np.float64), sizes, floor)
    else:
        if found.entropies.keys() != found.scores.keys():
            raise PeerError("E604", "'entropy' needs a calibration with spectra", where=found.task)
        weights = softmax(np.array([found.entropies[layer] for layer in found.scores]) / temperature)
        counts = water_fill(total, weights, sizes, floor)
    masks = {layer: top(s, int(n)) for (layer, s), n in zip(found.scores.items(), counts, strict=True)}
    return Slice(found.task, masks, {layer: np.zeros(len(m.indices), np.float32) for layer, m in masks.items()})


def entropy(sigma: NDArray[np.float64], rank: int) -> float:
    """H(sigma) / log R of singular values (eq. 21), 0 to 1; 0 where there is one direction or none."""
    if rank < 2 or not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum() / np.log(rank))


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(x) / sum exp(x)."""
    weights = np.exp(np.maximum(x - x.max(), -300))  # however low the temperature, none is zero
    return np.asarray(weights / weights.sum())


def water_fill(total: int, weights: NDArray[np.float64], caps: NDArray[np.int64], floor: int = 0) -> NDArray[np.int64]:
    """Whole numbers that add up to `total`: n_l = clip(level w_l, floor, cap_l), rounded by largest remainder.

    Among all real n within the bounds this is the one with the highest sum of w_l log n_l.

    Args:
        total: to share out.
        weights: (L,), above zero; the shares where no bound is met.
        caps: (L,), the most that each can take.
        floor: the fewest that each gets, or its cap if that is less.

    Raises:
        PeerError: E604 if the bounds add up to less than `total` at the top, or to more at the bottom.
    """
    low = np.minimum(floor, caps)
    if not low.sum() <= total <= caps.sum():
        text = f"{total} entries to learn, but {len(caps)} layers take between {low.sum()} and {caps.sum()}"
        raise PeerError("E604", f"{text}; change the share or the floor")
    levels = np.unique(np.concatenate([[0.0], low / weights, caps / weights]))  # between two of them all is linear
    taken = np.clip(levels[:, None] * weights, low, caps).sum(1)
    level = np.interp(total, taken, levels)
    exact = np.clip(level * weights, low, caps)
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    rest = total - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole


def top(scores: NDArray[np.float32], count: int) -> Mask:
    """The mask of the `count` highest scores of a layer (r, d_out), earlier entries first where equal (eq. 18)."""
    rows, columns = scores.shape
    return Mask((rows, columns), _highest(scores.ravel(), count))


def _global(found: Calibration, total: int) -> NDArray[np.int64]:
    """Entries of each layer among the `total` highest scores of all layers; earlier layers first where equal."""
    chosen = _highest(np.concatenate([s.ravel() for s in found.scores.values()]), total)
    ends = np.cumsum([s.size for s in found.scores.values()])
    return np.diff(np.searchsorted(chosen, ends), prepend=0)


def _highest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest scores, ascending."""
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)

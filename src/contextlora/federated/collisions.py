"""How often sparse slices meet: the collision rate of a group, expected (SO-LoRA eq. 19) or counted. No torch here.

A position of a layer's B collides when two or more devices of the group have it active. Both kinds of count are kept as
the state of a group that can be joined with another group's, which is all that clustering needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError

Floats = NDArray[np.float64]
Bitmap = NDArray[np.uint8]


def expected_rates(sparsity: Floats) -> Floats:
    """S_l of one group (SO-LoRA eq. 19): the chance that a position is active in two devices or more, independently.

    Args:
        sparsity: s, (devices, layers): each device's share of active positions.

    Returns: (layers,).
    """
    return _all_joined(ExpectedCollisions(sparsity), len(sparsity))


def measured_rates(masks: Bitmap, sizes: Sequence[int]) -> Floats:
    """S_l of one group, counted: the share of a layer's positions that two masks or more have active.

    Args:
        masks: (devices, bytes); see `MeasuredCollisions`.
        sizes: positions in each layer.

    Returns: (layers,).
    """
    return _all_joined(MeasuredCollisions(masks, sizes), len(masks))


class Collisions(Protocol):
    """The groups 0..K-1 of a clustering, one for each device at first."""

    @property
    def rates(self) -> Floats:
        """S_l of every group, (K, layers)."""

    def joined(self, a: int) -> Floats:
        """S_l of group `a` joined with each of the groups, (K, layers); row `a` itself means nothing."""

    def join(self, a: int, b: int) -> None:
        """Makes group `a` the union of both; group `b` counts no more."""


def _all_joined(groups: Collisions, count: int) -> Floats:
    for other in range(1, count):
        groups.join(0, other)
    return np.asarray(groups.rates[0])


class ExpectedCollisions:
    """Eq. 19 as a state: the probabilities that none, exactly one, or more devices of a group have a position active.

    It is all sums and products of numbers from 0 to 1, without the cancellation of eq. 19 as printed, and symmetric in
    the groups to the last bit: S, by which clusters are chosen, is the same number on every machine.

    Args:
        sparsity: s, (devices, layers).
    """

    def __init__(self, sparsity: Floats):
        self._one = np.array(sparsity, float)
        self._none = 1 - self._one
        self.rates: Floats = np.zeros_like(self._one)

    def joined(self, a: int) -> Floats:
        """See `Collisions`."""
        more, mine = self.rates, self.rates[a]
        return np.asarray((more + mine) - more * mine + self._one * self._one[a])

    def join(self, a: int, b: int) -> None:
        """See `Collisions`."""
        self.rates[a] = self.joined(a)[b]
        self._one[a] = self._one[a] * self._none[b] + self._none[a] * self._one[b]
        self._none[a] *= self._none[b]


class MeasuredCollisions:
    """The same, counted on masks: positions active in any device of a group, and in two or more.

    Args:
        masks: (devices, bytes) of packed bits: for each layer in turn `numpy.packbits` of its mask, row by row, each
            layer filled up with zero bits to whole bytes.
        sizes: positions in each layer, at least 1.

    Raises PeerError E642 for masks that are no such thing.
    """

    def __init__(self, masks: Bitmap, sizes: Sequence[int]):
        widths = [-(-n // 8) for n in sizes]
        if masks.dtype != np.uint8 or masks.ndim != 2 or masks.shape[1] != sum(widths):
            text = f"masks of {sum(widths)} bytes a device were expected, got {masks.dtype} of shape {masks.shape}"
            raise PeerError("E642", text)
        ends = np.cumsum(widths, dtype=np.intp)
        spare = np.array([(1 << (-n % 8)) - 1 for n in sizes], np.uint8)
        if np.any(masks[:, ends - 1] & spare):
            raise PeerError("E642", "a mask has bits set beyond the end of a layer")
        self._starts = ends - np.array(widths, np.intp)
        self._sizes = np.array(sizes, float)
        self._any, self._more = masks.copy(), np.zeros_like(masks)

    @property
    def rates(self) -> Floats:
        """See `Collisions`."""
        return self._counted(self._more)

    def joined(self, a: int) -> Floats:
        """See `Collisions`."""
        return self._counted(self._more | self._more[a] | (self._any & self._any[a]))

    def join(self, a: int, b: int) -> None:
        """See `Collisions`."""
        self._more[a] |= self._more[b] | (self._any[a] & self._any[b])
        self._any[a] |= self._any[b]

    def _counted(self, bits: Bitmap) -> Floats:
        """Share of set bits in each layer, (K, layers)."""
        counts = np.add.reduceat(np.bitwise_count(bits), self._starts, axis=1, dtype=np.int64)
        return np.asarray(counts / self._sizes)

"""A sparse slice: what peers exchange of one task's block, as plain arrays (SO-LoRA eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError

Layer = str  # a linear's path in the model; with A_SIDE behind it, that of an A which learns too
A_SIDE = ".A"


@dataclass(frozen=True)
class Mask:
    """Which entries of one layer's B (r, d_out) are active: M^B of eq. 3.

    Attributes:
        shape: r and d_out; entries count row by row, as B is stored.
        indices: of the active entries, ascending, (n,) int64.
    """

    shape: tuple[int, int]
    indices: NDArray[np.int64]

    def __post_init__(self) -> None:
        i = self.indices
        if i.ndim != 1 or i.dtype != np.int64 or (np.diff(i) <= 0).any():
            raise PeerError("E601", "a mask's indices must ascend in one dimension")
        if len(i) and not (i[0] >= 0 and i[-1] < self.size):
            raise PeerError("E601", f"a mask of {self.size} entries names entry {i[-1] if i[0] >= 0 else i[0]}")

    @property
    def size(self) -> int:
        """Entries of B, active or not."""
        return self.shape[0] * self.shape[1]

    @property
    def rate(self) -> float:
        """s_l, the share of active entries (eq. 4)."""
        return len(self.indices) / self.size

    @property
    def whole(self) -> bool:
        """Whether every entry is active."""
        return len(self.indices) == self.size

    def either(self, other: Mask) -> Mask:
        """Active where one of the two is."""
        if self.whole or other.whole:
            return complete(self.shape)
        return Mask(self.shape, np.union1d(self.indices, other.indices))

    @classmethod
    def of_bits(cls, shape: tuple[int, int], bits: NDArray[np.bool_]) -> Mask:
        """Active where `bits` (size,) says so."""
        return complete(shape) if bits.all() else cls(shape, np.flatnonzero(bits).astype(np.int64))

    def bits(self) -> NDArray[np.bool_]:
        """Whether each entry is active, (size,)."""
        bits = np.zeros(self.size, bool)
        bits[self.indices] = True
        return bits

    def bitmap(self) -> NDArray[np.uint8]:
        """One bit an entry, most significant first, (ceil(size / 8),)."""
        return np.packbits(self.bits())

    @classmethod
    def of_bitmap(cls, shape: tuple[int, int], bitmap: NDArray[np.uint8]) -> Mask:
        """Takes back what `bitmap` gave. Raises PeerError E601 for another length or bits beyond the last entry."""
        size = shape[0] * shape[1]
        bits = np.unpackbits(bitmap)
        if len(bitmap) != -(-size // 8) or bits[size:].any():
            raise PeerError("E601", f"a bitmap of {len(bitmap)} bytes for {size} entries")
        return cls.of_bits(shape, bits[:size].astype(bool))


@lru_cache(maxsize=4096)
def complete(shape: tuple[int, int]) -> Mask:
    """The mask of all entries, one object for each shape: eight bytes an entry are much where all entries learn."""
    return Mask(shape, np.arange(shape[0] * shape[1], dtype=np.int64))


def zeros(task: str, masks: Mapping[Layer, Mask]) -> Slice:
    """A slice with nothing learnt yet."""
    return Slice(task, masks, {layer: np.zeros(len(m.indices), np.float32) for layer, m in masks.items()})


@dataclass(frozen=True)
class Slice:
    """One task's block as it travels; A is never sent, every device makes it from the shared seed.

    Attributes:
        task: whose block.
        masks: by layer.
        values: of the active entries, by layer, (n_l,) float32; all else of B is zero.
    """

    task: str
    masks: Mapping[Layer, Mask]
    values: Mapping[Layer, NDArray[np.float32]]

    def __post_init__(self) -> None:
        if self.masks.keys() != self.values.keys():
            raise PeerError("E601", f"masks and values of '{self.task}' are of different layers")
        for layer, v in self.values.items():
            if v.shape != self.masks[layer].indices.shape or v.dtype != np.float32:
                raise PeerError("E601", f"{v.shape} {v.dtype} values for {len(self.masks[layer].indices)}", where=layer)

    @property
    def active(self) -> int:
        """Q = sum_l d_l r_l s_l, the entries that are trained and sent (eq. 17)."""
        return sum(map(len, self.values.values()))

    def dense(self, layer: Layer) -> NDArray[np.float32]:
        """B of one layer, (r, d_out)."""
        mask = self.masks[layer]
        b = np.zeros(mask.size, np.float32)
        b[slice(None) if mask.whole else mask.indices] = self.values[layer]
        return b.reshape(mask.shape)

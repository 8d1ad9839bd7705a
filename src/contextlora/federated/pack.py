"""A cluster's slices as one dense B and a bitmap for each task: exact where their masks are disjoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError
from contextlora.federated.means import layers_of, mean
from contextlora.federated.slices import Layer, Mask, Slice


@dataclass(frozen=True)
class Packed:
    """Several tasks' slices in the memory of one.

    Attributes:
        b: by layer, (r, d_out) float32; entries of several tasks hold the mean of their values.
        bitmaps: by task and layer, one bit an entry.
        collision: the largest share of a layer's entries that several tasks claim; 0 means that nothing was lost.
    """

    b: Mapping[Layer, NDArray[np.float32]]
    bitmaps: Mapping[str, Mapping[Layer, NDArray[np.uint8]]]
    collision: float

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        bits = sum(v.nbytes for of_task in self.bitmaps.values() for v in of_task.values())
        return bits + sum(v.nbytes for v in self.b.values())

    def slice(self, task: str) -> Slice:
        """The task's slice: B where the task's bitmap says so."""
        shapes = {layer: (v.shape[0], v.shape[1]) for layer, v in self.b.items()}
        masks = {layer: Mask.of_bitmap(shapes[layer], bits) for layer, bits in self.bitmaps[task].items()}
        return Slice(task, masks, {layer: self.b[layer].ravel()[m.indices] for layer, m in masks.items()})


def pack(slices: Sequence[Slice], s_max: float = 0.0) -> Packed:
    """Packs one slice a task.

    Args:
        slices: of different tasks, equal in rank.
        s_max: the collision up to which losing is accepted, S_max.

    Raises:
        PeerError: E615 if a layer's collision exceeds `s_max`, saying which and by how much; E616 if a task comes
            twice; E612 if ranks differ.
    """
    if len({s.task for s in slices}) < len(slices):
        raise PeerError(
            "E616", f"a task comes twice among {', '.join(s.task for s in slices)}; average its slices first"
        )
    layers = layers_of(slices)
    measured = {layer: collision([s.masks[layer] for s in slices if layer in s.masks]) for layer in layers}
    for layer, s in measured.items():
        if s > s_max:
            raise PeerError("E615", f"the masks collide in {s:.4f} of the entries, more than {s_max:g}", where=layer)
    merged = mean(sorted(slices, key=lambda s: s.task), [1] * len(slices))
    bitmaps = {s.task: {layer: mask.bitmap() for layer, mask in s.masks.items()} for s in slices}
    return Packed({layer: merged.dense(layer) for layer in layers}, bitmaps, max(measured.values(), default=0.0))


def collision(masks: Sequence[Mask]) -> float:
    """The share of entries that at least two masks have active: S of eq. 19, counted instead of expected."""
    once, twice = np.zeros((2, -(-masks[0].size // 8)), np.uint8)
    for mask in masks:
        bits = mask.bitmap()
        twice |= once & bits
        once |= bits
    return int(np.bitwise_count(twice).sum()) / masks[0].size

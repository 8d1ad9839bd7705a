"""Means over sparse slices, entry by entry: the arithmetic that all aggregation shares.

Sums run in float64 in the order given and never across entries, so that every machine gets the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.slices import Layer, Mask, Slice


def mean(slices: Sequence[Slice], weights: Sequence[float], *, counted: bool = True) -> Slice:
    """The weighted mean of slices over the union of their masks, named like the first.

    Args:
        counted: divide an entry by the weights of the slices that have it active (ours), else by all weights, as if
            the others had sent a zero (eq. 10 and 24).
    """
    masks, values = {}, {}
    for layer in layers_of(slices):
        shape = shape_of(slices, layer)
        total, present = np.full(shape[0] * shape[1], -0.0), np.zeros(shape[0] * shape[1])  # 0 + -0 would lose the sign
        for s, w in zip(slices, weights, strict=True):
            if layer in s.masks:
                on = slice(None) if s.masks[layer].whole else s.masks[layer].indices
                total[on] += w * s.values[layer].astype(np.float64)
                present[on] += w
        masks[layer] = Mask.of_bits(shape, present > 0)
        on = masks[layer].indices
        values[layer] = (total[on] / (present[on] if counted else sum(weights))).astype(np.float32)
    return Slice(slices[0].task, masks, values)


def over(below: Slice | None, above: Slice) -> Slice:
    """`above`, and where it has no entry what `below` has there."""
    if below is None:
        return above
    masks, values = {}, {}
    for layer in layers_of((below, above)):
        shape = shape_of((below, above), layer)
        dense, present = np.zeros(shape[0] * shape[1], np.float32), np.zeros(shape[0] * shape[1], bool)
        for s in (below, above):
            if layer in s.masks:
                dense[s.masks[layer].indices] = s.values[layer]
                present[s.masks[layer].indices] = True
        masks[layer], values[layer] = Mask.of_bits(shape, present), dense[present]
    return Slice(above.task, masks, values)


def layers_of(slices: Iterable[Slice]) -> list[Layer]:
    """The layers that any of them has, by name."""
    return sorted({layer for s in slices for layer in s.masks})


def shape_of(slices: Iterable[Slice], layer: Layer) -> tuple[int, int]:
    """The shape of a layer's B that all slices with that layer agree on. Raises PeerError E612."""
    shapes = {s.masks[layer].shape for s in slices if layer in s.masks}
    if len(shapes) != 1:
        raise PeerError("E612", f"B of {' and '.join(map(str, sorted(shapes)))} cannot be averaged", where=layer)
    return shapes.pop()

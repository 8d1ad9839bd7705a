"""Means of one task's slices that a few senders cannot turn: norm clipping and the coordinate-wise trimmed mean.

Neither knows who lies. Both hold only against fewer liars than half of a task's senders, and neither against a lie that
looks like an honest update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError
from contextlora.federated.means import layers_of, shape_of
from contextlora.federated.slices import Layer, Mask, Slice


def clipped(slices: Sequence[Slice], before: Slice | None, times: float) -> list[Slice]:
    """Every slice moved towards what was held until its distance is at most `times` the median distance.

        B_j <- B + (B_j - B) min(1, times m / d_j),   d_j = ||B_j - B||_2 over j's entries, m = median of d

    B is what was held, zero where nothing was. Guarantee: with fewer than half of the senders lying, m is at most the
    largest honest distance D. A liar therefore moves a mean by at most `times` D in the 2-norm, compared with its
    sending B back, however large its values. The direction stays the liar's choice.
    """
    moves = [{k: v - _held(before, k, s.masks[k]) for k, v in s.values.items()} for s in slices]
    # fsum rounds once: a sum that runs otherwise on another processor would give another device other bytes
    far = [math.sqrt(math.fsum(x * x for v in m.values() for x in v.tolist())) for m in moves]
    limit = times * float(np.median(far))
    return [s if d <= limit else _pulled(s, before, m, limit / d) for s, m, d in zip(slices, moves, far, strict=True)]


def _held(before: Slice | None, layer: Layer, mask: Mask) -> NDArray[np.float64]:
    """What was held at a mask's entries."""
    if before is None or layer not in before.masks:
        return np.zeros(len(mask.indices))
    return before.dense(layer).ravel()[mask.indices].astype(np.float64)


def _pulled(slice_: Slice, before: Slice | None, moves: Mapping[Layer, NDArray[np.float64]], share: float) -> Slice:
    values = {k: _held(before, k, slice_.masks[k]) + share * m for k, m in moves.items()}
    return Slice(slice_.task, slice_.masks, {k: v.astype(np.float32) for k, v in values.items()})


def trimmed_mean(slices: Sequence[Slice], liars: int) -> Slice:
    """The mean of each entry without its `liars` largest and `liars` smallest values.

    Entries that at most 2 x `liars` slices have are left out: their honest values could be in the minority. Guarantee,
    entry by entry: if at most f = `liars` of the c > 2 f values are false, the result lies between the smallest and the
    largest honest value. That is as far as it goes: f + 1 false values can put one of them anywhere, so of c senders
    at most ceil(c / 2) - 1 may lie (then it is the median).
    """
    if liars < 1:
        raise PeerError("E614", f"trimming against {liars} liars; name at least one, or none and take the plain mean")
    masks, values = {}, {}
    for layer in layers_of(slices):
        having = [s for s in slices if layer in s.masks]
        shape = shape_of(having, layer)
        sent = np.full((len(having), shape[0] * shape[1]), np.inf)  # absent values go last
        for row, s in zip(sent, having, strict=True):
            row[s.masks[layer].indices] = s.values[layer]
        on = np.flatnonzero(np.isfinite(sent).sum(0) > 2 * liars)
        kept = np.sort(sent[:, on], axis=0)
        last = np.isfinite(kept).sum(0) - liars
        total = np.zeros(len(on))
        for place in range(liars, len(having)):
            total += np.where(place < last, kept[place], 0)
        masks[layer] = Mask(shape, on.astype(np.int64))
        values[layer] = (total / (last - liars)).astype(np.float32)
    return Slice(slices[0].task, masks, values)

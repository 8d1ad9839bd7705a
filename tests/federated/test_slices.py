"""Masks and slices: what is kept, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.slices import Mask, Slice


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    on = draw(st.sets(st.integers(0, shape[0] * shape[1] - 1)))
    return Mask(shape, np.array(sorted(on), np.int64))


@given(masks())
def test_a_bitmap_is_the_mask(mask):
    again = Mask.of_bitmap(mask.shape, mask.bitmap())
    assert np.array_equal(again.indices, mask.indices)
    assert int(np.bitwise_count(mask.bitmap()).sum()) == len(mask.indices) == round(mask.rate * mask.size)


@given(masks())
def test_dense_holds_the_values_and_zeros(mask):
    values = np.arange(1, len(mask.indices) + 1, dtype=np.float32)
    slice_ = Slice("a", {"l": mask}, {"l": values})
    dense = slice_.dense("l")
    assert dense.shape == mask.shape
    assert np.array_equal(dense[dense != 0], values)
    assert slice_.active == np.count_nonzero(dense)


@pytest.mark.parametrize("indices", [[2, 1], [1, 1], [-1, 2], [5, 6]])
def test_indices_that_are_no_mask_are_refused(indices):
    with pytest.raises(PeerError, match="E601"):
        Mask((2, 3), np.array(indices, np.int64))


@pytest.mark.parametrize("bitmap", [b"\x00\x00", b"", b"\x02"])
def test_bitmaps_of_another_size_are_refused(bitmap):
    with pytest.raises(PeerError, match="E601 a bitmap"):
        Mask.of_bitmap((2, 3), np.frombuffer(bitmap, np.uint8))


@pytest.mark.parametrize("values", [np.zeros(3, np.float32), np.zeros(2)])
def test_values_must_fit_their_mask(values):
    with pytest.raises(PeerError, match="E601 l"):
        Slice("a", {"l": Mask((2, 3), np.array([0, 4]))}, {"l": values})
    with pytest.raises(PeerError, match="different layers"):
        Slice("a", {"l": Mask((2, 3), np.array([0, 4]))}, {})

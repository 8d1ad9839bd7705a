"""Packing a cluster: exact without collisions, refused beyond S_max, and what it loses in between."""

from __future__ import annotations

import numpy as np
import pytest
from federation import SHAPES, of_dense, sparse
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.pack import collision, load_packed, pack, save_packed
from contextlora.federated.slices import Mask, Slice


def disjoint(n, rng, shape=(8, 60)):
    """n slices that share no entry, zeros among their values."""
    owner = rng.integers(0, n + 2, shape)
    made = []
    for i in range(n):
        mask = Mask(shape, np.flatnonzero(owner == i).astype(np.int64))
        values = np.round(rng.standard_normal(len(mask.indices)), 0).astype(np.float32)
        made.append(Slice(f"t{i}", {"l": mask}, {"l": values}))
    return made


@given(st.integers(1, 6), st.integers(0, 2**32))
def test_without_collisions_every_slice_comes_back_bit_for_bit(n, seed):
    slices = disjoint(n, np.random.default_rng(seed))
    packed = pack(slices)
    assert packed.collision == 0
    for s in slices:
        again = packed.slice(s.task)
        assert again.task == s.task
        assert np.array_equal(again.masks["l"].indices, s.masks["l"].indices)
        assert again.values["l"].tobytes() == s.values["l"].tobytes()


def test_it_takes_the_memory_of_one_block_and_a_bit_for_each_task_and_entry():
    packed = pack(disjoint(5, np.random.default_rng(0)))
    assert packed.nbytes == 480 * 4 + 5 * 480 // 8


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_collisions_are_counted_as_loops_count_them(seed, n):
    rng = np.random.default_rng(seed)
    slices = [sparse(f"t{i}", rng, 0.4) for i in range(n)]
    for layer, (r, d) in SHAPES.items():
        claims = [sum(e in s.masks[layer].indices for s in slices) for e in range(r * d)]
        assert collision([s.masks[layer] for s in slices]) == sum(c >= 2 for c in claims) / (r * d)


def test_beyond_s_max_it_is_refused_with_the_collision_that_was_counted():
    one = of_dense("a", {"l.0": np.ones((1, 4)), "l.1": np.array([[1, 0, 0, 0]])})
    other = of_dense("b", {"l.0": np.array([[2, 2, 2, 0]]), "l.1": np.array([[0, 1, 0, 0]])})
    with pytest.raises(PeerError, match=r"E615 l.0: the masks collide in 0.7500 of the entries, more than 0.5"):
        pack([one, other], 0.5)
    packed = pack([one, other], 0.75)
    assert packed.collision == 0.75
    assert packed.slice("a").dense("l.0").tolist() == [[1.5, 1.5, 1.5, 1]]
    assert packed.slice("b").dense("l.0").tolist() == [[1.5, 1.5, 1.5, 0]]
    assert packed.slice("b").dense("l.1").tolist() == [[0, 1, 0, 0]]


def test_what_does_not_belong_together_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(PeerError, match="E616"):
        pack([sparse("a", rng), sparse("a", rng)], 1)
    with pytest.raises(PeerError, match=r"E612 l\.0"):
        pack([sparse("a", rng), of_dense("b", {"l.0": np.ones((3, 5))})], 1)


def test_ranks_that_differ_are_refused_whatever_their_bitmaps_lengths():
    rng = np.random.default_rng(1)
    slices = [sparse("a", rng, shapes={"l": (4, 32)}), sparse("b", rng, shapes={"l": (3, 32)})]
    with pytest.raises(PeerError, match="E612 l:"):
        pack(slices, 1.0)


def test_what_is_packed_is_read_back_from_its_file(tmp_path):
    rng = np.random.default_rng(2)
    packed = pack([sparse(f"t{i}", rng, 0.4) for i in range(3)], 1.0)
    save_packed(packed, tmp_path / "packed.safetensors")
    again = load_packed(tmp_path / "packed.safetensors")
    assert again.collision == packed.collision > 0
    for task in packed.bitmaps:
        for layer, mask in packed.slice(task).masks.items():
            assert np.array_equal(again.slice(task).masks[layer].indices, mask.indices)
            assert again.slice(task).values[layer].tobytes() == packed.slice(task).values[layer].tobytes()
    (tmp_path / "other").write_bytes(b"rubbish")
    with pytest.raises(PeerError, match="E601"):
        load_packed(tmp_path / "other")

"""epoch_batches: every sample once, seeded by (seed, task, epoch) alone, similar lengths together."""

from __future__ import annotations

import itertools
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from contextlora.data.sampler import BUCKET, epoch_batches

lengths = st.lists(st.integers(1, 500), max_size=300)


@given(lengths, st.integers(1, 9), st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 99))
def test_a_partition_of_full_batches(lengths, size, seed, task, epoch):
    batches = epoch_batches(lengths, size, seed=seed, task=task, epoch=epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sum(len(b) < size for b in batches) <= 1
    assert all(type(i) is int for b in batches for i in b)
    assert batches == epoch_batches(tuple(lengths), size, seed=seed, task=task, epoch=epoch)


@given(st.lists(st.integers(1, 500), min_size=40, max_size=300), st.integers(1, 9))
def test_each_argument_changes_the_order(lengths, size):
    one = epoch_batches(lengths, size, seed=0, task="a", epoch=0)
    others = [
        epoch_batches(lengths, size, seed=1, task="a", epoch=0),
        epoch_batches(lengths, size, seed=0, task="b", epoch=0),
        epoch_batches(lengths, size, seed=0, task="a", epoch=1),
    ]
    assert all(one != other for other in others)


@given(lengths, st.integers(1, 9))
def test_a_bucket_is_cut_by_length(lengths, size):
    """Batches of a bucket do not overlap in length, so there is no better cut of it; padding is never worse."""
    batches = epoch_batches(lengths, size, seed=3, task="a", epoch=0)
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    if len(lengths) <= BUCKET * size:
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded <= max(lengths, default=0) * len(lengths)


def test_much_less_padding_than_a_plain_shuffle():
    lengths = [1 + (i * 7919) % 400 for i in range(2000)]
    batches = epoch_batches(lengths, 4, seed=0, task="a", epoch=0)
    wasted = sum(4 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches) / sum(lengths)
    plain = [list(range(i, i + 4)) for i in range(0, 2000, 4)]
    naive = sum(4 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in plain) / sum(lengths)
    assert wasted < 0.06 < 0.3 < naive


def test_the_same_in_another_process():
    """Not Python's hash, which differs from process to process."""
    call = "epoch_batches(range(30), 4, seed=5, task='tâche', epoch=2)"
    code = f"from contextlora.data.sampler import *; print({call})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(eval(call))

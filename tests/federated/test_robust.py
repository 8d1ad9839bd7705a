"""What the robust means guarantee, against liars that send anything; and that the guarantee ends where it says."""

from __future__ import annotations

import numpy as np
import pytest
from federation import of_dense, sparse, updates
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.aggregate import Held, Update, ours
from contextlora.federated.means import mean
from contextlora.federated.robust import clipped, trimmed_mean
from contextlora.federated.slices import Slice

LIES = [-3e38, -7.0, 0.0, 1e-30, 7.0, 3e38]


def full(values, task="a"):
    """A slice whose every entry is active, zeros too."""
    values = np.asarray(values, np.float32)
    slice_ = of_dense(task, {"l": np.ones_like(values)[None]})
    return Slice(task, slice_.masks, {"l": values})


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_up_to_half_the_senders_cannot_leave_the_honest_range(liars, more, data):
    count = 2 * liars + more
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    honest = rng.standard_normal((count - liars, 6)).astype(np.float32)
    lies = np.array(data.draw(st.lists(st.lists(st.sampled_from(LIES), min_size=6, max_size=6), min_size=liars,
                                       max_size=liars)), np.float32)  # fmt: skip
    order = data.draw(st.permutations(range(count)))
    sent = [full(np.vstack([honest, lies])[i]) for i in order]
    got = trimmed_mean(sent, liars).values["l"]
    assert (got >= honest.min(0)).all()
    assert (got <= honest.max(0)).all()


def test_one_liar_more_than_trimmed_can_put_it_anywhere():
    honest = [full([float(i)]) for i in range(3)]
    assert trimmed_mean([*honest, full([3e38]), full([3e38])], 2).values["l"][0] == 2
    assert trimmed_mean([*honest, full([3e38]), full([3e38])], 1).values["l"][0] > 1e37


@given(updates(least=3, most=6, same_task=True), st.integers(1, 2))
def test_the_trimmed_mean_is_the_sorted_middle_of_each_entry_enough_have(sent, liars):
    slices = [u.slice for u in sent]
    got = trimmed_mean(slices, liars)
    for layer, mask in got.masks.items():
        for e in range(mask.size):
            having = sorted(float(s.dense(layer).flat[e]) for s in slices if e in s.masks[layer].indices)
            if len(having) <= 2 * liars:
                assert e not in mask.indices
            else:
                assert got.dense(layer).flat[e] == pytest.approx(np.mean(having[liars:-liars]), rel=1e-6, abs=1e-7)


def test_against_liars_a_device_keeps_its_own_where_too_few_agree():
    me, you = full([1.0, 2.0]), full([9.0, 9.0])
    held = ours(Update("me", me), [Update("you", you)], Held(), liars=1)
    assert np.array_equal(held.slices["", "a"].values["l"], me.values["l"])
    friends = [Update(n, full([3.0, 4.0])) for n in "xy"]
    held = ours(Update("me", me), [Update("you", full([9.0, -9.0])), *friends], Held(), liars=1)
    assert np.array_equal(held.slices["", "a"].values["l"], np.array([3.0, 3.0], np.float32))


def test_another_tasks_lone_sender_is_taken_on_trust():
    held = ours(Update("me", full([1.0])), [Update("you", full([9.0], "b"))], Held(), liars=1)
    assert held.slices["", "b"].values["l"][0] == 9


@given(updates(least=3, most=7, same_task=True), st.floats(0.5, 2), st.data())
def test_a_clipped_sender_goes_no_further_than_the_honest_ones_times_the_factor(sent, times, data):
    slices = [u.slice for u in sent]
    before = data.draw(st.one_of(st.none(), st.just(sparse("a", np.random.default_rng(1), 0.7))))
    liars = (len(slices) - 1) // 2
    lying = [
        Slice(s.task, s.masks, {k: (v * np.float32(1e6)).astype(np.float32) for k, v in s.values.items()})
        for s in slices[:liars]
    ]

    def far(s):
        moves = (s.values[k] - (before.dense(k).flat[m.indices] if before else 0.0) for k, m in s.masks.items())
        return np.sqrt(sum((np.asarray(m, np.float64) ** 2).sum() for m in moves))

    honest = max(map(far, slices[liars:]))
    for one in clipped([*lying, *slices[liars:]], before, times):
        assert far(one) <= times * honest * (1 + 1e-5) + 1e-6


def test_clipping_leaves_those_within_the_limit_alone_and_keeps_directions():
    quiet, loud = [full([0.0, 1.0]), full([1.0, 0.0])], full([30.0, 40.0])
    got = clipped([*quiet, loud], None, 2.0)
    assert got[:2] == quiet
    np.testing.assert_allclose(got[2].values["l"], [1.2, 1.6], rtol=1e-6)
    pulled = clipped([*quiet, loud], full([30.0, 39.0]), 1.0)[2]
    np.testing.assert_allclose(pulled.values["l"], [30.0, 40.0], rtol=1e-6)


def test_a_liar_turns_the_plain_mean_and_not_the_robust_one():
    honest = [full([1.0, -1.0]), full([1.1, -1.1]), full([0.9, -0.9])]
    liar = full([-1e6, 1e6])
    assert mean([*honest, liar], [1] * 4).values["l"][0] < -1e5
    assert trimmed_mean([*honest, liar], 1).values["l"] == pytest.approx([0.95, -0.95])
    within = clipped([*honest, liar], None, 1.0)
    moved, rest = mean(within, [1] * 4).values["l"], sum(s.values["l"] for s in within[:3]) / 4
    assert np.linalg.norm(moved - rest) <= 1.1 * np.sqrt(2) / 4


def test_no_liars_need_no_trimming():
    with pytest.raises(PeerError, match="E614"):
        trimmed_mean([full([1.0])], 0)

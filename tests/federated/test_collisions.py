"""Eq. 19 against its printed form, enumeration, Monte Carlo and popcount."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.collisions import (
    ExpectedCollisions,
    MeasuredCollisions,
    expected_rates,
    measured_rates,
)

shares = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def packed(masks: list[np.ndarray]) -> np.ndarray:
    """One device's masks, layer by layer, as bytes."""
    return np.concatenate([np.packbits(m) for m in masks])


@given(shares)
def test_it_is_equation_19(s):
    one = sum(x * math.prod(1 - z for k, z in enumerate(s) if k != j) for j, x in enumerate(s))
    printed = 1 - math.prod(1 - x for x in s) - one
    two_or_more = sum(
        math.prod(x if on else 1 - x for x, on in zip(s, which, strict=True))
        for which in product([False, True], repeat=len(s))
        if sum(which) >= 2
    )
    got = expected_rates(np.array(s)[:, None])
    assert got.shape == (1,)
    assert got[0] == pytest.approx(printed, abs=1e-14)
    assert got[0] == pytest.approx(two_or_more, rel=1e-12)  # relative: no cancellation, however small
    assert 0 <= got[0] <= 1 + 1e-12


@given(shares, st.randoms())
def test_groups_joined_in_any_way_have_one_rate(s, random):
    groups, alive = ExpectedCollisions(np.array([s, s[::-1]]).T), list(range(len(s)))
    while len(alive) > 1:
        a, b = random.sample(alive, 2)
        ahead, back = groups.joined(a)[b], groups.joined(b)[a]
        assert np.array_equal(ahead, back)  # to the last bit
        groups.join(a, b)
        assert np.array_equal(groups.rates[a], ahead)
        alive.remove(b)
    assert groups.rates[alive[0]] == pytest.approx(expected_rates(np.array([s, s[::-1]]).T), rel=1e-12)


@pytest.mark.parametrize("s", [(0.1,) * 4, (0.05, 0.1, 0.2, 0.3), (0.2,) * 15, (1.0, 1.0), (0.02, 0.5)])
def test_expected_counted_and_drawn_agree(s):
    """Masks of an exact count at random places; 3 layers of different size, one of them not of whole bytes."""
    rng, sizes = np.random.default_rng(0), [30_001, 100_000, 8_000]
    masks = [[rng.permutation(n) < round(x * n) for n in sizes] for x in s]
    drawn = np.array([(np.sum([m[layer] for m in masks], axis=0) >= 2).mean() for layer in range(3)])
    counted = measured_rates(np.stack([packed(m) for m in masks]), sizes)
    assert counted.tolist() == drawn.tolist()
    expected = expected_rates(np.array([[x] * 3 for x in s]))
    deviation = np.sqrt(expected * (1 - expected) / np.array(sizes))  # of independent places; exact counts vary less
    assert np.all(np.abs(counted - expected) <= 4 * deviation + 1e-4)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_counts_of_joined_groups_are_counts_of_their_members(seed, devices):
    rng, sizes = np.random.default_rng(seed), [13, 8, 40]
    masks = [[rng.random(n) < 0.4 for n in sizes] for _ in range(devices)]
    groups, members = MeasuredCollisions(np.stack([packed(m) for m in masks]), sizes), {i: [i] for i in range(devices)}
    while len(members) > 1:
        a, b = (int(i) for i in rng.choice(list(members), 2, replace=False))
        joined = groups.joined(a)[b]
        groups.join(a, b)
        members[a] += members.pop(b)
        counts = [(np.sum([masks[i][layer] for i in members[a]], axis=0) >= 2).mean() for layer in range(3)]
        assert joined.tolist() == groups.rates[a].tolist() == counts


def test_masks_that_favour_the_same_rows_meet_more_often_than_expected():
    """Why the masks themselves are counted once they are known: independence is an assumption of eq. 19."""
    rng, rows = np.random.default_rng(0), np.exp(np.random.default_rng(1).standard_normal(1536))[:, None]
    masks = []
    for _ in range(4):
        score = rows * np.abs(rng.standard_normal((1536, 32)))
        masks.append(packed([(score > np.quantile(score, 0.9)).ravel()]))
    counted = measured_rates(np.stack(masks), [1536 * 32])[0]
    assert expected_rates(np.full((4, 1), 0.1))[0] == pytest.approx(0.0523)
    assert counted > 1.5 * 0.0523


def test_masks_that_cannot_be_are_refused():
    good = packed([np.ones(13, bool)])[None]
    assert measured_rates(np.repeat(good, 2, axis=0), [13]).tolist() == [1.0]
    for masks, said in (
        (good.astype(bool), "masks of 2 bytes a device were expected, got bool"),
        (good[:, :1], r"masks of 2 bytes a device were expected, got uint8 of shape \(1, 1\)"),
        (good[0], "masks of 2 bytes"),
        (good | 1, "bits set beyond the end of a layer"),
    ):
        with pytest.raises(PeerError, match=f"E642 .*{said}"):
            MeasuredCollisions(masks, [13])

"""Intervals against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from contextlora.reports.statistics import CHUNK, difference, mean


def test_with_one_seed_it_is_the_bootstrap_over_items():
    scores = np.random.default_rng(0).random((1, 400))
    found = mean(scores)
    half = 1.96 * scores.std() / 20
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.15 * half)
    assert (found.seeds, found.items) == (1, 400)


def test_two_ways_against_the_closed_form():
    """The pigeonhole bootstrap's variance (Owen 2007), for rows, columns and their rest."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 1, (8, 1)) + rng.normal(0, 2, (1, 60)) + rng.normal(0, 0.1, (8, 60))
    rows, columns = scores.mean(1).var(), scores.mean(0).var()
    found = mean(scores)
    sd = np.sqrt(rows / 8 + columns / 60)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sd, rel=0.06)


@pytest.mark.parametrize(("seed_sd", "item_sd", "rest_sd"), [(0.0, 1.0, 0.5), (0.3, 1.0, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_sd: float, item_sd: float, rest_sd: float):
    rng, held, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        scores = rng.normal(0, seed_sd, (10, 1)) + rng.normal(0, item_sd, (1, 80)) + rng.normal(0, rest_sd, (10, 80))
        found = mean(scores, resamples=600)
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / trials <= 1


def test_a_thing_minus_itself_is_exactly_zero():
    scores = np.random.default_rng(3).random((5, 50))
    found = difference(scores, scores)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.excludes(0)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(4)
    pictures = rng.random((1, 200))  # some are harder than others, for both
    one, other = (pictures + rng.normal(0.05 * k, 0.1, (5, 200)) for k in (1, 0))
    together = difference(one, other)
    apart = difference(one, other[:, rng.permutation(200)])
    assert together.high - together.low < 0.5 * (apart.high - apart.low)
    assert together.excludes(0)
    assert together.mean == pytest.approx(one.mean() - other.mean())


def test_a_single_row_is_compared_with_every_row():
    scores = np.random.default_rng(5).random((4, 30))
    assert difference(scores, np.zeros((1, 30))) == mean(scores)


def test_the_same_call_gives_the_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch):
    scores = np.random.default_rng(6).random((3, 20))
    assert mean(scores) == mean(scores)
    assert mean(scores, seed=1) != mean(scores)
    assert mean(scores, resamples=CHUNK + 1).mean == scores.mean()


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        mean(np.empty((2, 0)))

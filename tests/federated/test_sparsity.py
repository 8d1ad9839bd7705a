"""Budgets and masks against brute force: exact totals, exact counts, ties by index."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.sparsity import Calibration, entropy, first_slice, softmax, top, water_fill


def levelled(total, weights, low, caps):
    """The only real numbers within the bounds, in proportion to the weights where no bound is met; every case tried."""
    for state in product((-1, 0, 1), repeat=len(weights)):
        fixed = [lo if s < 0 else hi for s, lo, hi in zip(state, low, caps, strict=True)]
        free = [i for i, s in enumerate(state) if s == 0]
        left = total - sum(f for i, f in enumerate(fixed) if i not in free)
        if not free:
            if left == 0 and _some_level(state, weights, low, caps):
                return [Fraction(f) for f in fixed]
            continue
        level = Fraction(left) / sum(weights[i] for i in free)
        exact = [level * w if i in free else Fraction(fixed[i]) for i, w in enumerate(weights)]
        clipped = [min(max(level * w, lo), hi) for w, lo, hi in zip(weights, low, caps, strict=True)]
        if exact == clipped:
            return exact
    raise AssertionError("no case fits")


def _some_level(state, weights, low, caps):
    least = max([c / w for s, w, c in zip(state, weights, caps, strict=True) if s > 0], default=0)
    most = min([lo / w for s, w, lo in zip(state, weights, low, strict=True) if s < 0], default=least)
    return least <= most


@st.composite
def shares(draw):
    count = draw(st.integers(1, 5))
    weights = [Fraction(draw(st.integers(1, 64)), 16) for _ in range(count)]
    caps = [draw(st.integers(1, 40)) for _ in range(count)]
    floor = draw(st.integers(0, 8))
    total = draw(st.integers(sum(min(floor, c) for c in caps), sum(caps)))
    return total, weights, caps, floor


@given(shares())
@settings(deadline=None)
def test_water_filling_equals_brute_force(share):
    total, weights, caps, floor = share
    got = water_fill(total, np.array(weights, float), np.array(caps), floor)
    want = levelled(total, weights, [min(floor, c) for c in caps], caps)
    assert sum(got) == total
    assert all(abs(g - w) < 1 for g, w in zip(got.tolist(), want, strict=True))
    up = [w - int(w) for g, w in zip(got.tolist(), want, strict=True) if g > w]  # largest remainders go up
    down = [w - int(w) for g, w in zip(got.tolist(), want, strict=True) if g < w]
    assert min(up, default=Fraction(1)) >= max(down, default=Fraction(0))


@pytest.mark.parametrize("total", [0, 9, 61])
def test_totals_beyond_the_bounds_are_refused(total):
    with pytest.raises(PeerError, match=r"E604 .* take between 10 and 60"):
        water_fill(total, np.ones(2), np.array([20, 40]), 5)


def test_water_filling_survives_a_temperature_near_zero():
    weights = softmax(np.array([0.9, 0.5, 0.1]) / 1e-6)
    assert weights.argmax() == 0
    assert weights.sum() == pytest.approx(1)
    assert water_fill(25, weights, np.array([10, 10, 10])).tolist() == [10, 8, 7]  # what is far below counts alike
    assert water_fill(8, weights, np.array([10, 10, 10]), 1).tolist() == [6, 1, 1]


@given(st.integers(1, 6), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_masks_have_the_exact_count_and_ties_go_by_index(rows, columns, data):
    scores = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)), "f4")
    count = data.draw(st.integers(0, scores.size))
    want = sorted(sorted(range(scores.size), key=lambda i: (-scores[i], i))[:count])
    assert top(scores.reshape(rows, columns), count).indices.tolist() == want


def calibration(seed, shapes=((2, 30), (3, 7), (2, 11)), **more):
    rng = np.random.default_rng(seed)
    scores = {f"l{i}": rng.integers(0, 6, s).astype(np.float32) for i, s in enumerate(shapes)}
    return Calibration("t", scores, {layer: float(rng.random()) for layer in scores}, 9, **more)


@given(st.integers(0, 200), st.integers(3, 103), st.sampled_from(["entropy", "uniform", "global"]))
@settings(deadline=None)
def test_every_allocation_has_exactly_its_total(seed, total, allocation):
    found = calibration(seed)
    slice_ = first_slice(found, total, allocation=allocation)
    assert slice_.active == total
    assert not any(v.any() for v in slice_.values.values())
    for layer, mask in slice_.masks.items():
        assert mask.shape == found.scores[layer].shape
        inside = found.scores[layer].ravel()[mask.indices]
        outside = np.delete(found.scores[layer].ravel(), mask.indices)
        assert min(inside, default=9) >= max(outside, default=-1)
        assert len(inside) >= (allocation != "global")


@given(st.integers(0, 200), st.integers(1, 103))
@settings(deadline=None)
def test_global_takes_the_highest_scores_of_all_layers(seed, total):
    found = calibration(seed)
    every = [(-v, i, k) for i, s in enumerate(found.scores.values()) for k, v in enumerate(s.ravel().tolist())]
    want = sorted((i, k) for _, i, k in sorted(every)[:total])
    masks = first_slice(found, total, allocation="global").masks.values()
    assert [(i, k) for i, m in enumerate(masks) for k in m.indices.tolist()] == want


def test_uniform_gives_every_layer_the_same_share():
    found = calibration(0, shapes=((2, 100), (4, 25), (1, 50)))
    assert [len(m.indices) for m in first_slice(found, 35, allocation="uniform").masks.values()] == [20, 10, 5]


def test_entropy_follows_eq_22_with_its_min():
    found = Calibration("t", dict.fromkeys("abc", np.zeros((1, 1000), np.float32)), {"a": 1.0, "b": 0.5, "c": 0.0}, 9)
    found.scores["c"] = np.zeros((1, 10), np.float32)  # less than its share of 186
    e = np.exp([2.0, 1.0])
    want = [round(990 * float(w)) for w in e / e.sum()] + [10]
    got = first_slice(found, 1000, temperature=0.5)
    assert [len(m.indices) for m in got.masks.values()] == want
    even = first_slice(found, 1000, temperature=1e9)
    assert [len(m.indices) for m in even.masks.values()] == [495, 495, 10]


@pytest.mark.parametrize(
    ("total", "more", "text"),
    [
        (0, {}, "0 entries to learn of 103"),
        (104, {}, "104 entries to learn of 103"),
        (9, {"temperature": 0.0}, "temperature 0.0"),
        (2, {}, "take between 3 and 103"),
    ],
)
def test_budgets_that_cannot_be_are_refused(total, more, text):
    with pytest.raises(PeerError, match=text):
        first_slice(calibration(0), total, **more)


def test_entropy_needs_spectra():
    found = Calibration("t", {"l": np.zeros((1, 4), np.float32)}, {}, 9)
    with pytest.raises(PeerError, match="E604 t: 'entropy' needs"):
        first_slice(found, 2)
    assert first_slice(found, 2, allocation="uniform").active == 2


def test_entropy_of_known_spectra():
    assert entropy(np.ones(8), 8) == pytest.approx(1)
    assert entropy(np.array([3.0, 0.0, 0.0]), 3) == 0
    assert entropy(np.array([0.5, 0.25, 0.25]), 4) == pytest.approx(0.75)
    assert entropy(np.zeros(3), 3) == entropy(np.ones(1), 1) == 0

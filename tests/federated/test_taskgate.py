"""The gate against its closed form, and routing among synthetic tasks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.taskgate import TaskGate, TaskMean, confusion, out_of_task

LOOSE = {"floor": 0.0, "reach": float("inf")}


def clusters(rng, tasks=5, d=256, shared=10.0, apart=1.0, noise=1.0, n=200):
    """Prompts of tasks that differ a little around a common mean with a few loud coordinates, (tasks, n, d)."""
    common = rng.standard_normal(d)
    common[:4] *= 30
    common *= shared / np.linalg.norm(common)
    own = rng.standard_normal((tasks, 1, d))
    own *= apart / np.linalg.norm(own, axis=-1, keepdims=True)
    loud = np.ones(d)
    loud[:4] *= 30
    return common + own + noise * loud * rng.standard_normal((tasks, n, d)) / np.sqrt(d)


def means(x):
    return {f"t{i}": TaskMean.of(part) for i, part in enumerate(x)}


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(2, 9), st.booleans())
def test_g_is_1_at_the_tasks_mean_0_behind_the_centre_and_linear_between(seed, tasks, d, scaled):
    rng = np.random.default_rng(seed)
    known = means(rng.standard_normal((tasks, 8, d)))
    gate = TaskGate(known, scaled=scaled, **LOOSE)
    h = np.stack([m.mean for m in known.values()])
    centre = h.mean(0)
    for i in range(tasks):
        for along in (-2.0, -0.5, 0.0, 0.25, 1.0, 3.0):
            g = gate.gates((centre + along * (h[i] - centre))[None])[0]
            assert g[i] == pytest.approx(max(along, 0), abs=1e-9)
    x = rng.standard_normal((20, d))
    if not scaled:  # the formula of the page, written out
        own = h - centre
        expected = [[max(own[i] @ (p - centre), 0) / (own[i] @ own[i]) for i in range(tasks)] for p in x]
        np.testing.assert_allclose(gate.gates(x), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30))
def test_means_of_a_stream_are_the_means_of_all(seed, one, other):
    rng = np.random.default_rng(seed)
    x = 1e3 + rng.standard_normal((one + other, 4))
    merged, whole = TaskMean.of(x[:one]).merged(TaskMean.of(x[one:])), TaskMean.of(x)
    assert merged.count == whole.count == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.squares, x.var(0) * len(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(whole.squares, x.var(0) * len(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_distinct_tasks_are_routed_right_where_scaling_columns_does_not(scaled):
    rng = np.random.default_rng(1)
    x = clusters(rng)
    calibration, asked = x[:, :100], x[:, 100:]
    gate = TaskGate(means(calibration), scaled=scaled, **LOOSE)
    tasks = list(gate.tasks)
    true = [t for t in tasks for _ in range(100)]
    counts = confusion(tasks, true, gate.routes(asked.reshape(500, -1)))
    right = np.trace(counts) / counts.sum()
    assert right >= (0.95 if scaled else 0.5)

    # eq. 26 read as A diag(h): the adapter whose scaled projection of x is largest
    h = calibration.mean(1)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    a = rng.standard_normal((5, 16, 256))
    energy = np.stack([((asked.reshape(500, -1) * h[i]) @ a[i].T).__pow__(2).sum(1) for i in range(5)], 1)
    assert (energy.argmax(1) == np.repeat(range(5), 100)).mean() < 0.45


def test_scaling_does_not_matter_where_coordinates_are_alike():
    rng = np.random.default_rng(2)
    common = rng.standard_normal(64)
    own = rng.standard_normal((4, 1, 64))
    x = common + own + rng.standard_normal((4, 400, 64))
    plain, scaled = (TaskGate(means(x[:, :300]), scaled=s, **LOOSE).gates(x[:, 300:].reshape(400, -1)) for s in (0, 1))
    assert (plain.argmax(1) == np.repeat(range(4), 100)).mean() > 0.98
    np.testing.assert_allclose(scaled, plain, atol=0.15)


def test_foreign_prompts_get_no_gate_at_all_and_the_tasks_own_do():
    rng = np.random.default_rng(3)
    x = clusters(rng, apart=3.0)
    gate = TaskGate(means(x[:4, :100]), scaled=True)
    inside, left_out = x[:4, 100:].reshape(400, -1), x[4]
    noise = 5 * rng.standard_normal((50, 256))
    assert (gate.gates(inside).max(1) > 0).mean() > 0.95
    assert (gate.gates(left_out) == 0).all(1).mean() > 0.95
    assert (gate.gates(noise) == 0).all()
    assert gate.routes(noise) == [None] * 50


def test_the_thresholds_are_where_they_are_said_to_be():
    x = np.array([[1.0, 0], [3, 0], [-1, 0], [-3, 0]])  # h = (2, 0) and (-2, 0), both with a radius of sqrt 2
    known = {"a": TaskMean.of(x[:2]), "b": TaskMean.of(x[2:])}

    def g(point, **more):
        return TaskGate(known, scaled=False, **more).gates(np.array([point]))[0].tolist()

    wide = float("inf")
    assert g([1.001, 0], reach=wide) == pytest.approx([0.5005, 0])
    assert g([0.999, 0], reach=wide) == [0, 0]
    assert g([2, 2.12]) == pytest.approx([1, 0])  # 1.5 sqrt 2 = 2.1213
    assert g([2, 2.13]) == [0, 0]
    assert g([2, 2.13], reach=2) == pytest.approx([1, 0])


def test_one_task_alone_and_one_in_the_midst_of_others_are_told_by_distance():
    rng = np.random.default_rng(4)
    near, far = rng.standard_normal((40, 8)), 9 + rng.standard_normal((40, 8))
    alone = TaskGate({"a": TaskMean.of(near)})
    assert (alone.gates(near)[:, 0] == 1).mean() > 0.9
    assert (alone.gates(far) == 0).all()
    ends = np.array([[-4.0, 0], [-4, 1], [0, 0], [0, 1], [4, 0], [4, 1]])
    three = TaskGate({t: TaskMean.of(ends[i : i + 2]) for t, i in zip("abc", (0, 2, 4), strict=True)}, scaled=False)
    assert three.routes(np.array([[0.0, 0.5], [4.0, 0.5]])) == ["b", "c"]


@given(st.integers(0, 2**32), st.floats(0.1, 500))
def test_sharpened_gates_are_the_softmax_of_those_that_are_not_0(seed, beta):
    rng = np.random.default_rng(seed)
    known = means(rng.standard_normal((4, 8, 6)))
    x = rng.standard_normal((10, 6))
    plain, sharp = (TaskGate(known, sharpness=b, reach=float("inf")).gates(x) for b in (0, beta))
    for g, s in zip(plain, sharp, strict=True):
        if not g.any():
            assert not s.any()
            continue
        powers = [np.exp(beta * (v - g.max())) if v > 0 else 0.0 for v in g]
        np.testing.assert_allclose(s, np.array(powers) / sum(powers), atol=1e-12)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from(["a", "b", None])), max_size=30))
def test_confusion_counts_pairs(pairs):
    counts = confusion(["a", "b"], [t for t, _ in pairs], [r for _, r in pairs])
    names = ["a", "b", None]
    assert counts.tolist() == [[sum(p == (t, r) for p in pairs) for r in names] for t in names]
    own, foreign = out_of_task(counts)
    of_tasks = [r for t, r in pairs if t is not None]
    others = [r for t, r in pairs if t is None]
    assert own == pytest.approx(of_tasks.count(None) / len(of_tasks), nan_ok=True) if of_tasks else np.isnan(own)
    assert foreign == pytest.approx(others.count(None) / len(others)) if others else np.isnan(foreign)


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1]])])
def test_inputs_without_a_mean_are_refused(x):
    with pytest.raises(PeerError, match="E617 a task's mean"):
        TaskMean.of(x)


def test_a_gate_needs_means_of_one_layer():
    with pytest.raises(PeerError, match="E617 a gate needs"):
        TaskGate({})
    with pytest.raises(PeerError, match="E617 a gate needs"):
        TaskGate({"a": TaskMean.of(np.ones((1, 2))), "b": TaskMean.of(np.ones((1, 3)))})

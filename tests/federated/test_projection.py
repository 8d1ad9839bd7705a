"""A from the shared seed: orthogonal where there is room, the same for all devices, Theorem 2 exact."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.federated.projection import projection
from contextlora.graph import TaskGraph


def graph_of(*ranks):
    return TaskGraph.from_dict({"tasks": {f"t{i}": {"question": "?", "rank": r} for i, r in enumerate(ranks)}})


def blocks(graph, layer, d_in, seed=0):
    a = projection(graph, layer, d_in, seed)
    return [a[graph.block(t).start : graph.block(t).stop] for t in graph.names]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 9))
@settings(deadline=None)
def test_blocks_are_orthonormal_as_long_as_they_fit(ranks, d_in, seed):
    graph = graph_of(*ranks)
    fits = max((graph.block(t).stop for t in graph.names if graph.block(t).stop <= d_in), default=0)
    a = projection(graph, "l", d_in, seed)
    assert a.dtype == torch.float64
    assert a.shape == (sum(ranks), d_in)
    torch.testing.assert_close(a[:fits] @ a[:fits].T, torch.eye(fits, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("ranks", [(16, 16, 16, 16), (5, 1, 30, 28)])
def test_theorem_2_is_exact_whatever_b_learns_even_when_ranks_fill_all_of_d_in(ranks):
    """eq. 35: <w_i, w_j>_F = 0, here of weights as large as anything in it could be."""
    torch.manual_seed(0)
    d_in, d_out = 64, 48
    w = [torch.randn(len(a), d_out, dtype=torch.float64).T @ a for a in blocks(graph_of(*ranks), "l", d_in)]
    for i in range(len(w)):
        for j in range(i):
            assert abs(float((w[i] * w[j]).sum())) < 1e-12 * float(w[i].norm() * w[j].norm())


def test_gaussian_blocks_overlap_by_up_to_r_over_d_in():
    """One gradient step from B = 0 on the same loss, w = G A^T A: the worst case.

    Two independent Gaussian blocks: E <w_i, w_j> = |G|^2 (r / d)^2 and E |w|^2 = |G|^2 r (d + r + 1) / d^2 (Wishart),
    so that the cosine is r / (d + r + 1) on average, just below r / d.
    """
    torch.manual_seed(0)
    d, r, rounds = 40, 8, 150
    graph = graph_of(40, 8, 8)  # the first one leaves no room
    cosines = []
    for k in range(rounds):
        _, one, other = blocks(graph, f"layer{k}", d)
        g = torch.randn(30, d, dtype=torch.float64)
        wi, wj = g @ one.T @ one, g @ other.T @ other
        cosines.append(float((wi * wj).sum() / wi.norm() / wj.norm()))
    found = torch.tensor(cosines)
    error = float(found.std()) / rounds**0.5
    assert error < 0.01
    assert abs(float(found.mean()) - r / (d + r + 1)) < 4 * error
    assert float(found.mean()) < r / d


def test_rows_have_norm_one_on_both_sides_of_the_border():
    graph = graph_of(64, 300)
    inside, outside = blocks(graph, "l", 64)
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-14)
    squares = outside.square().sum(1)  # chi^2_64 / 64: mean 1, variance 2 / 64
    assert abs(float(squares.mean()) - 1) < 4 * (2 / 64 / 300) ** 0.5
    assert float(squares.var()) == pytest.approx(2 / 64, rel=0.35)
    assert abs(float(outside.mean())) < 4 / (64 * 300 * 64) ** 0.5


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(4, 24))
@settings(deadline=None)
def test_appending_a_task_changes_no_earlier_block_by_a_bit(ranks, d_in):
    fewer, all_ = blocks(graph_of(*ranks[:-1]), "l", d_in), blocks(graph_of(*ranks), "l", d_in)
    assert all(torch.equal(one, other) for one, other in zip(fewer, all_, strict=False))


def test_seed_layer_and_task_each_make_another_block():
    graph = graph_of(3, 3)
    found = [*blocks(graph, "l", 20), blocks(graph, "l", 20, seed=1)[0], blocks(graph, "m", 20)[0]]
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 0.01 for other in found[:i])


def test_another_process_makes_the_same_bytes():
    code = (
        "import torch, hashlib; torch.set_num_threads(1)\n"
        "from contextlora.federated.projection import projection; from contextlora.graph import TaskGraph\n"
        "g = TaskGraph.from_dict({'tasks': {n: {'question': '?', 'rank': 5} for n in ('t0', 't1', 't2')}})\n"
        "print(hashlib.sha256(projection(g, 'l', 33, 7).numpy().tobytes()).hexdigest())"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    ours = projection(graph_of(5, 5, 5), "l", 33, 7)
    assert theirs == hashlib.sha256(ours.numpy().tobytes()).hexdigest()

"""A from a shared seed: every device makes the same one, so it is never sent (SO-LoRA eq. 16).

One block a task, rows of norm 1, and blocks of different tasks exactly orthogonal as long as their ranks fit into d_in:

    A_i A_j^T = 0 for i != j,  A_i A_i^T = I       (d_in >= sum of ranks up to and with the later of i, j)

Then <w_i, w_j>_F = <B_i B_j^T, A_i A_j^T> = 0 whatever B learns (Theorem 2). A block beyond d_in has no room left and
is Gaussian, N(0, 1/d_in): updates that want the same then have a cosine of up to r / d_in, which is all that the
paper's own independent Gaussian blocks reach. Its variance of 1 would make A x longer by sqrt(d_in), to no use.

Why norm 1: it is what a row of N(0, 1/d_in) has on average, so E |A x|^2 = r / d_in |x|^2 on both sides of that border,
and one learning rate serves both. LoRA's usual first A is shorter by sqrt 3.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from contextlora.graph import TaskGraph


def projection(graph: TaskGraph, layer: str, d_in: int, seed: int) -> Tensor:
    """A of one layer for all tasks of a graph, (R, d_in) float64; shared between calls, not to be written to.

    A task's block depends on seed, layer and the tasks declared up to it: appending a task changes no earlier block,
    not by a bit. It is the same in every process of a machine that runs as many threads; another BLAS library or
    thread count may round the last bits of float64 otherwise. Rounded to float32 hardly an entry in ten million then
    differs, by one unit in the last place; what was trained with one A gives the same answers with the other up to
    rounding. NumPy keeps its normal draws between releases as a rule, not as a promise.

    Args:
        graph: the tasks in declared order, with their ranks.
        layer: the linear's path in the model.
        d_in: its input features.
        seed: what all devices of a federation share.
    """
    return _rows(seed, layer, tuple((t, graph.rank_of(t)) for t in graph.names), d_in)


def independent(graph: TaskGraph, layer: str, d_in: int, seed: int) -> Tensor:
    """A as LoRI draws it: an independent Gaussian block for each task, N(0, 1/d_in), (R, d_in) float64."""
    return torch.cat([_gaussian(seed, layer, t, (graph.rank_of(t), d_in)) for t in graph.names])


@lru_cache(maxsize=1)  # a layer asks for one block after another
def _rows(seed: int, layer: str, ranks: tuple[tuple[str, int], ...], d_in: int) -> Tensor:
    rows = torch.zeros(sum(r for _, r in ranks), d_in, dtype=torch.float64)
    stop = 0
    for task, rank in ranks:
        start, stop = stop, stop + rank
        block = _gaussian(seed, layer, task, (rank, d_in))
        rows[start:stop] = _beside(block, rows[:start]) if stop <= d_in else block
    return rows


def _gaussian(seed: int, layer: str, task: str, shape: tuple[int, int]) -> Tensor:
    """N(0, 1 / d_in), (r, d_in) float64."""
    digest = hashlib.sha256(f"{seed}|{layer}|{task}".encode()).digest()
    draws = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(shape)
    return torch.from_numpy(draws) / math.sqrt(shape[1])


def _beside(block: Tensor, before: Tensor) -> Tensor:
    """An orthonormal basis of what is left of `block` (r, d_in) beside the orthonormal rows `before`."""
    for _ in range(2):  # once leaves what rounding brings back where little room is left; twice is enough
        q, upper = torch.linalg.qr((block - (block @ before.T) @ before).T)
        block = (q * upper.diagonal().sign()).T  # a diagonal above zero makes it unique, whoever's LAPACK
    return block

"""Private copies, a variant of ContextLoRA: a child starts from what its prerequisites learned, and tunes that alone.

Where ContextLoRA keeps W[P(v)] on and frozen beside W[v], here the block of v itself starts from

    A_v, B_v = the best approximation of rank r_v of  sum over p in P(v) of s_p B_p A_p       (Eckart and Young)

which is exact where r_v is at least the sum of the prerequisites' ranks; ranks beyond start as in LoRA (A random, B
zero). Then v trains and answers with its own block alone, so it costs its prerequisites nothing, as a frozen ratio
below 1 would, and it is deployed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from contextlora.graph import TaskGraph
from contextlora.lora.layer import GatedLinear
from contextlora.lora.sharing import Plan, level_by_level, own_alone


def plan(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """The tasks of a level side by side, each in its own block; what they copy was trained in the levels before."""
    plain = level_by_level(graph, tasks, own_alone(graph))
    return replace(plain, phases=tuple(replace(p, prepare=partial(copy, tasks=p.tasks)) for p in plain.phases))


@torch.no_grad()
def copy(layers: Iterable[GatedLinear], tasks: Sequence[str]) -> None:
    """Gives each task that has prerequisites their sum to start from."""
    for layer in layers:
        for t in tasks:
            if before := layer.graph.prerequisites(t):
                _copy(layer, t, before)


def _copy(layer: GatedLinear, task: str, before: Sequence[str]) -> None:
    rows, columns = layer.block(task)
    ratio = {p: layer.graph.scale_of(p) / layer.graph.scale_of(task) for p in before}
    a = torch.cat([layer.block(p)[0] for p in before])
    b = torch.cat([layer.block(p)[1] * ratio[p] for p in before])
    if len(a) > len(rows):
        a, b = truncated(a, b, len(rows))
    rows[: len(a)] = a
    columns[: len(b)] = b


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of b^T a (R, d_in), (R, d_out) by `rank` ranks, as such a pair with balanced sizes."""
    qa, ra = torch.linalg.qr(a.T.double())  # (d_in, R), (R, R)
    qb, rb = torch.linalg.qr(b.T.double())
    u, s, vh = torch.linalg.svd(rb @ ra.T)  # b^T a = qb (rb ra^T) qa^T
    root = s[:rank].sqrt()[:, None]
    return (root * (vh[:rank] @ qa.T)).to(a), (root * (u[:, :rank].T @ qb.T)).to(b)

"""O-LoRA (Wang et al. 2023): tasks one after another, each in ranks kept orthogonal to those of the tasks before.

While task k trains, the blocks of tasks 1..k-1 are on and frozen, and the loss gains lambda sum |A_i A_k^T| over the
earlier tasks i, summed over layers (SEMANTICS section 1). Afterwards every block is on for every task. lambda is the
configuration's `penalty`, 0.5 unless told otherwise, as in the authors' scripts (--lamda_1 0.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from contextlora.graph import TaskGraph
from contextlora.lora.layer import GatedLinear
from contextlora.lora.sharing import Phase, Plan, Sharing


def one_after_another(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Declared order, old blocks on and frozen."""
    names = graph.names
    so_far = {t: names[: i + 1] for i, t in enumerate(names)}
    own = {t: {t: graph.rank_of(t)} for t in names}
    sharing, ever_after = Sharing(so_far, own), Sharing(dict.fromkeys(names, names), own)
    return Plan(tuple(Phase(((t,),), sharing, orthogonality) for t in tasks), ever_after)


def orthogonality(layers: Iterable[GatedLinear], tasks: tuple[str, ...]) -> Tensor:
    """Sum over layers of sum |A_old A_task^T|; its gradient reaches A_task alone."""
    (task,) = tasks
    found = [torch.zeros(())]
    for layer in layers:
        if start := layer.graph.block(task).start:
            found.append((layer.A[:start].detach() @ layer.learning[f"{task}_A"].T).abs().sum())
    return torch.stack([x.to(found[-1]) for x in found]).sum()

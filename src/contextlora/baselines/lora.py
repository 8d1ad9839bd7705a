"""LoRA (Hu et al. 2021): one adapter for all tasks, or one for each.

`joint` is the papers' multi-task baseline: all R ranks are on and trained for every sample (gate 1, SEMANTICS section
1), one optimizer over the shuffled samples of all tasks. `per_task` is LoRA as most people deploy it: r_v ranks for
each task alone, the graph ignored. `by_question` is the same behind a router.
"""

from __future__ import annotations

from collections.abc import Sequence

from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.sharing import Phase, Plan, all_at_once, all_for_all, own_alone


def joint(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Every block on and learning for every task; one run."""
    ranks = {t: graph.rank_of(t) for t in graph.names}
    sharing = all_for_all(graph, ranks)
    return all_at_once(tasks, sharing)


def per_task(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Every task its own block and nothing else; all side by side."""
    sharing = own_alone(graph)
    return Plan((Phase(tuple((t,) for t in tasks), sharing),), sharing)


def by_question(graph: TaskGraph, tasks: Sequence[str]) -> Plan:
    """Hard routing: the question decides the expert. It names the task, so this is `per_task` with a perfect router.

    Raises ConfigError E118 if two tasks ask the same question.
    """
    asked: dict[str, str] = {}
    for t in graph.names:
        other = asked.setdefault(graph.task(t).question, t)
        if other != t:
            raise ConfigError("E118", f"'{other}' and '{t}' ask the same question: no router could tell them apart")
    return per_task(graph, tasks)

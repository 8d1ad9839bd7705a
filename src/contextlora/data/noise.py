"""Label noise, for the robustness experiments of ContextLoRA section V ("shuffling QA pairs")."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from contextlora.data.examples import Example
from contextlora.errors import DataError
from contextlora.graph import TaskGraph


def label_noise(
    examples: Sequence[Example], graph: TaskGraph, fraction: float, seed: int, tasks: Sequence[str] | None = None
) -> list[Example]:
    """Shuffles the answers of a share of the training question-answer pairs.

    A pair is one task of one example: the question is that task about that picture, the answer its correct option (all
    of them, where several are). Pairs count only in split train, of tasks without prerequisites and with options: the
    paper pollutes "basic, fixed-response questions" alone; `tasks` names others instead. Of these N pairs,
    round(fraction x N) are sampled (halves to the even number); their questions and their answers are permuted
    independently and matched anew, the k-th question with the k-th answer. A picture stays with its question. So

    * an answer may land on another task's question and then is none of its options: the result is for training only
      and is not checked against the graph again (with one task in `tasks`, answers stay that task's options);
    * some pairs get their own or an equal answer back, so fewer than round(fraction x N) become wrong;
    * all answers together stay the same.

    The result depends on the examples' ids, not on their order. With the same seed, the pairs of a smaller fraction are
    among those of a larger one.

    Args:
        fraction: share of the pairs, 0 to 1.
        seed: of the choice and both permutations.
        tasks: whose pairs count, dependent tasks too; None means every root with options.

    Returns:
        The examples in their order; those without a sampled pair are the same objects.

    Raises:
        DataError: E209 if `fraction` is not within 0 to 1, or one of `tasks` has no options. ConfigError: E104 if the
            graph has no such task.
    """
    if not 0 <= fraction <= 1:
        raise DataError("E209", f"label noise should be a share from 0 to 1, got {fraction}")
    noised = _roots(graph) if tasks is None else _named(graph, tasks)
    pairs = [
        (e.id, task, e.answers[task]) for e in examples if e.split == "train" for task in noised if task in e.answers
    ]
    pairs.sort(key=lambda pair: pair[:2])
    rng = random.Random(seed)
    rng.shuffle(pairs)
    chosen = pairs[: round(fraction * len(pairs))]  # in shuffled order: this is the permutation of the questions
    answers = [answer for _, _, answer in chosen]
    rng.shuffle(answers)
    changed: dict[str, dict[str, tuple[str, ...]]] = {}
    for (name, task, _), answer in zip(chosen, answers, strict=True):
        changed.setdefault(name, {})[task] = answer
    return [replace(e, answers={**e.answers, **changed[e.id]}) if e.id in changed else e for e in examples]


def _roots(graph: TaskGraph) -> list[str]:
    return [name for name, task in graph.tasks.items() if not task.after and task.options is not None]


def _named(graph: TaskGraph, tasks: Sequence[str]) -> list[str]:
    """`tasks`, each once. Raises ConfigError E104 for an unknown one, DataError E209 for one without options."""
    for name in tasks:
        if graph.task(name).options is None:
            text = f"task '{name}' has free answers; label noise shuffles those of tasks with options"
            raise DataError("E209", text, where="noise_tasks")
    return list(dict.fromkeys(tasks))

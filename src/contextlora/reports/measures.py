"""What a recipe can measure. A measure does one job and gives scores by task and item, and what the job cost.

A new one is a function (those that look inside a model stand in `probes.py`) in MEASURES, a kind in `kinds.py`, a view
in `views/`, and a word in the recipe's `measure`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from contextlora.data.examples import Example, load_examples
from contextlora.data.jsonl import Faults, read_lines
from contextlora.errors import DataError, did_you_mean
from contextlora.evaluation.evaluate import evaluate
from contextlora.evaluation.metrics import score
from contextlora.graph import TaskGraph
from contextlora.reports.airtime import radio
from contextlora.reports.bench import Bench, forget_peak, levels, machine, peak_memory, trained
from contextlora.reports.federations import collisions, federated, layers
from contextlora.reports.jobs import FORMAT, Job
from contextlora.reports.probes import Measured, Scores, inference, masks, mechanism, repair
from contextlora.strict import Strict


def do(bench: Bench, job: Job) -> dict[str, Any]:
    """Does a job and returns its result, as it is kept."""
    forget_peak()
    found = MEASURES[bench.recipe.measure](bench, job)
    settings = {} if job.kind == "answers" else job.config.model_dump(mode="json")
    return {
        "format": FORMAT,
        "id": job.id,
        "job": {
            "scenario": job.data.scenario,
            "arm": job.arm,
            "point": dict(job.point),
            "seed": job.seed,
            "kind": job.kind,
            "model": job.model,
            "data": job.data.key,
            "train": settings,
        },
        "graph": levels(job.graph),
        "mean": {t: sum(s.values()) / len(s) for t, s in found.scores.items() if s},
        "scores": found.scores,
        "cost": found.cost | peak_memory(),
        "made": machine(bench.recipe.device),
        **found.more(),
    }


def accuracy(bench: Bench, job: Job) -> Measured:
    """The score of every answer on the recipe's split: 1, 0.5 or 0."""
    if job.answers is not None:
        return imported(job.answers, load_examples(bench.folder(job.data), job.graph), bench.recipe.split, job.graph)
    with bench.opened(job) as o:
        cost = trained(o, job, bench.store.work(job.id), bench.told) if job.kind == "trained" else {}
        examples = load_examples(o.folder, job.graph, split=bench.recipe.split)
        batches, began = list[int](), time.perf_counter()

        def count(done: int, total: int) -> None:
            batches.append(done)
            bench.told(f"asking question {done} of {total}")

        found = evaluate(
            o.model,
            o.processor,
            job.graph,
            data=o.folder,
            split=bench.recipe.split,
            context=job.config.context_asked,
            features=o.reader,
            progress=count,
        )
        seconds = time.perf_counter() - began
    scores = {
        t: {e.id: score(said[e.id], e.answers[t]) for e in examples if e.id in said}
        for t, said in found.answers.items()
    }
    spent = {"eval_seconds": seconds, "seconds_per_eval_batch": seconds / max(1, len(batches))}
    return Measured(scores, {**cost, **spent})


class _Answered(Strict):
    """One line of an outside model's answers."""

    id: str
    answers: dict[str, Annotated[tuple[str, ...], Field(strict=False)]]


def imported(path: Path, examples: list[Example], split: str, graph: TaskGraph) -> Measured:
    """Scores an outside model's answers.

    Args:
        path: one object a line; an example that it leaves out is left out here, an empty list scores 0.
        examples: all of the data folder.
        split: the part that counts.

    Raises:
        DataError: E201 to E203 for a file that cannot be read, E224 for examples or tasks that the data has not, an
            example answered twice, or no answer to anything of the split.
    """
    faults, known, seen = Faults(path), {e.id: e for e in examples}, set[str]()
    scores: Scores = {}
    for line, said in read_lines(path, _Answered, faults):
        example = known.get(said.id)
        if example is None:
            faults.add(line, "E224", f"no example '{said.id}' in the data.{did_you_mean(said.id, known)}")
            continue
        if said.id in seen:
            faults.add(line, "E224", f"example '{said.id}' is answered twice")
        seen.add(said.id)
        for task, chosen in said.answers.items():
            if task not in graph.tasks:
                faults.add(line, "E224", f"no task '{task}' in the graph.{did_you_mean(task, graph.names)}")
            elif example.split == split and task in example.answers:
                scores.setdefault(task, {})[said.id] = score(chosen, example.answers[task])
    faults.raise_any()
    if not scores:
        raise DataError("E224", f"answers nothing of split '{split}'", where=path)
    return Measured({t: scores[t] for t in graph.names if t in scores})


MEASURES: Mapping[str, Callable[[Bench, Job], Measured]] = {
    "accuracy": accuracy,
    "inference": inference,
    "masks": masks,
    "repair": repair,
    "federated": federated,
    "layers": layers,
    "collisions": collisions,
    "radio": radio,
    "mechanism": mechanism,
}

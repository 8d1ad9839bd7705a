"""What the results say: means by arm, differences to ours, costs; and results.csv with every job's numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from contextlora.graph import TaskGraph
from contextlora.reports.jobs import Job, Point, points, unique
from contextlora.reports.kinds import KINDS
from contextlora.reports.recipe import Recipe
from contextlora.reports.statistics import Interval, Scores, difference, mean
from contextlora.reports.store import Store

ALL = "mean of tasks"
COSTS = (
    "trained_parameters",
    "sent_parameters",
    "sent_bytes",
    "joules",
    "heard",
    "collision",
    "routed",
    "updates",
    "samples",
    "train_seconds",
    "seconds_per_update",
    "eval_seconds",
    "seconds_per_eval_batch",
    "peak_memory_mb",
    "peak_gpu_memory_mb",
)
MADE = ("machine", "device", "threads", "torch", "date")
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One number of a table.

    Attributes:
        scenario, point, task: where it was measured.
        arm: whose it is; of a difference, the rival's.
        value: with its interval.
    """

    scenario: str
    point: Point
    task: str
    arm: str
    value: Interval


class Findings:
    """All that is known of a comparison so far.

    Args:
        recipe: what is compared.
        jobs: all of its cells.
        store: where the results are.
    """

    def __init__(self, recipe: Recipe, jobs: Sequence[Job], store: Store):
        self.recipe, self.jobs, self.kind = recipe, jobs, KINDS[recipe.measure]
        self.results = {j.id: r for j in unique(jobs) if (r := store.result(j.id)) is not None}
        self.total, self.done = len(unique(jobs)), len(self.results)

    @cached_property
    def missing(self) -> list[str]:
        """The jobs that are not done."""
        return [j.title for j in unique(self.jobs) if j.id not in self.results]

    @cached_property
    def cells(self) -> dict[tuple[str, Point], dict[str, dict[int, Result]]]:
        """By scenario and point, then by arm, the results by seed. One that no seed changes is there once, as -1."""
        found: dict[tuple[str, Point], dict[str, dict[int, Result]]] = {}
        for job in self.jobs:
            if (result := self.results.get(job.id)) is not None:
                seeds = found.setdefault((job.data.scenario, job.point), {}).setdefault(job.arm, {})
                seeds[-1 if job.kind != "trained" and self._for_any_seed(job) else job.seed] = result
        return found

    def _for_any_seed(self, job: Job) -> bool:
        same = (job.arm, job.data.scenario, job.point)
        return len({j.id for j in self.jobs if (j.arm, j.data.scenario, j.point) == same}) == 1

    def graph(self, scenario: str) -> TaskGraph:
        """The tasks of a scenario."""
        return next(j.data.graph for j in self.jobs if j.data.scenario == scenario)

    def tasks(self, scenario: str) -> list[str]:
        """The tasks that the tables show, in declared order."""
        graph = self.graph(scenario)
        if self.recipe.read == "last":
            return [graph.levels()[-1][-1]]
        return [*graph.names, *([ALL] if len(graph.names) > 1 else [])]

    @cached_property
    def lines(self) -> list[Line]:
        """The mean of every arm, task, point and scenario that is measured."""
        found = []
        for (scenario, point), arms in self.cells.items():
            for task in self.tasks(scenario):
                for arm, results in arms.items():
                    scores, _, _ = matrix(results, task)
                    if scores.size:
                        found.append(Line(scenario, point, task, arm, mean(scores)))
        return found

    @cached_property
    def differences(self) -> list[Line]:
        """Ours minus every other arm, over the seeds and items that both have.

        Of a single arm over a sweep: every point minus the sweep's first.
        """
        if len(self.recipe.arms) == 1:
            return self._along_sweep()
        found, ours = [], self.recipe.ours
        for (scenario, point), arms in self.cells.items():
            for task in self.tasks(scenario):
                for arm in (a for a in arms if a != ours and ours in arms):
                    one, other = paired(arms[ours], arms[arm], task)
                    if one.size and other.size:
                        found.append(Line(scenario, point, task, arm, difference(one, other)))
        return found

    def _along_sweep(self) -> list[Line]:
        found, ours = [], self.recipe.ours
        first = next(points(self.recipe.sweep))
        for (scenario, point), arms in self.cells.items():
            start = self.cells.get((scenario, first), {})
            for task in self.tasks(scenario) if start and point != first else ():
                one, other = paired(arms[ours], start[ours], task)
                if one.size and other.size:
                    found.append(Line(scenario, point, task, ours, difference(one, other)))
        return found

    @cached_property
    def differences_title(self) -> str:
        """What `differences` are, in a few words."""
        ours = self.recipe.ours
        if len(self.recipe.arms) > 1:
            return f"{ours} minus each other"
        first = ", ".join(f"{k} {v}" for k, v in next(points(self.recipe.sweep)))
        return f"{ours} minus itself at {first}" if first else "differences"

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """By scenario and arm, the mean of each cost over seeds and points."""
        found = []
        for scenario in self.recipe.scenarios:
            for arm in self.recipe.arms:
                each = {
                    j.id: self.results[j.id]["cost"]
                    for j in self.jobs
                    if j.data.scenario == scenario and j.arm == arm and j.id in self.results
                }
                if each:
                    known = [c for c in COSTS if any(c in e for e in each.values())]
                    means = {c: float(np.mean([e[c] for e in each.values() if c in e])) for c in known}
                    found.append({"scenario": scenario, "arm": arm, **means})
        return found


def matrix(results: Mapping[int, Result], task: str, part: str = "") -> tuple[Scores, list[int], list[str]]:
    """Scores of a task, (seeds, items), with its seeds and its items: those that all seeds have.

    Args:
        results: by seed.
        part: of results that have parts, such as one step of several; "" means their own scores.
    """
    seeds = sorted(results)
    tables = [_items(results[s], task, part) for s in seeds]
    items = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    return np.array([[t[i] for i in items] for t in tables]).reshape(len(seeds), len(items)), seeds, items


def paired(
    ours: Mapping[int, Result], other: Mapping[int, Result], task: str, parts: tuple[str, str] = ("", "")
) -> tuple[Scores, Scores]:
    """Both tables over the items that both have, and the same seeds; one that no seed changes keeps its single row.

    Args:
        parts: which part of either side, as in `matrix`.
    """
    if -1 not in ours and -1 not in other:
        common = ours.keys() & other.keys()
        ours, other = ({s: r for s, r in side.items() if s in common} for side in (ours, other))
    (one, _, first), (two, _, second) = matrix(ours, task, parts[0]), matrix(other, task, parts[1])
    both = sorted(set(first) & set(second))
    at = [[items.index(i) for i in both] for items in (first, second)]
    return one[:, at[0]], two[:, at[1]]


def _items(result: Result, task: str, part: str) -> dict[str, float]:
    """A task's scores by item. ALL is the mean over tasks of the items that every task has."""
    scores: dict[str, dict[str, float]] = parts_of(result).get(part, {})
    if task != ALL:
        return scores.get(task, {})
    items = set.intersection(*(set(s) for s in scores.values())) if scores else set[str]()
    return {i: sum(s[i] for s in scores.values()) / len(scores) for i in items}


def parts_of(result: Result) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by part, task and item; the part "" are the result's own."""
    return {"": result["scores"], **result.get("parts", {})}


def place(scenario: str, point: Point, *more: str) -> list[str]:
    """A scenario's name (of a data folder, its last part), the sweep's values, and what else tells a row."""
    return [scenario.rstrip("/").rpartition("/")[2], *(f"{v}" for _, v in point), *more]


# --- as files --------------------------------------------------------------------------------------------------------


def results_csv(findings: Findings) -> str:
    """One row for each job and task; of a measure with parts, for each job, task and part."""
    kind, text = findings.kind, io.StringIO()
    names = ["recipe", "preset", "scenario", "task", "dependent", "level", "arm", *findings.recipe.sweep, "seed"]
    names += [kind.part] * bool(kind.part)
    writer = csv.DictWriter(text, [*names, kind.unit, "items", "id", *COSTS, *MADE], lineterminator="\n")
    writer.writeheader()
    for job in findings.jobs:
        if (result := findings.results.get(job.id)) is not None:
            writer.writerows(_rows(findings, job, result))
    return text.getvalue()


def _rows(findings: Findings, job: Job, result: Result) -> Iterable[dict[str, Any]]:
    recipe, kind = findings.recipe, findings.kind
    of_job: dict[str, Any] = {
        "recipe": recipe.name,
        "preset": recipe.preset,
        "scenario": job.data.scenario,
        "arm": job.arm,
    }
    of_job |= {**dict(job.point), "seed": job.seed, "id": job.id}
    of_job |= {m: result["made"].get(m, "") for m in MADE}
    for part, tasks in parts_of(result).items():
        cost = {**result["cost"], **result.get("part_cost", {}).get(part, {})}
        named = {kind.part: part or kind.whole} if kind.part else {}
        for task, scores in tasks.items():
            if scores:
                value = {kind.unit: sum(scores.values()) / len(scores), "items": len(scores)}
                costs = {c: cost.get(c, "") for c in COSTS}
                yield {**of_job, "task": task, **result["graph"].get(task, {}), **named, **value, **costs}


def as_data(findings: Findings) -> dict[str, Any]:
    """The numbers as JSON can hold them.

    Differences only of measures without parts: where there are parts the views take theirs inside one job, and between
    jobs a time, say, differs by what else the machine does.
    """

    def plain(line: Line) -> dict[str, Any]:
        where = {"scenario": line.scenario, "point": dict(line.point), "task": line.task, "arm": line.arm}
        return {**where, **vars(line.value)}

    return {
        "done": findings.done,
        "total": findings.total,
        findings.recipe.measure: [plain(x) for x in findings.lines],
        **({} if findings.kind.part else {"differences": [plain(x) for x in findings.differences]}),
        "costs": findings.costs,
    }

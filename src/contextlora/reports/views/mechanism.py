"""Why a result came out as it did: where tasks start, which layers work, how gradients agree (section III)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from contextlora.reports.charts import heat
from contextlora.reports.grids import Grid, Rows, Section
from contextlora.reports.statistics import Interval, difference, mean
from contextlora.reports.tables import ALL, Findings, Result, matrix, paired, place

STARTS = {"none": "no block", "prerequisites": "prerequisites' blocks", "": "all blocks, trained"}  # by part
START_NOTE = (
    "Mean answer loss, nats a token, on a few batches of the split, with 95 % intervals over seeds and batches drawn "
    "together. ContextLoRA starts to train a dependent task on its prerequisites' blocks: where their push, the loss "
    "with them minus the loss with no block, is above zero, they push their own tasks' answers instead of helping it "
    "start. A joint adapter has no blocks of tasks: only its loss with everything on is told."
)
LAYER_NOTE = (
    "Change of the task's loss, nats a token, when one block is masked in one decoder layer alone: above zero "
    "(orange) the block works there. Means over seeds on two batches."
)
COSINE_NOTE = (
    "Cosine of the gradients of two tasks' losses with respect to all blocks at once, as joint training would have "
    "them: below zero (purple) one undoes what the other learns. Means over seeds; small batches draw cosines to "
    "zero."
)


def sections(findings: Findings) -> list[Section]:
    """Starting losses, layers by blocks, tasks by tasks."""
    layers, cosines = list[tuple[str, str]](), list[tuple[str, str]]()
    for (scenario, point), arms in findings.cells.items():
        for arm, results in arms.items():
            name = ", ".join(place(scenario, point, arm))
            layers += [(f"{name}, {task}", svg) for task, svg in _layers(results).items()]
            cosines.append((name, _cosines(results)))
    return [
        Section("Where dependent tasks start", _starts(findings), note=START_NOTE),
        Section("Which layers a block works in", figures=layers, note=LAYER_NOTE),
        Section("Whether tasks pull the same way", figures=cosines, note=COSINE_NOTE),
    ]


def _starts(findings: Findings) -> list[Grid]:
    losses, push = Rows(), Rows()
    for (scenario, point), arms in findings.cells.items():
        for arm, task in product(arms, (t for t in findings.tasks(scenario) if t != ALL)):
            where = place(scenario, point, task, arm)
            for part, column in STARTS.items():
                scores = matrix(arms[arm], task, part)[0]
                if scores.size:
                    losses.add(where, column, mean(scores))
            given, base = paired(arms[arm], arms[arm], task, ("prerequisites", "none"))
            if given.size:
                push.add(where, "push", difference(given, base))
    heads, seeds, style = (
        ["scenario", *findings.recipe.sweep, "task", "arm"],
        findings.recipe.seeds,
        findings.kind.style,
    )
    columns, signed = losses.columns(STARTS.values()), replace(style, signed=True, against=0.0)
    return [
        Grid("answer loss, nats a token", heads, columns, losses.found, style, seeds),
        Grid("what prerequisites add; * where the interval excludes 0", heads, ["push"], push.found, signed, seeds),
    ]


def _layers(results: Mapping[int, Result]) -> dict[str, str]:
    """By dependent task, the heat map of layers and blocks; of an arm without blocks of tasks, nothing."""
    first = next(iter(results.values()))["detail"].get("layers", {})
    found = {}
    for task, one in first.items():
        change = _mean([r["detail"]["layers"][task]["change"] for r in results.values()])
        rows = [f"layer {path.rpartition('.')[2]}" for path in one["layers"]]
        found[task] = _drawn(change, rows, one["blocks"], "+.3f", ("masked block", "in this layer alone"))
    return found


def _cosines(results: Mapping[int, Result]) -> str:
    tasks = next(iter(results.values()))["detail"]["alignment"]["tasks"]
    cosine = _mean([r["detail"]["alignment"]["cosine"] for r in results.values()])
    return _drawn(cosine, tasks, tasks, "+.2f", ("task", "task"))


def _mean(tables: list[list[list[float | None]]]) -> NDArray[np.float64]:
    """The mean over seeds; NaN where one has no number."""
    return np.asarray(np.mean(np.array(tables, dtype=np.float64), axis=0))


def _drawn(values: NDArray[np.float64], rows: list[str], columns: list[str], form: str, said: tuple[str, str]) -> str:
    def number(value: Interval | float) -> str:
        return f"{value:{form}}"

    cells = {(r, c): float(v) for r, line in zip(rows, values, strict=True) for c, v in zip(columns, line, strict=True)}
    return heat({k: v for k, v in cells.items() if not np.isnan(v)}, rows, columns, number, said)

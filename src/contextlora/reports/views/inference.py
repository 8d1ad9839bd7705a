"""Seconds of an arm and of the plain base model on the same batches, timed in turn, and their ratio (section VII-A)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from contextlora.reports.charts import bars
from contextlora.reports.grids import Grid, Rows, Section
from contextlora.reports.statistics import Interval, Scores, difference, mean
from contextlora.reports.tables import ALL, Findings, paired, place

BASE = "base model"  # the part
TIMED = ("the arm", "the base model beside it")
NOTE = (
    "Both answer the very same batch one right after the other, in turn, so that what slows the machine down slows "
    "both: the ratio is worth more than the seconds. It is the geometric mean of the batches' ratios, with its 95 % "
    "interval over rounds and batches drawn together; of three or four batches such intervals are too narrow. A base "
    "model as an arm is timed against itself: its ratio shows what chance does."
)


def sections(findings: Findings) -> list[Section]:
    """One table of seconds, one of ratios, and bars."""
    seconds, ratios = Rows(), Rows()
    drawn: dict[str, dict[str, dict[str, Interval]]] = {}
    for (scenario, point), arms in findings.cells.items():
        series = drawn.setdefault(", ".join(place(scenario, point)), {})
        for arm, task in product(arms, findings.tasks(scenario)):
            mine, base = paired(arms[arm], arms[arm], task, ("", BASE))
            if not mine.size:
                continue
            where = place(scenario, point, task, arm)
            seconds.add(where, TIMED[0], mean(mine))
            seconds.add(where, TIMED[1], mean(base))
            ratios.add(where, "ratio", ratio(mine, base))
            if task != ALL:
                series.setdefault(arm, {})[task] = mean(mine)
                series.setdefault(f"base model beside {arm}", {})[task] = mean(base)
    heads, count = ["scenario", *findings.recipe.sweep, "task", "arm"], findings.recipe.seeds
    over = "the arm's seconds over the base model's; * where the interval excludes 1"
    tables = [
        Grid("seconds for one batch", heads, TIMED, seconds.found, findings.kind.style, count),
        Grid(over, heads, ["ratio"], ratios.found, replace(findings.kind.style, against=1.0), count),
    ]
    figures = [(name, bars(series, findings.kind.label)) for name, series in drawn.items() if series]
    return [Section("What was found", tables, figures, note=NOTE)]


def ratio(arm: Scores, base: Scores) -> Interval:
    """The geometric mean of arm / base, both (rounds, batches) of the same batches, with its interval."""
    found = difference(np.log(arm), np.log(base))
    middle, low, high = (float(np.exp(x)) for x in (found.mean, found.low, found.high))
    return Interval(middle, low, high, found.seeds, found.items)

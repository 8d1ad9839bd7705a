"""One task's answers poisoned, then repaired: how much comes back, and at what cost (ContextLoRA section VII-B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from contextlora.reports.charts import lines
from contextlora.reports.grids import Grid, Rows, Section, plain_table
from contextlora.reports.statistics import Interval, difference, mean
from contextlora.reports.tables import Findings, Result, matrix, paired, place

STAGES = {  # by step, its column: with blocks and without, the third step touches the one task, the fourth the rest
    "clean": "clean",
    "poisoned": "poisoned",
    "repaired": "repaired or continued",
    "continued": "repaired or continued",
    "descendants": "descendants or retrained",
    "retrained": "descendants or retrained",
}
COLUMNS = tuple(dict.fromkeys(STAGES.values()))
MARKED = "* where the interval excludes 0"
COSTS = {
    "trained_parameters": ("trained parameters", 0),
    "updates": ("updates of a parameter", 0),
    "samples": ("samples seen", 0),
    "train_seconds": ("training, s", 1),
}
NOTE = (
    "All training answers of one task are shuffled among themselves. With a block for each task, that block is reset "
    "and trained again on the clean answers (repaired), then the blocks that were trained on top of it (descendants). "
    "A joint adapter goes on with the clean answers of that task alone (continued), or is trained from scratch on all "
    "(retrained, which is the clean training again). Means with 95 % intervals over seeds and items drawn together."
)
COST_NOTE = (
    "Means over seeds. Clean and poisoned are not part of a repair. Every method sees each sample once an epoch. The "
    "poisoned training's seconds hold the layers below the blocks too, which the others share and have computed "
    "before."
)


def sections(findings: Findings) -> list[Section]:
    """Accuracy at every step with a figure for each arm, what is still lost, ours against others, and the costs."""
    heads, seeds = ["scenario", *findings.recipe.sweep, "task", "arm"], findings.recipe.seeds
    accuracy, lost, ahead, figures = Rows(), Rows(), Rows(), list[tuple[str, str]]()
    for (scenario, point), arms in findings.cells.items():
        for arm, results in arms.items():
            series: dict[str, dict[str, Interval]] = {}
            for task, (stage, part) in product(findings.tasks(scenario), stages(results).items()):
                where, scores = place(scenario, point, task, arm), matrix(results, task, part)[0]
                accuracy.add(where, stage, mean(scores))
                series.setdefault(task, {})[part or "clean"] = mean(scores)
                if part:
                    lost.add(where, stage, difference(*paired(results, results, task, (part, ""))))
                if arm != findings.recipe.ours and stage in (mine := stages(arms.get(findings.recipe.ours, {}))):
                    sides = paired(arms[findings.recipe.ours], results, task, (mine[stage], part))
                    if sides[0].size:
                        ahead.add(where, stage, difference(*sides))
            title = ", ".join([*place(scenario, point, arm), f"{poisoned(results)} poisoned"])
            figures.append((title, lines(series, findings.kind.label, "step")))
    style = findings.kind.style
    against = replace(style, signed=True, against=0.0)
    tables = [
        Grid("accuracy at every step", heads, accuracy.columns(COLUMNS), accuracy.found, style, seeds),
        Grid(f"against clean training; {MARKED}", heads, lost.columns(COLUMNS), lost.found, against, seeds),
        Grid(
            f"{findings.recipe.ours} minus each other; {MARKED}",
            heads,
            ahead.columns(COLUMNS),
            ahead.found,
            against,
            seeds,
        ),
    ]
    costs = f'<div class="wide">{plain_table(*costs_of_steps(findings))}</div>'
    return [
        Section("What was found", tables, figures, note=NOTE),
        Section("What each step cost", below=costs, note=COST_NOTE),
    ]


def stages(results: Mapping[int, Result]) -> dict[str, str]:
    """By column, the part of an arm's results that stands in it, in the order of the steps."""
    found = {"clean": ""} if results else {}
    for result in results.values():
        found |= {STAGES[step]: step for step in result["parts"]}
    return found


def poisoned(results: Mapping[int, Result]) -> str:
    """The task whose answers were shuffled."""
    return str(next(iter(results.values()))["detail"]["poisoned"])


def costs_of_steps(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of costs, means over seeds."""
    rows = []
    for (scenario, point), arms in findings.cells.items():
        for arm, results in arms.items():
            for part in stages(results).values():
                each = [r["part_cost"][part] if part else r["cost"] for r in results.values()]
                trained = next(iter(results.values()))["detail"]["trained"][part or "clean"]
                numbers = [f"{np.mean([e[c] for e in each]):,.{digits}f}" for c, (_, digits) in COSTS.items()]
                rows.append([*place(scenario, point, arm, part or "clean", ", ".join(trained)), *numbers])
    heads = ["scenario", *findings.recipe.sweep, "arm", "step", "trained tasks", *(name for name, _ in COSTS.values())]
    return heads, rows

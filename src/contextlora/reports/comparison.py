"""The page of a comparison: one self-contained HTML file, whatever part of the jobs is done. All text is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from contextlora.reports.charts import bars, lines
from contextlora.reports.store import write_whole
from contextlora.reports.tables import ALL, Findings, Line, place, results_csv, shown

COUNTED = {
    "trained_parameters": ("trained parameters", 0),
    "updates": ("updates of a parameter", 0),
    "samples": ("samples seen", 0),
    "train_seconds": ("training, s", 1),
    "seconds_per_update": ("an update, s", 3),
    "eval_seconds": ("measuring, s", 1),
    "seconds_per_eval_batch": ("a batch, s", 3),
    "peak_memory_mb": ("peak memory, MB", 0),
    "peak_gpu_memory_mb": ("peak GPU memory, MB", 0),
}
MISSING = 20  # jobs that are listed by name


def write_comparison(findings: Findings, folder: Path, command: Sequence[str]) -> Path:
    """Writes report.html and results.csv into a comparison's folder; returns the page's path. Raises RunError E523."""
    write_whole(folder / "results.csv", results_csv(findings))
    write_whole(folder / "report.html", page(findings, command))
    return folder / "report.html"


def page(findings: Findings, command: Sequence[str]) -> str:
    """The page's text."""
    recipe = findings.recipe
    what = "accuracy in percent" if recipe.measure == "accuracy" else "seconds for one batch of four, to all answers"
    template = Template(resources.files(__package__).joinpath("comparison.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(recipe.title),
        subtitle=escape(f"{recipe.paper}. Preset {recipe.preset}, {recipe.model}, {recipe.seeds} seeds."),
        state=_state(findings),
        figures="".join(_figures(findings)),
        lines=_table(findings, findings.lines),
        lines_note=escape(
            f"Mean {what} with its 95 % interval, over seeds and items drawn together (10,000 bootstrap resamples)."
            + (" With one seed an interval covers the choice of items alone, not another run." * _one_seed(findings))
        ),
        differences_title=escape(findings.differences_title),
        differences=_table(findings, findings.differences, signed=True),
        differences_note="Paired: the same seeds and the same items on both sides, drawn together. Coloured and marked "
        "* where the 95 % interval excludes 0; with many rows, one in twenty does so by chance.",
        published=_published(findings),
        published_note=escape(recipe.published.note),
        costs=_costs(findings),
        costs_note="Means over seeds and sweep points. Methods may see the same samples in a different number of "
        "updates: the number given is that of the parameters that move most often.",
        facts=_facts(findings, command),
    )


def _state(findings: Findings) -> str:
    if findings.done == findings.total:
        return ""
    named = "".join(f"<li>{escape(t)}</li>" for t in findings.missing[:MISSING])
    more = len(findings.missing) - MISSING
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    text = f"{findings.done} of {findings.total} jobs are done; run the same command again to go on. Not yet done:"
    return f'<section class="part"><h2>{text}</h2><ul>{named}</ul>{rest}</section>'


def _one_seed(findings: Findings) -> bool:
    return any(line.value.seeds == 1 for line in findings.lines)


def _figures(findings: Findings) -> list[str]:
    """One figure for each scenario; bars over a sweep get one for each of its points too."""
    recipe, found = findings.recipe, []
    for scenario in recipe.scenarios:
        mine = [x for x in findings.lines if x.scenario == scenario and x.task != ALL]
        if recipe.figure == "lines":
            parts = {scenario: lines(_over_sweep(findings, mine), recipe.measure, ", ".join(recipe.sweep))}
        else:
            points = dict.fromkeys(x.point for x in mine)
            named = {p: ", ".join([scenario, *(f"{k} {v}" for k, v in p)]) for p in points}
            parts = {n: bars(_by_task(mine, p), recipe.measure) for p, n in named.items()}
        found += [f'<h3>{escape(name)}</h3><div class="figure">{svg}</div>' for name, svg in parts.items() if mine]
    return found


def _by_task(mine: Sequence[Line], point: Any) -> dict[str, dict[str, Any]]:
    series: dict[str, dict[str, Any]] = {}
    for x in (x for x in mine if x.point == point):
        series.setdefault(x.arm, {})[x.task] = x.value
    return series


def _over_sweep(findings: Findings, mine: Sequence[Line]) -> dict[str, dict[str, Any]]:
    series: dict[str, dict[str, Any]] = {}
    several = len({x.task for x in mine}) > 1
    alone = len(findings.recipe.arms) == 1
    for x in mine:
        name = x.task if alone and several else f"{x.arm}, {x.task}" if several else x.arm
        series.setdefault(name, {})[", ".join(f"{v}" for _, v in x.point)] = x.value
    return series


def _table(findings: Findings, found: Sequence[Line], *, signed: bool = False) -> str:
    """One row for each place, one column for each arm."""
    if not found:
        return '<p class="note">Nothing to show yet.</p>'
    arms = [a for a in findings.recipe.arms if any(x.arm == a for x in found)]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for x in found:
        value, interval = shown(x.value, findings.recipe.measure, signed=signed)
        clear = signed and x.value.without_zero
        better = (x.value.mean > 0) == (findings.recipe.measure == "accuracy")
        kind = (' class="good"' if better else ' class="bad"') if clear else ""
        mark = " *" if clear else ""
        count = "1 seed" if x.value.seeds == 1 else f"{x.value.seeds} seeds"
        interval += f", {count}" if x.value.seeds < findings.recipe.seeds else ""
        cell = f'<span{kind}>{value}{mark}</span><span class="range">{interval}</span>'
        rows.setdefault(tuple(place(x)), {})[x.arm] = cell
    heads = ["scenario", *findings.recipe.sweep, "task"]
    top = "".join(f"<th>{escape(h)}</th>" for h in heads) + "".join(f'<th class="n">{escape(a)}</th>' for a in arms)
    body = ""
    for where, cells in rows.items():
        words = "".join(f"<td>{escape(w)}</td>" for w in where)
        numbers = "".join(f'<td class="n">{cells.get(a, "")}</td>' for a in arms)
        body += f"<tr>{words}{numbers}</tr>"
    return f"<table><tr>{top}</tr>{body}</table>"


def _published(findings: Findings) -> str:
    rows = findings.recipe.published.rows
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    if not rows:
        return '<p class="note">The paper prints no number for this.</p>'
    return _plain_table(
        ["", *columns],
        [
            [name, *("not printed" if row.get(c) is None else f"{row[c]:g}" for c in columns)]
            for name, row in rows.items()
        ],
    )


def _costs(findings: Findings) -> str:
    known = [c for c in COUNTED if any(c in row for row in findings.costs)]
    rows = [
        [row["scenario"], row["arm"], *(f"{row[c]:,.{COUNTED[c][1]}f}" if c in row else "" for c in known)]
        for row in findings.costs
    ]
    return _plain_table(["scenario", "arm", *(COUNTED[c][0] for c in known)], rows)


def _facts(findings: Findings, command: Sequence[str]) -> str:
    recipe = findings.recipe
    made = [r["made"] for r in findings.results.values()]
    facts: Mapping[str, Any] = {
        "command": " ".join(shlex.quote(w) for w in command),
        "jobs": f"{findings.done} of {findings.total}",
        "model": f"{recipe.model}, {recipe.dtype}",
        "machine": "; ".join(sorted({m["machine"] for m in made})),
        "torch": ", ".join(sorted({m["torch"] for m in made})),
        "from": min((m["date"] for m in made), default=""),
        "to": max((m["date"] for m in made), default=""),
        "pictures": ", ".join(f"{k} {v}" for k, v in recipe.data.model_dump().items()),
        "measured on": f"split {recipe.split}",
        "alignment": _settings(recipe.align.model_dump()),
        "training, all arms": _settings(recipe.train.model_dump(exclude_unset=True)),
        **{f"arm {name}": _settings(arm.model_dump(exclude_unset=True)) for name, arm in recipe.arms.items()},
        **{f"sweep, {key}": ", ".join(map(str, values)) for key, values in recipe.sweep.items()},
    }
    return _plain_table(["", ""], [[k, str(v)] for k, v in facts.items()])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"

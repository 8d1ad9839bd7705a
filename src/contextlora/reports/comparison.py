"""The page of a comparison: one self-contained HTML file, whatever part of the jobs is done. All text is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from contextlora.reports.grids import Section, plain_table, whole_page
from contextlora.reports.store import write_whole
from contextlora.reports.tables import Findings, results_csv
from contextlora.reports.views import sections

COUNTED = {
    "trained_parameters": ("trained parameters", 0),
    "sent_parameters": ("parameters a message", 0),
    "sent_bytes": ("bytes a device and round", 0),
    "joules": ("J a round", 4),
    "heard": ("share heard", 3),
    "collision": ("worst cluster's collision rate, counted", 3),
    "routed": ("routed right", 3),
    "updates": ("updates of a parameter", 0),
    "samples": ("samples seen", 0),
    "train_seconds": ("training, s", 1),
    "seconds_per_update": ("an update, s", 3),
    "eval_seconds": ("measuring, s", 1),
    "seconds_per_eval_batch": ("a batch, s", 3),
    "peak_memory_mb": ("peak memory, MB", 0),
    "peak_gpu_memory_mb": ("peak GPU memory, MB", 0),
}
COSTS_NOTE = (
    "Means over seeds and sweep points. Methods may see the same samples in a different number of updates: the number "
    "given is that of the parameters that move most often."
)
MISSING = 20  # jobs that are listed by name


def write_comparison(findings: Findings, folder: Path, command: Sequence[str]) -> Path:
    """Writes report.html and results.csv into a comparison's folder; returns the page's path. Raises RunError E523."""
    write_whole(folder / "results.csv", results_csv(findings))
    write_whole(folder / "report.html", page(findings, command))
    return folder / "report.html"


def page(findings: Findings, command: Sequence[str]) -> str:
    """The page's text."""
    recipe = findings.recipe
    shown = [
        *sections(findings),
        Section("What the paper says", below=_published(findings), note=recipe.published.note),
        Section("What it cost", below=_costs(findings), note=findings.kind.costs + COSTS_NOTE),
        Section("What was run", below=_facts(findings, command)),
    ]
    subtitle = f"{recipe.paper}. Preset {recipe.preset}, {recipe.model}, {recipe.seeds} seeds."
    return whole_page(recipe.title, subtitle, shown, _state(findings))


def _state(findings: Findings) -> str:
    if findings.done == findings.total:
        return ""
    named = "".join(f"<li>{escape(t)}</li>" for t in findings.missing[:MISSING])
    more = len(findings.missing) - MISSING
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    text = f"{findings.done} of {findings.total} jobs are done; run the same command again to go on. Not yet done:"
    return f'<section class="part"><h2>{text}</h2><ul>{named}</ul>{rest}</section>'


def _published(findings: Findings) -> str:
    rows = findings.recipe.published.rows
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    if not rows:
        return '<p class="note">The paper prints no number for this.</p>'
    return plain_table(
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
    return plain_table(["scenario", "arm", *(COUNTED[c][0] for c in known)], rows)


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
    return plain_table(["", ""], [[k, str(v)] for k, v in facts.items()])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())

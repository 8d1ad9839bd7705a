"""Tables to paste into docs/results.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median

from configurations import Configuration
from methods import OURS, Row, valid


def markdown(configuration: Configuration, rows: Sequence[Row]) -> str:
    """One configuration's table, and what it says, in words."""
    c = configuration
    first = rows[0]
    fleet = ", ".join(f"{n} {s:g}x {gb:g} GB" for n, (s, gb) in c.devices.items())
    lines = [
        f"### {c.name}: {first.network} of {first.rate:.0f} Mbit/s as measured",
        "",
        f'{fleet}; blocks on layers "{c.layers}", {c.tasks} tasks x {c.batch} samples an update,'
        f" {c.updates} updates x {c.epochs} epochs.",
        "",
        "| method | step s (median, min, n) | all updates s | GB an update | step / exact | all / exact"
        " | cost model | simulator | setting |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(r) for r in rows]
    notes = [f"{r.method} does not fit: {r.lacks}" for r in rows if r.lacks]
    notes += [f"{r.method} failed: {r.failed.splitlines()[-1]}" for r in rows if r.failed]
    notes += [f"{r.method}: slices go to all devices at the end, {r.exchange:.1f} s" for r in rows if r.exchange]
    done = [r for r in rows if not r.failed]
    if done:
        late = max(done, key=lambda r: r.late / r.step)
        worst = max(r.apart for r in done)
        notes.append(
            f"gradients differ by at most {worst:.1g}; emulation at most {late.late:.2f} s late ({late.method})"
        )
    return "\n".join([*lines, "", *(f"* {n}" for n in notes), *_verdict(done), ""])


def _line(r: Row) -> str:
    if r.failed:
        return f"| {r.method} | failed | | | | | | | {r.how} |"
    ratio = [f"{x:.2f}" if x else "" for x in (r.step_ratio, r.ratio)]
    off = [f"{x:.1f} ({100 * (x / r.seconds - 1):+.1f} %)" if x else "" for x in (r.predicted, r.simulated)]
    step = f"{r.step:.2f} ({r.least:.2f}, {r.steps})"
    name = f"{r.method} (does not fit)" if r.lacks else r.method
    name += "" if valid(r) else " (INVALID: machine too busy)"
    return (
        f"| {name} | {step} | {r.seconds:.1f} | {r.gigabytes:.2f} | {' | '.join(ratio)} | {' | '.join(off)} | {r.how} |"
    )


def _verdict(rows: Sequence[Row]) -> list[str]:
    rows = [r for r in rows if valid(r)]
    exact = next((r for r in rows if r.method == "exact"), None)
    others = [r for r in rows if r.method not in OURS]
    if exact is None or not others:
        return []
    lines = []
    for what, some in (("best rival", others), ("best rival that fits", [r for r in others if not r.lacks])):
        if some:
            best = min(some, key=lambda r: r.seconds)
            lines.append(f"* {what}: {best.method}, {best.ratio:.2f}x of exact's time")
    plans = [r for r in rows if r.method in OURS and not r.lacks]
    quickest = min(plans, key=lambda r: r.seconds)
    above = 100 * (exact.seconds / quickest.seconds - 1)
    lines.append(f"* of our plans the quickest is {quickest.method}; exact is {above:.1f} % above it")
    return lines


def summary(rows: Sequence[Row]) -> str:
    """Every method over the configurations that it ran on: time beside exact's, and how far predictions were off."""
    done = [r for r in rows if not r.failed]
    lines = [
        "### All configurations",
        "",
        "| method | configurations | all / exact: least, median, most | cost model off, mean | simulator off, mean |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(r.method for r in done):
        some = [r for r in done if r.method == method]
        ratios = [r.ratio for r in some if r.ratio]
        beside = f"{min(ratios):.2f}, {median(ratios):.2f}, {max(ratios):.2f}" if ratios else ""
        lines.append(f"| {method} | {len(some)} | {beside} | {_off(some)} |")
    return "\n".join([*lines, f"| all plans | {sum(r.predicted > 0 for r in done)} | | {_off(done)} |", ""])


def _off(rows: Sequence[Row]) -> str:
    """Mean absolute deviations of the cost model and of the simulator from what was measured, as two cells."""
    both = [[abs(said / r.seconds - 1) for r in rows if (said := getattr(r, by))] for by in ("predicted", "simulated")]
    return " | ".join(f"{100 * fmean(off):.1f} %" if off else "" for off in both)


def read(path: Path) -> list[Row]:
    """The rows of a file that `--csv` wrote."""
    kinds = {f.name: {"str": str, "float": float, "int": int}[str(f.type)] for f in fields(Row)}
    with path.open(newline="") as f:
        return [Row(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(f)]

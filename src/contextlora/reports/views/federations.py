"""What pages about federations show: accuracy and what travelled, budgets of layers, collisions, the air (SO-LoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from contextlora.reports.charts import heat, lines
from contextlora.reports.grids import Grid, Rows, Section, plain_table
from contextlora.reports.jobs import Point
from contextlora.reports.kinds import Style
from contextlora.reports.statistics import Interval, difference, mean
from contextlora.reports.tables import Findings, Result, matrix, paired, place
from contextlora.reports.views import accuracy

ORACLE = "hard_routing"
TRAVELLED = {
    "trained_parameters": ("trained parameters", "{:,.0f}"),
    "sent_parameters": ("parameters a message", "{:,.0f}"),
    "sent_bytes": ("bytes a device and round", "{:,.0f}"),
    "joules": ("J a round", "{:.4f}"),
    "heard": ("share of receivers in time", "{:.3f}"),
    "collision": ("collision rate, counted", "{:.3f}"),
    "routed": ("prompts routed right", "{:.3f}"),
    "train_seconds": ("simulated in, s", "{:.0f}"),
}
TRAVELLED_NOTE = (
    "Means over seeds. The collision rate is max_l S_l of the worst cluster of the last round, by popcount. Bytes are "
    "those handed to the channel, all slots and rows included; a broadcast counts once. A device that is alone sends "
    "nothing. Routed right: of the prompts of all tasks, those that the gate sent to their own task."
)
GAP_NOTE = "Each method minus hard routing, which knows every input's true task. " + accuracy.PAIRED
Cells = Iterator[tuple[str, Point, str, Mapping[int, Result]]]


def federated(findings: Findings) -> list[Section]:
    """Accuracy by task and method, ours minus each other, the distance to hard routing, bytes, collisions, routes."""
    found = accuracy.sections(findings)
    if (gap := _to_oracle(findings)) is not None:
        found.append(gap)
    heads = ["scenario", *findings.recipe.sweep, "method", *(name for name, _ in TRAVELLED.values())]
    rows = [[*place(s, p, arm), *_costs(results)] for s, p, arm, results in _cells(findings)]
    figures = (
        [("worst collision rate of a cluster", _collisions(findings))] if "devices" in findings.recipe.sweep else []
    )
    travelled = Section("What travelled", (), figures, plain_table(heads, rows), TRAVELLED_NOTE)
    return [*found, travelled, *_routes(findings)]


def _cells(findings: Findings) -> Cells:
    for (scenario, point), arms in findings.cells.items():
        for arm in findings.recipe.arms:
            if arm in arms:
                yield scenario, point, arm, arms[arm]


def _costs(results: Mapping[int, Result]) -> list[str]:
    found = []
    for cost, (_, form) in TRAVELLED.items():
        known = [r["cost"][cost] for r in results.values() if cost in r["cost"]]
        found.append(form.format(np.mean(known)) if known else "")
    return found


def _to_oracle(findings: Findings) -> Section | None:
    oracle = next((n for n, a in findings.recipe.arms.items() if a.federation.get("aggregate") == ORACLE), None)
    if oracle is None or oracle == findings.recipe.ours:
        return None
    rows = Rows()
    for scenario, point, arm, results in _cells(findings):
        routed = findings.cells[scenario, point].get(oracle, {})
        for task in findings.tasks(scenario) if arm != oracle and routed else ():
            one, other = paired(results, routed, task)
            if one.size and other.size:
                rows.add(place(scenario, point, arm), task, difference(one, other))
    style = replace(findings.kind.style, signed=True, against=0.0)
    order = [t for s in findings.recipe.scenarios for t in findings.tasks(s)]
    heads = ["scenario", *findings.recipe.sweep, "method"]
    grid = Grid(
        "minus hard routing", heads, rows.columns(dict.fromkeys(order)), rows.found, style, findings.recipe.seeds
    )
    return Section("Distance to hard routing", [grid], note=GAP_NOTE)


def _collisions(findings: Findings) -> str:
    series: dict[str, dict[str, Interval]] = {}
    for _, point, arm, results in _cells(findings):
        rates = [r["cost"]["collision"] for r in results.values() if "collision" in r["cost"]]
        if rates:
            series.setdefault(arm, {})[str(dict(point)["devices"])] = mean(np.array(rates)[:, None])
    return lines(series, "collision rate", "devices") if series else ""


def _routes(findings: Findings) -> list[Section]:
    """Confusion matrices of the gate, summed over seeds, rows in percent."""
    figures = []
    for scenario, point, arm, results in _cells(findings):
        runs = [run for r in results.values() for run in r.get("detail", {}).get("runs", ()) if "routes" in run]
        if not runs:
            continue
        tasks, counts = runs[0]["tasks"], np.sum([run["routes"] for run in runs], axis=0)[:-1]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        cells = {(t, c): float(shares[i, j]) for i, t in enumerate(tasks) for j, c in enumerate([*tasks, "none"])}
        drawn = heat(cells, tasks, [*tasks, "none"], lambda v: f"{100 * float(v):.0f} %", ("went to", "task"))  # type: ignore[arg-type]
        figures.append((", ".join(place(scenario, point, arm)), drawn))
    return [Section("Where the gate sent prompts", (), figures)] if figures else []


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS_NOTE = (
    "Mean over the linears of a decoder layer. Entropy is eq. 21 over log R, 0 to 1; the budget is the share of a "
    "layer's entries of B that learn, eq. 22. One calibration: no interval."
)


def layers(findings: Findings) -> list[Section]:
    """Entropy and budget over the decoder layers, a line a task (Fig. 5)."""
    figures = []
    for scenario, point, arm, results in _cells(findings):
        for what, label in (("entropy", "entropy / log R"), ("budget", "share that learns")):
            series: dict[str, dict[str, Interval]] = {}
            result = results[min(results)]
            for part, tasks in result["parts"].items():
                kind, _, depth = part.partition(" of layer ")
                for task, linears in tasks.items() if kind == what else ():
                    series.setdefault(task, {})[str(int(depth))] = mean(np.array([[np.mean(list(linears.values()))]]))
            figures.append((", ".join([*place(scenario, point, arm), what]), lines(series, label, "decoder layer")))
    return [Section("Entropy and budget by layer", (), figures, note=LAYERS_NOTE)]


# --- collisions ------------------------------------------------------------------------------------------------------

COLLISION_NOTE = (
    "max over layers of S_l, in percent. Expected is eq. 19, which takes masks to be independent; counted is the "
    "popcount of the devices' own masks. Clusters obey S_max, power and deadline of the first round. Where counts are "
    "planned with, no cluster exceeds S_max; planned with eq. 19, masks that favour the same entries do."
)


def collisions(findings: Findings) -> list[Section]:
    """Collision rate against the number of devices, all together and in clusters (Fig. 4 as captioned)."""
    figures, rows, counts = [], Rows(), Rows()
    for scenario, point, arm, results in _cells(findings):
        series: dict[str, dict[str, Interval]] = {}
        parts = next(iter(results.values()))["parts"]
        for n, what in ((n, what) for n, kinds in parts.items() for what in kinds):
            value = mean(matrix(results, what, n)[0])
            if what.startswith("number"):
                counts.add([*place(scenario, point, arm), n], what, value)
            else:
                series.setdefault(what, {})[n] = value
                rows.add([*place(scenario, point, arm), n], what, value)
        figures.append((", ".join(place(scenario, point, arm)), lines(series, "collision rate", "devices")))
    heads, seeds = ["scenario", *findings.recipe.sweep, "masks", "devices"], findings.recipe.seeds
    grids = [
        Grid("collision rate", heads, _columns(rows), rows.found, findings.kind.style, seeds),
        Grid("clusters", heads, _columns(counts), counts.found, Style(1, 1, higher=False), seeds),
    ]
    return [Section("Collision rate by number of devices", grids, figures, note=COLLISION_NOTE)]


def _columns(rows: Rows) -> Sequence[str]:
    return list(dict.fromkeys(c for row in rows.found.values() for c in row))


# --- radio -----------------------------------------------------------------------------------------------------------

RADIO_NOTE = (
    "One message of the first device to all others; means over runs with 95 % intervals, each run with other places "
    "and fading. per joule: receivers reached in all runs over their joules. missed: of the links of groups that "
    "planning allows, the share that faded below what it counted on. planned: the share of runs whose group planning "
    "allows."
)


def radio(findings: Findings) -> list[Section]:
    """Receivers, joules, receivers per joule and outage of broadcast and unicast, by the message's size."""
    rows = Rows()
    for scenario, point, arm, results in _cells(findings):
        parts = next(iter(results.values()))["parts"]
        for what, sizes in parts.items():
            for size in sizes:
                rows.add([size, *place(scenario, point, arm)[1:]], what, mean(matrix(results, size, what)[0]))
    rows.found = dict(sorted(rows.found.items(), key=lambda row: float(row[0][0].split()[0])))
    heads = ["message", *findings.recipe.sweep, "cast"]
    grid = Grid(
        "one message to all others", heads, _columns(rows), rows.found, findings.kind.style, findings.recipe.seeds
    )
    return [Section("What one message takes", [grid], note=RADIO_NOTE)]

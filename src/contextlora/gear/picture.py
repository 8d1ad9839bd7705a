"""Pictures of a plan at work: a Gantt chart of a step, and the timeline of a whole plan. No torch.

`reports` is above this package, so how a figure becomes the same text each time is said here once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from contextlora.gear.cost import Problem
from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import Group, Plan, PlannedGroup
from contextlora.gear.schedule import Kind
from contextlora.gear.simulate import Event, Trace, simulate
from contextlora.gear.units import show_bytes

# Colour, hatching and words: from light to dark in this order, so that they stay apart without colour.
_LOOKS: dict[Kind, tuple[str, str, str]] = {
    Kind.SEND: ("#dff0d8", "", "activations sent"),
    Kind.FORWARD: ("#9cc3e8", "", "forward"),
    Kind.SEND_GRADIENT: ("#9a6fb5", "", "gradients sent"),
    Kind.BACKWARD: ("#a34b12", "", "backward"),
    Kind.REDUCE: ("#222b3a", "xxx", "all-reduce, with the wait"),
}
_COLOURS = ("#a9c8e6", "#f0bd8d", "#a8d5ba", "#ccb4dd", "#e6a9af", "#c4c9d1", "#dcc878", "#98cfd3")
_RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "contextlora", "font.family": "sans-serif", "font.size": 9}
_INK = "#223"


def gantt(trace: Trace, groups: Sequence[Group], first: int = 0, count: int = 1) -> Figure:
    """Who does what in steps `first` to `first + count - 1`, every bar with its micro-batch; other steps' work is pale.

    Args:
        groups: those that were simulated; their devices are the rows, then the medium or the links in use.
    """
    start = min(sum(s[:first]) for s in trace.steps)
    stop = max(sum(s[: first + count]) for s in trace.steps)
    seen = [e for e in trace.events if e.end > start and e.start < stop]
    rows = [d for g in groups for d in g.devices]
    rows += sorted({e.place for e in seen} - set(rows))
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = _rows(figure, [name.strip("()") for name in rows])
    for e in seen:
        a, b = max(e.start, start) - start, min(e.end, stop) - start
        _event(axes, e, rows.index(e.place), a, b, stop - start, first <= e.step < first + count)
    axes.set_xlim(0, stop - start)
    axes.set_xlabel("seconds")
    kinds = {e.kind for e in seen}
    _legend(axes, [_patch(c, h, text) for k, (c, h, text) in _LOOKS.items() if k in kinds])
    return figure


def timeline(plan: Plan, fleet: Fleet) -> Figure:
    """Which device works on which tasks when: stage after stage; beside a device's name, the most memory it uses."""
    rows = list(fleet.devices)
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = _rows(figure, [_memory(plan, fleet, name) for name in rows])
    start, shades = 0.0, dict[tuple[str, ...], str]()
    for number, stage in enumerate(plan.stages, 1):
        for planned in stage.groups:
            colour = shades.setdefault(planned.group.tasks, _COLOURS[len(shades) % len(_COLOURS)])
            _work(axes, rows, planned, start, plan.seconds, colour)
        if stage.exchange > 0:
            end = start + stage.seconds
            axes.axvspan(end - stage.exchange, end, facecolor="#4a5568", alpha=0.25, hatch="...", linewidth=0)
        axes.text(start, -0.62, f" stage {number}", fontsize=8, color=_INK, va="bottom")
        start += stage.seconds
        axes.axvline(start, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, plan.seconds)
    axes.set_xlabel("seconds" + (", from estimated speeds" if plan.synthetic else ""))
    patches = [_patch(c, "", _plain(", ".join(tasks))) for tasks, c in shades.items()]
    patches += [_patch("white", "////", "frozen layers ahead")] if _streams(plan) else []
    patches += [_patch("#d2d5da", "...", "slices exchanged")] if any(s.exchange > 0 for s in plan.stages) else []
    _legend(axes, patches)
    return figure


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same for a figure of the same things."""
    with matplotlib.rc_context(_RC):
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as SVG where the name ends so, else in the format that its ending names, such as PNG."""
    path = Path(path)
    if path.suffix.lower() == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=160)


def draw(problem: Problem, plan: Plan, folder: str | Path) -> list[Path]:
    """Writes a plan's timeline and the third step of each of its stages, when prefixes run ahead; gives the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {folder / "timeline.svg": timeline(plan, problem.fleet)}
    for number, stage in enumerate(plan.stages, 1):
        groups = [p.group for p in stage.groups]
        made[folder / f"step-{number}.svg"] = gantt(simulate(problem, groups, steps=4), groups, first=2)
    for path, figure in made.items():
        save(figure, path)
    return list(made)


# --- parts -----------------------------------------------------------------------------------------------------------


def _rows(figure: Figure, labels: Sequence[str]) -> Axes:
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [_plain(text) for text in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def _event(axes: Axes, e: Event, row: int, start: float, end: float, span: float, now: bool) -> None:
    colour, hatch, _ = _LOOKS[e.kind]
    dark = e.kind in (Kind.BACKWARD, Kind.REDUCE)
    axes.broken_barh(
        [(start, end - start)],
        (row - 0.36, 0.72),
        facecolor=colour,
        hatch=hatch,
        edgecolor="white" if dark else _INK,
        linewidth=0.5,
        alpha=1.0 if now else 0.3,
    )
    if e.micro >= 0 and (end - start) / span > 0.012 * len(str(e.micro)):
        middle = (start + end) / 2
        ink = "white" if dark and now else _INK
        axes.text(middle, row, str(e.micro), ha="center", va="center", fontsize=7, color=ink, clip_on=True)


def _work(axes: Axes, rows: Sequence[str], planned: PlannedGroup, start: float, whole: float, colour: str) -> None:
    group, seconds = planned.group, planned.predicted.seconds
    for part in (*group.prefix, *group.trainers):
        ahead, row = part in group.prefix, rows.index(part.device)
        axes.broken_barh(
            [(start, seconds)],
            (row - 0.34, 0.68),
            facecolor=colour,
            hatch="////" if ahead else "",
            edgecolor="white",
            linewidth=0.8,
        )
        units = f"units {part.start} to {part.stop - 1}"
        busy = f"{100 * planned.predicted.devices[part.device].busy / seconds:.0f} % busy" if seconds else ""
        said = next((s for s in (f"{units}, {busy}", busy) if len(s) * 0.012 < seconds / whole), "")
        axes.text(
            start + seconds / 2,
            row,
            said,
            ha="center",
            va="center",
            fontsize=7,
            color=_INK,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0} if ahead and said else None,
        )


def _memory(plan: Plan, fleet: Fleet, name: str) -> str:
    used = [g.predicted.devices[name].memory for s in plan.stages for g in s.groups if name in g.group.devices]
    has = show_bytes(fleet.devices[name].memory)
    return f"{name}\n{show_bytes(max(used))} of {has}" if used else f"{name}\nidle, {has}"


def _streams(plan: Plan) -> bool:
    return any(g.group.prefix for s in plan.stages for g in s.groups)


def _patch(colour: str, hatch: str, text: str) -> Patch:
    return Patch(facecolor=colour, hatch=hatch, edgecolor="#99a", linewidth=0.5, label=text)


def _legend(axes: Axes, patches: Iterable[Patch]) -> None:
    axes.legend(handles=list(patches), frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1.02), fontsize=8)


def _plain(text: str) -> str:
    """Text that matplotlib neither hides (a leading underscore) nor reads as a formula (a dollar sign)."""
    return text.replace("$", r"\$").lstrip("_") or text

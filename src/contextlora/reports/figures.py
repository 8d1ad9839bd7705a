"""Figures of a report as SVG text: loss curves, and accuracy before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

COLOURS = ("#2f6db3", "#d1701f", "#2e8b57", "#8a4fb0", "#b8434e", "#6b7280", "#b08900", "#1f8f96")
_RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "contextlora", "font.family": "sans-serif", "font.size": 10}


def loss_curves(losses: Mapping[str, Sequence[float]]) -> str:
    """The loss of each task over its updates (nats a token, log scale) with its running mean."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (task, values) in enumerate(losses.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(range(1, len(values) + 1), smooth(values), color=colour, linewidth=1.8, label=plain(task))
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))  # 0.5 rather than 5 x 10^-1
    axes.set_xlabel("update of the task")
    axes.set_ylabel("loss (nats a token)")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    bare(axes)
    axes.legend(frameon=False, ncols=4, loc="upper right")
    return svg(figure)


def accuracy_bars(
    before: Mapping[str, float], after: Mapping[str, tuple[float, float, float]], majority: Mapping[str, float]
) -> str:
    """Accuracy by task: before, after with its interval (mean, low, high), and a tick at the majority class."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    tasks = list(after)
    for i, task in enumerate(tasks):
        mean, low, high = after[task]
        axes.bar(i - 0.18, before.get(task, 0), 0.34, color="#c9d3df", label="before" if not i else None)
        axes.bar(i + 0.18, mean, 0.34, color=COLOURS[0], label="after" if not i else None)
        axes.errorbar(i + 0.18, mean, [[mean - low], [high - mean]], color="#123", capsize=3, linewidth=1)
        if task in majority:
            place = [i - 0.38, i + 0.38]
            axes.plot(place, [majority[task]] * 2, "--", color="#b8434e", label="" if i else "most frequent answer")
    axes.set_xticks(range(len(tasks)), [plain(t) for t in tasks])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("accuracy")
    bare(axes)
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last 20 values, or the last tenth where that is less."""
    width = max(1, min(20, len(values) // 10))
    total, found = 0.0, list[float]()
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0)
        found.append(total / min(i + 1, width))
    return found


def bare(axes: matplotlib.axes.Axes) -> None:
    """Leaves out what is only frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def plain(text: str) -> str:
    """Text that matplotlib neither hides (a leading underscore) nor reads as a formula (a dollar sign)."""
    return text.replace("$", r"\$").lstrip("_") or text


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same for the same figure."""
    with matplotlib.rc_context(_RC):
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]

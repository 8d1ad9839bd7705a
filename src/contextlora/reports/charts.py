"""Figures of a comparison as SVG text: bars by task, lines over a sweep or steps, heat maps; with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from contextlora.reports.figures import COLOURS, bare, plain, svg
from contextlora.reports.statistics import Interval

Series = Mapping[str, Mapping[str, Interval]]  # by what the legend says, then by the place on the x axis


def bars(series: Series, unit: str, top: float | None = None) -> str:
    """Grouped bars: one group for each place, one bar for each of the series; `top` is where the y axis ends."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    places = list(dict.fromkeys(p for values in series.values() for p in values))
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        at = [places.index(p) + (i - (len(series) - 1) / 2) * width for p in values]
        means = [v.mean for v in values.values()]
        axes.bar(at, means, width * 0.92, color=COLOURS[i % len(COLOURS)], label=plain(name))
        axes.errorbar(at, means, _reach(list(values.values())), fmt="none", ecolor="#123", capsize=2, linewidth=1)
    axes.set_xticks(range(len(places)), [plain(p) for p in places])
    if top is not None:
        axes.set_ylim(0, top)
    axes.set_ylabel(unit)
    bare(axes)
    axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def lines(series: Series, unit: str, label: str) -> str:
    """One line for each of the series over the places, which are numbers or words, with a band for its interval."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    places = list(dict.fromkeys(p for values in series.values() for p in values))
    at = _positions(places)
    for i, (name, values) in enumerate(series.items()):
        colour, x = COLOURS[i % len(COLOURS)], [at[p] for p in values]
        axes.plot(x, [v.mean for v in values.values()], "o-", color=colour, markersize=4, label=plain(name))
        low, high = [v.low for v in values.values()], [v.high for v in values.values()]
        axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.set_xticks([at[p] for p in places], [plain(p) for p in places])
    axes.set_xlabel(plain(label))
    axes.set_ylabel(unit)
    bare(axes)
    axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def heat(
    values: Mapping[tuple[str, str], Interval | float],
    rows: Sequence[str],
    columns: Sequence[str],
    said: Callable[[Interval | float], str],
    axes_said: tuple[str, str],
) -> str:
    """A heat map about zero, each cell with its number; a pair that has no value stays empty.

    Args:
        values: by row and column.
        rows, columns: from above and from the left.
        said: what stands in a cell.
        axes_said: what the columns are, and the rows.
    """
    figure = Figure(figsize=(2.2 + 1.25 * len(columns), 1 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    cells = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in values.items():
        at = rows.index(row), columns.index(column)
        cells[at] = _middle(value)
        axes.text(at[1], at[0], said(value), ha="center", va="center", fontsize=8, color="#123")
    most = np.nanmax(np.abs(cells), initial=0.0) or 1.0
    axes.imshow(cells, cmap="PuOr_r", vmin=-1.6 * most, vmax=1.6 * most, aspect="auto")  # pale enough for the numbers
    axes.set_xticks(range(len(columns)), [plain(c) for c in columns])
    axes.set_yticks(range(len(rows)), [plain(r) for r in rows])
    axes.set_xlabel(axes_said[0])
    axes.set_ylabel(axes_said[1])
    axes.spines[:].set_visible(False)
    return svg(figure)


def _middle(value: Interval | float) -> float:
    return value.mean if isinstance(value, Interval) else value


def _positions(places: Sequence[str]) -> dict[str, float]:
    """Where each place lies on the x axis: at its number, or in order if they are not all numbers."""
    try:
        return {p: float(p) for p in places}
    except ValueError:
        return {p: float(i) for i, p in enumerate(places)}


def _reach(values: Sequence[Interval]) -> list[list[float]]:
    return [[max(0.0, v.mean - v.low) for v in values], [max(0.0, v.high - v.mean) for v in values]]

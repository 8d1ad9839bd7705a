"""Figures of a federation as SVG text: where its devices are, and what its rounds have cost and brought."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from contextlora.federated.protocol import SLOTS
from contextlora.reports.figures import COLOURS, bare, plain, svg
from contextlora.reports.rounds import Round

Floats = NDArray[np.float64]
SHAPES = "osD^vPX*"  # of clusters beyond the colours
INK, PALE = "#1c2733", "#9aa8b7"
WAY = 20  # earlier rounds whose positions the map shows
MANY = 20_000  # points; more are drawn as a picture within the SVG


def device_map(rounds: Sequence[Round], radius: float | None = None) -> str:
    """The devices where they were in the last round, by cluster, and faintly where they came from.

    Args:
        rounds: at least one, the last with positions.
        radius: of the disc that the devices are in, m, if it is known.
    """
    last = rounds[-1]
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots()
    if radius is not None:
        axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor=PALE, linestyle=":"))
    for way in ways(rounds[-1 - WAY :]).values():
        axes.plot(*np.transpose(way), ".-", color=PALE, alpha=0.4, linewidth=1, markersize=3)
    together = [[n for n in group if n in last.positions] for group in last.clusters if len(group) > 1]
    for i, group in enumerate(filter(None, together)):
        _cluster(axes, [last.positions[n] for n in group], i, f"cluster of {group[0]}")
    alone = [g[0] for g in last.clusters if len(g) == 1]
    gone = sorted(last.positions.keys() - {n for g in last.clusters for n in g})
    for names, fill, said in ((alone, INK, "alone"), (gone, "white", "not heard")):
        if at := [last.positions[n] for n in names if n in last.positions]:
            x, y = np.transpose(at)
            axes.scatter(x, y, s=42, color=fill, edgecolor=INK, linewidth=1, label=said, zorder=3)
    for name, place in last.positions.items():
        size = 8 if len(last.positions) <= 40 else 5
        axes.annotate(plain(name), place, xytext=(5, 4), textcoords="offset points", fontsize=size, zorder=4)
    axes.set_aspect("equal")
    axes.set_xlabel("m")
    axes.set_ylabel("m")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), ncols=1 + len(together) // 28)
    return svg(figure)


def _cluster(axes: Axes, at: Sequence[tuple[float, float]], index: int, said: str) -> None:
    """A cluster's devices, tied together in their middle."""
    colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index // len(COLOURS) % len(SHAPES)]
    middle = np.mean(at, axis=0)
    for place in at:
        axes.plot(*np.transpose([middle, place]), color=colour, alpha=0.35, linewidth=1.2, zorder=1)
    x, y = np.transpose(at)
    axes.scatter(x, y, s=52, color=colour, marker=shape, label=plain(said), zorder=3)


def ways(rounds: Sequence[Round]) -> dict[str, list[tuple[float, float]]]:
    """Where each device that has moved was, round by round."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rounds:
        for name, place in r.positions.items():
            found.setdefault(name, []).append(place)
    return {name: way for name, way in found.items() if any(a != b for a, b in pairwise(way))}


def loss_by_device(rounds: Sequence[Round], tasks: Mapping[str, str]) -> str:
    """The loss of each device's local updates (nats a token), and the mean of those that were there.

    Few devices have a colour each; many have that of their task.
    """
    steps, figure = _steps(rounds), Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    names = sorted({n for r in rounds for n in r.losses})
    few = len(names) <= len(COLOURS)
    kinds = list(names if few else dict.fromkeys(tasks.get(n, "devices") for n in names))
    style: Any = {"marker": "." if len(steps) <= 40 else "", "rasterized": len(names) * len(steps) > MANY}
    for name in names:
        kind = name if few else tasks.get(name, "devices")
        values = _values(rounds, (r.losses.get(name, math.nan) for r in rounds))
        width, alpha = (1.5, 0.9) if few else (0.8, 0.45)
        axes.plot(steps, values, color=COLOURS[kinds.index(kind) % len(COLOURS)], linewidth=width, alpha=alpha, **style)
    axes.plot(steps, _values(rounds, (r.loss for r in rounds)), color=INK, linewidth=2, linestyle="--", **style)
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=plain(k)) for i, k in enumerate(kinds)]
    handles.append(Line2D([], [], color=INK, linewidth=2, linestyle="--", label="mean"))
    axes.set_ylabel("loss (nats a token)")
    _by_round(axes, steps)
    axes.legend(handles=handles, frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def bytes_by_slot(rounds: Sequence[Round]) -> str:
    """What was handed to the channel, slot upon slot, in MB."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    under, edges = np.zeros(len(_steps(rounds))), _edges(rounds)
    for i, slot in enumerate(slots(rounds)):
        upto = under + _values(rounds, (r.bytes.get(slot, 0) / 1e6 for r in rounds), 0.0)
        axes.stairs(upto, edges, baseline=under, fill=True, color=COLOURS[i % len(COLOURS)], label=slot)
        under = upto
    axes.set_ylabel("MB")
    _by_round(axes, _steps(rounds))
    axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def slots(rounds: Sequence[Round]) -> list[str]:
    """Those that were used, in the order of a round."""
    used = {s for r in rounds for s in r.bytes}
    return [s for s in SLOTS if s in used] + sorted(used - set(SLOTS))


def energy_and_reach(rounds: Sequence[Round]) -> str:
    """J of all devices above; receivers that were sent something, and those that had it in time, below."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    edges = _edges(rounds)
    above.stairs(_values(rounds, (r.energy or 0.0 for r in rounds), 0.0), edges, fill=True, color=COLOURS[6])
    above.set_ylabel("J")
    below.stairs(_values(rounds, (r.asked or 0 for r in rounds), 0.0), edges, fill=True, color="#c9d3df", label="asked")
    below.stairs(
        _values(rounds, (r.reached or 0 for r in rounds), 0.0), edges, fill=True, color=COLOURS[2], label="reached"
    )
    below.set_ylabel("receivers")
    bare(above)
    _by_round(below, _steps(rounds))
    below.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


def collision_rates(rounds: Sequence[Round], most: float | None = None) -> str:
    """max_l S_l of every cluster of two devices or more, and of the worst; `most` is S_max, if it is known."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    dots = [(r.step, s) for r in rounds for g, s in zip(r.clusters, r.collisions, strict=False) if len(g) > 1]
    if dots:
        style: Any = {"s": 12, "alpha": 0.5, "linewidth": 0, "rasterized": len(dots) > MANY // 4}
        axes.scatter(*np.transpose(dots), color=COLOURS[0], label="a cluster", **style)
    worst = _values(rounds, (r.worst for r in rounds))
    axes.stairs(worst, _edges(rounds), color=COLOURS[0], label="the worst", baseline=None)
    top = max([s for _, s in dots], default=0.0)
    if most is not None:
        axes.axhline(most, color=COLOURS[4], linestyle="--", linewidth=1.2, label=f"S_max {most:g}")
    near = most is not None and (most < 4 * top or not top)  # one far above would flatten all else
    axes.set_ylim(0, 1.15 * (max(top, most or 0) if near else top) or 1)
    axes.set_ylabel("collision rate")
    _by_round(axes, _steps(rounds))
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure)


# --- what they share -------------------------------------------------------------------------------------------------


def _steps(rounds: Sequence[Round]) -> range:
    return range(rounds[0].step, rounds[-1].step + 1)


def _edges(rounds: Sequence[Round]) -> Floats:
    """Where the rounds' stairs begin and end."""
    return np.arange(rounds[0].step, rounds[-1].step + 2, dtype=np.float64) - 0.5


def _values(rounds: Sequence[Round], values: Iterable[float], missing: float = math.nan) -> Floats:
    """The rounds' values from the first to the last; `missing` is that of a round whose line was lost."""
    found = np.full(len(_steps(rounds)), missing)
    found[[r.step - rounds[0].step for r in rounds]] = list(values)
    return found


def _by_round(axes: Axes, steps: range) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bare(axes)

"""Rounds as they end, as a table on the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

COLUMNS = ("round", "loss", "devices", "clusters", "MB", "J", "heard", "worst collision", "refused")


@contextmanager
def live(
    total: int, *, done: int = 0, last: int = 12, quiet: bool = False, console: Console | None = None
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Shows the last rounds: call what it gives with (round, its numbers) after each one.

    Args:
        total: of rounds.
        done: rounds that had ended before.
        last: how many rounds are shown.
        quiet: show nothing; nor is anything shown where there is no terminal.
        console: where to show it; None is stderr.
    """
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda round_, numbers: None
        return
    rows: deque[tuple[str, ...]] = deque(maxlen=last)
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), auto_refresh=False)
    row = bar.add_task("rounds", total=total, completed=done)
    with Live(Group(_table(rows), bar), console=console, auto_refresh=False) as shown:

        def after(round_: int, numbers: Mapping[str, Any]) -> None:
            rows.append(cells(round_, numbers))
            bar.update(row, completed=round_ + 1)
            shown.update(Group(_table(rows), bar), refresh=True)

        yield after


def cells(round_: int, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """A round's row, as `COLUMNS` say; `numbers` are those of metrics.jsonl."""
    there, clusters = len(numbers["losses"]), len(numbers["clusters"])
    return (
        str(round_),
        f"{numbers['loss']:.3f}",
        str(there),
        str(clusters),
        f"{sum(numbers['bytes'].values()) / 1e6:.3f}",
        f"{numbers['energy']:.3g}",
        f"{numbers['reached']}/{numbers['asked']}",
        f"{max(numbers['collisions'], default=0.0):.3f}",
        str(sum(numbers["refused"].values())),
    )


def _table(rows: deque[tuple[str, ...]]) -> Table:
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table

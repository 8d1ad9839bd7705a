"""The table of rounds on a terminal, and silence where there is none."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from contextlora.federated.live import live

NUMBERS = {
    "losses": {"a": 1.0, "b": 2.0},
    "loss": 1.5,
    "clusters": [["a", "b"]],
    "bytes": {"rows": 500, "slices": 1_999_500},
    "energy": 0.01234,
    "reached": 1,
    "asked": 2,
    "collisions": [0.0421],
    "refused": {"E627": 1, "E628": 2},
}


def shown(rounds: int, terminal: bool = True, **how: object) -> str:
    console = Console(file=StringIO(), force_terminal=terminal, width=140, color_system=None)
    with live(20, console=console, **how) as after:  # type: ignore[arg-type]
        for i in range(rounds):
            after(i, NUMBERS)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_last_rounds_are_shown():
    text = shown(7, last=3)
    final = text[text.rindex("worst collision") :]
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in final.splitlines() if line.startswith("│")]
    assert rows == [[str(i), "1.500", "2", "1", "2.000", "0.0123", "1/2", "0.042", "3"] for i in (4, 5, 6)]
    assert "7/20" in final


@pytest.mark.parametrize("how", [{"terminal": False}, {"quiet": True}])
def test_nothing_is_written_where_nobody_looks(how):
    assert shown(3, **how) == ""


def test_nothing_is_broken_by_a_round_of_nobody():
    nobody = {**NUMBERS, "losses": {}, "clusters": [], "collisions": [], "refused": {}, "bytes": {}}
    console = Console(file=StringIO(), force_terminal=True, width=140, color_system=None)
    with live(20, console=console) as after:
        after(0, nobody)
    assert "0.000" in console.file.getvalue()  # type: ignore[attr-defined]

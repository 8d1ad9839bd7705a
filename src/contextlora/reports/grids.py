"""Tables of means with intervals, made once and shown three ways: as HTML, in a console, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

from contextlora.reports.kinds import Style
from contextlora.reports.statistics import Interval

Row = Mapping[str, Interval]  # by column
NOTHING = '<p class="note">Nothing to show yet.</p>'


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        title: in a few words.
        heads: what the words of a row's place are: scenario, task, ...
        columns: those of numbers.
        rows: by the words of their place, the numbers by column; one that is not known is left out.
        style: of the numbers.
        seeds: that a complete number rests on; fewer are told.
    """

    title: str
    heads: Sequence[str]
    columns: Sequence[str]
    rows: Mapping[tuple[str, ...], Row]
    style: Style
    seeds: int


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        grids: its tables.
        figures: by heading, HTML that stands above the tables.
        below: HTML that stands below them.
        note: what a reader has to know, as text.
    """

    title: str
    grids: Sequence[Grid] = ()
    figures: Sequence[tuple[str, str]] = ()
    below: str = ""
    note: str = ""

    def html(self) -> str:
        """The section's HTML, every text escaped."""
        drawn = "".join(f'<h3>{escape(name)}</h3><div class="figure">{svg}</div>' for name, svg in self.figures)
        several = len(self.grids) > 1
        tables = "".join(
            f'{f"<h3>{escape(g.title)}</h3>" if several else ""}<div class="wide">{as_html(g)}</div>'
            for g in self.grids
        )
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f"<section><h2>{escape(self.title)}</h2>{drawn}{tables}{self.below}{note}</section>"


@dataclass
class Rows:
    """Collects the rows of a grid in the order in which they come."""

    found: dict[tuple[str, ...], dict[str, Interval]] = field(default_factory=dict)

    def add(self, place: Iterable[str], column: str, value: Interval) -> None:
        """Puts a number where it belongs."""
        self.found.setdefault(tuple(place), {})[column] = value

    def columns(self, order: Iterable[str]) -> list[str]:
        """Those of `order` that hold a number."""
        return [c for c in order if any(c in row for row in self.found.values())]


def shown(value: Interval, style: Style) -> tuple[str, str]:
    """A number and its interval as text."""
    sign = "+" if style.signed else ""
    first, low, high = (f"{x * style.scale:{sign}.{style.digits}f}" for x in (value.mean, value.low, value.high))
    return first, f"{low} to {high}"


def clear(value: Interval, style: Style) -> bool:
    """Whether the interval excludes what means no difference."""
    return style.against is not None and value.excludes(style.against)


def as_html(grid: Grid) -> str:
    """A table; numbers that are told from chance are coloured by whether they are better."""
    if not grid.rows:
        return NOTHING
    top = "".join(f"<th>{escape(h)}</th>" for h in grid.heads)
    top += "".join(f'<th class="n">{escape(c)}</th>' for c in grid.columns)
    body = ""
    for where, cells in grid.rows.items():
        words = "".join(f"<td>{escape(w)}</td>" for w in where)
        numbers = "".join(f'<td class="n">{_cell(cells[c], grid) if c in cells else ""}</td>' for c in grid.columns)
        body += f"<tr>{words}{numbers}</tr>"
    return f"<table><tr>{top}</tr>{body}</table>"


def as_text(grid: Grid) -> list[dict[str, str]]:
    """Rows of a console's table."""
    return [
        dict(zip(grid.heads, where, strict=True))
        | {c: _words(cells[c], grid) if c in cells else "" for c in grid.columns}
        for where, cells in grid.rows.items()
    ]


def as_json(grid: Grid) -> dict[str, Any]:
    """The table as JSON can hold it."""
    rows = [
        dict(zip(grid.heads, where, strict=True)) | {c: vars(value) for c, value in cells.items()}
        for where, cells in grid.rows.items()
    ]
    return {"title": grid.title, "rows": rows}


def _cell(value: Interval, grid: Grid) -> str:
    number, interval = shown(value, grid.style)
    kind, mark = "", ""
    if grid.style.against is not None and value.excludes(grid.style.against):
        better = (value.mean > grid.style.against) == grid.style.higher
        kind, mark = (' class="good"' if better else ' class="bad"'), " *"
    return f'<span{kind}>{number}{mark}</span><span class="range">{interval}{_few(value, grid)}</span>'


def _words(value: Interval, grid: Grid) -> str:
    number, interval = shown(value, grid.style)
    return f"{number} ({interval}{_few(value, grid)})" + (" *" if clear(value, grid.style) else "")


def _few(value: Interval, grid: Grid) -> str:
    if value.seeds >= grid.seeds:
        return ""
    return ", 1 seed" if value.seeds == 1 else f", {value.seeds} seeds"


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words, escaped, that scrolls where it is too wide."""
    top = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def whole_page(title: str, subtitle: str, sections: Iterable[Section], above: str = "") -> str:
    """One self-contained page; `above` is HTML that stands before the sections."""
    template = Template(resources.files(__package__).joinpath("sections.html").read_text(encoding="utf-8"))
    body = above + "".join(s.html() for s in sections)
    return template.substitute(title=escape(title), subtitle=escape(subtitle), sections=body)

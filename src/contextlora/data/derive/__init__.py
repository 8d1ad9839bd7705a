"""Recipes: how the answers of a task graph follow from a picture's boxes. Declarative; nothing in a recipe is executed.

A recipe is YAML with the graph (`graph:`, as in graph.yaml, options left out) and one rule a task (`answers:`):

    event:    {classes: {Accident: traffic accident, ...}}                            # class of the largest box
    extent:   {measure: area, below: {small: 0.08, medium: 0.25}, otherwise: large}   # a measure, cut into steps
    response: {table: [event, extent], rows: {traffic accident: {small: call a tow truck, ...}, ...}}

The options of each task are its rule's answers in the order written. `without_boxes: skip` leaves out pictures
without a box; `without_boxes: {event: nothing unusual}` gives their answers. The shipped recipes lie beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from contextlora.errors import ConfigError, did_you_mean
from contextlora.graph import TaskGraph, Text
from contextlora.strict import Strict, parse_yaml, read_yaml, validate


@dataclass(frozen=True)
class Box:
    """One object: its class and, as parts of the picture's width and height, its centre and size."""

    label: str
    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height


class Rule(Strict):
    """How one task's answer is found; exactly one of `classes`, `measure` and `table`.

    Attributes:
        classes: answer by the class of the largest box (the first of equally large ones).
        measure: of the largest box (`x` and `y` are its centre), or `count`, the number of boxes.
        below: answers with their exclusive upper bounds, rising; with `measure`.
        otherwise: the answer at or above the last bound; with `measure`.
        table: the tasks whose answers select the row, each declared before this one.
        rows: answers nested as deep as `table` is long.
    """

    classes: Annotated[dict[str, Text], Field(min_length=1)] | None = None
    measure: Literal["area", "x", "y", "width", "height", "count"] | None = None
    below: Annotated[dict[str, float], Field(min_length=1)] | None = None
    otherwise: Text | None = None
    table: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    rows: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        given = {name for name, value in self if value is not None}
        if given not in ({"classes"}, {"measure", "below", "otherwise"}, {"table", "rows"}):
            raise ValueError("give either classes, or measure with below and otherwise, or table with rows")
        bounds = list((self.below or {}).values())
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"the bounds of below should rise, got {bounds}")
        return self

    def options(self) -> tuple[str, ...]:
        """All possible answers, in the order written."""
        if self.measure:
            return tuple(dict.fromkeys([*(self.below or {}), str(self.otherwise)]))
        return tuple(dict.fromkeys(_leaves(self.classes or self.rows)))

    def answer(self, boxes: Sequence[Box], known: Mapping[str, str]) -> str:
        """The answer for a picture. Raises KeyError if its class is not in `classes`."""
        largest = max(boxes, key=lambda box: box.area)
        if self.classes:
            return self.classes[largest.label]
        if self.measure:
            value = len(boxes) if self.measure == "count" else getattr(largest, self.measure)
            return next((name for name, bound in (self.below or {}).items() if value < bound), str(self.otherwise))
        row: Any = self.rows
        for task in self.table or ():
            row = row[known[task]]
        return str(row)


class _RecipeFile(Strict):
    """A recipe as written."""

    graph: dict[str, Any]
    answers: Annotated[dict[str, Rule], Field(min_length=1)]
    without_boxes: Literal["skip"] | dict[str, Text] | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: a graph with options, and a rule for each of its tasks in an order that can be computed."""

    graph: TaskGraph
    rules: Mapping[str, Rule]
    without_boxes: Literal["skip"] | Mapping[str, str] | None

    @classmethod
    def load(cls, recipe: str | Path) -> Recipe:
        """Reads a shipped recipe by its name, or a YAML file. Raises ConfigError (E101 to E106)."""
        if isinstance(recipe, str) and "/" not in recipe and not recipe.endswith((".yaml", ".yml")):
            shipped = {
                p.name.removesuffix(".yaml"): p for p in resources.files(__name__).iterdir() if ".yaml" in p.name
            }
            if recipe not in shipped:
                hint = did_you_mean(recipe, shipped) or f" There are: {', '.join(sorted(shipped))}."
                raise ConfigError("E102", f"no recipe '{recipe}'.{hint} A file's name ends in .yaml")
            return cls.from_dict(parse_yaml(shipped[recipe].read_text(encoding="utf-8"), recipe), where=recipe)
        return cls.from_dict(read_yaml(recipe), where=recipe)

    @classmethod
    def from_dict(cls, data: Any, where: object = "") -> Recipe:
        """Checks the contents of a recipe; `where` names them in errors."""
        file = validate(_RecipeFile, data, where)
        instead = file.without_boxes if isinstance(file.without_boxes, dict) else {}
        options: dict[str, tuple[str, ...]] = {}
        for task, rule in file.answers.items():
            for other in rule.table or ():
                if other not in options:
                    text = f"answers.{task}.table: no task '{other}' before this one.{did_you_mean(other, options)}"
                    raise ConfigError("E103", text, where=where)
            axes = [options[other] for other in rule.table or ()]
            if fault := _table_fault(rule.rows, axes, f"answers.{task}.rows") if axes else "":
                raise ConfigError("E103", fault, where=where)
            options[task] = rule.options()
        graph = _graph_with(file.graph, options, instead, where)
        if instead and set(instead) != set(options):
            raise ConfigError("E103", f"without_boxes: give an answer for each of {', '.join(options)}", where=where)
        return cls(graph, file.answers, file.without_boxes)

    def answers(self, boxes: Sequence[Box]) -> dict[str, str] | None:
        """The answer of every task for a picture with these boxes; None if it is to be left out.

        Raises KeyError with a class that a rule does not know, IndexError for no box where the recipe is silent on it.
        """
        if not boxes:
            if self.without_boxes is None:
                raise IndexError("no boxes")
            return None if isinstance(self.without_boxes, str) else dict(self.without_boxes)
        known: dict[str, str] = {}
        for task, rule in self.rules.items():
            known[task] = rule.answer(boxes, known)
        return known


def _graph_with(
    graph: dict[str, Any], options: Mapping[str, tuple[str, ...]], instead: Mapping[str, str], where: object
) -> TaskGraph:
    """The recipe's graph, each task given the options that its rule can answer."""
    tasks = graph.get("tasks")
    if not isinstance(tasks, dict) or set(tasks) != set(options):
        raise ConfigError(
            "E103", f"graph.tasks and answers should name the same tasks: {', '.join(options)}", where=where
        )
    filled = {}
    for name, task in tasks.items():
        if not isinstance(task, dict) or "options" in task:
            raise ConfigError(
                "E103", f"graph.tasks.{name}: give a question; its options follow from answers", where=where
            )
        extra = [instead[name]] if name in instead else []
        filled[name] = {**task, "options": list(dict.fromkeys([*options[name], *extra]))}
    return TaskGraph.from_dict({**graph, "tasks": filled}, where=where)


def _leaves(rows: Any) -> list[str]:
    return [leaf for row in rows.values() for leaf in _leaves(row)] if isinstance(rows, dict) else [str(rows)]


def _table_fault(rows: Any, axes: Sequence[Sequence[str]], path: str) -> str:
    """What is wrong with a table whose rows should be indexed by each of `axes` in turn, or an empty string."""
    if not axes:
        fine = isinstance(rows, str) and rows == rows.strip() != ""
        return "" if fine else f"{path}: should be an answer, got {str(rows)[:60]!r}"
    if not isinstance(rows, dict):
        return f"{path}: should have a row for each of {', '.join(axes[0])}"
    for key in rows:
        if key not in axes[0]:
            return f"{path}: unknown row '{key}'.{did_you_mean(key, axes[0])}"
    if missing := [key for key in axes[0] if key not in rows]:
        return f"{path}: no row for {', '.join(missing)}"
    return next((f for key, row in rows.items() if (f := _table_fault(row, axes[1:], f"{path}.{key}"))), "")

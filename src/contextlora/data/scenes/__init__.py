"""Benchmark scenarios drawn from a seed: pictures whose facts are known, with the ContextLoRA paper's tasks and graphs.

The paper (section V) labels photographs by hand: the Internet of Vehicles (three roots into one), a factory (two into
one into one) and a city (the fourth task on the second and third). Here every picture is drawn from facts, so the keys
hold without labelling, and a dependent answer is a table over the facts behind its prerequisites.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from contextlora.data.scenes import city, city_picture, factory, factory_picture, iov, iov_picture
from contextlora.errors import DataError, did_you_mean
from contextlora.graph import Task, TaskGraph

VERSION = 5  # of the drawing: raise it with every change that alters a picture or a key
_STAMP = "scenario.json"

Facts = dict[str, Any]


@dataclass(frozen=True)
class _Scenario:
    """One benchmark: its tasks, and the scene that draws them. Equal `stream`, equal pictures."""

    stream: int
    tasks: Mapping[str, Task]
    facts: Callable[[Generator], Facts]
    answers: Callable[[Facts], dict[str, tuple[str, ...]]]
    paint: Callable[[Generator, Facts], Image.Image]


_SCENARIOS = {
    **{name: _Scenario(1, tasks, iov.facts, iov.answers, iov_picture.paint) for name, tasks in iov.TASKS.items()},
    "factory": _Scenario(2, factory.TASKS, factory.facts, factory.answers, factory_picture.paint),
    "city": _Scenario(3, city.TASKS, city.facts, city.answers, city_picture.paint),
}
SCENARIOS: tuple[str, ...] = tuple(_SCENARIOS)


def scenario_graph(scenario: str) -> TaskGraph:
    """The task graph of a scenario. Raises DataError E220 for an unknown name."""
    return TaskGraph(_find(scenario).tasks, name=scenario)


def render(scenario: str, index: int, *, seed: int = 0) -> tuple[Image.Image, Facts, dict[str, tuple[str, ...]]]:
    """Draws picture `index` of a scenario.

    Returns:
        The 224 x 224 RGB picture, its facts, and the key of every task of the scenario.

    Raises:
        DataError: E220 for an unknown scenario.
    """
    scene = _find(scenario)
    rng = np.random.default_rng((seed, index, scene.stream))
    facts = scene.facts(rng)
    key = scene.answers(facts)
    return scene.paint(rng, facts), facts, {task: key[task] for task in scene.tasks}


def build(
    scenario: str,
    folder: str | Path,
    *,
    train: int = 1200,
    valid: int = 200,
    test: int = 400,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Draws a scenario into a data folder: images/, graph.yaml and, last, data.jsonl.

    The same arguments give the same bytes. A folder that already holds this build is left as it is; one whose build was
    interrupted is drawn again.

    Args:
        scenario: one of SCENARIOS.
        folder: where to; made if it is missing.
        train: pictures in split train (the paper's 1,200), likewise `valid` and `test`.
        valid: pictures in split valid.
        test: pictures in split test.
        seed: 0 or more; another seed gives other pictures of the same kind.
        progress: called with (done, total) after each picture.

    Returns:
        The folder.

    Raises:
        DataError: E220 for an unknown scenario, E221 for counts or a seed that cannot be, E222 if the folder holds
            something else.
    """
    graph, folder = scenario_graph(scenario), Path(folder)
    counts = {"train": train, "valid": valid, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()) or seed < 0:
        raise DataError("E221", f"counts and seed should be 0 or more and one count above 0, got {counts}, seed {seed}")
    stamp = json.dumps({"scenario": scenario, **counts, "seed": seed, "version": VERSION}) + "\n"
    if _holds(folder, stamp):
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _replace(folder / _STAMP, stamp)
    graph.save(folder / "graph.yaml")
    splits = [name for name, count in counts.items() for _ in range(count)]
    lines = []
    for index, split in enumerate(splits):
        lines.append(json.dumps(_one(scenario, folder, index, seed) | {"split": split}) + "\n")
        if progress:
            progress(index + 1, len(splits))
    _replace(folder / "data.jsonl", "".join(lines))
    return folder


def _one(scenario: str, folder: Path, index: int, seed: int) -> dict[str, Any]:
    """Draws and writes one picture. Returns its record, without the split."""
    picture, facts, key = render(scenario, index, seed=seed)
    path = folder / "images" / f"{index:05}.jpg"
    encoded = BytesIO()  # quality is a fact of the camera too: drawn from the index, not from the picture's generator
    picture.save(encoded, "JPEG", quality=75 + 7 * (index % 3))
    path.write_bytes(encoded.getvalue())
    answers = {task: list(options) for task, options in key.items()}
    return {"id": f"{index:05}", "image": f"images/{path.name}", "answers": answers, "facts": facts}


def _find(scenario: str) -> _Scenario:
    if scenario not in _SCENARIOS:
        known = ", ".join(SCENARIOS)
        raise DataError("E220", f"no scenario '{scenario}'.{did_you_mean(scenario, SCENARIOS)} Known: {known}")
    return _SCENARIOS[scenario]


def _holds(folder: Path, stamp: str) -> bool:
    """Whether the folder holds this finished build. Raises DataError E222 if it holds anything but (part of) it."""
    if not folder.exists():
        return False
    try:
        there = (folder / _STAMP).read_text(encoding="utf-8")
    except FileNotFoundError:
        # images/ is made before the stamp: an empty one, or the stamp's unfinished copy, is still our own beginning
        foreign = [p.name for p in folder.iterdir() if p.name not in ("images", f"{_STAMP}.part")]
        if foreign or any((folder / "images").glob("*")):
            raise DataError("E222", "holds something else; give an empty or a new folder", where=folder) from None
        return False
    except OSError as e:
        raise DataError("E222", f"cannot be used as a folder: {e.strerror}", where=folder) from None
    if there != stamp:
        raise DataError("E222", f"holds another build, {there.strip()}; give a new folder", where=folder)
    return (folder / "data.jsonl").is_file()


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it is there complete or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""What importers found, and the data folder it becomes: graph.yaml, data.jsonl, images/."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contextlora.data.images import check_image, image_hash
from contextlora.data.records import DATA_FILE, Record, write_records
from contextlora.errors import ConfigError, DataError
from contextlora.graph import TaskGraph
from contextlora.strict import validate

MAX_OPTIONS = 8


@dataclass
class Item:
    """What an importer found: one picture (or none) with question and answer by task."""

    image: Path | None
    split: str | None
    answers: dict[str, str]
    questions: dict[str, str]
    id: str | None = None
    where: object = ""
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)


def write_folder(out: Path, graph: TaskGraph, items: list[Item], source: object) -> Path:
    """Writes the data folder beside `out`, then moves it there."""
    if not items:
        raise DataError("E223", "nothing to import", where=source)
    copies: dict[str, Path] = {}
    records = [_record(item, graph, copies) for item in items]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:40]}-") as scratch:
            part = Path(scratch) / "data"
            write_records(part, records)
            graph.save(part / "graph.yaml")
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                if not _same(part, out) or not all((out / name).is_file() for name in copies):
                    raise DataError("E222", "holds something else; give an empty or a new folder", where=out)
                return out
            (part / "images").mkdir()
            for name, path in copies.items():
                shutil.copyfile(path, part / name)
            return part.replace(out)
    except OSError as e:
        raise DataError("E222", f"cannot be written: {e.strerror}", where=out) from None


def _same(part: Path, out: Path) -> bool:
    names = (DATA_FILE, "graph.yaml")
    return all((out / n).is_file() and (out / n).read_bytes() == (part / n).read_bytes() for n in names)


def _record(item: Item, graph: TaskGraph, copies: dict[str, Path]) -> Record:
    """The record of an item, whose picture is noted in `copies` under its new name."""
    data: dict[str, Any] = {"answers": item.answers, "split": item.split, "id": item.id, "options": item.options}
    data["questions"] = {t: q for t, q in item.questions.items() if q != graph.tasks[t].question}
    if item.image is not None:
        check_image(item.image)
        name = f"images/{slug(item.image.stem)}-{image_hash(item.image)[:12]}{item.image.suffix.lower()}"
        copies.setdefault(name, item.image)
        data["image"] = name
    try:
        return validate(Record, data)
    except ConfigError as e:
        raise DataError("E223", e.message, where=item.where) from None


def slug(text: str) -> str:
    """`text` as a safe file or task name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:60] or "unnamed"


def infer_graph(name: str, items: list[Item]) -> TaskGraph:
    """A graph without edges: each task's commonest question and, where they are few, its answers as options."""
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(t for item in items for t in item.answers):
        asked = Counter(item.questions[task] for item in items if task in item.answers)
        answers = sorted({item.answers[task] for item in items if task in item.answers}, key=_natural)
        question, times = asked.most_common(1)[0]
        tasks[task] = {"question": question if times * 2 > asked.total() else f"Answer the {task} question."}
        own = any(task in item.options for item in items)
        if not own and 2 <= len(answers) <= MAX_OPTIONS and all(len(a) <= 100 and "\n" not in a for a in answers):
            tasks[task]["options"] = answers
    return TaskGraph.from_dict({"name": slug(name), "tasks": tasks}, where="the imported tasks")


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts answer2 before answer10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d{1,9})", text)]

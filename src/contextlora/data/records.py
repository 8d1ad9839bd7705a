"""A data folder's records: data.jsonl, one strict JSON object a line. `examples.py` fits them to a task graph.

    {"image": "images/0001.jpg", "answers": {"weather": ["rain"], "road": "wet"}, "split": "train", "id": "0001",
     "questions": {"weather": "asked in other words"}, "options": {"quiz": ["a frog", "a newt"]},
     "facts": {"vehicles": 3}}

Only `answers` is required. Every fault of a file is collected and reported in one DataError that names file and line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Field, field_validator

from contextlora.data.images import image_hash
from contextlora.data.jsonl import Faults, read_lines
from contextlora.errors import DataError
from contextlora.graph import Text, check_options
from contextlora.strict import Strict

DATA_FILE = "data.jsonl"
Split: TypeAlias = Literal["train", "valid", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
_Scalar = str | int | float | bool | None


class Record(Strict):
    """One line of data.jsonl.

    Attributes:
        image: path of the picture, relative to the data folder; None for a text-only record.
        answers: the correct answers by task. A lone string is a list of one. A record may answer only some tasks.
        split: the part it belongs to; give it in every record of a folder or in none.
        id: a name of its own; None takes the image's path.
        questions: this record's wording of a task's question, where it differs from the graph's.
        options: what this record's answer is one of, by task, where the graph lists no options for the task.
        facts: what is known about the picture besides; training ignores it.
    """

    image: Annotated[str, Field(max_length=1024)] | None = None
    answers: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    split: Split | None = None
    id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    questions: dict[str, Text] = Field(default_factory=dict)
    options: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)

    @field_validator("image")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        if value is not None and (fault := _path_fault(value)):
            raise ValueError(f"'{value[:60]}' {fault}")
        return value

    @field_validator("answers", mode="before")
    @classmethod
    def _answer_lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError('should be an object such as {"weather": ["rain"]}')
        return {task: _answer_list(task, given) for task, given in value.items()}

    @field_validator("options", mode="before")
    @classmethod
    def _option_lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError('should be an object such as {"quiz": ["a frog", "a newt"]}')
        found = {task: _answer_list(task, given) for task, given in value.items()}
        for task, options in found.items():
            check_options(options, f"'{str(task)[:60]}'")
        return found

    @field_validator("facts")
    @classmethod
    def _flat(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, fact in value.items():
            for item in fact if isinstance(fact, list | tuple) else [fact]:
                if not isinstance(item, _Scalar) or (isinstance(item, float) and not math.isfinite(item)):
                    raise ValueError(
                        f"'{key[:60]}' should be text, a finite number, true, false, null or a list of these"
                    )
        return value


def read_records(folder: str | Path) -> list[Record]:
    """Reads data.jsonl without a graph. Raises DataError (E201 to E203)."""
    lines, faults = read_with_lines(Path(folder))
    faults.raise_any()
    return [record for _, record in lines]


def write_records(folder: str | Path, records: Iterable[Record]) -> Path:
    """Writes data.jsonl, whole or not at all, and returns its path. The folder is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", newline="\n", delete=False) as file:
        try:
            for record in records:
                file.write(dump_record(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            return Path(file.name).replace(folder / DATA_FILE)
        except BaseException:
            Path(file.name).unlink()
            raise


def dump_record(record: Record) -> str:
    """A record as one line of JSON, without what is at its default."""
    return json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False, allow_nan=False)


def data_hash(folder: str | Path) -> str:
    """sha256 hex over data.jsonl and the bytes of every image it names: what a model card says it was trained on."""
    root = Path(folder)
    paths = {r.image: inside(root, r.image) for r in read_records(root) if r.image}
    digest = hashlib.sha256((root / DATA_FILE).read_bytes())
    for name, path in sorted(paths.items()):
        digest.update(f"\n{name}\0{image_hash(path)}".encode())
    return digest.hexdigest()


def inside(root: str | Path, relative: str) -> Path:
    """The path of `relative` within the folder `root`, links followed.

    Raises DataError E205 if it is absolute, climbs out by "..", or leads out through a link. It need not exist.
    """
    fault = _path_fault(relative)
    try:
        base = Path(root).resolve()
        path = base if fault else (base / relative).resolve()
        if not fault and not path.is_relative_to(base):
            fault = "leads out of the data folder through a link; copy the files into the folder"
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, text that no file system can hold
        fault = "is not a usable path"
    if fault:
        raise DataError("E205", f"path '{relative[:60]}' {fault}", where=root)
    return path


# --- one record ------------------------------------------------------------------------------------------------------


def read_with_lines(root: Path) -> tuple[list[tuple[int, Record]], Faults]:
    """All records that are well-formed, with their line numbers, and the faults of the others."""
    faults = Faults(root / DATA_FILE)
    if not root.is_dir():
        raise DataError("E201", f"no such folder; expected one that holds {DATA_FILE}", where=root)
    return list(read_lines(faults.file, Record, faults)), faults


def _answer_list(task: Any, given: Any) -> tuple[str, ...]:
    answers, task = [given] if isinstance(given, str) else given, str(task)[:60]
    if not isinstance(answers, list | tuple) or not answers:
        raise ValueError(f"'{task}' should be text or a list of at least one text")
    for a in answers:
        if not isinstance(a, str) or not a.strip() or len(a) > 4000:
            raise ValueError(f"'{task}' should be text of 1 to 4000 characters, got {str(a)[:60]!r}")
        if answers.count(a) > 1:
            raise ValueError(f"'{task}' gives '{a[:60]}' twice")
    return tuple(answers)


def _path_fault(path: str) -> str:
    """What makes a relative path unusable on any system, or an empty string."""
    if "\\" in path:
        return "holds a backslash; separate folders by '/'"
    if path.startswith("/") or PureWindowsPath(path).drive:
        return "is absolute; give it relative to the data folder"
    if ".." in path.split("/"):
        return "leads out of the data folder by '..'"
    if not path.strip() or "\0" in path or len(path) > 1024:
        return "is not a usable path"
    return ""

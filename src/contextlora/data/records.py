"""A data folder's records: data.jsonl, one strict JSON object a line, read into Examples that fit a task graph.

    {"image": "images/0001.jpg", "answers": {"weather": ["rain"], "road": "wet"}, "split": "train", "id": "0001",
     "questions": {"weather": "asked in other words"}, "options": {"quiz": ["a frog", "a newt"]},
     "facts": {"vehicles": 3}}

Only `answers` is required. Every fault of a file is collected and reported in one DataError that names file and line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Field, field_validator

from contextlora.data.images import image_hash
from contextlora.data.jsonl import Faults, read_lines
from contextlora.errors import DataError, did_you_mean
from contextlora.graph import MAX_OPTIONS, Task, TaskGraph, Text
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
    options: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(default_factory=dict)
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
            name = f"'{str(task)[:60]}'"
            if not 2 <= len(options) <= MAX_OPTIONS:
                raise ValueError(f"{name} needs 2 to {MAX_OPTIONS} options, got {len(options)}")
            if any(o != o.strip() or len(o.splitlines()) > 1 for o in options):
                raise ValueError(f"{name}: an option may not begin or end with a space or hold a line break")
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


@dataclass(frozen=True)
class Example:
    """A record that fits a graph.

    Attributes:
        id: unique within the folder.
        image: where the picture is, or None for a text-only example.
        answers: the correct options by task, in the graph's order; after `label_noise` possibly another task's.
        questions: wordings that replace the graph's; a task without an entry is asked as the graph says.
        split: "train", "valid" or "test".
        options: this example's own options, by task without options in the graph.
    """

    id: str
    image: Path | None
    answers: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, str]
    split: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def load_examples(
    folder: str | Path, graph: TaskGraph, *, split: str | None = None, ignore_unknown_tasks: bool = False
) -> list[Example]:
    """Reads the examples of a data folder and checks them against the graph.

    Tasks that only the data knows are left out, so that removing a task from graph.yaml needs no change to the data;
    but a task name that looks misspelled (`_misspelled`) is an error. Records that answer no task of the graph are
    left out. Where no record carries a split, a hash of the image's path (of the id, if text-only) puts 80 % into
    train, 10 % into valid and 10 % into test, so that all records of one picture stay together.

    Args:
        split: only this part.
        ignore_unknown_tasks: leave out unknown tasks even if they look misspelled.

    Raises:
        DataError: E201 nothing to read, E202 not JSON, E203 a wrong field, E204 does not fit the graph, E205 a path
            that leaves the folder, E206 missing images, E207 an id twice, E208 splits only in some records.
    """
    if split is not None and split not in SPLITS:
        raise DataError("E208", f"no split '{split}'; there are {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    root = Path(folder)
    lines, faults = _read(root)
    if not ignore_unknown_tasks:
        _refuse_misspelled(lines, graph, faults)
    for line, record in lines:
        _check_answers(line, record, graph, faults)
    _check_splits(lines, faults)
    ids = _ids(lines, faults)
    images = _find_images(root, lines, faults)
    faults.raise_any()
    _refuse_foreign(lines, graph, root / DATA_FILE)
    examples = []
    for (_, record), name in zip(lines, ids, strict=True):
        part = record.split or _hashed_split(record.image or _stem(record))
        answers = {t: _in_order(graph.tasks[t], record.answers[t]) for t in graph.names if t in record.answers}
        if answers and split in (None, part):
            image = images[record.image] if record.image else None
            questions = {t: q for t, q in record.questions.items() if t in graph.tasks}
            options = {t: o for t, o in record.options.items() if t in graph.tasks}
            examples.append(Example(name, image, answers, questions, part, options))
    return examples


def read_records(folder: str | Path) -> list[Record]:
    """Reads data.jsonl without a graph. Raises DataError (E201 to E203)."""
    lines, faults = _read(Path(folder))
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


def _read(root: Path) -> tuple[list[tuple[int, Record]], Faults]:
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


# --- against the graph -----------------------------------------------------------------------------------------------


def _misspelled(lines: list[tuple[int, Record]], graph: TaskGraph) -> dict[str, str]:
    """Names in the data that are probably misspellings of a task of the graph, with that task.

    A near name is taken for a task of its own, which the graph no longer has, if some record answers both, or if it is
    at least a tenth as frequent as its neighbour. (task_5 is near task_4, and yet no misspelling.)
    """
    used = Counter(task for _, r in lines for task in r.answers)
    wrong = {}
    for name in sorted(({n for _, r in lines for n in r.questions} | set(used)) - set(graph.tasks)):
        for near in difflib.get_close_matches(name, graph.names, n=1, cutoff=0.75):
            both = any(name in r.answers and near in r.answers for _, r in lines)
            if not both and (not used[near] or used[name] * 10 < used[near]):
                wrong[name] = near
    return wrong


def _refuse_misspelled(lines: list[tuple[int, Record]], graph: TaskGraph, faults: Faults) -> None:
    wrong = _misspelled(lines, graph)
    for line, record in lines:
        for key, names in (("answers", record.answers), ("questions", record.questions), ("options", record.options)):
            for name in names:
                if name in wrong:
                    faults.add(line, "E204", f"{key}: the graph has no task '{name}'. Did you mean '{wrong[name]}'?")


def _refuse_foreign(lines: list[tuple[int, Record]], graph: TaskGraph, file: Path) -> None:
    if not any(task in graph.tasks for _, r in lines for task in r.answers):
        known = ", ".join(list(dict.fromkeys(t[:60] for _, r in lines for t in r.answers))[:8])
        text = f"answers no task of graph '{graph.name}' ({', '.join(graph.names[:8])}); it answers: {known}"
        raise DataError("E204", text, where=file)


def _check_answers(line: int, record: Record, graph: TaskGraph, faults: Faults) -> None:
    for name, answers in record.answers.items():
        task = graph.tasks.get(name)
        if task is None:
            continue
        if len(answers) > task.choose:
            faults.add(line, "E204", f"answers.{name}: {len(answers)} answers; at most {task.choose} may be correct")
        if task.options is not None and name in record.options:
            faults.add(line, "E204", f"options.{name}: the graph lists this task's options; leave one of the two out")
        options = task.options or record.options.get(name, answers)
        for answer in (a for a in answers if a not in options):
            hint = did_you_mean(answer, options) or f" Options: {', '.join(options[:12])}."
            faults.add(line, "E204", f"answers.{name}: '{answer[:60]}' is not an option.{hint}")
    for name in record.options.keys() - record.answers.keys():
        faults.add(line, "E204", f"options.{name}: the record has no answer to this task")


def _in_order(task: Task, answers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(o for o in task.options if o in answers) if task.options is not None else answers


# --- ids, splits and images ------------------------------------------------------------------------------------------


def _stem(record: Record) -> str:
    """The record's id, else its image's path, else (text-only) a hash of what it says."""
    return record.id or record.image or hashlib.sha256(dump_record(record).encode()).hexdigest()[:16]


def _ids(lines: list[tuple[int, Record]], faults: Faults) -> list[str]:
    """A unique id for each record: its stem, numbered where several records without an id share one."""
    at: dict[str, int] = {}
    for line, record in lines:
        if record.id is not None and at.setdefault(record.id, line) != line:
            faults.add(line, "E207", f"id '{record.id}' is taken by line {at[record.id]}")
    ids, taken = [], Counter[str](dict.fromkeys(at, 1))
    for _, record in lines:
        name = stem = _stem(record)
        while record.id is None and taken[name]:
            taken[stem] += 1
            name = f"{stem}#{taken[stem]}"
        taken[name] = max(1, taken[name])
        ids.append(name)
    return ids


def _check_splits(lines: list[tuple[int, Record]], faults: Faults) -> None:
    without = [line for line, record in lines if record.split is None]
    if without and len(without) < len(lines):
        faults.add(without[0], "E208", f"no split here or in {len(without) - 1} others, though other records have one")


def _hashed_split(key: str) -> str:
    at = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return "train" if at < 0.8 else "valid" if at < 0.9 else "test"


def _find_images(root: Path, lines: list[tuple[int, Record]], faults: Faults) -> dict[str, Path]:
    """The images by the path that the records give; those not found make one fault together."""
    first_line: dict[str, int] = {}
    for line, record in lines:
        if record.image is not None:
            first_line.setdefault(record.image, line)
    found: dict[str, Path] = {}
    for name, line in first_line.items():
        try:
            path = inside(root, name)
            if path.is_file():
                found[name] = path
        except DataError as e:
            faults.add(line, e.code, f"image: {e.message}")
            found[name] = root
        except OSError:  # e.g. a name too long for this file system: missing
            pass
    if missing := [name for name in first_line if name not in found]:
        noun = "image is" if len(missing) == 1 else "images are"
        some = ", ".join(name[:80] for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        faults.add(first_line[missing[0]], "E206", f"{len(missing)} {noun} missing: {some}")
    return found

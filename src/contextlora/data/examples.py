"""Examples: records that fit a task graph, with unique ids, a split each, and pictures that are there."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from contextlora.data.jsonl import Faults
from contextlora.data.records import DATA_FILE, SPLITS, Record, dump_record, inside, read_with_lines
from contextlora.errors import DataError, did_you_mean
from contextlora.graph import Task, TaskGraph


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
    lines, faults = read_with_lines(root)
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

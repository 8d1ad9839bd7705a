"""Importers: YOLO boxes, LLaVA conversations and instruction JSON become a data folder.

Each writes a new folder (graph.yaml, data.jsonl, images/), whole or not at all. Importing the same again changes
nothing; a folder that holds anything else is refused. Pictures are copied under safe names with a hash of their bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from contextlora.data.derive import Recipe
from contextlora.data.derive.yolo import SPLIT_NAMES, labelled_pictures, read_boxes, read_classes
from contextlora.data.items import Item, infer_graph, slug, write_folder
from contextlora.data.jsonl import parse_json
from contextlora.data.records import inside
from contextlora.errors import ConfigError, DataError, did_you_mean
from contextlora.strict import read_yaml

MAX_JSON = 1 << 30


def import_yolo(folder: str | Path, recipe: str | Path, out: str | Path) -> Path:
    """Imports pictures with YOLO boxes; the answers follow from the boxes by a recipe.

    Read are split folders (train, valid or val, test) with the label file `class cx cy w h` beside each picture or in
    images/ and labels/, on either side of the split; without split folders, the folder itself. Class names come from
    classes.txt or the `names` of data.yaml.

    Args:
        recipe: a YAML file (`contextlora.data.derive`), or the name of a shipped one, such as "smartcity-rad".
        out: the data folder to make. Returns it.

    Raises:
        DataError: E223 for a source that does not fit, E222 if `out` holds something else; as `check_image` for images.
        ConfigError: a faulty recipe.
    """
    folder, rules = Path(folder), Recipe.load(recipe)
    classes = read_classes(folder)
    for task, rule in rules.rules.items():
        for name in classes if rule.classes else ():
            if name not in (rule.classes or {}):
                text = f"class '{name}' has no answer in the recipe's answers.{task}.classes."
                raise DataError("E223", text + did_you_mean(name, rule.classes or {}), where=folder)
    items, bare = [], []
    for split, image, label in labelled_pictures(folder):
        boxes = read_boxes(label, classes)
        if not boxes and rules.without_boxes is None:
            bare.append(image)
        elif (answers := rules.answers(boxes)) is not None:
            items.append(Item(image, split, answers, {}, where=label))
    if bare:
        some = ", ".join(p.name for p in bare[:3])
        text = f"{len(bare)} pictures have no boxes ({some}); say in the recipe what to do: `without_boxes: skip`"
        raise DataError("E223", text, where=folder)
    return write_folder(Path(out), rules.graph, items, folder)


def import_llava(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    tasks: Mapping[str, str] | Sequence[str] | str | Path | None = None,
) -> Path:
    """Imports LLaVA conversations: `[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]`.

    Every question becomes a task without prerequisites (add `after` to the new graph.yaml). A task whose answers are
    few (at most 8) gets them as options, else it is a free question.

    Args:
        source: a JSON file, or a folder with train.json, valid.json and test.json.
        out: the data folder to make. Returns it.
        images: the folder that "image" is relative to; default the source's.
        tasks: the task of each question text, or task names in the order of turns, or a YAML file that holds either.
            None names them task1, task2, ... by turn.

    Raises:
        DataError: E223 for a source that does not fit, E205 and E206 for images outside `images` or missing, E222 if
            `out` holds something else.
    """
    if isinstance(tasks, str | Path):
        tasks = read_yaml(tasks)
    if tasks is not None and not isinstance(tasks, Mapping | list | tuple):
        raise ConfigError("E103", "tasks should map questions to task names, or list task names by turn")
    items = []
    for path, split in _json_files([source]):
        for i, raw in enumerate(_read_json(path)):
            where = f"{path}[{i}]"
            image = raw.get("image")
            if image is not None and not isinstance(image, str):
                raise DataError("E223", "image should be one path", where=where)
            found = inside(images or path.parent, image) if image else None
            item = Item(found, split, {}, {}, _id(raw.get("id")), where)
            for turn, (question, answer) in enumerate(_turns(raw.get("conversations"), where)):
                name = _task_of(question, turn, tasks, where)
                if name in item.answers:
                    raise DataError("E223", f"two questions belong to task '{name}'", where=where)
                item.answers[name], item.questions[name] = answer, question
            items.append(item)
    twice = {i for i, n in Counter(item.id for item in items).items() if n > 1}
    for item in items:
        item.id = None if item.id in twice else item.id
    return write_folder(Path(out), infer_graph(Path(source).stem, items), items, source)


def import_instructions(source: str | Path | Sequence[str | Path], out: str | Path, *, spell_out: bool = False) -> Path:
    """Imports instruction JSON: `[{"instruction", "input", "output", "answer"}, ...]`, each set a task of its own.

    The question of a record is its instruction, then a blank line and its input if it has one; the answer is "answer",
    or "output" where that is missing. A set with at most 8 different answers gets them as options, else it is free.

    Args:
        source: files, or folders of files. `boolq/train.json` is split train of set boolq; `boolq.json` has no split.
        out: the data folder to make. Returns it.
        spell_out: where a question lists labelled options (`answer1: a frog answer2: a newt`), ask without them, and
            take what the label stands for as the answer ("a newt"), to be chosen from the record's own options. Small
            models know how likely a text is long before they can name its label. Sets without labels stay as they are.

    Raises:
        DataError: E223 for a source that does not fit, E222 if `out` holds something else.
    """
    sources: list[str | Path] = [source] if isinstance(source, str | Path) else list(source)
    items = []
    for path, split in _json_files(sources):
        name = slug(path.parent.resolve().name if split else path.stem)
        for i, raw in enumerate(_read_json(path)):
            where = f"{path}[{i}]"
            parts = [raw.get("instruction"), raw.get("input") or ""]
            answer = raw.get("answer", raw.get("output"))
            if not all(isinstance(p, str) for p in parts) or not str(parts[0]).strip():
                raise DataError("E223", "instruction should be text, and input text or missing", where=where)
            if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
                raise DataError("E223", f"answer should be text or a number, got {str(answer)[:60]!r}", where=where)
            question = "\n\n".join(str(p).strip() for p in parts if p)
            number = f"{name}-{split}-{i:06}" if split else f"{name}-{i:06}"
            item = Item(None, split, {name: str(answer).strip()}, {name: question}, number, where)
            items.append(_spelled_out(item, name) if spell_out else item)
    return write_folder(Path(out), infer_graph(Path(sources[0]).stem, items), items, sources[0])


_FORMAT = re.compile("answer format:", re.IGNORECASE)


def _spelled_out(item: Item, task: str) -> Item:
    """The same with the texts of its labelled options instead of their labels; unchanged if the question labels none.

    Raises:
        DataError: E223 where only some labels have a text, or the answer is none of them.
    """
    question, answer = item.questions[task], item.answers[task]
    *_, mark = (None, *_FORMAT.finditer(question))
    if mark is None or not (form := question[mark.end() :].strip()) or "\n" in form:
        return item
    labels = [x.strip() for x in form.split("/")]
    marks = [m for x in labels if (m := re.search(rf"(?i)\b{re.escape(x)}:", question))]
    if not marks:
        return item
    if len(marks) < len(labels) or answer not in labels or marks != sorted(marks, key=re.Match.start):
        text = f"answer '{answer[:60]}' and format '{form[:60]}' should name options that the question lists"
        raise DataError("E223", text, where=item.where)
    ends = [*(m.start() for m in marks[1:]), mark.start()]
    texts = [question[m.end() : end].strip() for m, end in zip(marks, ends, strict=True)]
    said, asked = texts[labels.index(answer)], question[: marks[0].start()].strip()
    options = tuple(dict.fromkeys(texts))  # public sets do list a text twice
    return replace(item, answers={task: said}, questions={task: asked}, options={task: options})


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_files(sources: Sequence[str | Path]) -> list[tuple[Path, str | None]]:
    """The JSON files of files and folders (two levels deep), each with the split that its name says."""
    paths: list[Path] = []
    for source in map(Path, sources):
        paths += sorted([*source.glob("*.json"), *source.glob("*/*.json")]) if source.is_dir() else [source]
    found = [(path, SPLIT_NAMES.get(path.stem.lower())) for path in paths]
    if not found:
        raise DataError("E223", "no .json files", where=", ".join(map(str, sources)))
    loose = [path for path, split in found if split is None]
    if loose and len(loose) < len(found):
        text = "tells no split by its name, though other files do: train.json, valid.json, test.json"
        raise DataError("E223", text, where=loose[0])
    return found


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise DataError("E223", f"larger than {MAX_JSON >> 20} MiB", where=path)
        data = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as e:
        raise DataError("E223", f"cannot be read: {e.strerror}", where=path) from None
    except ValueError as e:
        raise DataError("E223", str(e), where=path) from None
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) for item in data):
        raise DataError("E223", "should be a list of objects, and not empty", where=path)
    return data


def _turns(turns: Any, where: str) -> list[tuple[str, str]]:
    """Questions (without the <image> mark) and answers of one conversation."""
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise DataError("E223", "conversations should be a list of question and answer by turns", where=where)
    said = []
    for turn, speaker in zip(turns, ["human", "gpt"] * (len(turns) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise DataError(
                "E223", f'expected {{"from": "{speaker}", "value": text}}, got {str(turn)[:60]}', where=where
            )
        said.append(turn["value"].replace("<image>", "").strip())
        if not said[-1]:
            raise DataError("E223", f"an empty turn of {speaker}", where=where)
    return list(zip(said[::2], said[1::2], strict=True))


def _task_of(question: str, turn: int, tasks: Mapping[str, str] | Sequence[str] | None, where: str) -> str:
    if tasks is None:
        return f"task{turn + 1}"
    if isinstance(tasks, Mapping):
        if question not in tasks:
            raise DataError("E223", f"no task for '{question[:80]}'.{did_you_mean(question, tasks)}", where=where)
        return str(tasks[question])
    if turn >= len(tasks):
        raise DataError("E223", f"more than the {len(tasks)} turns that tasks names", where=where)
    return str(tasks[turn])


def _id(value: Any) -> str | None:
    return str(value)[:200] or None if isinstance(value, str | int) else None

"""Reading a YOLO folder: which pictures it holds, in which split, and the boxes beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from contextlora.data.derive import Box
from contextlora.data.records import inside
from contextlora.errors import DataError
from contextlora.strict import read_yaml

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLIT_NAMES = {"train": "train", **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"), "test": "test"}


def read_classes(folder: Path) -> list[str]:
    """Class names by number, from classes.txt or the `names` of data.yaml. Raises DataError E223."""
    if (folder / "classes.txt").is_file():
        return [line.strip() for line in _text(folder / "classes.txt").splitlines() if line.strip()]
    if (folder / "data.yaml").is_file():
        data = read_yaml(folder / "data.yaml")
        names = data.get("names") if isinstance(data, dict) else None
        listed = [names.get(i) for i in range(len(names))] if isinstance(names, dict) else names
        if isinstance(listed, list) and all(isinstance(n, str) for n in listed):
            return listed
    raise DataError("E223", "no class names: expected classes.txt, or data.yaml with a list `names`", where=folder)


def labelled_pictures(folder: Path) -> Iterator[tuple[str | None, Path, Path]]:
    """Yields split, picture and label file (which may be missing), in the order of splits and names.

    Raises DataError E223 if there is no picture, E205 if one is a link that leads out of the folder.
    """
    found = False
    places: list[tuple[str | None, Path, Path]] = []
    for name in SPLIT_NAMES:
        places.append((SPLIT_NAMES[name], folder / name, folder / name))
        places.append((SPLIT_NAMES[name], folder / name / "images", folder / name / "labels"))
        places.append((SPLIT_NAMES[name], folder / "images" / name, folder / "labels" / name))
    for split, images, labels in [*places, (None, folder, folder), (None, folder / "images", folder / "labels")]:
        if split is None and found:
            return
        for image in sorted(images.iterdir()) if images.is_dir() else []:
            if image.suffix.lower() in _SUFFIXES:
                found = True
                inside(folder, image.relative_to(folder).as_posix())
                yield split, image, labels / f"{image.stem}.txt"
    if not found:
        raise DataError("E223", "no pictures here or in train/, valid/, test/", where=folder)


def read_boxes(label: Path, classes: Sequence[str]) -> list[Box]:
    """The boxes of a label file; none if there is no file. Raises DataError E223 naming file and line."""
    if not label.exists():
        return []
    boxes = []
    for number, line in enumerate(_text(label).splitlines(), 1):
        if not (parts := line.split()):
            continue
        try:
            kind, x, y, w, h = int(parts[0]), *map(float, parts[1:])
        except (ValueError, TypeError):
            raise DataError("E223", "expected `class cx cy w h`, boxes only", where=f"{label}:{number}") from None
        if not 0 <= kind < len(classes):
            raise DataError("E223", f"class {kind}, but there are {len(classes)} names", where=f"{label}:{number}")
        if not all(-0.01 <= v <= 1.01 for v in (x, y, w, h)) or w <= 0 or h <= 0:
            text = "a box outside the picture; cx cy w h are parts of its width and height, 0 to 1"
            raise DataError("E223", text, where=f"{label}:{number}")
        boxes.append(Box(classes[kind], x, y, w, h))
    return boxes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError("E223", f"cannot be read as text: {getattr(e, 'strerror', 'not UTF-8')}", where=path) from None

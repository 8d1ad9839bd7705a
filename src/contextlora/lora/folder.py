"""A folder that is always whole: replaced at once, and read only where its manifest's checksums agree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from contextlora.errors import AdapterError

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 << 20


def write_folder(folder: str | Path, files: Mapping[str, bytes], *, marker: str) -> Path:
    """Writes `files`, by their path in the folder, as `replacing` does."""
    with replacing(folder, marker=marker) as new:
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
    return Path(folder)


@contextmanager
def replacing(folder: str | Path, *, marker: str) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; then it takes the place of `folder` in one step.

    Whatever moment the process dies at, `existing(folder)` is the old folder or the new one, each whole. What else a
    user had put beside our files comes along. One writer at a time.

    Args:
        folder: the folder to write.
        marker: a file that a folder of this kind holds. A folder with other things in it and not this is refused.

    Raises:
        AdapterError: E319 if `folder` is something else, or cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    try:
        if not folder.exists() and old.exists():  # a run died between the two renames below
            old.rename(folder)
        _check_ours(folder, marker)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        _bring_along(folder, new)
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise AdapterError("E319", f"cannot be written: {e.strerror or e}", where=folder) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def existing(folder: str | Path) -> Path:
    """The folder, or what stands for it if a run died while replacing it. Raises AdapterError E310."""
    folder = Path(folder).expanduser()
    for path in (folder, _sibling(folder.resolve(), "old")):
        if path.is_dir():
            return path
    raise AdapterError("E310", "no such adapter folder", where=folder)


def seal(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The bytes of manifest.json: format, `manifest`, the sha256 of every file, and its own."""
    body = {"format": FORMAT, **manifest, "files": {name: sha256(files[name]) for name in sorted(files)}}
    return json.dumps({**body, "sha256": _own_sha256(body)}, indent=1, ensure_ascii=False).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks manifest.json.

    Raises:
        AdapterError: E310 if there is none, E311 if it is damaged, E312 if a newer release wrote it, E313 if it names
            a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise AdapterError("E310", f"not an adapter folder: it has no {MANIFEST}", where=folder)
    if path.stat().st_size > _MAX_MANIFEST:
        raise AdapterError("E311", f"larger than {_MAX_MANIFEST >> 20} MiB, so not a manifest", where=path)
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise AdapterError("E311", f"damaged: {type(e).__name__}: {str(e)[:100]}", where=path) from None
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise AdapterError("E311", "damaged: it has no format number", where=path)
    if manifest["format"] > FORMAT:
        raise AdapterError(
            "E312",
            f"has format {manifest['format']}, this release reads up to {FORMAT}; upgrade contextlora",
            where=path,
        )
    if manifest.pop("sha256", None) != _own_sha256(manifest):
        raise AdapterError("E311", "damaged: its contents do not match its own sha256", where=path)
    _check_names(manifest, path)
    return manifest


def read_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The bytes of one file, if they are those that were written. Raises AdapterError E310, E311, E313."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AdapterError("E313", "a link that leads out of the adapter folder", where=path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise AdapterError("E310", f"cannot be read: {e.strerror}", where=path) from None
    wanted = manifest["files"].get(name)
    if sha256(data) != wanted:
        raise AdapterError(
            "E311", f"damaged: sha256 is {sha256(data)[:16]}, the manifest says {str(wanted)[:16]}", where=path
        )
    return data


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _own_sha256(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode())


def _check_names(manifest: Mapping[str, Any], path: Path) -> None:
    files, tasks = manifest.get("files"), manifest.get("tasks")
    if not isinstance(files, dict) or not isinstance(tasks, dict):
        raise AdapterError("E311", "damaged: it lists no files or no tasks", where=path)
    for name in (*files, *tasks):
        deep = len(PurePosixPath(name).parts) > (3 if name in files else 1)
        if deep or name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
            raise AdapterError("E313", f"names '{name}', which may lie outside the adapter folder", where=path)


def _check_ours(folder: Path, marker: str) -> None:
    if not folder.exists() or (folder / marker).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise AdapterError("E319", f"exists and has no {marker}; name a new or empty folder", where=folder)


def _bring_along(folder: Path, new: Path) -> None:
    for extra in folder.iterdir() if folder.exists() else ():
        if extra.name != "tasks" and not (new / extra.name).exists():
            copy = shutil.copytree if extra.is_dir() else shutil.copy2
            copy(extra, new / extra.name)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def sync(path: Path) -> None:
    """Has the disk hold a file, or a folder's list of names, before we go on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

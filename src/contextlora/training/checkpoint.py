"""Checkpoints that survive kill -9 and bad disks: written aside, hashed, renamed; the newest valid one is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from contextlora.errors import RunError

KEEP = 2
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood.

    Attributes:
        stage, update: the next update to do, of which stage.
        run: identifies configuration, graph and data; another run's checkpoint is refused.
        tensors: blocks and optimizer states by name.
    """

    stage: int
    update: int
    run: str
    tensors: dict[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and drops all but the newest two. Atomic: a kill at any moment leaves the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{checkpoint.stage:03d}-{checkpoint.update:07d}"
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file(checkpoint.tensors, part / "tensors.safetensors")
    head = {"format": FORMAT, "stage": checkpoint.stage, "update": checkpoint.update, "run": checkpoint.run}
    head["sha256"] = _sha256(part / "tensors.safetensors")
    (part / "checkpoint.json").write_text(json.dumps(head | {"self": _seal(head)}))
    for path in part.iterdir():
        _sync(path)
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync(folder)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path, run: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Raises RunError E520 if it belongs to another run."""
    for path in _newest_first(folder):
        found = _read(path)
        if found is None:
            continue
        if found.run != run:
            raise RunError(
                "E520",
                "these checkpoints come from other settings, tasks or data; use another `out`, or train without --resume",
                where=folder,
            )
        return found
    return None


def clear(folder: Path) -> None:
    """Removes a run's checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if any byte of it is not as written."""
    try:
        head: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
        seal = head.pop("self")
        if seal != _seal(head) or head["format"] != FORMAT or head["sha256"] != _sha256(path / "tensors.safetensors"):
            return None
        return Checkpoint(head["stage"], head["update"], head["run"], load_file(path / "tensors.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("[0-9]*-[0-9]*") if p.is_dir()), reverse=True)


def _seal(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

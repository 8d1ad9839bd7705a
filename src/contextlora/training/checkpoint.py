"""Checkpoints that survive kill -9 and bad disks: written aside, hashed, renamed; the newest valid one is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contextlora.errors import RunError
from contextlora.lora.attach import adapted_layers
from contextlora.lora.folder import sync

KEEP = 2
NAMES = "[0-9]*-[0-9]*"  # stage and update
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood.

    Attributes:
        stage, update: the next update to do, of which stage.
        run: identifies configuration, graph and data; another run's checkpoint is refused.
        tensors: blocks and optimizer states by name.
        given: answers that the stage's prompts hold, by task and example id.
    """

    stage: int
    update: int
    run: str
    tensors: dict[str, Tensor]
    given: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and drops all but it and the one before. Atomic: a kill at any moment leaves the older ones.

    Raises RunError E523 if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    name = f"{checkpoint.stage:03d}-{checkpoint.update:07d}"
    part = folder / f".{name}.part"
    try:
        part.mkdir()
        _write(part, checkpoint)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError("E523", f"a checkpoint cannot be written: {e}", where=folder) from None
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    sync(folder)
    found = _newest_first(folder)
    later = [p for p in found if _place(p) > _place(final)]  # damaged, else the run would have gone on from there
    for old in later + found[len(later) + KEEP :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(part: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.tensors, part / "tensors.safetensors")
    head: dict[str, Any] = {"format": FORMAT, "stage": checkpoint.stage, "update": checkpoint.update}
    head |= {"run": checkpoint.run, "given": checkpoint.given, "sha256": _sha256(part / "tensors.safetensors")}
    (part / "checkpoint.json").write_text(json.dumps(head | {"self": _seal(head)}))
    for path in (*part.iterdir(), part):
        sync(path)


def left_in(folder: Path) -> bool:
    """Whether a run has left checkpoints in a folder, or below it."""
    return any(folder.rglob(NAMES))


def load_latest(folder: Path, run: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Raises RunError E520 if it belongs to another run."""
    return next(load_all(folder, run), None)


def load_all(folder: Path, run: str) -> Iterator[Checkpoint]:
    """All checkpoints that are whole, the newest first. Raises RunError E520 at one that belongs to another run."""
    for path in _newest_first(folder):
        found = _read(path)
        if found is None:
            continue
        if found.run != run:
            raise RunError(
                "E520",
                "these checkpoints come from other settings, tasks, data or base; use another `out` or no --resume",
                where=folder,
            )
        yield found


def layer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that training may change in the layers, by the names that a checkpoint has for them; no copies."""
    layers = adapted_layers(model).items()
    return {f"{name}|{path}": t for path, layer in layers for name, t in layer.tensors().items()}


@torch.no_grad()
def restore_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what `layer_tensors` gave."""
    for name, mine in layer_tensors(model).items():
        mine.copy_(tensors[name])


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
        given = {t: {i: tuple(a) for i, a in found.items()} for t, found in head["given"].items()}
        tensors = load_file(path / "tensors.safetensors")
        return Checkpoint(head["stage"], head["update"], head["run"], tensors, given)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob(NAMES) if p.is_dir()), key=_place, reverse=True)


def _place(path: Path) -> tuple[int, int]:
    """Stage and update of a checkpoint: as names, stage 1000 would come before 999."""
    stage, update = path.name.split("-")
    return int(stage), int(update)


def _seal(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

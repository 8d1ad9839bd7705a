"""A cluster's slices as one dense B and a bitmap for each task: exact where their masks are disjoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from contextlora.errors import PeerError, RunError
from contextlora.federated.means import layers_of, mean, shape_of
from contextlora.federated.slices import Layer, Mask, Slice


@dataclass(frozen=True)
class Packed:
    """Several tasks' slices in the memory of one.

    Attributes:
        b: by layer, (r, d_out) float32; entries of several tasks hold the mean of their values.
        bitmaps: by task and layer, one bit an entry.
        collision: the largest share of a layer's entries that several tasks claim; 0 means that nothing was lost.
    """

    b: Mapping[Layer, NDArray[np.float32]]
    bitmaps: Mapping[str, Mapping[Layer, NDArray[np.uint8]]]
    collision: float

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        bits = sum(v.nbytes for of_task in self.bitmaps.values() for v in of_task.values())
        return bits + sum(v.nbytes for v in self.b.values())

    def slice(self, task: str) -> Slice:
        """The task's slice: B where the task's bitmap says so."""
        shapes = {layer: (v.shape[0], v.shape[1]) for layer, v in self.b.items()}
        masks = {layer: Mask.of_bitmap(shapes[layer], bits) for layer, bits in self.bitmaps[task].items()}
        return Slice(task, masks, {layer: self.b[layer].ravel()[m.indices] for layer, m in masks.items()})


def pack(slices: Sequence[Slice], s_max: float = 0.0) -> Packed:
    """Packs one slice a task.

    Args:
        slices: of different tasks, equal in rank.
        s_max: the collision up to which losing is accepted, S_max.

    Raises:
        PeerError: E615 if a layer's collision exceeds `s_max`, saying which and by how much; E616 if a task comes
            twice; E612 if ranks differ.
    """
    if len({s.task for s in slices}) < len(slices):
        raise PeerError(
            "E616", f"a task comes twice among {', '.join(s.task for s in slices)}; average its slices first"
        )
    layers = layers_of(slices)
    for layer in layers:
        shape_of(slices, layer)
    measured = {layer: collision([s.masks[layer] for s in slices if layer in s.masks]) for layer in layers}
    for layer, s in measured.items():
        if s > s_max:
            raise PeerError("E615", f"the masks collide in {s:.4f} of the entries, more than {s_max:g}", where=layer)
    merged = mean(sorted(slices, key=lambda s: s.task), [1] * len(slices))
    bitmaps = {s.task: {layer: mask.bitmap() for layer, mask in s.masks.items()} for s in slices}
    return Packed({layer: merged.dense(layer) for layer in layers}, bitmaps, max(measured.values(), default=0.0))


def collision(masks: Sequence[Mask]) -> float:
    """The share of entries that at least two masks have active: S of eq. 19, counted instead of expected."""
    once, twice = np.zeros((2, -(-masks[0].size // 8)), np.uint8)
    for mask in masks:
        bits = mask.bitmap()
        twice |= once & bits
        once |= bits
    return int(np.bitwise_count(twice).sum()) / masks[0].size


def save_packed(packed: Packed, path: Path) -> None:
    """Writes it as safetensors. Raises RunError E523."""
    tensors: dict[str, NDArray[Any]] = {f"b|{layer}": v for layer, v in packed.b.items()}
    tensors |= {f"mask|{task}|{la}": bits for task, of_task in packed.bitmaps.items() for la, bits in of_task.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"collision": repr(packed.collision)})
    except (OSError, SafetensorError) as e:
        raise RunError("E523", f"cannot be written: {e}", where=path) from None


def load_packed(path: Path) -> Packed:
    """Reads what `save_packed` wrote. Raises PeerError E601 for anything else."""
    b: dict[Layer, NDArray[np.float32]] = {}
    bitmaps: dict[str, dict[Layer, NDArray[np.uint8]]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                kind, *what = name.split("|")
                if kind == "b":
                    b[what[0]] = file.get_tensor(name)
                else:
                    bitmaps.setdefault(what[0], {})[what[1]] = file.get_tensor(name)
            return Packed(b, bitmaps, float(file.metadata()["collision"]))
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError):
        raise PeerError("E601", "not packed slices", where=path) from None

"""What a device keeps between rounds, so that it rejoins after a kill: its slice, its adapters, what it has let in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contextlora.federated.aggregate import Held
from contextlora.federated.federation import Federation
from contextlora.federated.local import Local
from contextlora.federated.peer import Peer
from contextlora.federated.slices import Mask, Slice
from contextlora.federated.taskgate import TaskMean
from contextlora.training import checkpoint

LOCAL, HELD, SEEN, MEANS = "local|", "held|", "seen|", "means|"


def run_of(settings: Federation) -> str:
    """Identifies a federation, wherever it is kept and whatever goes wrong: another one's checkpoints are refused."""
    text = json.dumps(settings.model_dump(exclude={"out", "faults", "wait"}), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def save_peer(peer: Peer, folder: Path) -> None:
    """Keeps where a device stands, between two rounds. Raises RunError E523."""
    tensors = {LOCAL + name: t for name, t in peer.local.tensors().items()}
    for (cluster, task), slice_ in peer.held.slices.items():
        tensors |= {f"{HELD}{cluster}|{task}|{name}": t for name, t in _tensors(slice_)}
    for (name, task, what), (version, round_) in peer.inbox.seen.items():
        tensors[f"{SEEN}{name}|{task}|{what}"] = torch.tensor([version, round_])
    for name, mean in peer.means.items():
        tensors[f"{MEANS}{name}"] = torch.from_numpy(np.concatenate([[mean.count], mean.mean, mean.squares]))
    at = checkpoint.Checkpoint(peer.round, 0, run_of(peer.settings), {k: t.contiguous() for k, t in tensors.items()})
    checkpoint.save(folder, at)


def load_peer(peer: Peer, folder: Path) -> bool:
    """Takes back what was kept, if anything was. Raises RunError E520 for another federation's."""
    found = checkpoint.load_latest(folder, run_of(peer.settings))
    if found is None:
        return False
    peer.start(Local.of_tensors(peer.owner, _below(found.tensors, LOCAL)))
    peer.round = found.stage
    slices: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, t in _below(found.tensors, HELD).items():
        cluster, task, name = key.split("|", 2)
        slices.setdefault((cluster, task), {})[name] = t
    peer.held = Held({k: _slice(k[1], parts) for k, parts in sorted(slices.items())}, peer.held.choice)
    for key, t in _below(found.tensors, SEEN).items():
        name, task, what = key.split("|")
        peer.inbox.seen[name, task, what] = (int(t[0]), int(t[1]))
    for name, t in _below(found.tensors, MEANS).items():
        mean, squares = np.split(t.numpy()[1:], 2)
        peer.means[name] = TaskMean(int(t[0]), mean, squares)
    return True


def _below(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def _tensors(slice_: Slice) -> Iterator[tuple[str, Tensor]]:
    """Copies: tasks of one cluster may hold the very same arrays, and a file of tensors refuses what is shared."""
    for layer, mask in slice_.masks.items():
        yield f"shape|{layer}", torch.tensor(mask.shape)
        yield f"mask|{layer}", torch.from_numpy(mask.kept().copy())
        yield f"values|{layer}", torch.from_numpy(slice_.values[layer].copy())


def _slice(task: str, parts: dict[str, Tensor]) -> Slice:
    layers = [name.removeprefix("shape|") for name in parts if name.startswith("shape|")]
    masks = {la: Mask.of_kept(_pair(parts[f"shape|{la}"]), parts[f"mask|{la}"].numpy()) for la in layers}
    return Slice(task, masks, {la: parts[f"values|{la}"].numpy() for la in layers})


def _pair(t: Tensor) -> tuple[int, int]:
    return int(t[0]), int(t[1])

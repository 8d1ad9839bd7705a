"""What a device keeps between rounds, so that it rejoins after a kill: its slice, its adapters, what it has let in.

A device alone does not keep what it has of others: they send it again. The devices of a simulation keep that too, in
one checkpoint for all, where what many of them have stands once: a resumed simulation goes on as if nothing had been.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contextlora.errors import RunError
from contextlora.federated.aggregate import Held
from contextlora.federated.federation import Federation
from contextlora.federated.local import Local
from contextlora.federated.mailbox import Holding
from contextlora.federated.peer import Peer
from contextlora.federated.post import Heard, Post
from contextlora.federated.slices import Mask, Slice
from contextlora.federated.taskgate import TaskMean
from contextlora.training import checkpoint

KEPT, METRICS = "kept", "metrics.jsonl"
LEFT = (KEPT, "adapter", "adapters", "packed", "packed.safetensors", METRICS, "evaluation.json", "report.html")
LOCAL, HELD, MEANS, KNOWN = "local|", "held|", "means|", "known|"

Tensors = dict[str, Tensor]
Content = Tensor | NDArray[np.floating] | bytes  # what many hold alike is the same object
Late = Mapping[tuple[str, str], list[tuple[str, bytes]]]


# --- the folder ----------------------------------------------------------------------------------------------------


def run_of(settings: Federation) -> str:
    """Identifies a federation, wherever it is kept and whatever goes wrong: another one's checkpoints are refused."""
    text = json.dumps(settings.model_dump(exclude={"out", "faults", "wait"}), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_a_second_run(out: Path, *, again: bool) -> None:
    """Raises RunError E521 or E522 where a run would throw away what an earlier one has left.

    Args:
        again: go on, or throw away: that is what the user wants.
    """
    if again:
        return
    if any((out / name).is_dir() for name in ("adapter", "adapters")):
        raise RunError("E521", "holds a finished federation; use another `out`, or --force", where=out)
    if checkpoint.left_in(out / KEPT):
        text = "holds an interrupted federation; go on with --resume, or throw it away with --force"
        raise RunError("E522", text, where=out)


def throw_away(out: Path) -> None:
    """Removes all that a run of a federation leaves in its folder, and nothing else."""
    for name in LEFT:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


# --- one device ----------------------------------------------------------------------------------------------------


def save_peer(peer: Peer, folder: Path, *, begins: bool = False) -> None:
    """Keeps where a device stands, before it tells others: no later life of it says two things under one version.

    Args:
        begins: in a round that an earlier life may have kept, and begun, too.

    Raises RunError E523.
    """
    life, run = 0, run_of(peer.settings)
    if begins and (before := checkpoint.load_latest(folder, run)) is not None and before.stage == peer.round:
        life = before.update + 1
    save_all(folder, run, Kept(peer.round, {peer.name: parts_of(peer)}), life)


def load_peer(peer: Peer, folder: Path) -> bool:
    """Takes back what was kept, if anything was. Raises RunError E520 for another federation's."""
    kept = load_all(folder, run_of(peer.settings)).devices.get(peer.name)
    if kept is not None:
        restore(peer, kept)
    return kept is not None


def parts_of(peer: Peer) -> dict[str, Content]:
    """What a device keeps for itself; no copies of what others have too."""
    facts: dict[str, Any] = {"round": peer.round, "said": peer.said, "rates": peer.rates}
    facts["seen"] = [[*k, *v] for k, v in peer.post.inbox.seen.items()]
    tensors: dict[str, Content] = {LOCAL + name: t for name, t in peer.local.tensors().items()}
    tensors["facts"] = _json(facts)
    for (cluster, task), slice_ in peer.held.slices.items():
        flat = peer.once(("flat", id(slice_)), lambda slice_=slice_: (slice_, _of_slice(slice_)))[1]  # type: ignore[misc]
        tensors |= {f"{HELD}{cluster}|{task}|{name}": t for name, t in flat.items()}
    for name, mean in peer.means.items():
        tensors |= {f"{MEANS}{name}|{mean.count}|mean": mean.mean, f"{MEANS}{name}|{mean.count}|squares": mean.squares}
    return tensors


def tensors_of(peer: Peer) -> Tensors:
    """The same as it is read back."""
    return {name: _tensor(content) for name, content in parts_of(peer).items()}


def restore(peer: Peer, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what `parts_of` gave."""
    facts = _facts(tensors["facts"])
    peer.start(Local.of_tensors(peer.owner, _below(tensors, LOCAL)))
    peer.round, peer.said, peer.rates = facts["round"], facts["said"], facts["rates"]
    slices: dict[tuple[str, str], Tensors] = {}
    for key, t in _below(tensors, HELD).items():
        cluster, task, name = key.split("|", 2)
        slices.setdefault((cluster, task), {})[name] = t
    peer.held = Held({k: _shared(peer, k[1], parts) for k, parts in slices.items()}, peer.held.choice)
    for name, task, what, version, round_ in facts["seen"]:
        peer.post.inbox.seen[name, task, what] = (version, round_)
    means = _below(tensors, MEANS)
    for name, count, what in (key.split("|") for key in means):
        if what == "mean":
            mean, squares = (means[f"{name}|{count}|{w}"].numpy() for w in ("mean", "squares"))
            peer.means[name] = TaskMean(int(count), mean, squares)


def _shared(peer: Peer, task: str, parts: Tensors) -> Slice:
    """A slice that was kept; the same object for all devices that kept the same."""
    key = ("kept", task, *map(id, parts.values()))
    return peer.once(key, lambda: (parts, _slice(task, parts)))[1]


# --- what a device knows of others ---------------------------------------------------------------------------------


def known_of(post: Post) -> dict[str, Content]:
    """What a device has heard and said, so that it need not ask again nor say all again; no copies."""
    out, inbox = post.outbox, post.inbox
    found: dict[str, Content] = {f"announced|{name}": h.announced for name, h in post.heard.items()}
    for (name, task), held in inbox.slices.items():
        found |= {f"holds|{name}|{task}|{v}": values for v, values in held.versions.items()}
    said = {name: at for name, at in (("base", out.base), ("sent", out.sent)) if at is not None}
    found |= {name: values for name, (_, values) in said.items()}
    facts = {
        "bits": post.bits,
        "heard": {name: (h.task, h.version) for name, h in post.heard.items()},
        "slices": [(*k, held.mask.hex(), held.counts, list(held.versions)) for k, held in inbox.slices.items()],
        "said": {name: version for name, (version, _) in said.items()},
        "mask": out.mask.hex(),
        "counts": out.counts,
    }
    return {KNOWN + k: c for k, c in found.items()} | {KNOWN + "facts": _json(facts)}


def restore_known(post: Post, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what `known_of` gave; of a device that was gone then, nothing is there."""
    tensors = _below(tensors, KNOWN)
    if not tensors:
        return
    facts, out = _facts(tensors["facts"]), post.outbox
    post.bits, out.mask, out.counts = facts["bits"], bytes.fromhex(facts["mask"]), facts["counts"]
    said = {name: (version, tensors[name].numpy()) for name, version in facts["said"].items()}
    out.base, out.sent = said.get("base"), said.get("sent")
    for name, (task, version) in facts["heard"].items():
        announced = tensors[f"announced|{name}"].numpy().tobytes()
        post.heard[name] = Heard(task, post.announced(announced, task), announced, version)
    for name, task, mask, counts, versions in facts["slices"]:
        values = {v: tensors[f"holds|{name}|{task}|{v}"].numpy() for v in versions}
        post.inbox.slices[name, task] = Holding(bytes.fromhex(mask), counts, values)


# --- in one file: all devices of a simulation, or the one -------------------------------------------------------------


@dataclass
class Kept:
    """Where the devices of a simulation stood.

    Attributes:
        round: the next one.
        devices: what each has kept, by name; of one that was there in the last round, also what it knows of others.
        late: bundles under way, by slot and receiver: from whom, and what.
    """

    round: int = 0
    devices: dict[str, Any] = field(default_factory=dict)
    late: Late = field(default_factory=dict)


def save_all(folder: Path, run: str, kept: Kept, life: int = 0) -> None:
    """Keeps all devices at once: a kill at any moment leaves them all in one round. Raises RunError E523."""
    pool = _Pool()
    index = {name: {k: pool.add(c) for k, c in parts.items()} for name, parts in kept.devices.items()}
    late = [(*k, sender, pool.add(data)) for k, sent in kept.late.items() for sender, data in sent]
    tensors = pool.tensors | {"index": _tensor(_json({"devices": index, "late": late}))}
    checkpoint.save(folder, checkpoint.Checkpoint(kept.round, life, run, tensors))


def load_all(folder: Path, run: str) -> Kept:
    """What `save_all` kept last, or nothing. Raises RunError E520 for another federation's."""
    found = checkpoint.load_latest(folder, run)
    if found is None:
        return Kept()
    index = _facts(found.tensors["index"])
    devices = {n: {k: found.tensors[t] for k, t in parts.items()} for n, parts in index["devices"].items()}
    late: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
    for slot, to, sender, t in index["late"]:
        late.setdefault((slot, to), []).append((sender, found.tensors[t].numpy().tobytes()))
    return Kept(found.stage, devices, late)


class _Pool:
    """Contents by their hash, each once."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self._names: dict[int, str] = {}

    def add(self, content: Content) -> str:
        """The name of a content, of which the caller must not let go before the pool."""
        if id(content) not in self._names:
            data = _array(content)
            name = hashlib.sha256(f"{data.dtype}{data.shape}".encode() + data.tobytes()).hexdigest()[:32]
            if name not in self.tensors:
                self.tensors[name] = _tensor(content)
            self._names[id(content)] = name
        return self._names[id(content)]


# --- as tensors ----------------------------------------------------------------------------------------------------


def _below(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def _array(content: Content) -> NDArray[Any]:
    return np.frombuffer(content, np.uint8) if isinstance(content, bytes) else np.asarray(content)


def _tensor(content: Content) -> Tensor:
    return torch.tensor(_array(content))


def _json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _facts(t: Tensor) -> Any:
    return json.loads(t.numpy().tobytes())


def _of_slice(slice_: Slice) -> Tensors:
    """A slice in three tensors: layers and their shapes, a bit an entry, active values."""
    layers = [(layer, *mask.shape) for layer, mask in slice_.masks.items()]
    bits = [mask.bitmap() for mask in slice_.masks.values()]
    values = [slice_.values[layer] for layer, *_ in layers]
    return {
        "layers": _tensor(_json(layers)),
        "bits": torch.from_numpy(np.concatenate(bits)),
        "values": torch.from_numpy(np.concatenate(values)),
    }


def _slice(task: str, parts: Tensors) -> Slice:
    layers = _facts(parts["layers"])
    ends = np.cumsum([-(-rows * width // 8) for _, rows, width in layers])[:-1]
    masks = {
        layer: Mask.of_bitmap((rows, width), bits)
        for (layer, rows, width), bits in zip(layers, np.split(parts["bits"].numpy(), ends), strict=True)
    }
    values = np.split(parts["values"].numpy(), np.cumsum([len(m.indices) for m in masks.values()])[:-1])
    return Slice(task, masks, dict(zip(masks, values, strict=True)))

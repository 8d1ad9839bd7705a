"""What a device has in the end: its task's adapter for use anywhere and, if asked, its cluster's in the room of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from contextlora.errors import PeerError, RunError
from contextlora.federated.layer import export, load_slice
from contextlora.federated.pack import pack, save_packed
from contextlora.federated.peer import Peer


def deliver(
    peer: Peer, adapter: Path, packed: Path, say: Callable[[str], None] = lambda _: None, *, keep: bool = True
) -> None:
    """Writes a device's adapter as a PEFT folder and, where the federation packs, what it holds of its cluster.

    A packed device answers with what the packing has left of its adapters; where they collide beyond S_max it stays
    unpacked, and `say` is told. Without `keep` it is packed all the same, but nothing is written. Raises RunError E523.
    """
    if keep:
        _export(peer, adapter)
    if not peer.settings.pack or not hasattr(peer, "clustering"):  # without a round nothing has changed
        return
    tasks = {peer.settings.devices[n].task for n in peer.clustering.group_of(peer.name)}
    mine = {k: s for k, s in peer.held.slices.items() if s.task in tasks}
    try:
        found = pack([*mine.values()], peer.settings.limits.collision)
    except PeerError as e:
        say(f"{peer.name} is not packed: {e}")
        return
    if keep:
        save_packed(found, packed)
    peer.held = replace(peer.held, slices={**peer.held.slices, **{k: found.slice(s.task) for k, s in mine.items()}})


def _export(peer: Peer, out: Path) -> None:
    """What it trains as a plain PEFT LoRA; of full fine-tuning, the weights' differences to the base."""
    if peer.settings.aggregate != "full":
        load_slice(peer.reader.model, peer.local.block)
        export(peer.reader.model, peer.owner, out, peer.settings.model)
        return
    moved = {f"{layer}.weight": torch.from_numpy(peer.local.block.dense(layer)) for layer in peer.layers}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(moved, out / "difference.safetensors")
    except (OSError, SafetensorError) as e:
        raise RunError("E523", f"cannot be written: {e}", where=out) from None

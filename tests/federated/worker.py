"""One real device of a federation on a tiny model, in a process of its own; started by tests."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

import tiny
from contextlora.data.collate import Encoder
from contextlora.federated import device
from contextlora.federated.aggregate import Held
from contextlora.federated.fabric import transfers
from contextlora.federated.fabric.zenoh import ZenohFabric
from contextlora.federated.federation import load_federation
from contextlora.federated.identity import load_identity, load_peers
from contextlora.federated.layer import layers
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures


def tiny_reader(*_: object) -> ImageFeatures:
    model, processor = tiny.llama(torch.float32)
    attach(model, tiny.graph(), make=layers(0))
    return ImageFeatures(model, Encoder(processor, tiny.graph()))


def fingerprint(held: Held) -> str:
    """A hash of every byte of every adapter that a device holds."""
    digest = hashlib.sha256()
    for (cluster, task), slice_ in held.slices.items():
        digest.update(f"{cluster}|{task}".encode())
        for layer, mask in slice_.masks.items():
            digest.update(layer.encode() + mask.indices.tobytes() + slice_.values[layer].tobytes())
    return digest.hexdigest()


def main(name: str, home: Path, options: list[str]) -> None:
    torch.set_num_threads(1)
    if "--small-chunks" in options:  # the tiny model's messages are single chunks otherwise, which measure nothing
        transfers.CHUNK = transfers._SMALLEST = 512
    device.open_reader = tiny_reader
    settings = load_federation(home / "federation.yaml")
    me, peers = load_identity(home / name), load_peers(home / "peers.yaml")
    peer = device.open_device(settings, me, peers)
    with ZenohFabric(me, peers, settings.name) as fabric:
        device.run_device(peer, fabric, home / settings.name / name, resume="--resume" in options, silent=True)
    found = {"held": fingerprint(peer.held), "refused": dict(peer.post.refused), "heard": sorted(peer.post.heard)}
    (home / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

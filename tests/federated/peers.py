"""Enrolled devices and their fabrics for tests: a real authority, real certificates, free ports of this machine."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from contextlora.federated.fabric.zenoh import ZenohFabric
from contextlora.federated.identity import (
    create_authority,
    create_identity,
    load_identity,
    load_peers,
    read_peer,
    save_peers,
    sign_request,
)

RUN = "test"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def enroll(folder: Path, names: Sequence[str]) -> Path:
    """Makes authority and devices under `folder`, and peers.yaml, whose path it gives."""
    create_authority(folder / "authority")
    peers = []
    for name, port in zip(names, free_ports(len(names)), strict=True):
        issued = sign_request(folder / "authority", create_identity(folder / name, name))
        shutil.copy(issued, folder / name / "certificate.pem")
        peers.append(read_peer(issued, f"127.0.0.1:{port}"))
    save_peers(folder / "peers.yaml", peers)
    return folder / "peers.yaml"


def fabric(folder: Path, name: str, *, peers: Path | None = None, run: str = RUN, **more) -> ZenohFabric:
    return ZenohFabric(load_identity(folder / name), load_peers(peers or folder / "peers.yaml"), run, **more)

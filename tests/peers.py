"""Enrolled devices and their fabrics for tests: a real authority, real certificates, free ports of this machine."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from contextlora.federated.fabric.zenoh import ZenohFabric, configuration
from contextlora.federated.identity import load_identity, load_peers, save_peers
from contextlora.federated.wire import run_hash

RUN = "test"
SPACE = f"contextlora/{run_hash(RUN).hex()[:16]}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def fabric(folder: Path, name: str, peers: Path | None = None, **more: Any) -> ZenohFabric:
    return ZenohFabric(load_identity(folder / name), load_peers(peers or folder / "peers.yaml"), RUN, **more)


def by_way_of(folder: Path, name: str, port: int) -> Path:
    """A list of peers in which `name` is found at another port."""
    peers = load_peers(folder / "peers.yaml")
    peers[name] = replace(peers[name], endpoint=f"127.0.0.1:{port}")
    save_peers(folder / f"peers-{port}.yaml", peers.values())
    return folder / f"peers-{port}.yaml"


def raw_session(folder: Path, name: str, **tls: Any) -> Any:
    """A zenoh session that obeys nobody: it calls all peers with this device's certificate, and may try anything."""
    import zenoh

    peers, me = load_peers(folder / "peers.yaml"), load_identity(folder / name)
    others = {n: p for n, p in peers.items() if n != name}
    config = configuration(me, replace(peers[name], endpoint=None), others, SPACE, None, 2.0)
    config["transport"]["link"]["tls"] |= tls
    del config["access_control"]
    return zenoh.open(zenoh.Config.from_json5(json.dumps(config)))


def until(condition: Callable[[], Any], seconds: float = 20.0) -> float:
    """Waits for a condition, asleep; gives the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never came true"
        time.sleep(0.02)
    return time.monotonic() - start


def meet(*fabrics: ZenohFabric) -> None:
    """Waits until all see all."""
    until(lambda: all(len(f.alive()) >= len(fabrics) - 1 for f in fabrics))


def message_of(name: str, round_: int, size: int = 1 << 20) -> bytes:
    """The same bytes in every process: whose and of which round, then noise."""
    return f"{name} {round_} ".encode().ljust(64) + random.Random(f"{name} {round_}").randbytes(size - 64)


def receive_all(device: ZenohFabric, count: int, seconds: float) -> dict[str, bytes]:
    """What arrives, by sender, until it is `count` messages or the time is over."""
    got: dict[str, bytes] = {}
    for sender, message in device.receive(device.now() + seconds):
        got[sender] = message
        if len(got) == count:
            break
    return got

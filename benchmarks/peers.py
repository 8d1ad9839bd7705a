"""Three peers, each a process of its own, send one another 1 MB at once over mTLS on this machine.

python benchmarks/peers.py [--rounds 20] [--bytes 1000000]

A round begins at the same moment everywhere (processes of one machine share its steady clock) and ends for a peer when
both messages of the others are here, whole and their hash checked; between rounds all sleep. The wire time beside it is
that of the same exchange without the fabric: the same processes and certificates, plain TLS 1.3 sockets with client
certificates, every message sent in one piece and nothing checked. A round's time is that of its slowest peer.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from contextlora.federated.fabric.zenoh import ZenohFabric
from contextlora.federated.identity import enroll_here, load_identity, load_peers

NAMES = ["ant", "bee", "cat"]
PAUSE = 0.8  # seconds from the start of one round to that of the next


def rounds(count: int, one: Callable[[], None]) -> dict[str, object]:
    """Seconds of each round, and of the processor for all; the first begins when the process that measures says."""
    print("ready", flush=True)
    start, took, busy = float(input()), [], time.process_time()
    for r in range(count):
        time.sleep(max(0.0, start + r * PAUSE - time.monotonic()))
        one()
        took.append(time.monotonic() - (start + r * PAUSE))
    return {"took": took, "busy": time.process_time() - busy}


def by_fabric(folder: Path, name: str, size: int, count: int) -> dict[str, object]:
    others = [n for n in NAMES if n != name]
    with ZenohFabric(load_identity(folder / name), load_peers(folder / "peers.yaml"), "bench") as fabric:

        def one() -> None:
            deadline = fabric.now() + 10
            fabric.send(others, os.urandom(size), deadline)
            missing = set(others)
            for sender, message in fabric.receive(deadline):
                assert len(message) == size
                missing.discard(sender)
                if not missing:
                    return
            raise SystemExit(f"{name} did not hear from {missing}")

        while len(fabric.alive()) < len(others):
            time.sleep(0.02)
        took = rounds(count, one)
        time.sleep(0.3)  # the others may still be at it
        sent = sum(t.sent for t in fabric.traffic.values())
        goodput = statistics.mean(fabric.goodput().values())
        return {**took, "sent": sent, "goodput": goodput, "refused": dict(fabric.refused)}


def by_sockets(folder: Path, name: str, size: int, count: int) -> dict[str, object]:
    """The same exchange over plain TLS."""
    files = folder / name / "certificate.pem", folder / name / "tls.key"
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(*files)
        context.load_verify_locations(folder / "authority" / "ca.pem")
    ports = {n: int(str(p.endpoint).rpartition(":")[2]) for n, p in load_peers(folder / "peers.yaml").items()}
    links = []
    with socket.create_server(("127.0.0.1", ports[name])) as listening:
        for other in NAMES[: NAMES.index(name)]:
            while True:
                try:
                    raw = socket.create_connection(("127.0.0.1", ports[other]))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            links.append(client.wrap_socket(raw))
        while len(links) < len(NAMES) - 1:
            links.append(server.wrap_socket(listening.accept()[0], server_side=True))
    for link in links:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def one() -> None:
        message, work = os.urandom(size), []
        for link in links:
            work += [
                threading.Thread(target=link.sendall, args=(message,)),
                threading.Thread(target=read, args=(link,)),
            ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()

    def read(link: ssl.SSLSocket) -> None:
        got = 0
        while got < size:
            got += len(link.recv(min(1 << 16, size - got)))

    return rounds(count, one)


def measure(how: str, folder: Path, size: int, count: int) -> list[dict[str, object]]:
    """Runs the three processes; what each of them says."""
    what, pipe = [str(folder), str(size), str(count)], subprocess.PIPE
    commands = [[sys.executable, __file__, "--peer", how, name, *what] for name in NAMES]
    processes = [subprocess.Popen(c, stdin=pipe, stdout=pipe, text=True) for c in commands]
    for p in processes:
        p.stdout.readline()
    start = time.monotonic() + 1
    for p in processes:
        p.stdin.write(f"{start}\n")
        p.stdin.flush()
    said = [p.communicate(timeout=300)[0] for p in processes]
    if any(p.returncode for p in processes):
        raise SystemExit(f"a peer failed: {[p.returncode for p in processes]}")
    return [json.loads(s) for s in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        how, name, folder, size, count = options.peer
        run = by_fabric if how == "fabric" else by_sockets
        print(json.dumps(run(Path(folder), name, int(size), int(count))))
        return
    print(f"`python benchmarks/peers.py --rounds {options.rounds} --bytes {options.bytes}`\n")
    print("| a round of three peers | median ms | 10 % | 90 % | processor ms of a peer |\n|---|---|---|---|---|")
    medians = {}
    for how in ("fabric", "sockets"):
        with tempfile.TemporaryDirectory() as folder:
            enroll_here(folder, NAMES)
            said = measure(how, Path(folder), options.bytes, options.rounds + 1)
        slowest = [1e3 * max(r) for r in zip(*(s["took"] for s in said), strict=True)][1:]  # the first one warms up
        cuts = statistics.quantiles(slowest, n=10)
        medians[how] = statistics.median(slowest)
        busy = 1e3 * statistics.mean(s["busy"] for s in said) / (options.rounds + 1)
        print(f"| {how} | {medians[how]:.1f} | {cuts[0]:.1f} | {cuts[-1]:.1f} | {busy:.1f} |", flush=True)
        if how == "fabric":
            least = (options.rounds + 1) * 2 * options.bytes
            more = [100 * (s["sent"] / least - 1) for s in said]
            refused, goodput = [s["refused"] for s in said], [s["goodput"] / 1e6 for s in said]
    print(f"\nThe fabric takes {medians['fabric'] / medians['sockets']:.2f} times the wire time.")
    print(f"Bytes beyond the messages: {max(more):.2f} %. Refused: {refused}.")
    print(f"Goodput to a peer as if alone, Mbit/s, mean by sender: {', '.join(f'{g:.0f}' for g in goodput)}.")


if __name__ == "__main__":
    main()

"""Emulated devices on one machine: processes in network namespaces on one slow medium, really talking to each other.

`isolate` puts the whole program in namespaces of its own, where it may set up any network and where nothing outlives
it: the kernel takes namespaces, interfaces and processes away with it, however it ends. It takes root, or a kernel that
lets users have namespaces of their own. `network` then sets up one of

* medium: one half-duplex medium that all share: an HTB class on an IFB that every bridge port's ingress goes through;
* links: a rate for each pair and direction: an HTB class per peer where packets leave a device;
* relay: the same medium with a delay, by a process that passes packets between TUN devices: kernels often lack netem;
* paced: where none of that is allowed, plain loopback, its sockets paced one by one (SO_MAX_PACING_RATE): a link of its
  own for each pair and direction, without delay. `Network.how` says which.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

INSIDE = "GEAR_TESTBED"
KEPT = Path("/run/netns")
CLONE_NEWNET = 0x40000000
SO_MAX_PACING_RATE, TCP_INFO, BYTES_SENT = 47, 11, 200  # linux/socket.h, linux/tcp.h: offset of tcpi_bytes_sent
QUEUE = 200  # packets on the medium, as access points have them
LIBC = ctypes.CDLL(None, use_errno=True)


def isolate() -> str:
    """Starts the program again in namespaces of its own, unless it is there. Returns why it cannot, "" if it is."""
    if os.environ.get(INSIDE):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        KEPT.mkdir()
        return ""
    if missing := [tool for tool in ("unshare", "ip", "tc", "mount") if shutil.which(tool) is None]:
        return f"no {', '.join(missing)} on this machine"
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        apart += ["--user", "--map-root-user"]
    tried = subprocess.run([*apart, "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"not root, and no namespaces for users here ({tried.stderr.strip()})"
    sys.stdout.flush()
    return os.execvpe(apart[0], [*apart, sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


@dataclass(frozen=True)
class Network:
    """Where emulated devices are.

    Attributes:
        count: of devices.
        rate: bit/s, of the medium or of each link.
        how: "medium", "links", "relay" or "paced".
        interface: through which devices talk.
    """

    count: int
    rate: float
    how: str
    interface: str

    def address(self, device: int) -> str:
        """Its IP address."""
        return "127.0.0.1" if self.how == "paced" else f"10.77.0.{device + 1}"

    def enter(self, device: int) -> None:
        """Moves this process to a device; before it opens sockets."""
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        if self.how != "paced":
            with (KEPT / f"d{device}").open() as f:
                if LIBC.setns(f.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the namespace of device {device}")

    def pace(self) -> None:
        """Paces sockets opened since; on real interfaces there is nothing to do."""
        if self.how == "paced":
            for s in _sockets():
                s.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", int(self.rate / 8)))

    def sent(self) -> int:
        """Bytes that this device has sent so far: of its interface, headers too; of its sockets where paced."""
        if self.how == "paced":
            infos = (s.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256) for s in _sockets())
            return sum(struct.unpack_from("Q", i, BYTES_SENT)[0] for i in infos if len(i) >= BYTES_SENT + 8)
        lines = Path("/proc/self/net/dev").read_text().splitlines()
        mine = next(line for line in lines if line.strip().startswith(f"{self.interface}:"))
        return int(mine.split(":")[1].split()[8])


def _sockets() -> Iterator[socket.socket]:
    """This process's connected TCP sockets."""
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  numbers, not files
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as s:
                if s.type == socket.SOCK_STREAM and s.family in (socket.AF_INET, socket.AF_INET6) and s.getpeername():
                    yield s
        except OSError:  # closed since, or it listens
            continue


@contextmanager
def network(
    count: int, rate: float, *, delay: float = 0.0, links: Mapping[tuple[int, int], float] | None = None
) -> Iterator[Network]:
    """Sets up a network and takes it down again; after `isolate` only, else it is "paced".

    Args:
        rate: bit/s of the medium.
        delay: seconds, one way.
        links: bit/s of each pair of devices, both ways round; then there is no medium, and `delay` must be 0.
    """
    if not os.environ.get(INSIDE):
        yield Network(count, rate, "paced", "lo")
        return
    relay = None
    try:
        for i in range(count):
            _run(f"ip netns add d{i}")
            _run(f"ip -n d{i} link set lo up")
        if delay:
            command = [sys.executable, str(Path(__file__).with_name("relay.py")), *map(str, (count, rate, delay))]
            relay = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert relay.stdout is not None
            if relay.stdout.readline() != b"up\n":
                raise RuntimeError("the relay did not come up")
            yield Network(count, rate, "relay", "air")
        else:
            _bridge(count, rate, links)
            yield Network(count, rate, "links" if links else "medium", "eth0")
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        _down(count)


def _bridge(count: int, rate: float, links: Mapping[tuple[int, int], float] | None) -> None:
    """All devices on one bridge; the medium's limit on what enters it, or links' limits on what leaves devices."""
    _run("ip link add bridge type bridge")
    _run("ip link set bridge up")
    if not links:
        _run("ip link add medium type ifb")
        _run("ip link set medium up")
        _run("tc qdisc add dev medium root handle 1: htb default 10")
        _limit("tc", "medium", 10, rate)
    for i in range(count):
        _run(f"ip link add v{i} type veth peer name eth0 netns d{i}")
        _run(f"ip link set v{i} master bridge up")
        _run(f"ip -n d{i} addr add 10.77.0.{i + 1}/24 dev eth0")
        _run(f"ip -n d{i} link set eth0 gso_max_segs 1 up")  # packets as on a wire, so that limits hold for each
        if links:
            _run(f"tc -n d{i} qdisc add dev eth0 root handle 1: htb default 10")
            _limit(f"tc -n d{i}", "eth0", 10, 1e9)  # ARP
            for j in (j for j in range(count) if j != i):
                _limit(f"tc -n d{i}", "eth0", 20 + j, links[i, j])
                match = f"u32 match ip dst 10.77.0.{j + 1}/32 flowid 1:{20 + j}"
                _run(f"tc -n d{i} filter add dev eth0 parent 1: protocol ip {match}")
        else:
            _run(f"tc qdisc add dev v{i} handle ffff: ingress")
            redirect = "u32 match u32 0 0 action mirred egress redirect dev medium"
            _run(f"tc filter add dev v{i} parent ffff: protocol all {redirect}")


def _limit(tc: str, interface: str, number: int, rate: float) -> None:
    limits = f"rate {rate:.0f}bit ceil {rate:.0f}bit burst 32k cburst 32k quantum 1514"
    _run(f"{tc} class add dev {interface} parent 1: classid 1:{number} htb {limits}")
    _run(f"{tc} qdisc add dev {interface} parent 1:{number} pfifo limit {QUEUE}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _down(count: int) -> None:
    for what in (*(f"netns del d{i}" for i in range(count)), "link del bridge", "link del medium"):
        subprocess.run(["ip", *what.split()], capture_output=True)


def together(net: Network, devices: Sequence[int], work: Callable[[int], T], limit: float = 600.0) -> list[T]:
    """Runs `work(rank)` in a process on each device; rank i is the i-th of `devices`. Returns what each made.

    Processes are forked, so that libraries are loaded once.

    Raises:
        RuntimeError: with the first traceback, when a process has failed; the others are ended. Also after `limit` s.
    """
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank, device in enumerate(devices):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_one, args=(net, device, rank, work, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    made: dict[int, T] = {}
    until = time.monotonic() + limit
    try:
        while len(made) < len(devices):
            ready = multiprocessing.connection.wait(
                [p for i, p in enumerate(pipes) if i not in made], max(0.0, until - time.monotonic())
            )
            if not ready:
                raise RuntimeError(f"not done after {limit:.0f} s")
            for rank in (pipes.index(p) for p in ready):  # type: ignore[arg-type]
                try:
                    done, what = pipes[rank].recv()
                except EOFError:
                    processes[rank].join(5)
                    done, what = False, f"device {devices[rank]} ended with {processes[rank].exitcode} and no word"
                if not done:
                    raise RuntimeError(what)
                made[rank] = what
    finally:
        for p in processes:
            if len(made) < len(devices):
                p.kill()
            p.join()
    return [made[i] for i in range(len(devices))]


def _one(net: Network, device: int, rank: int, work: Callable[[int], Any], told: Any) -> None:
    try:
        os.dup2(2, 1)  # libraries chat; what a program prints is its parent's
        net.enter(device)
        told.send((True, work(rank)))
    except BaseException:
        told.send((False, f"on device {device}:\n{traceback.format_exc()}"))


def goodput(net: Network, seconds: float = 0.6) -> float:
    """Bit/s of payload between two devices, as a user would measure with iperf: what planners are told."""
    if net.how == "paced":
        return net.rate  # of one socket, whose headers are not counted
    return together(net, (0, 1), partial(_meter, net, int(net.rate / 8 * seconds)), limit=60)[0]


def _meter(net: Network, size: int, rank: int) -> float:
    port, halves = 5999, range(2)  # the first half opens TCP's window
    if rank:
        for _ in range(100):
            try:
                with socket.create_connection((net.address(0), port)) as s:
                    for _ in halves:
                        s.sendall(bytes(size))
                return 0.0
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise RuntimeError("nobody listens on device 0")
    with socket.create_server((net.address(0), port)) as server:
        peer, _ = server.accept()
        with peer:
            for _ in halves:
                began, left = time.perf_counter(), size
                while left:
                    left -= len(peer.recv(min(left, 1 << 20)))
    return size * 8 / (time.perf_counter() - began)

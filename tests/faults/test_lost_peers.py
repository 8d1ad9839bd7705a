"""SIGKILL and SIGSTOP of a peer that is a process of its own: the others notice, go on, and take it back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contextlora.federated.identity import enroll_here
from peers import fabric, meet, message_of, until

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE.parent)]),
}
NOTICED = 6.0  # seconds: three times the lease, on a machine that may be busy
LATE = 1.5  # seconds after a deadline, likewise; a link to a frozen peer is held for longer


@pytest.fixture
def fleet(tmp_path):
    """ant and bee in this process, cat in her own; all have met."""
    enroll_here(tmp_path, ["ant", "bee", "cat"])
    ant, bee = fabric(tmp_path, "ant"), fabric(tmp_path, "bee")
    started = []

    def start():
        first = str(1000 * len(started))
        command = [sys.executable, str(HERE / "peer_process.py"), str(tmp_path), "cat", first]
        started.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "up\n"
        until(lambda: "cat" in ant.alive() and "cat" in bee.alive())
        return started[-1]

    meet(ant, bee)
    yield ant, bee, start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    ant.close()
    bee.close()


def hear(device, seconds):
    """All (sender, round) that arrive in so many seconds; every message must be exactly what its sender made."""
    heard = []
    for sender, message in device.receive(device.now() + seconds):
        name, round_ = message[:64].decode().split()
        assert name == sender
        assert message == message_of(name, int(round_), len(message))
        heard.append((sender, int(round_)))
    return heard


def exchange(ant, bee, round_, seconds):
    """ant and bee tell each other a megabyte while each expects to hear from cat too; the seconds that it took."""
    start = time.monotonic()
    heard = {}
    threads = [threading.Thread(target=lambda d=d: heard.update({d.name: hear(d, seconds)})) for d in (ant, bee)]
    for thread in threads:
        thread.start()
    ant.send(["bee", "cat"], message_of("ant", round_), ant.now() + seconds)
    bee.send(["ant", "cat"], message_of("bee", round_), bee.now() + seconds)
    for thread in threads:
        thread.join()
    assert [h for h in heard["ant"] if h[0] == "bee"] == [("bee", round_)]
    assert [h for h in heard["bee"] if h[0] == "ant"] == [("ant", round_)]
    return time.monotonic() - start


def test_a_killed_peer_is_noticed_and_its_successor_taken_in(fleet):
    ant, bee, start = fleet
    cat = start()
    assert {sender for sender, _ in hear(ant, 2)} == {"cat"}
    cat.send_signal(signal.SIGKILL)
    assert until(lambda: ant.alive() == {"bee"} and bee.alive() == {"ant"}) < 2
    took = exchange(ant, bee, 1, 2.0)
    assert 2.0 <= took < 2.0 + LATE
    start()
    assert {sender for sender, _ in hear(ant, 2)} == {"cat"}
    assert not ant.refused


def test_a_frozen_peer_is_noticed_holds_nobody_up_and_comes_back(fleet):
    ant, bee, start = fleet
    cat = start()
    cat.send_signal(signal.SIGSTOP)
    took = exchange(ant, bee, 1, 2.0)  # nobody knows yet that she is gone
    assert 2.0 <= took < 2.0 + LATE
    assert until(lambda: ant.alive() == {"bee"} and bee.alive() == {"ant"}) < NOTICED
    list(ant.receive(ant.now()))
    took = exchange(ant, bee, 2, 1.0)
    assert 1.0 <= took < 1.0 + LATE
    cat.send_signal(signal.SIGCONT)
    assert until(lambda: "cat" in ant.alive() and "cat" in bee.alive()) < NOTICED
    list(ant.receive(ant.now()))
    assert {sender for sender, _ in hear(ant, 2)} == {"cat"}
    assert not ant.refused


def test_a_frozen_peer_in_the_middle_of_a_transfer_holds_nobody_up(fleet):
    """32 MB that she no longer takes fill every buffer on the way to her."""
    ant, bee, start = fleet
    cat = start()
    ant.send(["cat"], bytes(32 << 20), ant.now() + 3)
    until(lambda: ant.traffic["cat"].chunks > 3)
    cat.send_signal(signal.SIGSTOP)
    for round_ in range(3):
        assert exchange(ant, bee, round_, 1.0) < 1.0 + LATE

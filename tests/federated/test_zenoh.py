"""The fabric over real sockets with real TLS, on this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from contextlora.errors import PeerError
from contextlora.federated.fabric.transfers import CHUNK, WINDOW
from contextlora.federated.fabric.zenoh import ZenohFabric
from contextlora.federated.identity import enroll_here, load_identity, load_peers
from contextlora.federated.settings import Limits
from contextlora.federated.trace import MeasuredChannel
from peers import RUN, by_way_of, fabric, free_ports, meet, message_of, receive_all, until
from proxy import Proxy

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def devices(tmp_path):
    """Three enrolled devices that have met."""
    enroll_here(tmp_path, NAMES)
    found = {name: fabric(tmp_path, name) for name in NAMES}
    meet(*found.values())
    yield found
    for device in found.values():
        device.close()


def others(name):
    return [n for n in NAMES if n != name]


def test_a_megabyte_from_everyone_to_everyone(devices):
    for round_ in range(2):
        sent = {n: message_of(n, round_) for n in NAMES}
        got, start = {}, time.monotonic()

        def listen(name, got=got):
            got[name] = receive_all(devices[name], 2, 20)

        threads = [threading.Thread(target=listen, args=(n,)) for n in NAMES]
        for thread in threads:
            thread.start()
        for name, device in devices.items():
            device.send(others(name), sent[name], device.now() + 20)
        assert time.monotonic() - start < 2, "send should return at once"
        for thread in threads:
            thread.join()
        assert got == {n: {o: sent[o] for o in others(n)} for n in NAMES}
        assert time.monotonic() - start < 15, "receive should have stopped early"
    for name, device in devices.items():
        assert not device.refused
        for other in others(name):
            traffic = device.traffic[other]
            assert traffic.chunks == 2 * -(-(1 << 20) // CHUNK)
            assert 2 << 20 < traffic.sent < (2 << 20) * 1.01
            until(lambda a=traffic, b=devices[other].traffic[name]: a.sent == b.received)


def test_goodput_of_a_throttled_link_is_measured_and_recorded(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    with Proxy(load_peers(tmp_path / "peers.yaml")["ant"].endpoint, rate=1e6) as proxy:
        ant, bee = fabric(tmp_path, "ant"), fabric(tmp_path, "bee", by_way_of(tmp_path, "ant", proxy.port))
        with ant, bee:
            meet(ant, bee)
            assert bee.goodput() == {}
            bee.send(["ant"], message_of("bee", 0), bee.now() + 20)
            assert receive_all(ant, 1, 20) == {"bee": message_of("bee", 0)}
            until(bee.goodput)
            channel = MeasuredChannel(["ant", "bee"], Limits())
            for to, rate in bee.goodput().items():
                channel.record(3, bee.name, to, rate)
            assert channel.rate(3, "bee", "ant") == pytest.approx(8e6, rel=0.25)
            bee.send(["ant"], b"short", bee.now() + 20)
            assert receive_all(ant, 1, 20) == {"bee": b"short"}
            assert channel.rate(3, "bee", "ant") == bee.goodput()["ant"]  # a word measures the way, not the rate


def test_a_transfer_that_is_cut_goes_on_where_it_was(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    size, message = 2 << 20, message_of("bee", 0, 2 << 20)
    with Proxy(load_peers(tmp_path / "peers.yaml")["ant"].endpoint, rate=2e6) as proxy:
        ant, bee = fabric(tmp_path, "ant"), fabric(tmp_path, "bee", by_way_of(tmp_path, "ant", proxy.port))
        with ant, bee:
            meet(ant, bee)
            bee.send(["ant"], message, bee.now() + 30)
            until(lambda: bee.traffic["ant"].chunks > 18)
            proxy.cut()
            assert ant.traffic["bee"].received < size * 0.9
            until(lambda: "ant" not in bee.alive())
            assert receive_all(ant, 1, 25) == {"bee": message}
            assert -(-size // CHUNK) < bee.traffic["ant"].chunks <= -(-size // CHUNK) + WINDOW + 2
            assert proxy.connections == 2
            assert not ant.refused


def test_a_device_without_an_endpoint_calls_the_others(tmp_path):
    enroll_here(tmp_path, NAMES)
    text = (tmp_path / "peers.yaml").read_text().splitlines()
    hidden = [line.split(", endpoint")[0] + "}" if '"ant"' in line else line for line in text]
    (tmp_path / "peers.yaml").write_text("\n".join(hidden))
    found = {name: fabric(tmp_path, name) for name in NAMES}
    try:
        meet(*found.values())
        found["cat"].send(["ant"], b"hello", found["cat"].now() + 10)
        assert receive_all(found["ant"], 1, 10) == {"cat": b"hello"}
    finally:
        for device in found.values():
            device.close()


def test_a_message_waits_for_a_peer_that_comes_before_the_deadline_and_not_for_one_that_comes_later(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    with fabric(tmp_path, "ant") as ant:
        start = ant.now()
        ant.send(["bee"], b"early", start + 0.5)
        ant.send(["bee"], b"late", start + 20)
        assert list(ant.receive(start + 0.6)) == []
        assert 0.6 <= ant.now() - start < 1.0
        with fabric(tmp_path, "bee") as bee:
            assert receive_all(bee, 1, 10) == {"ant": b"late"}
            assert list(bee.receive(bee.now() + 0.5)) == []


def test_what_comes_after_the_deadline_is_there_at_the_next_call(devices):
    ant, bee = devices["ant"], devices["bee"]
    early = ant.receive(ant.now() + 0.3)
    assert list(early) == []
    late = ant.receive(ant.now())
    bee.send(["ant"], b"x", bee.now() + 10)
    until(lambda: ant._arrivals)
    assert list(late) == []
    assert receive_all(ant, 1, 10) == {"bee": b"x"}


def test_closing_is_quick_seen_at_once_and_final(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    before = threading.active_count()
    ant, bee = fabric(tmp_path, "ant"), fabric(tmp_path, "bee")
    meet(ant, bee)
    waiting = threading.Thread(target=lambda: list(bee.receive(bee.now() + 60)))
    waiting.start()
    start = time.monotonic()
    bee.close()
    bee.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert time.monotonic() - start < 3
    assert until(lambda: not ant.alive()) < 1
    with pytest.raises(PeerError, match="E657"):
        bee.send(["ant"], b"x", bee.now() + 1)
    with fabric(tmp_path, "bee") as again:  # the port is free again
        meet(ant, again)
        ant.send(["bee"], b"y", ant.now() + 10)
        assert receive_all(again, 1, 10) == {"ant": b"y"}
    ant.close()
    until(lambda: threading.active_count() <= before)


def test_faults_that_a_user_can_make(tmp_path):
    enroll_here(tmp_path, NAMES)
    with fabric(tmp_path, "ant") as ant:
        with pytest.raises(PeerError, match=r"E657 no peer 'bea'\. Did you mean 'bee'\?"):
            ant.send(["bee", "bea"], b"x", 0.0)
        with pytest.raises(PeerError, match="E634"):
            ant.send(["bee"], b"", ant.now() + 1)
        with pytest.raises(PeerError, match="E656 cannot listen on"):
            fabric(tmp_path, "ant")
        with pytest.raises(PeerError, match="E654"):
            fabric(tmp_path, "bee", listen="here")
    peers = load_peers(tmp_path / "peers.yaml")
    for wrong in ({"bee": peers["bee"]}, {"ant": peers["bee"]}):
        with pytest.raises(PeerError, match="E654"):
            ZenohFabric(load_identity(tmp_path / "ant"), wrong, RUN)


def test_another_runs_devices_do_not_hear_this_one(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    peers = load_peers(tmp_path / "peers.yaml")
    with fabric(tmp_path, "ant") as ant, ZenohFabric(load_identity(tmp_path / "bee"), peers, "another") as bee:
        bee.send(["ant"], b"x", bee.now() + 10)
        assert list(ant.receive(ant.now() + 1.5)) == []
        assert (ant.alive(), bee.alive()) == (frozenset(), frozenset())


def test_listening_elsewhere_than_others_call(tmp_path):
    enroll_here(tmp_path, ["ant", "bee"])
    (port,) = free_ports(1)
    moved = by_way_of(tmp_path, "ant", port)
    with fabric(tmp_path, "ant", listen=f"0.0.0.0:{port}") as ant, fabric(tmp_path, "bee", moved) as bee:
        meet(ant, bee)


def test_neither_zenoh_nor_torch_is_imported_before_it_is_needed():
    code = (
        "import sys, contextlora.federated.fabric.zenoh; print({'zenoh', 'torch', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"

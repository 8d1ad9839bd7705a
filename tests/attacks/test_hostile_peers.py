"""What someone on the network, or a device of the federation that has gone bad, can do to the others: not much."""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

import pytest

from contextlora.federated.chunks import split, transfer_id
from contextlora.federated.fabric.transfers import CHUNK
from contextlora.federated.identity import enroll_here, load_identity, load_peers, save_peers
from peers import SPACE, fabric, meet, message_of, raw_session, receive_all, until

zenoh = pytest.importorskip("zenoh")


def offer_of(message, total=None):
    return struct.pack("<32sII", transfer_id(message), total or len(message), CHUNK)


def signed(folder, signer, body, sender, receiver):
    route = f"contextlora offer\0{SPACE}/{sender}/{receiver}\0".encode()
    return body + load_identity(folder / signer).key.sign(route + body)


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def pair(tmp_path):
    """ant and bee, who have met; cat is enrolled as they are, and up to the test."""
    enroll_here(tmp_path, ["ant", "bee", "cat"])
    ant, bee = fabric(tmp_path, "ant"), fabric(tmp_path, "bee")
    meet(ant, bee)
    yield tmp_path, ant, bee
    ant.close()
    bee.close()


def still_works(ant, bee, round_=0):
    bee.send(["ant"], message_of("bee", round_), bee.now() + 20)
    assert receive_all(ant, 1, 20) == {"bee": message_of("bee", round_)}


def test_another_authoritys_bee_is_not_let_in(tmp_path):
    """She has the same name and even the true bee's message key in her list; the authority is her own."""
    enroll_here(tmp_path / "ours", ["ant", "bee"])
    enroll_here(tmp_path / "hers", ["ant", "bee"])
    ours, hers = (load_peers(tmp_path / whose / "peers.yaml") for whose in ("ours", "hers"))
    mixed = tmp_path / "hers" / "mixed.yaml"
    save_peers(mixed, [ours["ant"], hers["bee"]])
    with fabric(tmp_path / "ours", "ant") as ant, fabric(tmp_path / "hers", "bee", mixed) as eve:
        eve.send(["ant"], b"hello", eve.now() + 20)
        assert list(ant.receive(ant.now() + 2)) == []
        assert (ant.alive(), eve.alive()) == (frozenset(), frozenset())
        assert (ant._session.info.links(), eve._session.info.links()) == ([], [])
        with fabric(tmp_path / "ours", "bee") as bee:  # while she goes on trying
            meet(ant, bee)
            still_works(ant, bee)


@pytest.mark.parametrize("how", ["no certificate", "no TLS"])
def test_without_a_certificate_nobody_gets_in(tmp_path, how):
    enroll_here(tmp_path, ["ant", "bee"])
    with fabric(tmp_path, "ant") as ant:
        if how == "no TLS":
            config = {"mode": "peer", "scouting": {"multicast": {"enabled": False}}}
            config["connect"] = {"endpoints": ["tcp/" + load_peers(tmp_path / "peers.yaml")["ant"].endpoint]}
            eve = zenoh.open(zenoh.Config.from_json5(str(config).replace("False", "false")))
        else:
            eve = raw_session(tmp_path, "bee", enable_mtls=False)
        time.sleep(1.5)
        assert (eve.info.links(), ant._session.info.links()) == ([], [])
        eve.close()


def test_one_who_is_certified_but_not_listed_gets_nothing(tmp_path):
    enroll_here(tmp_path, ["ant", "dog"])
    full = load_peers(tmp_path / "peers.yaml")
    enroll_here(tmp_path, ["bee"])
    bee = load_peers(tmp_path / "peers.yaml")["bee"]
    save_peers(tmp_path / "peers.yaml", [full["ant"], bee])
    save_peers(tmp_path / "all.yaml", [*full.values(), bee])
    with (
        fabric(tmp_path, "ant") as ant,
        fabric(tmp_path, "bee") as bee,
        fabric(tmp_path, "dog", tmp_path / "all.yaml") as dog,
    ):
        meet(ant, bee)
        until(lambda: len(dog._session.info.links()) == 2)  # TLS lets her in, nothing else does
        dog.send(["ant", "bee"], b"hello", dog.now() + 20)
        still_works(ant, bee)
        assert list(ant.receive(ant.now() + 1)) == []
        assert (dog.alive(), ant.alive()) == (frozenset(), {"bee"})


def test_a_device_that_speaks_in_anothers_name_is_refused_and_seen(pair):
    folder, ant, bee = pair
    eve = raw_session(folder, "cat")
    until(lambda: len(eve.info.links()) == 2)
    message = message_of("cat", 0)
    forged = [
        ("offer/bee/ant", signed(folder, "cat", offer_of(message), "bee", "ant")),  # her signature, his name
        ("offer/bee/ant", signed(folder, "cat", offer_of(message), "cat", "ant")),
        ("offer/cat/ant", signed(folder, "cat", offer_of(message), "cat", "bee")),  # made for another receiver
        ("offer/cat/ant", offer_of(message)),
        ("offer/nobody/ant", signed(folder, "cat", offer_of(message), "nobody", "ant")),
        ("offer/*/ant", signed(folder, "cat", offer_of(message), "bee", "ant")),
    ]
    for key, body in forged:
        eve.put(f"{SPACE}/{key}", body, congestion_control=zenoh.CongestionControl.BLOCK)
    until(lambda: ant.refused["E658"] == len(forged))
    still_works(ant, bee)
    assert ant.refused == {"E658": len(forged)}
    eve.close()


def test_frames_under_anothers_name_do_not_arrive(pair):
    """While bee sends, cat publishes bee's chunks with other content, her 'done' and her asks."""
    folder, ant, bee = pair
    eve = raw_session(folder, "cat")
    until(lambda: len(eve.info.links()) == 2)
    seen = []
    for key in ("**", "link/bee/ant/*", "offer/*/*"):
        eve.declare_subscriber(f"{SPACE}/{key}", seen.append, allowed_origin=zenoh.Locality.REMOTE)
    truth, lie = message_of("bee", 0), message_of("bee", 1)
    bee.send(["ant"], truth, bee.now() + 20)
    for key in ("link/bee/ant", "link/*/ant", "link/bee/*", "**"):
        for chunk in split(lie, CHUNK):
            eve.put(f"{SPACE}/{key}/chunk", chunk, congestion_control=zenoh.CongestionControl.BLOCK)
        eve.put(f"{SPACE}/{key}/done", transfer_id(truth), congestion_control=zenoh.CongestionControl.BLOCK)
        eve.delete(f"{SPACE}/{key}/chunk")
    assert receive_all(ant, 1, 20) == {"bee": truth}
    still_works(ant, bee, 2)
    time.sleep(0.3)
    assert not ant.refused
    assert not bee.refused
    bee.close()
    until(lambda: not ant.alive())
    tokens = [eve.liveliness().declare_token(f"{SPACE}/alive/{name}") for name in ("bee", "dog", "*")]
    time.sleep(0.5)
    assert not ant.alive()  # she cannot raise the dead
    for token in tokens:
        token.undeclare()
    assert [str(s.key_expr) for s in seen] == []
    eve.close()


def test_rubbish_from_a_certified_device_is_refused_and_counted(pair):
    folder, ant, bee = pair
    eve = raw_session(folder, "cat")
    until(lambda: len(eve.info.links()) == 2)
    huge = signed(folder, "cat", offer_of(b"x", (1 << 32) - 1), "cat", "ant")
    short = signed(folder, "cat", b"short", "cat", "ant")
    rubbish = [
        ("offer/cat/ant", huge, "E623"),
        ("offer/cat/ant", short, "E659"),
        ("offer/cat/ant", b"", "E658"),
        ("link/cat/ant/chunk", b"", "E636"),
        ("link/cat/ant/chunk", split(bytes(5000), CHUNK)[0], "E659"),
        ("link/cat/ant/ask", b"x" * 5, "E659"),
        ("link/cat/ant/done", b"x" * 5, "E659"),
        ("link/cat/ant/offer", huge, "E659"),
        ("link/cat/ant/nonsense", b"x", "E659"),
        ("link/cat/ant/*", b"x", "E659"),
    ]
    for key, body, code in rubbish:
        before = ant.refused[code]
        eve.put(f"{SPACE}/{key}", body, congestion_control=zenoh.CongestionControl.BLOCK)
        until(lambda c=code, b=before: ant.refused[c] == b + 1)
    assert ant.refused.total() == len(rubbish)
    eve.put(f"{SPACE}/link/cat/ant/chunk", bytes(1 << 20), congestion_control=zenoh.CongestionControl.BLOCK)
    still_works(ant, bee)
    assert ant.refused.total() == len(rubbish)  # what is far too large for a chunk ends before it is put together
    eve.close()


def test_a_flood_holds_no_memory_and_stops_nobody(pair):
    """cat announces as much as an offer can say and pours unasked chunks as fast as her link takes them."""
    folder, ant, bee = pair
    eve = raw_session(folder, "cat")
    until(lambda: len(eve.info.links()) == 2)
    still_works(ant, bee)
    stop, poured = threading.Event(), 0
    piece = split(bytes(CHUNK), CHUNK)[0]

    def pour():
        nonlocal poured
        while not stop.wait(0.001):
            huge = offer_of(poured.to_bytes(8, "big"), 100 << 20)
            for key, body in [
                ("offer/cat/ant", signed(folder, "cat", huge, "cat", "ant")),
                *[("link/cat/ant/chunk", piece)] * 8,
            ]:
                eve.put(f"{SPACE}/{key}", body, congestion_control=zenoh.CongestionControl.BLOCK)
                poured += len(body)

    before, round_ = resident(), 0
    thread = threading.Thread(target=pour)
    thread.start()
    while poured < 96 << 20:
        round_ += 1
        still_works(ant, bee, round_)
        time.sleep(0.3)
    stop.set()
    thread.join()
    assert round_ > 1
    assert resident() - before < 24 << 20
    assert ant.refused["E659"] > 100
    eve.close()

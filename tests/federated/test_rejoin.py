"""A device that comes back after a kill, and one that is all alone: in this process, without sockets."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from contextlora.errors import PeerError, RunError
from contextlora.federated.device import run_device
from contextlora.federated.fabric import Arrival, Traffic
from contextlora.federated.keep import load_peer, save_peer
from contextlora.federated.peer import Peer
from contextlora.federated.planner import Planner
from contextlora.federated.protocol import bundle, rounds
from contextlora.federated.setup import channel_of, shares
from contextlora.federated.simulate import simulated_key
from contextlora.federated.wire import public_key
from contextlora.reports.federation import is_federation, write_federation_report
from contextlora.reports.rounds import read_rounds
from federated.federation import small, write_words
from federated.worker import tiny_reader


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"), train=12)


@pytest.fixture(scope="module")
def reader():
    return tiny_reader()


@pytest.fixture
def settings(words, tmp_path):
    one = {"slices": {"share": 0.3, "calibration": 1}, "updates": 1}
    return small(words, tmp_path, {"ant": "weather", "bee": "weather"}, rounds=3, **one)


def born(settings, name, reader):
    """A device that knows nothing."""
    known = {public_key(simulated_key(settings, n)): n for n in settings.devices}
    planner = Planner(channel_of(settings), settings.limits)
    key = simulated_key(settings, name)
    return Peer(name, settings, reader, shares(settings)[name], key, known, planner)


def begins(settings, name, reader, folder):
    """A device that rejoins from what it kept, or calibrates: as `run_device` begins."""
    peer = born(settings, name, reader)
    if not load_peer(peer, folder):
        peer.calibrate()
    rows = bundle(peer.round, "rows", peer.rows())
    save_peer(peer, folder, begins=True)
    return peer, rows


def test_whoever_rejoins_is_heard_at_once_and_a_replay_never(settings, reader, tmp_path):
    """bee dies three times in one round, each time when its row has arrived."""
    ant = begins(settings, "ant", reader, tmp_path / "ant")[0]
    said = []
    for _ in range(3):
        bee, rows = begins(settings, "bee", reader, tmp_path / "bee")
        assert bee.round == 0
        said.append(rows)
        ant.rows()
        ant.meet({"bee": rows})
        assert ant.table.keys() == {"ant", "bee"}
        assert not ant.post.refused
    ant.rows()
    for replay in said:
        ant.meet({"bee": replay})
    assert ant.table.keys() == {"ant"}
    assert ant.post.refused == {"E628": 6}, "a row and a mean, three times"


def test_a_device_that_has_lost_its_disk_is_heard_in_the_next_round(settings, reader, tmp_path):
    ant, bee = (begins(settings, n, reader, tmp_path / n)[0] for n in ("ant", "bee"))
    for _ in range(2):
        rows = {p.name: bundle(p.round, "rows", p.rows()) for p in (ant, bee)}
        for peer, other in ((ant, "bee"), (bee, "ant")):
            peer.meet({other: rows[other]})
            peer.round += 1
    bee, rows = begins(settings, "bee", reader, tmp_path / "a new disk")
    theirs = bundle(ant.round, "rows", ant.rows())
    ant.meet({"bee": rows})
    assert ant.post.refused["E628"] == 2, "it says what it has said before"
    bee.meet({"ant": theirs})
    bee.round += 1
    ant.rows()
    ant.meet({"bee": bundle(bee.round, "rows", bee.rows())})
    assert ant.table.keys() == {"ant", "bee"}


class Loop:
    """The fabric of a device whose peer repeats, as its own words, what a script says; no clock but that of calls."""

    def __init__(self, script):
        self.name, self.refused, self.script = "ant", Counter(), script
        self.traffic = {"bee": Traffic()}
        self.inbox, self.time = deque(), 0.0

    def now(self):
        self.time += 0.25
        return self.time

    def alive(self):
        return frozenset(["bee"])

    def send(self, to, message, deadline):
        assert list(to) == ["bee"]
        self.traffic["bee"].sent += len(message)
        answer = self.script(message)
        self.traffic["bee"].received += len(answer)
        self.inbox.append(Arrival("bee", answer))

    def receive(self, deadline):
        while self.inbox:
            yield self.inbox.popleft()

    def goodput(self):
        return {"bee": 8e6}


def script(bee):
    """bee's rounds in step with ant's: whatever ant sends, bee answers with its own of that slot."""
    going = rounds(bee)
    waiting = [next(going)]

    def answer(message):
        ((_, mine),) = waiting[0].sends
        try:
            waiting[0] = going.send({"ant": message})
        except StopIteration:
            waiting.clear()
        while waiting and not waiting[0].sends:
            waiting[0] = going.send({})
        return mine

    return answer


def played(settings, reader, out, **how):
    """ant's rounds as a real device, with bee beside it."""
    bee = born(settings, "bee", reader)
    bee.calibrate()
    fabric = Loop(script(bee))
    ant = born(settings, "ant", reader)
    return run_device(ant, fabric, out, silent=True, **how), fabric


def test_a_real_device_tells_what_it_can_measure(settings, reader, tmp_path):
    _, fabric = played(settings, reader, tmp_path / "ant")
    found = read_rounds(tmp_path / "ant")
    assert [r.step for r in found] == [0, 1, 2]
    assert sum(r.sent for r in found) == fabric.traffic["bee"].sent
    assert sum(sum(r.received.values()) for r in found) == fabric.traffic["bee"].received
    assert set(found[0].bytes) >= {"rows", "slices"}
    assert all(r.awaited == r.arrived >= 1 for r in found)
    assert all(r.seconds > 0 and r.energy is None and r.asked is None and r.device == "ant" for r in found)
    assert found[0].collisions[0] > 0
    assert found[-1].goodput == {"bee": 8e6}


def test_a_real_devices_folder_has_a_page(settings, reader, tmp_path):
    played(settings, reader, tmp_path / "ant")
    assert is_federation(tmp_path / "ant")
    text = write_federation_report(tmp_path / "ant").read_text()
    assert "As ant saw it" in text
    assert "a real device does not know where others are" in text
    assert "rounds: 3 of 3" in text
    assert "<th>J</th>" not in text
    assert "<th>awaited</th>" in text
    assert "<td>bee</td><td>8</td>" in text.replace("\n", "")


def test_a_second_run_of_a_device_throws_nothing_away_unasked(settings, reader, tmp_path):
    class Killed(BaseException):
        pass

    def killed(self, step, values):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contextlora.federated.device.Tracker.log", killed)
        with pytest.raises(Killed):
            played(settings, reader, tmp_path / "ant")
    with pytest.raises(RunError, match="E522"):
        played(settings, reader, tmp_path / "ant")
    played(settings, reader, tmp_path / "ant", force=True)
    with pytest.raises(RunError, match="E521"):
        played(settings, reader, tmp_path / "ant")


def test_rates_to_strangers_are_refused(settings, reader, tmp_path):
    told = settings.model_copy(update={"radio": settings.radio.model_copy(update={"measured": True})})
    ant, bee = (born(told, n, reader) for n in ("ant", "bee"))
    for peer in (ant, bee):
        peer.calibrate()
    ant.rows()
    bee.rates = {"ant": 5e6, "dog": 1e6}
    ant.meet({"bee": bundle(0, "rows", bee.rows())})
    assert ant.post.refused == {"E603": 1}
    assert ant.table.keys() == {"ant"}
    with pytest.raises(PeerError, match="E641"):
        channel_of(told).expected_rate(0, "ant", "dog")

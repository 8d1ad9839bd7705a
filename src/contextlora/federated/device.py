"""One real device of a federation: the rounds of `protocol`, carried by a fabric, against a clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contextlora.errors import ConfigError, PeerError, did_you_mean
from contextlora.federated.deliver import deliver
from contextlora.federated.fabric import Fabric
from contextlora.federated.federation import Federation, save_federation
from contextlora.federated.identity import Identity
from contextlora.federated.identity import Peer as Known
from contextlora.federated.keep import KEPT, load_peer, refuse_a_second_run, save_peer, throw_away
from contextlora.federated.peer import Peer
from contextlora.federated.planner import Planner
from contextlora.federated.protocol import Bundles, Exchange, Rounds, Slot, place, rounds
from contextlora.federated.setup import channel_of, graph_of_devices, open_reader, shares
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.track import Tracker

LOOK = 0.2  # seconds between two looks at who is still there
GRACE = 5.0  # seconds that one who cannot be reached is waited for: on a busy machine links break for a moment


def run_device(
    peer: Peer,
    fabric: Fabric,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    silent: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Peer:
    """All rounds of a device; it keeps where it stands after each, and exports its task's adapter at the end.

    Args:
        peer: before its first round.
        fabric: of the device of the same name.
        out: where it keeps itself and its metrics.
        resume: go on from what was kept; in the others' round, if they have gone on.
        force: throw away what an earlier run has left in `out`.
        silent: no progress bar.
        say: told of what a user should know.

    Raises:
        RunError: E520 what was kept is of another federation, E521 or E522 an earlier run that neither `resume` nor
            `force` tells what to do with. PeerError: E659 if no other device comes.
    """
    refuse_a_second_run(out, again=resume or force)
    if not resume:
        throw_away(out)
    if not load_peer(peer, out / KEPT):
        peer.calibrate()
    mail, told = Mail(fabric, peer.settings.wait), Counter[str]()
    mail.wait_for(peer.others)
    going = rounds(peer)
    with Tracker(out, quiet=silent) as watch:
        watch.stage(f"rounds of {peer.name}", peer.settings.rounds, peer.round)
        before, exchange = peer.round, _onward(going, None)
        save_peer(peer, out / KEPT, begins=True)
        save_federation(peer.settings, out / "federation.yaml")
        while exchange is not None:
            arrived = mail.exchange(exchange)
            peer.rates = dict(fabric.goodput())
            exchange = _onward(going, arrived)
            if peer.round > before:
                save_peer(peer, out / KEPT)
                refused = peer.post.refused + fabric.refused + mail.refused
                numbers = standing(peer, fabric, mail.spent) | {"refused": dict(refused - told)}
                watch.log(peer.round - 1, numbers)
                clusters = numbers["clusters"]
                watch.advance(peer.round, f"loss {numbers['loss']:.3f}, {sum(map(len, clusters))} devices")
                before, mail.spent, told = peer.round, Spent(), refused
    deliver(peer, out / "adapter", out / "packed.safetensors", say)
    return peer


def standing(peer: Peer, fabric: Fabric, spent: Spent) -> dict[str, Any]:
    """A round in numbers, for a line of metrics.jsonl: what this device can know of it."""
    loss = sum(peer.losses) / len(peer.losses)
    return {
        "device": peer.name,
        "loss": loss,
        "losses": {peer.name: loss},
        "clusters": [list(group) for group in peer.clustering.groups],
        "collisions": list(peer.clustering.collisions),
        "bytes": dict(spent.sent),
        "received": dict(spent.received),
        "seconds": spent.seconds,
        "awaited": spent.awaited,
        "arrived": spent.arrived,
        "goodput": dict(fabric.goodput()),
    }


def _onward(going: Rounds, arrived: Bundles | None) -> Exchange | None:
    """The next exchange, None after the last round. A generator that begins is sent None."""
    try:
        return going.send(arrived)  # type: ignore[arg-type]
    except StopIteration:
        return None


@dataclass
class Spent:
    """What a round has cost a real device, as far as it can measure that.

    Attributes:
        sent, received: bytes of frames, by the slot in which they went; what is repeated counts each time.
        seconds: of all slots but the rows', from the first byte to the end of waiting for others.
        awaited, arrived: bundles that it waited for, and that had come when the slot was over; rows do not count.
    """

    sent: Counter[Slot] = field(default_factory=Counter)
    received: Counter[Slot] = field(default_factory=Counter)
    seconds: float = 0.0
    awaited: int = 0
    arrived: int = 0


class Mail:
    """What has come over a fabric, put in its place: a peer that is ahead sends for slots that are not here yet.

    Args:
        fabric: of this device.
        wait: seconds that a slot lasts at most. It ends as soon as everyone who is there and expected has sent.

    Attributes:
        spent: on the round so far; whoever tells it begins anew.
        refused: what is no bundle, by error code.
    """

    def __init__(self, fabric: Fabric, wait: float):
        self.fabric, self.wait = fabric, wait
        self._here: dict[tuple[str, Slot], tuple[int, bytes]] = {}
        self._seen: dict[str, float] = {}
        self.refused: Counter[str] = Counter()
        self.spent = Spent()
        self._before = 0, 0

    def wait_for(self, others: tuple[str, ...]) -> None:
        """Until all others are there, at most `wait` seconds. Raises PeerError E659 if not one of them is."""
        until = self.fabric.now() + self.wait
        while not self._there() >= set(others) and self.fabric.now() < until:
            time.sleep(LOOK / 4)
        if others and not self._there():
            raise PeerError("E659", f"none of {', '.join(others)} came within {self.wait:g} s; are they running?")

    def exchange(self, what: Exchange) -> dict[str, bytes]:
        """Sends what a slot sends; gives what has come for it, by sender, when it is over."""
        begun = self.fabric.now()
        deadline = begun + self.wait
        for to, data in what.sends:
            self.fabric.send(to, data, deadline)
        while True:
            missing = {n for n in what.expects if not self._has(n, what)}
            if not missing & self._there() or self.fabric.now() >= deadline:
                self._count(what, begun, missing)
                return self._taken(what)
            for sender, data in self.fabric.receive(min(deadline, self.fabric.now() + LOOK)):
                self._keep(sender, data)
                if not {n for n in missing if not self._has(n, what)}:
                    break

    def _count(self, what: Exchange, begun: float, missing: set[str]) -> None:
        """Puts all that went since the last slot was over to this one's account."""
        traffic = self.fabric.traffic.values()
        now = sum(t.sent for t in traffic), sum(t.received for t in traffic)
        self.spent.sent[what.slot] += now[0] - self._before[0]
        self.spent.received[what.slot] += now[1] - self._before[1]
        self._before = now
        if what.slot != "rows":
            self.spent.seconds += self.fabric.now() - begun
            self.spent.awaited += len(what.expects)
            self.spent.arrived += len(what.expects - missing)

    def _there(self) -> set[str]:
        """Who can be reached, or could until a moment ago."""
        now = self.fabric.now()
        self._seen |= dict.fromkeys(self.fabric.alive(), now)
        return {name for name, at in self._seen.items() if now - at < GRACE}

    def _keep(self, sender: str, data: bytes) -> None:
        try:
            round_, slot = place(data)
        except PeerError as e:
            self.refused[e.code] += 1
            return
        held = self._here.get((sender, slot))
        if held is None or held[0] < round_:
            self._here[sender, slot] = (round_, data)

    def _has(self, sender: str, what: Exchange) -> bool:
        held = self._here.get((sender, what.slot))
        return held is not None and (what.slot == "rows" or held[0] >= what.round)

    def _taken(self, what: Exchange) -> dict[str, bytes]:
        """The slot's bundles; rows of any round, so that one who was away hears which round it is."""
        found: dict[str, bytes] = {}
        for (sender, slot), (round_, data) in list(self._here.items()):
            if slot == what.slot and (slot == "rows" or round_ <= what.round):
                found[sender] = data  # one that is late is let in or refused by its versions
                del self._here[sender, slot]
        return found


def open_device(
    settings: Federation, identity: Identity, peers: Mapping[str, Known], say: Callable[[str], None] = lambda _: None
) -> Peer:
    """A device before its first round, with a base model of its own.

    Args:
        identity: whose name is one of the federation's devices.
        peers: the list of peers, by name.
        say: told of what a user should know.

    Raises:
        ConfigError: E103 for a device that the federation or the list of peers lacks. Otherwise as for a simulation.
    """
    if identity.name not in settings.devices:
        text = f"this device is '{identity.name}'.{did_you_mean(identity.name, settings.devices)}"
        raise ConfigError("E103", f"{text} The federation has {', '.join(settings.devices)}", where="devices")
    if missing := [n for n in settings.devices if n not in peers]:
        raise ConfigError("E103", f"the list of peers has no '{missing[0]}'", where=f"devices.{missing[0]}")
    graph = graph_of_devices(settings)
    reader = open_reader(settings, graph)
    prefix = FrozenPrefix(reader, int(settings.train.prefix_cache_gb * 2**30))
    known = {peers[n].key: n for n in settings.devices}
    mine = shares(settings, identity.name)[identity.name]
    planner = Planner(channel_of(settings), settings.planned, settings.radio.cast, say)
    return Peer(identity.name, settings, reader, mine, identity.key, known, planner, prefix)

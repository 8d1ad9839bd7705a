"""One real device of a federation: the rounds of `protocol`, carried by a fabric, against a clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from contextlora.errors import ConfigError, PeerError, did_you_mean
from contextlora.federated.fabric import Fabric
from contextlora.federated.federation import Federation
from contextlora.federated.identity import Identity
from contextlora.federated.identity import Peer as Known
from contextlora.federated.keep import load_peer, save_peer
from contextlora.federated.peer import Peer
from contextlora.federated.planner import Planner
from contextlora.federated.protocol import Bundles, Exchange, Rounds, Slot, place, rounds
from contextlora.federated.simulate import channel_of, graph_of_devices, open_reader, shares
from contextlora.training import checkpoint
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.track import Tracker

LOOK = 0.2  # seconds between two looks at who is still there
GRACE = 5.0  # seconds that one who cannot be reached is waited for: on a busy machine links break for a moment


def run_device(peer: Peer, fabric: Fabric, out: Path, *, resume: bool = False, silent: bool = False) -> Peer:
    """All rounds of a device; it keeps where it stands after each, and exports its task's adapter at the end.

    Args:
        peer: before its first round.
        fabric: of the device of the same name.
        out: where it keeps itself and its metrics.
        resume: go on from what was kept; in the others' round, if they have gone on.
        silent: no progress bar.

    Raises:
        RunError: E520 what was kept is of another federation. PeerError: E659 if no other device comes.
    """
    if not resume:
        checkpoint.clear(out / "kept")
    if not load_peer(peer, out / "kept"):
        peer.calibrate()
    mail = Mail(fabric, peer.settings.wait)
    mail.wait_for(peer.others)
    going = rounds(peer)
    with Tracker(out, quiet=silent) as watch:
        watch.stage(f"rounds of {peer.name}", peer.settings.rounds, peer.round)
        before, exchange = peer.round, _onward(going, None)
        while exchange is not None:
            exchange = _onward(going, mail.exchange(exchange))
            if peer.round > before:
                save_peer(peer, out / "kept")
                loss = sum(peer.losses) / len(peer.losses)
                refused = dict(peer.refused + fabric.refused + mail.refused)
                clusters = [list(group) for group in peer.clustering.groups]
                numbers = {"loss": loss, "clusters": clusters, "refused": refused, "goodput": dict(fabric.goodput())}
                watch.log(peer.round - 1, numbers)
                watch.advance(peer.round, f"loss {loss:.3f}, {sum(map(len, clusters))} devices")
                before = peer.round
    peer.export(out / "adapter")
    return peer


def _onward(going: Rounds, arrived: Bundles | None) -> Exchange | None:
    """The next exchange, None after the last round. A generator that begins is sent None."""
    try:
        return going.send(arrived)  # type: ignore[arg-type]
    except StopIteration:
        return None


class Mail:
    """What has come over a fabric, put in its place: a peer that is ahead sends for slots that are not here yet.

    Args:
        fabric: of this device.
        wait: seconds that a slot lasts at most. It ends as soon as everyone who is there and expected has sent.
    """

    def __init__(self, fabric: Fabric, wait: float):
        self.fabric, self.wait = fabric, wait
        self._here: dict[tuple[str, Slot], tuple[int, bytes]] = {}
        self._seen: dict[str, float] = {}
        self.refused: Counter[str] = Counter()

    def wait_for(self, others: tuple[str, ...]) -> None:
        """Until all others are there, at most `wait` seconds. Raises PeerError E659 if not one of them is."""
        until = self.fabric.now() + self.wait
        while not self._there() >= set(others) and self.fabric.now() < until:
            time.sleep(LOOK / 4)
        if others and not self._there():
            raise PeerError("E659", f"none of {', '.join(others)} came within {self.wait:g} s; are they running?")

    def exchange(self, what: Exchange) -> dict[str, bytes]:
        """Sends what a slot sends; gives what has come for it, by sender, when it is over."""
        deadline = self.fabric.now() + self.wait
        for to, data in what.sends:
            self.fabric.send(to, data, deadline)
        while True:
            missing = {n for n in what.expects if not self._has(n, what)}
            if not missing & self._there() or self.fabric.now() >= deadline:
                return self._taken(what)
            for sender, data in self.fabric.receive(min(deadline, self.fabric.now() + LOOK)):
                self._keep(sender, data)
                if not {n for n in missing if not self._has(n, what)}:
                    break

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


def open_device(settings: Federation, identity: Identity, peers: Mapping[str, Known]) -> Peer:
    """A device before its first round, with a base model of its own.

    Args:
        identity: whose name is one of the federation's devices.
        peers: the list of peers, by name.

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
    planner = Planner(channel_of(settings), settings.planned)
    return Peer(identity.name, settings, reader, mine, identity.key, known, planner, prefix)

"""A whole federation in one process: one resident base model, many devices that take turns on it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextlora.federated.channel import RadioChannel
from contextlora.federated.deliver import deliver
from contextlora.federated.fabric.local import Hub
from contextlora.federated.federation import Federation, save_federation
from contextlora.federated.keep import (
    KEPT,
    Kept,
    known_of,
    load_all,
    parts_of,
    refuse_a_second_run,
    restore,
    restore_known,
    run_of,
    save_all,
    tensors_of,
    throw_away,
)
from contextlora.federated.live import live
from contextlora.federated.once import Once
from contextlora.federated.peer import Peer
from contextlora.federated.planner import Planner
from contextlora.federated.protocol import Rounds, rounds
from contextlora.federated.setup import channel_of, graph_of_devices, open_reader, shares
from contextlora.federated.together import Together
from contextlora.federated.wire import public_key
from contextlora.models.inputs import ImageFeatures
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.track import Tracker

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def simulate(
    settings: Federation,
    *,
    resume: bool = False,
    force: bool = False,
    silent: bool = False,
    reader: ImageFeatures | None = None,
    prefix: FrozenPrefix | None = None,
    keep: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Peer]:
    """Runs a federation's rounds; keeps its devices and the metrics of each round in `settings.out`.

    Args:
        settings: what all devices agree on, and the faults.
        resume: go on after the last round that was kept, to the very bytes of a run that was not interrupted.
        force: throw away what an earlier run has left in `settings.out`.
        silent: no table of rounds on the terminal.
        reader: of a model with the method's layers (`methods.put_on`), instead of one that is opened here.
        prefix: activations below those layers, kept from other runs over the same base; None keeps this run's own.
        keep: write checkpoints, without which nothing resumes, and adapters.
        say: told of what a user should know.

    Returns:
        The devices as they stand at the end, by name.

    Raises:
        ConfigError: E104 a task that the graph does not have. RunError: E520 kept devices of another federation, E521
            or E522 an earlier run that neither `resume` nor `force` tells what to do with.
    """
    out, graph = Path(settings.out), graph_of_devices(settings)
    refuse_a_second_run(out, again=resume or force)
    kept = load_all(out / KEPT, run_of(settings)) if resume else Kept()
    devices = _Devices(settings, reader or open_reader(settings, graph), prefix, kept, say)
    if not resume:  # only now is anything thrown away
        throw_away(out)
    with Tracker(out, quiet=True) as watch, live(settings.rounds, done=kept.round, quiet=silent) as show:
        save_federation(settings, out / "federation.yaml")

        def after() -> None:
            done, numbers = devices.hub.round, devices.standing()
            watch.log(done, numbers)  # first: a round that was kept has its line
            if keep:
                save_all(out / KEPT, run_of(settings), devices.kept())
            devices.once.forget()
            show(done, numbers)

        devices.hub.run(devices.start, kept.round, after)
    for name in sorted(settings.devices.keys() - devices.peers.keys()):  # with nothing left to do
        devices.start(name)
    for name, peer in sorted(devices.peers.items()):
        deliver(peer, out / "adapters" / name, out / "packed" / f"{name}.safetensors", say, keep=keep)
    return devices.peers


class _Devices:
    """All devices of a federation, on one model and one air.

    Attributes:
        peers: the devices that have begun, by name.
        hub: what carries their messages.
        once: what is the same for all of them, computed once.
    """

    def __init__(
        self,
        settings: Federation,
        reader: ImageFeatures,
        prefix: FrozenPrefix | None,
        before: Kept,
        say: Callable[[str], None],
    ):
        self.settings, self.reader, self.prefix, self.before = settings, reader, prefix, before
        self.peers: dict[str, Peer] = {}
        self.channel, self.once, self.data = channel_of(settings), Once(), shares(settings)
        self.planner = Planner(self.channel, settings.planned, settings.radio.cast, say)
        self.hub = Hub(settings, self.channel)
        self.hub.late.update(before.late)
        self.keys = {name: simulated_key(settings, name) for name in settings.devices}
        self.known = {public_key(key): name for name, key in self.keys.items()}
        self.together = Together(settings.together, self.peers, self.hub)
        self.below = prefix or FrozenPrefix(reader, int(settings.train.prefix_cache_gb * 2**30))
        self._told: dict[str, Counter[str]] = {}  # what each had refused before this round

    def start(self, name: str) -> Rounds:
        """A device that begins, or that comes back: after a kill without what it knew of others."""
        back = name in self.peers
        state = tensors_of(self.peers[name]) if back else self.before.devices.pop(name, None)
        peer = Peer(
            name,
            self.settings,
            self.reader,
            self.data[name],
            self.keys[name],
            self.known,
            self.planner,
            self.below,
            self.once,
            self.together.train,
        )
        peer.prefix = self.prefix or peer.prefix
        if state is None:
            peer.calibrate()
        else:
            restore(peer, state)
            if self.hub.round == self.before.round and not back:  # nothing has befallen it but that all were stopped
                restore_known(peer.post, state)
        self.hub.rates[name].update(peer.rates)
        peer.rates = self.hub.rates[name]
        self.peers[name], self._told[name] = peer, Counter()
        return rounds(peer)

    def kept(self) -> Kept:
        """All that the next round begins with."""
        found: dict[str, Any] = {**self.before.devices, **{n: parts_of(p) for n, p in self.peers.items()}}
        found |= {n: found[n] | known_of(self.peers[n].post) for n in self.hub.there}
        return Kept(self.hub.round + 1, found, self.hub.late)

    def standing(self) -> dict[str, Any]:
        """A round in numbers, a line of metrics.jsonl. Clusters are those that its first device has found."""
        alive = [self.peers[n] for n in sorted(self.hub.there)]
        losses = {p.name: sum(p.losses) / len(p.losses) for p in alive if p.losses}
        refused = sum((p.post.refused - self._told[p.name] for p in alive), start=Counter[str]())
        self._told.update({p.name: p.post.refused for p in alive})
        numbers = asdict(self.hub.traffic) | {"bytes": dict(self.hub.traffic.bytes)}
        if isinstance(self.channel, RadioChannel):
            at = self.channel.positions(self.hub.round)
            numbers["positions"] = {n: [round(float(x), 2) for x in at[i]] for i, n in enumerate(self.channel.devices)}
        groups, collisions = ((c := alive[0].clustering).groups, c.collisions) if alive else ((), ())
        return numbers | {
            "loss": sum(losses.values()) / max(1, len(losses)),
            "losses": losses,
            "clusters": [list(g) for g in groups],
            "collisions": list(collisions),
            "refused": dict(refused),
        }


def simulated_key(settings: Federation, name: str) -> Ed25519PrivateKey:
    """A simulated device's signing key, which anyone can make again: real devices make their own (`enroll`)."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(
        hashlib.sha256(f"simulated|{settings.name}|{settings.seed}|{name}".encode()).digest()
    )

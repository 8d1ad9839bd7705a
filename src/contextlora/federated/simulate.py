"""A whole federation in one process: one resident base model, many devices that take turns on it."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextlora.data.collate import Encoder
from contextlora.data.records import Example, load_examples
from contextlora.errors import ConfigError, did_you_mean
from contextlora.federated.channel import Channel, RadioChannel
from contextlora.federated.fabric.local import Hub, Traffic
from contextlora.federated.federation import Federation, save_federation
from contextlora.federated.keep import load_peer, save_peer
from contextlora.federated.live import live
from contextlora.federated.methods import put_on
from contextlora.federated.peer import Peer
from contextlora.federated.planner import Planner
from contextlora.federated.protocol import Rounds, rounds
from contextlora.federated.trace import MeasuredChannel
from contextlora.federated.wire import public_key
from contextlora.graph import TaskGraph
from contextlora.models import load_model
from contextlora.models.inputs import ImageFeatures
from contextlora.training import checkpoint
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.session import feature_folder
from contextlora.training.track import Tracker

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def simulate(
    settings: Federation,
    *,
    resume: bool = False,
    silent: bool = False,
    reader: ImageFeatures | None = None,
    prefix: FrozenPrefix | None = None,
    keep: bool = True,
) -> dict[str, Peer]:
    """Runs a federation's rounds; keeps every device and the metrics of each round in `settings.out`.

    Args:
        settings: what all devices agree on, and the faults.
        resume: go on after the last round that every device has kept.
        silent: no table of rounds on the terminal.
        reader: of a model with the method's layers (`methods.put_on`), instead of one that is opened here.
        prefix: activations below those layers, kept from other runs over the same base; None keeps this run's own.
        keep: write checkpoints, without which nothing resumes and no device comes back, and adapters.

    Returns:
        The devices as they stand at the end, by name.

    Raises:
        ConfigError: E104 a task that the graph does not have. RunError: E520 kept devices of another federation.
    """
    reader = reader or open_reader(settings, graph_of_devices(settings))
    channel, out = channel_of(settings), Path(settings.out)
    planner = Planner(channel, settings.planned)
    keys = {name: simulated_key(settings, name) for name in settings.devices}
    known = {public_key(key): name for name, key in keys.items()}
    data = shares(settings)
    below = prefix or FrozenPrefix(reader, int(settings.train.prefix_cache_gb * 2**30))
    peers: dict[str, Peer] = {}
    told: dict[str, Counter[str]] = {}

    def start(name: str) -> Rounds:
        """A device that begins, or that comes back with what it has kept."""
        peer = peers[name] = Peer(name, settings, reader, data[name], keys[name], known, planner, below)
        peer.prefix = prefix or peer.prefix
        told[name] = Counter()
        if not load_peer(peer, _kept(out, name)):
            peer.calibrate()
        return rounds(peer)

    if not resume:
        (out / "metrics.jsonl").unlink(missing_ok=True)
        for name in settings.devices:
            checkpoint.clear(_kept(out, name))
    first = _first_round(settings, resume)
    with Tracker(out, quiet=True) as watch, live(settings.rounds, done=first, quiet=silent) as show:

        def after(round_: int, traffic: Traffic, there: frozenset[str]) -> None:
            for name in sorted(there) if keep else ():
                save_peer(peers[name], _kept(out, name))
            if round_ == first:  # not before: a resumed run may turn out to be another one
                save_federation(settings, out / "federation.yaml")
            numbers = standing(round_, peers, there, traffic, channel, told)
            told.update({name: peers[name].refused for name in there})
            watch.log(round_, numbers)
            show(round_, numbers)

        Hub(settings, channel).run(start, first, after)
    for name in settings.devices.keys() - peers.keys():  # with nothing left to do
        start(name)
    for name, peer in sorted(peers.items()) if keep else ():
        peer.export(out / "adapters" / name)
    return peers


def graph_of_devices(settings: Federation) -> TaskGraph:
    """The tasks. Raises ConfigError E104 for a device with another one."""
    graph = TaskGraph.load(settings.graph_path)
    for name, device in settings.devices.items():
        if device.task not in graph.names:
            text = f"no task '{device.task}'.{did_you_mean(device.task, graph.names)}"
            raise ConfigError("E104", text, where=f"devices.{name}")
    return graph


def open_reader(settings: Federation, graph: TaskGraph) -> ImageFeatures:
    """The base model with sparse layers: the same on every device."""
    model, processor = load_model(settings.model, dtype=settings.dtype)
    put_on(model, graph, settings)
    encoder = Encoder(processor, graph)
    return ImageFeatures(model, encoder, feature_folder(model) if encoder.sees_images else None)


def channel_of(settings: Federation) -> Channel:
    """The model of the air, or a trace in its place; the same numbers on every device."""
    names = sorted(settings.devices)
    if settings.trace:
        return MeasuredChannel.load(settings.trace, names, settings.limits, settings.radio.cast)
    return RadioChannel(names, settings.radio, settings.limits, (settings.name, settings.seed))


def shares(settings: Federation, only: str | None = None) -> dict[str, list[Example]]:
    """Each device's training data: its own folder's, or an equal share of what the common one has of its task.

    `only` leaves out all other devices, whose folders need not be here.
    """
    graph = graph_of_devices(settings)
    common: list[Example] | None = None
    found: dict[str, list[Example]] = {}
    for name, device in settings.devices.items():
        if only not in (None, name):
            continue
        if device.data is not None:
            mine = load_examples(device.data, graph, split="train")
            found[name] = _drawn([e for e in mine if device.task in e.answers], settings, name)
            continue
        common = load_examples(settings.data, graph, split="train") if common is None else common
        among = [n for n, d in settings.devices.items() if d.task == device.task and d.data is None]
        mine = [e for e in common if device.task in e.answers][among.index(name) :: len(among)]
        found[name] = _drawn(mine, settings, name)
    return found


def _drawn(mine: list[Example], settings: Federation, name: str) -> list[Example]:
    """`max_samples` of a device's examples, in their order; the same under every seed."""
    if settings.max_samples is None or settings.max_samples >= len(mine):
        return mine
    drawn = random.Random(f"{settings.name}|{name}").sample(range(len(mine)), settings.max_samples)
    return [mine[i] for i in sorted(drawn)]


def standing(
    round_: int,
    peers: Mapping[str, Peer],
    there: frozenset[str],
    traffic: Traffic,
    channel: Channel,
    told: Mapping[str, Counter[str]],
) -> dict[str, Any]:
    """A round in numbers, a line of metrics.jsonl. Clusters are those that its first device has found.

    `told` is what each device had refused before this round.
    """
    alive = [peers[n] for n in sorted(there)]
    losses = {p.name: sum(p.losses) / len(p.losses) for p in alive if p.losses}
    numbers = asdict(traffic) | {"bytes": dict(traffic.bytes)}
    groups, collisions = ((c := alive[0].clustering).groups, c.collisions) if alive else ((), ())
    if isinstance(channel, RadioChannel):
        at = channel.positions(round_)
        numbers["positions"] = {n: [round(float(x), 2) for x in at[i]] for i, n in enumerate(channel.devices)}
    return numbers | {
        "loss": sum(losses.values()) / max(1, len(losses)),
        "losses": losses,
        "clusters": [list(g) for g in groups],
        "collisions": list(collisions),
        "refused": dict(sum((p.refused - told[p.name] for p in alive), start=Counter[str]())),
    }


def simulated_key(settings: Federation, name: str) -> Ed25519PrivateKey:
    """A simulated device's signing key, which anyone can make again: real devices make their own (`enroll`)."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(
        hashlib.sha256(f"simulated|{settings.name}|{settings.seed}|{name}".encode()).digest()
    )


def _kept(out: Path, name: str) -> Path:
    return out / "devices" / name


def _first_round(settings: Federation, resume: bool) -> int:
    """The round after the last one that every device has kept; what some have kept beyond it is dropped."""
    if not resume:
        return 0
    kept = {
        n: {int(p.name.split("-")[0]): p for p in _kept(Path(settings.out), n).glob("[0-9]*-*")}
        for n in settings.devices
    }
    common = set.intersection(*(set(found) for found in kept.values()))
    for found in kept.values():
        for round_, folder in found.items():
            if round_ > max(common, default=-1):
                shutil.rmtree(folder)
    return max(common, default=0)

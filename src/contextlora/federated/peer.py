"""One device of a federation: its own slice, what it has heard from others, and what it says to them.

No transport and no clock here: `protocol.rounds` calls these methods in order, and someone else moves the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from contextlora.data.records import Example
from contextlora.errors import PeerError
from contextlora.federated.aggregate import Held, Update, choice_of, strategy
from contextlora.federated.cluster import Clustering
from contextlora.federated.codec import Codec
from contextlora.federated.federation import Federation
from contextlora.federated.layer import export, learning_parts, load_slice
from contextlora.federated.local import Local, first_batches, local_run
from contextlora.federated.mailbox import Inbox, Message, Outbox, Row, send_row
from contextlora.federated.methods import first_local, owner_of
from contextlora.federated.planner import Gateways, Planner
from contextlora.federated.protocol import Bundles, Slot, unbundle
from contextlora.federated.routing import pooled_prompts
from contextlora.federated.slices import Layer, Mask, Slice, zeros
from contextlora.federated.table import Standing, mean_row, read_mean
from contextlora.federated.taskgate import TaskMean
from contextlora.federated.wire import OVERHEAD, Kind, Limits, read_header
from contextlora.models.inputs import ImageFeatures
from contextlora.training.prefix import FrozenPrefix

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Sends = Sequence[tuple[tuple[str, ...], list[bytes]]]


@dataclass(frozen=True)
class Heard:
    """What a device has of another one: its mask, and the messages as they came, which it may pass on."""

    task: str
    masks: Mapping[Layer, Mask]
    announced: bytes
    version: int = 0
    values: bytes = b""


class Peer:
    """A device at work.

    Args:
        name: of this device.
        settings: what all devices agree on.
        reader: of a model with sparse layers; several peers of a simulation share it and take turns.
        examples: this device's data.
        key: its own.
        known: names of all devices by public key.
        planner: finds clusters; over the same channel on every device.
        prefix: activations of frozen layers, kept from round to round.

    Attributes:
        round: the next one, or the one it is in.
        local: its own slice and optimizer.
        held: the adapters it has, its own among them.
        means: what the prompts of each device look like, by device.
        clustering, gateways: of this round.
        losses: of its last local updates.
        refused: messages that were not let in, by error code, and bundles that could not be read.
    """

    def __init__(
        self,
        name: str,
        settings: Federation,
        reader: ImageFeatures,
        examples: Sequence[Example],
        key: Ed25519PrivateKey,
        known: Mapping[bytes, str],
        planner: Planner,
        prefix: FrozenPrefix | None = None,
    ):
        self.name, self.settings, self.reader, self.examples = name, settings, reader, examples
        self.key, self.planner = key, planner
        asked = settings.total_updates * settings.train.batch_size * settings.train.accumulate
        self.prefix = prefix if asked > len(examples) else None  # it pays from the second look at a sample on
        self.task = settings.devices[name].task
        self.others = tuple(n for n in sorted(settings.devices) if n != name)
        self.owner, graph = owner_of(self.task, settings), reader.encoder.graph
        self.layers = learning_parts(reader.model)
        self.shapes = {t: [p.shape(owner_of(t, settings)) for p in self.layers.values()] for t in graph.names}
        self.sizes = {t: [rows * columns for rows, columns in shapes] for t, shapes in self.shapes.items()}
        codecs = {"full": Codec[settings.wire.full.upper()]}
        delta = Codec[settings.wire.delta.upper()] if settings.wire.delta else None
        self.outbox = Outbox(key, settings.name, self.task, **codecs, delta=delta)
        limits = Limits(payload=max(Limits.payload, 3 * max(map(sum, self.sizes.values()))))
        self.inbox = Inbox(settings.name, known, self.sizes, limits, differences=delta is not None)
        self.round, self.held, self.losses = 0, Held(choice=choice_of(settings.aggregate)), list[float]()
        self.heard: dict[str, Heard] = {}
        self.table: dict[str, Standing] = {}
        self.fresh: dict[str, Update] = {}
        self.damaged: Counter[str] = Counter()
        self.means: dict[str, TaskMean] = {}
        self.bits = 0
        self.local: Local
        self.clustering: Clustering
        self.gateways: Gateways = {}

    # --- its own slice -------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Lays out its own slice, of `ours` from the first mini-batches of its data (eq. 18 and 20 to 22)."""
        s = self.settings
        self._load_prerequisites()
        self.start(first_local(self.reader, self.examples, self.task, s, self.prefix))
        batches = first_batches(self.reader, self.examples, self.task, s.train, s.slices.calibration)
        pooled = [pooled_prompts(self.reader.model, self.reader.inputs(b), prompt=b.prompt) for b in batches]
        mean = TaskMean.of(np.concatenate(pooled))
        self.means[self.name] = read_mean(mean_row(mean), len(mean.mean), self.name)  # as the others have it

    def start(self, local: Local) -> None:
        """Goes on from a slice."""
        self.local = local
        self.bits = 8 * (OVERHEAD + local.own.active)  # until a message has been sent: a byte an entry

    def train(self) -> None:
        """This round's local updates, with the prerequisites' slices frozen beside its own (eq. 6)."""
        s = self.settings
        self._load_prerequisites()
        done = min(self.round * s.updates, s.total_updates - s.updates)  # one that was away skips what it missed
        at = replace(self.local, update=max(done, self.local.update))
        counts = {"updates": s.updates, "total": s.total_updates}
        self.local, self.losses = local_run(
            self.reader, self.examples, at, s.train, **counts, prefix=self.prefix, task=self.task
        )

    def _load_prerequisites(self) -> None:
        """Puts on the model what it has of them, or nothing: in a simulation others were there before."""
        if self.owner != self.task:
            return  # one adapter for all tasks
        for p in self.reader.encoder.graph.prerequisites(self.task):
            none = {la: Mask(s, np.empty(0, np.int64)) for la, s in zip(self.layers, self.shapes[p], strict=True)}
            load_slice(self.reader.model, self.adapter(p) or zeros(p, none))

    def adapter(self, task: str) -> Slice | None:
        """What it would answer `task` with: its own cluster's adapter where clusters have one each."""
        return self.held.slices.get(("", task)) or self.held.slices.get((self.cluster, task))

    @property
    def cluster(self) -> str:
        """The name of its cluster: that of the first member."""
        return self._group()[0]

    def _group(self) -> tuple[str, ...]:
        return self.clustering.group_of(self.name) if hasattr(self, "clustering") else (self.name,)

    # --- rows: who is there, and who talks to whom -----------------------------------------------------------------

    def rows(self) -> list[bytes]:
        """Its rows of the table, as signed messages; what its prompts look like once in a while only."""
        active = tuple(len(self.local.learns[layer].indices) for layer in self.layers)
        have = {name: heard.version for name, heard in self.heard.items()}
        mine = Standing(self.task, active, self.bits, len(self.examples), have)
        self.table = {self.name: mine}
        rows = [mine.row()]
        if self.round == 0 or self.exchanges:
            rows.append(mean_row(self.means[self.name]))
        where, first = (self.key, self.settings.name, self.task), 2 * self.round + 1
        return [send_row(*where, row, version=first + i, round=self.round) for i, row in enumerate(rows)]

    def meet(self, arrived: Bundles) -> None:
        """Takes the rows of those that are there; goes on to their round if it was away; finds the clusters."""
        latest = self.round
        for _, message in self._opened(arrived):
            task = message.header.task
            if message.header.kind is not Kind.ROW or self.settings.devices[message.name].task != task:
                continue
            try:
                self._note(message.name, task, message.content)  # type: ignore[arg-type]
            except PeerError as e:
                self.damaged[e.code] += 1
                continue
            latest = max(latest, message.header.round)
        self.round = min(latest, self.settings.rounds - 1)
        members = frozenset(row.member(name, self.sizes[row.task]) for name, row in self.table.items())
        self.clustering = self.planner.clusters(self.round, members)
        self.gateways = self.planner.gateways(self.round, members) if self.exchanges else {}

    def _note(self, name: str, task: str, row: Row) -> None:
        if "mean" in row:
            self.means[name] = read_mean(row, len(self.means[self.name].mean), name)
        else:
            self.table[name] = Standing.read(task, row, self.sizes[task], name)

    def gate_means(self) -> dict[str, TaskMean]:
        """What the prompts of each task look like, over all its devices that it has heard of."""
        found: dict[str, TaskMean] = {}
        for name in sorted(self.means):
            task = self.settings.devices[name].task
            found[task] = found[task].merged(self.means[name]) if task in found else self.means[name]
        return found

    @property
    def exchanges(self) -> bool:
        """Whether clusters exchange what they have in this round."""
        return (self.round + 1) % self.settings.exchange_every == 0

    # --- messages --------------------------------------------------------------------------------------------------

    def sends(self, slot: Slot) -> Sends:
        """Whom it sends which messages in a slot."""
        group = self._group()
        mates = tuple(n for n in group if n != self.name)
        if slot == "slices":
            mine = self._update(mates) if mates or self.exchanges else []
            return [(mates, mine)] if mates else []
        index = self.clustering.groups.index(group)
        if slot == "inward":
            passed = [m for name in sorted(self.passed) for m in self.passed[name]]
            return [(mates, passed)] if mates and passed else []
        pairs = self.gateways.items()
        return [((b,), self._all_of(group, j)) for (i, j), (a, b) in pairs if i == index and a == self.name]

    def expects(self, slot: Slot) -> frozenset[str]:
        """From whom something may come in a slot."""
        group = self._group()
        if slot == "slices":
            return frozenset(group) - {self.name}
        index, pairs = self.clustering.groups.index(group), self.gateways.items()
        if slot == "across":
            return frozenset(a for (_, j), (a, b) in pairs if j == index and b == self.name)
        return frozenset(b for (_, j), (_, b) in pairs if j == index) - {self.name}

    def _update(self, mates: Sequence[str]) -> list[bytes]:
        """Its own news: values, whole where someone lacks what a difference would be to; first the mask, if need be."""
        have = [self.table[n].have.get(self.name) for n in mates]
        last = self.heard.get(self.name)
        version, messages = self.round + 1, list[bytes]()
        own = self.local.own
        if last is None or None in have:
            mask = np.concatenate([_bits(own.masks[layer]) for layer in self.layers])
            announced = self.outbox.announce(mask, self.sizes[self.task], version=version, round=self.round)
            last = Heard(self.task, own.masks, announced)
            messages.append(announced)
        elif self.exchanges or any(v != last.version for v in have):
            self.outbox.forget()
        else:
            self.outbox.acknowledged(last.version)
        values = np.concatenate([own.values[layer] for layer in self.layers])
        message = self.outbox.send(values, version=version, round=self.round)
        self.heard[self.name] = replace(last, version=version, values=message)
        self.bits = 8 * len(message)
        return [*messages, message]

    def _all_of(self, group: Sequence[str], to: int) -> list[bytes]:
        """All that it has of its cluster, masks only where the other cluster lacks them."""
        there, messages = self.clustering.groups[to], list[bytes]()
        for name in group:
            heard = self.heard.get(name)
            if heard is None or not heard.values or (name != self.name and name not in self.fresh):
                continue
            if any(name not in self.table[n].have for n in there):
                messages.append(heard.announced)
            messages.append(heard.values)
        return messages

    def take(self, arrived: Bundles) -> None:
        """Lets in what has come of others' slices."""
        self.passed: dict[str, list[bytes]] = {}
        for raw, message in self._opened(arrived):
            kind, name, task = message.header.kind, message.name, message.header.task
            if self.settings.devices[name].task != task or kind is Kind.ROW:
                continue
            self.passed.setdefault(name, []).append(raw)
            if kind is Kind.MASK:
                self.heard[name] = Heard(task, self._masks(message), raw)
            else:
                heard = self.heard[name] = replace(self.heard[name], version=message.header.version, values=raw)
                self.fresh[name] = self._as_update(name, heard, message)

    def _opened(self, arrived: Bundles) -> Iterator[tuple[bytes, Message]]:
        """The messages that are let in, of all bundles; what is refused is counted."""
        for via in sorted(arrived):
            try:
                messages = unbundle(arrived[via])
            except PeerError as e:
                self.damaged[e.code] += 1
                continue
            for raw in messages:
                try:
                    yield raw, self.inbox.open(raw)
                except PeerError as e:
                    if e.code in ("E629", "E630", "E632"):  # what it has of the sender is no use: its row asks for all
                        sender = read_header(raw, self.inbox.limits).sender
                        self.heard.pop(self.inbox.peers[sender], None)

    def _masks(self, message: Message) -> dict[Layer, Mask]:
        task = message.header.task
        parts = np.split(np.asarray(message.content, bool), np.cumsum(self.sizes[task])[:-1])
        made = [Mask.of_bits(shape, bits) for shape, bits in zip(self.shapes[task], parts, strict=True)]
        return dict(zip(self.layers, made, strict=True))

    def _as_update(self, name: str, heard: Heard, message: Message) -> Update:
        ends = np.cumsum([len(m.indices) for m in heard.masks.values()])[:-1]
        values = dict(zip(self.layers, np.split(np.asarray(message.content, np.float32), ends), strict=True))
        samples = self.table[name].samples if name in self.table else 1
        return Update(name, Slice(heard.task, heard.masks, values), samples, message.header.version, self._of(name))

    def _of(self, name: str) -> str:
        return next((g[0] for g in self.clustering.groups if name in g), name)

    # --- the end of a round ----------------------------------------------------------------------------------------

    def aggregate(self) -> None:
        """Puts together what it holds, its own slice included; the next round begins."""
        own = Update(self.name, self.local.own, len(self.examples), self.round + 1, self.cluster)
        self.held = strategy(self.settings.aggregate)(own, list(self.fresh.values()), self.held)
        block = self.adapter(self.owner)
        assert block is not None
        self.local = replace(self.local, block=_with_room(block, self.local.learns))
        self.fresh = {}
        self.round += 1

    def export(self, out: Path) -> None:
        """Writes what it trains as a plain PEFT LoRA; of full fine-tuning, the weights' differences to the base."""
        load_slice(self.reader.model, self.local.block)
        if self.settings.aggregate == "full":
            moved = {f"{layer}.weight": torch.from_numpy(self.local.block.dense(layer)) for layer in self.layers}
            out.mkdir(parents=True, exist_ok=True)
            save_file(moved, out / "difference.safetensors")
            return
        export(self.reader.model, self.owner, out, self.settings.model)

    @property
    def refused(self) -> Counter[str]:
        """Messages and bundles that were not let in, by error code."""
        return self.inbox.refused + self.damaged


def _bits(mask: Mask) -> Any:
    bits = np.zeros(mask.size, bool)
    bits[mask.indices] = True
    return bits


def _with_room(block: Slice, learns: Mapping[Layer, Mask]) -> Slice:
    """The block with at least the entries that learn, zero where nothing is known of them."""
    masks, values = dict[Layer, Mask](), dict[Layer, Any]()
    for layer, mine in learns.items():
        masks[layer] = block.masks[layer].either(mine)
        values[layer] = block.dense(layer).ravel()[masks[layer].indices]
    return Slice(block.task, masks, values)

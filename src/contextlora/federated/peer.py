"""One device of a federation: its own slice, what it has heard from others, and what it says to them.

No transport and no clock here: `protocol.rounds` calls these methods in order, and someone else moves the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from contextlora.data.examples import Example
from contextlora.errors import PeerError
from contextlora.federated import together
from contextlora.federated.aggregate import Held, Update, choice_of, strategy
from contextlora.federated.cluster import Clustering, Member
from contextlora.federated.federation import Federation
from contextlora.federated.layer import learning_parts, load_slice
from contextlora.federated.local import Local, Turn, first_batches
from contextlora.federated.mailbox import Row, send_row
from contextlora.federated.methods import first_local, owner_of
from contextlora.federated.once import Sharing, alone
from contextlora.federated.planner import Gateways, Planner
from contextlora.federated.post import Post
from contextlora.federated.protocol import Bundles, Slot
from contextlora.federated.routing import pooled_prompts
from contextlora.federated.slices import Layer, Mask, Slice, zeros
from contextlora.federated.table import Standing, mean_row, read_mean
from contextlora.federated.taskgate import TaskMean
from contextlora.federated.wire import Kind
from contextlora.models.inputs import ImageFeatures
from contextlora.training.prefix import FrozenPrefix

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PROMPTS = 64  # of a task, if there are: of 8 the gate has too tight a notion of what is foreign, and loses its own
Trainer = Callable[["Peer"], together.Trained]
Sends = Sequence[tuple[tuple[str, ...], list[bytes]]]


class Peer:
    """A device at work.

    Args:
        name: of this device.
        settings: what all devices agree on.
        reader: of a model with the method's layers; several peers of a simulation share it and take turns.
        examples: this device's data.
        key: its own.
        known: names of all devices by public key.
        planner: finds clusters; over the same channel on every device.
        prefix: activations of frozen layers, kept from round to round.
        once: shares what several devices of one process would make alike.
        trainer: does this round's updates.

    Attributes:
        round: the next one, or the one it is in.
        owner: in whose name it trains: its task, or everyone.
        local: its own slice and optimizer.
        held: the adapters it has, its own among them.
        means: what the prompts of each device look like, by device.
        clustering, gateways: of this round.
        losses: of its last local updates.
        post: what it has said and heard.
        said: the version of its last row.
        rates: bit/s to others, as far as whoever carries its messages has measured them.
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
        once: Sharing = alone,
        trainer: Trainer = together.alone,
    ):
        self.name, self.settings, self.reader, self.examples = name, settings, reader, examples
        self.key, self.planner, self.trainer = key, planner, trainer
        asked = settings.total_updates * settings.train.batch_size * settings.train.accumulate
        self.prefix = prefix if asked > len(examples) else None  # it pays from the second look at a sample on
        self.task = settings.devices[name].task
        self.others = tuple(n for n in sorted(settings.devices) if n != name)
        self.owner, graph = owner_of(self.task, settings), reader.encoder.graph
        self.layers = learning_parts(reader.model)
        owners = {t: owner_of(t, settings) for t in graph.names}
        shapes = {t: {la: part.shape(owner) for la, part in self.layers.items()} for t, owner in owners.items()}
        self.post = Post(name, settings, key, known, shapes, once)
        self.once, self.sizes = once, self.post.sizes
        self.round, self.held, self.losses = 0, Held(choice=choice_of(settings.aggregate)), list[float]()
        self.said, self.rates = 0, dict[str, float]()
        self.table: dict[str, Standing] = {}
        self.fresh: dict[str, Update] = {}
        self.means: dict[str, TaskMean] = {}
        self.local: Local
        self.clustering: Clustering
        self.gateways: Gateways = {}

    # --- its own slice -------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Lays out its own slice, of `ours` from the first mini-batches of its data (eq. 18 and 20 to 22)."""
        s = self.settings
        self._load_prerequisites()
        self.start(first_local(self.reader, self.examples, self.task, s, self.prefix))
        sharing = sum(d.task == self.task for d in s.devices.values())  # whose means are one in the gate
        count = max(s.slices.calibration, math.ceil(PROMPTS / s.train.batch_size / sharing))
        batches = first_batches(self.reader, self.examples, self.task, s.train, count)
        pooled = [pooled_prompts(self.reader.model, self.reader.inputs(b), prompt=b.prompt) for b in batches]
        mean = TaskMean.of(np.concatenate(pooled))
        self.means[self.name] = read_mean(mean_row(mean), len(mean.mean), self.name)  # as the others have it

    def start(self, local: Local) -> None:
        """Goes on from a slice."""
        self.local = local
        self.post.start(local.own)

    def train(self) -> None:
        """This round's local updates, with the prerequisites' slices frozen beside its own (eq. 6)."""
        self._load_prerequisites()
        self.local, self.losses = self.trainer(self)

    def turn(self) -> Turn:
        """What it is to train in this round. One that was away skips what it missed."""
        s = self.settings
        done = min(self.round * s.updates, s.total_updates - s.updates)
        return Turn(replace(self.local, update=max(done, self.local.update)), self.examples, self.task)

    def _load_prerequisites(self) -> None:
        """Puts on the model what it has of them, or nothing: in a simulation others were there before."""
        if self.owner != self.task:
            return  # one adapter for all tasks
        for p in self.reader.encoder.graph.prerequisites(self.task):
            none = {layer: Mask(shape, np.empty(0, np.int64)) for layer, shape in self.post.shapes[p].items()}
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
        have = {name: heard.version for name, heard in self.post.heard.items()}
        rates = {n: int(r) for n, r in self.rates.items()} if self.settings.radio.measured else {}
        mine = Standing(self.task, active, self.post.bits, len(self.examples), have, rates)
        self.table = {self.name: mine}
        rows = [mine.row()]
        if self.round == 0 or self.exchanges:
            rows.append(mean_row(self.means[self.name]))
        first = max(self.said + 1, 2 * self.round + 1)  # also for one that has forgotten what it said: beyond all that
        self.said = first + len(rows) - 1
        where = self.key, self.settings.name, self.task
        return [send_row(*where, row, version=first + i, round=self.round) for i, row in enumerate(rows)]

    def meet(self, arrived: Bundles) -> None:
        """Takes the rows of those that are there; goes on to their round if it was away; finds the clusters."""
        latest = self.round
        for _, message in self.post.opened(arrived):
            task = message.header.task
            if message.header.kind is not Kind.ROW or self.settings.devices[message.name].task != task:
                continue
            try:
                self._note(message.name, task, message.content)  # type: ignore[arg-type]
            except PeerError as e:
                self.post.damaged[e.code] += 1
                continue
            latest = max(latest, message.header.round)
        self.round = min(latest, self.settings.rounds - 1)
        members, sizes = self._members(), tuple(self.sizes[self.task])
        self.clustering = self.planner.clusters(self.round, members, sizes)
        self.gateways = self.planner.gateways(self.round, members, sizes) if self.exchanges else {}

    def _members(self) -> frozenset[Member]:
        """The table as planning takes it: with masks as soon as its rows say that everyone there has everyone's.

        Where one adapter is everyone's there is nothing to count: all its entries meet, as eq. 19 says.
        """
        names, rows = self.table.keys(), self.table.items()
        alike = all(self.sizes[row.task] == self.sizes[self.task] for row in self.table.values())
        known = self.owner == self.task and alike and names - self.post.heard.keys() <= {self.name}
        known = known and all(names - row.have.keys() <= {n} for n, row in rows)
        mask = {n: self.post.packed(n, self.local.learns) for n in names} if known else dict.fromkeys(names, b"")
        return frozenset(row.member(n, self.sizes[row.task], mask[n]) for n, row in rows)

    def _note(self, name: str, task: str, row: Row) -> None:
        if "mean" in row:
            width = len(self.means[self.name].mean)
            self.means[name] = self.once(("mean", id(row)), lambda: (row, read_mean(row, width, name)))[1]
        else:
            read = self.once(("standing", id(row)), lambda: (row, Standing.read(task, row, self.sizes[task], name)))[1]
            if unknown := read.rates.keys() - self.settings.devices.keys():
                raise PeerError("E603", f"rates to '{min(unknown)}', which is no device here", where=name)
            self.table[name] = read

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
            if not mates and not self.exchanges:
                return []
            have = [self.table[n].have.get(self.name) for n in mates]
            mine = self.post.news(self.local.own, have, round_=self.round, whole=self.exchanges)
            return [(mates, mine)] if mates else []
        index = self.clustering.groups.index(group)
        if slot == "inward":
            passed = [m for name in sorted(self.post.passed) for m in self.post.passed[name]]
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

    def _all_of(self, group: Sequence[str], to: int) -> list[bytes]:
        """All that it has of its cluster, masks only where the other cluster lacks them."""
        there, known = self.clustering.groups[to], [n for n in group if n == self.name or n in self.fresh]
        return self.post.all_of(known, {n for n in known if any(n not in self.table[m].have for m in there)})

    def take(self, arrived: Bundles) -> None:
        """Lets in what has come of others' slices."""
        for name, slice_, version in self.post.take(arrived):
            samples = self.table[name].samples if name in self.table else 1
            self.fresh[name] = Update(name, slice_, samples, version, self._of(name))

    def _of(self, name: str) -> str:
        return next((g[0] for g in self.clustering.groups if name in g), name)

    # --- the end of a round ----------------------------------------------------------------------------------------

    def aggregate(self) -> None:
        """Puts together what it holds, its own slice included; the next round begins."""
        own = Update(self.name, self.local.own, len(self.examples), self.round + 1, self.cluster)
        s = self.settings
        self.held = strategy(s.aggregate, s.mean.options, self.once)(own, list(self.fresh.values()), self.held)
        block = self.adapter(self.owner)
        assert block is not None
        self.local = replace(self.local, block=_with_room(block, self.local.learns))
        self.fresh = {}
        self.round += 1


def _with_room(block: Slice, learns: Mapping[Layer, Mask]) -> Slice:
    """The block with at least the entries that learn, zero where nothing is known of them."""
    masks, values = dict[Layer, Mask](), dict[Layer, Any]()
    for layer, mine in learns.items():
        masks[layer] = block.masks[layer].either(mine)
        values[layer] = block.dense(layer).ravel()[masks[layer].indices]
    return Slice(block.task, masks, values)

"""Training by a plan: what every device does, over torch.distributed (gloo between edge devices).

torch.distributed has no authentication: this is for a trusted LAN or VPN.

The walk: updates, their samples, their micro-batches and who runs each follow from plan, seed and data alone, so that
every device knows them without asking. Losses are sums over answer tokens divided by the whole update's, and gradients
are summed before clipping, so that every division among devices gives the gradients of a single process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Sample, collate
from contextlora.data.examples import Example
from contextlora.errors import PlanError, RunError
from contextlora.evaluation.evaluate import Answers, context_for
from contextlora.gear.cost import AHEAD, QUEUE
from contextlora.gear.plan import Group, Part, Plan, deal
from contextlora.gear.stream import Piece, Receiver, Sender
from contextlora.lora.attach import decoder_layers, gated_layers
from contextlora.lora.sharing import Sharing
from contextlora.models.inputs import ImageFeatures
from contextlora.training.loop import Stage, clip
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.step import Order, TaskRun

Run = TypeVar("Run", bound=Order)


@dataclass(frozen=True)
class Team:
    """A group at work.

    Attributes:
        group: of the plan.
        ranks: by device.
        me: this device.
        trainers: process group of the trainers, None unless there are several.
    """

    group: Group
    ranks: Mapping[str, int]
    me: str
    trainers: Any

    @property
    def trains(self) -> bool:
        """Whether this device is a trainer."""
        return any(p.device == self.me for p in self.group.trainers)

    @property
    def part(self) -> Part:
        """The units of this device."""
        return next(p for p in (*self.group.prefix, *self.group.trainers) if p.device == self.me)


def teams(plan: Plan, me: str) -> list[Team | None]:
    """This device's team in every stage of the plan, None where it has nothing to do. Every rank must call this."""
    ranks = {d: i for i, d in enumerate(plan.devices)}
    if dist.get_world_size() != len(ranks):
        text = f"the plan is for {len(ranks)} devices ({', '.join(ranks)}), and {dist.get_world_size()} have come"
        raise PlanError("E410", text)
    found: list[Team | None] = []
    for stage in plan.stages:
        mine = None
        for planned in stage.groups:
            g = planned.group
            members = [ranks[p.device] for p in g.trainers]
            made = dist.new_group(members) if len(members) > 1 else None  # all ranks make all groups, in one order
            if me in g.devices:
                mine = Team(g, ranks, me, made)
        found.append(mine)
    return found


# --- the walk --------------------------------------------------------------------------------------------------------


def active(runs: Sequence[Run], update: int, done: Mapping[str, int]) -> list[Run]:
    """The runs that have this update still before them; `done` has how many updates each had when the stage went on."""
    return [r for r in runs if done.get(r.name, 0) <= update < r.total]


def micro_batches(runs: Sequence[Order], update: int, size: int) -> list[list[Sample]]:
    """One update's samples of some runs, mixed as in a single process, in parts of `size`."""
    parts = zip_longest(*(r.micro_batches(update) for r in runs), fillvalue=[])
    mixed = [s for together in parts for part in together for s in part]
    return [mixed[i : i + size] for i in range(0, len(mixed), size)]


def dealt(parts: Sequence[Part], count: int, done: int = 0) -> list[int]:
    """Which of `parts` takes each of `count` micro-batches: as many as its pace lets it, in the order of their turns.

    Args:
        done: 0 orders turns by when they begin, for trainers; 1 by when they end, for devices that others wait for.
            Runs of neighbours would let the later trainers starve behind a short queue.
    """
    paces = [p.seconds or 1.0 for p in parts]
    turns = [((j + done) * paces[i], i) for i, n in enumerate(deal(count, paces)) for j in range(n)]
    return [i for _, i in sorted(turns)]


def pieces(team: Team, runs: Sequence[Order], total: int, done: Mapping[str, int]) -> Iterator[Piece]:
    """All that the prefix's devices send up to update `total`, in order, from where the stage stands.

    What a cache keeps is computed in the very pieces that a stage without interruption has, whatever is done already:
    another batch may round differently.
    """
    g = team.group
    updates = range(begins(runs, done), total)
    if not g.cache:
        for update in updates:
            yield from _update_pieces(team, micro_batches(active(runs, update, done), update, g.size))
        return
    made, home, seen = list[Piece](), dict[str, int](), set[str]()
    for update in range(max(r.per_epoch for r in runs)):
        fresh = []
        for b in micro_batches(active(runs, update, {}), update, g.size):
            new = {s.key: s for s in b if s.key not in seen}  # two tasks may ask the same of an example
            seen |= new.keys()
            fresh.append([*new.values()])
        for piece in _update_pieces(team, fresh):
            home |= {s.key: len(made) for s in piece.samples}
            made.append(piece)
    sent = set[int]()
    for update in updates:
        batches = micro_batches(active(runs, update, done), update, g.size)
        for i in dict.fromkeys(home[s.key] for b in batches for s in b):
            if i not in sent:
                sent.add(i)
                yield made[i]


def _update_pieces(team: Team, batches: Sequence[Sequence[Sample]]) -> Iterator[Piece]:
    """One update's pieces, by what of each micro-batch is to be sent."""
    g = team.group
    users = dealt(g.trainers, len(batches)) if g.form == "data" else [0] * len(batches)
    sent = [i for i, samples in enumerate(batches) if samples]
    for source, i in zip(dealt(g.prefix, len(sent), done=1), sent, strict=True):
        source_rank, user = team.ranks[g.prefix[source].device], team.ranks[g.trainers[users[i]].device]
        yield Piece(tuple(batches[i]), source_rank, user)


def begins(runs: Sequence[Order], done: Mapping[str, int]) -> int:
    """The update that comes next: the first that any run has before it."""
    return min(min(done.get(r.name, 0), r.total) for r in runs)


# --- a trainer -------------------------------------------------------------------------------------------------------


class TeamStage(Stage):
    """A stage whose micro-batches are divided among trainers that hold all layers above the cut each.

    Attributes:
        done: updates that each run has had when the stage went on; none at its beginning.
        places: by run, which of all its parameters, counted over the whole model, are trained on this device.
    """

    def __init__(self, team: Team, *given: Any):
        """`given` is as in `Stage`."""
        super().__init__(*given)
        self.team = team
        self.done: Mapping[str, int] = {}
        self.places = {r.name: list(range(len(r.parameters))) for r in self.runs}

    def update(self, update: int) -> dict[str, float]:
        """As in a single process; what is not finite is found by all trainers at once, after the sum."""
        runs = active(self.runs, update, self.done)
        losses = self._gradients(runs, update)
        clip(runs, losses, update)
        for r in runs:
            r.step(update)
        return losses

    def _gradients(self, runs: Sequence[TaskRun], update: int) -> dict[str, float]:
        batches = micro_batches(runs, update, self.team.group.size)
        tokens = self._tokens(runs, batches)
        losses = dict.fromkeys(tokens, 0.0)
        for batch in self._mine(batches):
            for task, value in self._backward(collate(batch, self.reader.encoder.pad), tokens).items():
                losses[task] += value
        return self._summed(runs, losses, update)

    def _tokens(self, runs: Sequence[TaskRun], batches: Sequence[list[Sample]]) -> dict[str, int]:
        """Answer tokens of the update by run, on all devices together."""
        tokens = dict.fromkeys((r.name for r in runs), 0)
        for s in (s for b in batches for s in b):
            tokens[self._run_of[s.task]] += len(s.answer)
        return tokens

    def _mine(self, batches: Sequence[list[Sample]]) -> list[list[Sample]]:
        g = self.team.group
        if g.form == "single":
            return list(batches)
        users = dealt(g.trainers, len(batches))
        return [b for b, i in zip(batches, users, strict=True) if g.trainers[i].device == self.team.me]

    def _summed(self, runs: Sequence[TaskRun], losses: dict[str, float], update: int) -> dict[str, float]:
        """Gradients and losses of all trainers together, in one message. Raises RunError E529."""
        parameters = [p for r in runs for p in r.parameters]
        got = torch.tensor([p.grad is not None for p in parameters], dtype=parameters[0].dtype)
        for p in parameters:
            if p.grad is None:  # no sample of its task came to this device
                p.grad = torch.zeros_like(p)
        if self.team.trainers is not None:
            told = torch.tensor(list(losses.values()), dtype=got.dtype)
            message = torch.cat([*(p.grad.flatten().cpu() for p in parameters if p.grad is not None), told, got])
            on_its_way = dist.all_reduce(message, group=self.team.trainers, async_op=True)
            self._run_ahead(update + 1, on_its_way)
            on_its_way.wait()
            *grads, told, got = message.split([*(p.numel() for p in parameters), len(losses), len(parameters)])  # type: ignore[no-untyped-call]
            for p, g in zip(parameters, grads, strict=True):
                assert p.grad is not None
                p.grad.copy_(g.view_as(p))
            losses = dict(zip(losses, told.tolist(), strict=True))
        if not got.all():  # it would silently stay as it is
            raise RunError("E529", f"{int((got == 0).sum())} of {len(got)} trainable parameters got no gradient")
        return losses

    def _run_ahead(self, update: int, meanwhile: Any) -> None:
        """Takes an update's first micro-batches through the frozen layers, as long as a message is on its way."""
        if self.team.group.prefix or not self.prefix.depth:
            return
        batches = micro_batches(active(self.runs, update, self.done), update, self.team.group.size)
        for batch in self._mine(batches)[:AHEAD]:
            if meanwhile.is_completed():
                return
            self.prefix.run_ahead(collate(batch, self.reader.encoder.pad))


def prefix_of(team: Team, reader: ImageFeatures, runs: Sequence[Order], total: int, done: Mapping[str, int]) -> Any:
    """What stands in for the layers below the blocks of a trainer."""
    g, me = team.group, team.ranks[team.me]
    if g.ahead == "streamed":
        mine = (p for p in pieces(team, runs, total, done) if p.trainer == me)
        return Receiver(reader, g.cut - 1, mine, g.cache, QUEUE)
    kept = FrozenPrefix(reader, 1 << 62 if g.cache else 0)
    if g.form == "pipeline" or g.cache:  # a first trainer may hold less than all that is frozen
        kept.depth = max(0, g.cut - 1)
    kept.admit([s for r in runs for s in r.samples])
    return kept


def stream(team: Team, reader: ImageFeatures, runs: Sequence[Order], total: int, done: Mapping[str, int]) -> None:
    """A prefix device's whole part in a stage."""
    sender, me = Sender(reader, team.group.cut - 1, QUEUE), team.ranks[team.me]
    for piece in pieces(team, runs, total, done):
        if piece.source == me:
            sender.send(piece)
    sender.finish()


def ask_prerequisites(
    reader: ImageFeatures, examples: Sequence[Example], tasks: Sequence[str], config: TrainConfig
) -> dict[str, Answers]:
    """With `context: predicted`, what the prerequisites of `tasks` answer to every picture, by task; else nothing.

    Each device asks about its share of the pictures, and tells all others what it has heard.
    """
    if config.context != "predicted":
        return {}
    mine: dict[str, Answers] = {}
    ways = dict.fromkeys(reader.encoder.graph.names, "predicted")
    for task in tasks:
        asked = [e for e in examples if task in e.answers]
        context_for(reader, asked[dist.get_rank() :: dist.get_world_size()], task, ways, mine)
    given: dict[str, Answers] = {}
    for told in from_all(mine):
        for task, answers in told.items():
            given.setdefault(task, {}).update({i: tuple(a) for i, a in answers.items()})
    return given


def from_all(mine: Any) -> list[Any]:
    """What every device has, as JSON: torch's own exchange of objects would unpickle what comes."""
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    room = max(int(n) for n in sizes)
    texts = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.cat([text, text.new_zeros(room - len(text))]))
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


@torch.no_grad()
def exchange(model: nn.Module, plan: Plan, index: int, sharing: Sharing) -> None:
    """Gives what a stage trained to every device: each block from the first trainer that had its layer."""
    ranks = {d: i for i, d in enumerate(plan.devices)}
    path = decoder_layers(model)[0]
    for planned in plan.stages[index].groups:
        g = planned.group
        owners = dict.fromkeys(o for t in g.tasks for o in sharing.learns[t])
        for name, layer in gated_layers(model).items():
            unit = int(name.removeprefix(f"{path}.").split(".")[0]) + 1
            source = next(ranks[p.device] for p in g.trainers if p.start <= unit < p.stop)
            for side in (s for o in owners for s in layer.block(o)):
                held = side.cpu().contiguous()
                dist.broadcast(held, source)
                side.copy_(held)

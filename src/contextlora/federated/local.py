"""One device's own training: its task's slice, some updates a round, through the loop that trains everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Batch, collate
from contextlora.data.examples import Example
from contextlora.errors import PeerError
from contextlora.federated.aggregate import EVERYONE
from contextlora.federated.layer import load_slice, to_slice
from contextlora.federated.slices import Layer, Mask, Slice
from contextlora.graph import TaskGraph
from contextlora.lora.attach import graph_of
from contextlora.lora.sharing import Phase, Sharing, along_graph
from contextlora.models.inputs import ImageFeatures
from contextlora.training.loop import Stage, learning_ends, task_samples
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.step import Order


@dataclass(frozen=True)
class Local:
    """Where a device stands with its own task, between two rounds: plain data, so that many share one model in turns.

    Attributes:
        block: what it holds of the task's B: what it trains itself, and what devices with the same task sent.
        learns: what it trains, by layer.
        update: the next update.
        optimizer: Adam's moments and step of what it trains, as `TaskRun.state` names them.
    """

    block: Slice
    learns: Mapping[Layer, Mask]
    update: int = 0
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def first(cls, slice_: Slice) -> Local:
        """Before the first round: nothing but the device's own slice."""
        return cls(slice_, slice_.masks)

    @property
    def own(self) -> Slice:
        """The entries that it trains: what it sends."""
        values = {layer: self.block.dense(layer).ravel()[m.indices] for layer, m in self.learns.items()}
        return Slice(self.block.task, self.learns, values)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        found = {"update": torch.tensor(self.update), **self.optimizer}
        for layer, mask in self.block.masks.items():
            found[f"shape|{layer}"] = torch.tensor(mask.shape)
            found[f"holds|{layer}"] = torch.from_numpy(mask.bitmap())
            found[f"values|{layer}"] = torch.from_numpy(self.block.values[layer])
            found[f"learns|{layer}"] = torch.from_numpy(self.learns[layer].bitmap())
        return found

    @classmethod
    def of_tensors(cls, task: str, tensors: Mapping[str, Tensor]) -> Local:
        """Takes back what `tensors` gave."""
        layers = [name.removeprefix("shape|") for name in tensors if name.startswith("shape|")]
        masks = {
            kind: {
                layer: Mask.of_bitmap((int(rows), int(columns)), tensors[f"{kind}|{layer}"].numpy())
                for layer in layers
                for rows, columns in [tensors[f"shape|{layer}"]]
            }
            for kind in ("holds", "learns")
        }
        block = Slice(task, masks["holds"], {layer: tensors[f"values|{layer}"].numpy() for layer in layers})
        optimizer = {name: t for name, t in tensors.items() if name.startswith("optimizer|")}
        return cls(block, masks["learns"], int(tensors["update"]), optimizer)


def local_run(
    reader: ImageFeatures,
    examples: Sequence[Example],
    at: Local,
    config: TrainConfig,
    *,
    updates: int,
    total: int,
    prefix: FrozenPrefix | None = None,
    task: str | None = None,
) -> tuple[Local, list[float]]:
    """Some updates of one device's slice (SO-LoRA eq. 6): where it stands then, and the loss of each.

    Run after run this does what one run of all updates would do, bit for bit: the order of samples, the learning rate
    and the optimizer go on.

    Args:
        reader: of a model with sparse layers, the slices of the task's prerequisites loaded. Nothing learns afterwards.
        examples: the device's data.
        at: where it stands; left as it is.
        config: hyperparameters; `epochs` does not matter here.
        updates: of this round.
        total: of all rounds, over which the learning rate warms up and decays.
        prefix: activations of layers below the lowest block, kept from round to round; None computes them each time.
        task: whose samples it trains on, where the block is everyone's; None takes the block's own task.

    Raises:
        PeerError: E608 for updates beyond `total`, or nothing to learn. RunError: E510, E511, E515 as in training.
    """
    turn = Turn(at, examples, task or at.block.task)
    return run_together(reader, [turn], config, updates=updates, total=total, prefix=prefix)[0]


@dataclass(frozen=True)
class Turn:
    """What one device trains: from where it stands, on its data, its task."""

    at: Local
    examples: Sequence[Example]
    task: str


def run_together(
    reader: ImageFeatures,
    turns: Sequence[Turn],
    config: TrainConfig,
    *,
    updates: int,
    total: int,
    prefix: FrozenPrefix | None = None,
) -> list[tuple[Local, list[float]]]:
    """`local_run` of devices of different tasks, their mini-batches in one forward pass through per-sample gates.

    Each has an optimizer, an order of samples and a clipping norm of its own, so all do what they would do alone but
    for rounding. All stand at the same update, and no block that is on for one of them learns for another.
    """
    model, first = reader.model, turns[0].at
    for turn in turns:
        _check(turn, updates, total)
    for turn in turns:
        load_slice(model, turn.at.block, turn.at.learns)
    phase = Phase(tuple((t.task,) for t in turns), sharing_of(graph_of(model), first.block.task))
    losses: dict[str, list[float]] = {t.task: [] for t in turns}
    with learning_ends(model, phase.sharing):
        of = {t.task: t.examples for t in turns}
        stage = Stage(reader, prefix or FrozenPrefix(reader, 0), of, phase, config)
        for run, turn in zip(stage.runs, turns, strict=True):
            run.total = total  # a federation counts updates, not epochs
            run.restore(dict(turn.at.optimizer))
        for update in range(first.update, first.update + updates):
            for task, loss in stage.update(update).items():
                losses[task].append(loss)
    done = [_after(model, t.at, updates, run.state()) for t, run in zip(turns, stage.runs, strict=True)]
    return [(local, losses[t.task]) for local, t in zip(done, turns, strict=True)]


def _check(turn: Turn, updates: int, total: int) -> None:
    at = turn.at
    if not any(len(m.indices) for m in at.learns.values()):
        raise PeerError("E608", "has no active entry; calibrate it first", where=turn.task)
    if at.update + updates > total:
        raise PeerError("E608", f"{updates} updates after {at.update}, but {total} in all", where=turn.task)


def _after(model: nn.Module, at: Local, updates: int, optimizer: Mapping[str, Tensor]) -> Local:
    held = {layer: mask.either(at.learns[layer]) for layer, mask in at.block.masks.items()}
    return Local(to_slice(model, at.block.task, held), at.learns, at.update + updates, optimizer)


def sharing_of(graph: TaskGraph, owner: str) -> Sharing:
    """Which blocks are on: a task's own and its prerequisites', or everyone's alone, whatever the task."""
    if owner != EVERYONE:
        return along_graph(graph, 1.0)
    learns = {EVERYONE: graph.rank_of(EVERYONE)}
    return Sharing(dict.fromkeys(graph.names, (EVERYONE,)), dict.fromkeys(graph.names, learns))


def first_batches(
    reader: ImageFeatures, examples: Sequence[Example], task: str, config: TrainConfig, count: int
) -> list[Batch]:
    """The first `count` mini-batches of a device's training, to calibrate with."""
    order = Order((task,), task_samples(reader, examples, task, config.context, {}), config)
    parts = (part for update in range(order.total) for part in order.micro_batches(update))
    return [collate(part, reader.encoder.pad) for part in islice(parts, count)]

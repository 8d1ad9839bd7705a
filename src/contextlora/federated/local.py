"""One device's own training: its task's slice, some updates a round, through the loop that trains everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from contextlora.config import TrainConfig
from contextlora.data.collate import Batch, collate
from contextlora.data.records import Example
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
    model, owner = reader.model, at.block.task
    task = task or owner
    if not any(len(m.indices) for m in at.learns.values()):
        raise PeerError("E608", "has no active entry; calibrate it first", where=task)
    if at.update + updates > total:
        raise PeerError("E608", f"{updates} updates after {at.update}, but {total} in all", where=task)
    phase = Phase(((task,),), sharing_of(graph_of(model), owner))
    load_slice(model, at.block, at.learns)
    losses: list[float] = []
    with learning_ends(model, phase.sharing):
        stage = Stage(reader, prefix or FrozenPrefix(reader, 0), examples, phase, config)
        (run,) = stage.runs
        run.total = total  # a federation counts updates, not epochs
        run.restore(dict(at.optimizer))
        for update in range(at.update, at.update + updates):
            losses += stage.update(update).values()
    held = {layer: mask.either(at.learns[layer]) for layer, mask in at.block.masks.items()}
    return Local(to_slice(model, owner, held), at.learns, at.update + updates, run.state()), losses


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

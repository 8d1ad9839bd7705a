r"""What the devices of a federation train under each aggregation: ours and its rivals, behind one interface.

    aggregate                        A                           what learns and travels    masks
    ours, paper_mean,                orthogonal block a task     B of its task              SO-LoRA's (eq. 18 to 22)
      single_cluster, lori_cat,
      hard_routing, local
    lori                             independent Gaussian a task B of its task              largest |B| of a trial
    ffa                              everyone's                  all of B                   none
    fedavg_lora                      everyone's, learns too      all of A and B             none
    full                             none                        the linears' weights       none

All see the same samples in the same order in as many updates, and their messages are encoded, signed and counted alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from contextlora.data.examples import Example
from contextlora.errors import ConfigError
from contextlora.federated.aggregate import EVERYONE
from contextlora.federated.calibration import calibrate
from contextlora.federated.dense import pairs, whole_weights
from contextlora.federated.federation import SHARED, Federation
from contextlora.federated.layer import gaussian_layers, layers, learning_parts
from contextlora.federated.local import Local, first_batches, local_run
from contextlora.federated.slices import Slice, complete, zeros
from contextlora.federated.sparsity import Calibration, first_slice
from contextlora.graph import Task, TaskGraph
from contextlora.lora.attach import Make, attach
from contextlora.models.inputs import ImageFeatures
from contextlora.training.prefix import FrozenPrefix

LAYERS: Mapping[str, Callable[[int], Make]] = {
    "lori": gaussian_layers,
    "fedavg_lora": pairs,
    "full": lambda seed: whole_weights,
}


def put_on(model: nn.Module, graph: TaskGraph, settings: Federation) -> None:
    """Attaches the layers that the federation's aggregation trains, on the linears that `train` names.

    Raises:
        ConfigError: E105 where everyone shares a block and a task has its name. PeerError: E607 for `full` on quantised
            weights.
    """
    make = LAYERS.get(settings.aggregate, layers)(settings.seed)
    whose = with_everyone(graph) if settings.aggregate in SHARED else graph
    attach(model, whose, make=make, layers=settings.train.layers, targets=settings.train.targets)


def with_everyone(graph: TaskGraph) -> TaskGraph:
    """The graph with one more block, of the graph's default rank, which no task owns. Raises ConfigError E105."""
    if EVERYONE in graph.tasks:
        text = f"a task is called '{EVERYONE}', which is the name of the block that all tasks share; rename it"
        raise ConfigError("E105", text, where=graph.name)
    return replace(graph, tasks={**graph.tasks, EVERYONE: Task(question="(the block that all tasks share)")})


def owner_of(task: str, settings: Federation) -> str:
    """In whose name a device of `task` trains."""
    return EVERYONE if settings.aggregate in SHARED else task


def first_local(
    reader: ImageFeatures, examples: Sequence[Example], task: str, settings: Federation, prefix: FrozenPrefix | None
) -> Local:
    """What a device begins with: which entries learn, all of them still at their start.

    Args:
        reader: of a model with the method's layers, the slices of the task's prerequisites loaded.
        examples: the device's data.
        task: whose device it is.
        settings: the federation's.
        prefix: as in `local_run`, for LoRI's trial.
    """
    s = settings
    if s.aggregate in SHARED:
        return Local.first(whole_slice(reader.model, EVERYONE))
    if s.aggregate == "lori":
        found, how = _tried(reader, examples, task, s, prefix), {"allocation": "global"}
    else:
        batches = first_batches(reader, examples, task, s.train, s.slices.calibration)
        found = calibrate(reader, task, batches, spectra=s.slices.allocation == "entropy")
        how = {"allocation": s.slices.allocation}
    total = max(1, round(s.slices.share * found.entries))
    more = {"temperature": s.slices.temperature, "floor": s.slices.floor}
    return Local.first(first_slice(found, total, **how, **more))  # type: ignore[arg-type]


def whole_slice(model: nn.Module, owner: str) -> Slice:
    """All that `owner` may learn, still at its start."""
    return zeros(owner, {name: complete(part.shape(owner)) for name, part in learning_parts(model).items()})


def _tried(
    reader: ImageFeatures, examples: Sequence[Example], task: str, settings: Federation, prefix: FrozenPrefix | None
) -> Calibration:
    """LoRI-S's calibration: all of B trained on trial, as long as the federation trains; |B| tells what is kept."""
    total, start = settings.total_updates, Local.first(whole_slice(reader.model, task))
    tried, _ = local_run(reader, examples, start, settings.train, updates=total, total=total, prefix=prefix)
    sizes = {layer: np.abs(tried.block.dense(layer)) for layer in tried.block.masks}
    return Calibration(task, sizes, {}, 0)

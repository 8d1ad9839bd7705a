"""How far a stage has come, run by run: what a trainer keeps meanwhile, and how any plan's devices take it over.

The groups of a stage train apart, so each run stands elsewhere, and a pipeline's trainer holds the optimizer's state of
its own layers alone. So a checkpoint within a stage (in the main job's format) has a device's own parameters and their
states, named by the run and by the parameter's place among all of that run's in the whole model. Whoever goes on, in
whatever groups, takes for each run the latest update of which some devices together hold all parameters: trainers of a
pipeline may have been killed one checkpoint apart. A run of which a part is lost for good begins the stage again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contextlora.evaluation.evaluate import Answers
from contextlora.gear.runtime import TeamStage, from_all
from contextlora.lora.attach import trainable_groups
from contextlora.lora.sharing import Phase
from contextlora.training import checkpoint
from contextlora.training.checkpoint import Checkpoint

WITHIN = "within"  # beside the checkpoints between stages, which stay: a device may be lost with its part
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's; its `step` is the number of updates


@dataclass(frozen=True)
class Progress:
    """Where a stage stands; at its beginning nothing is done.

    Attributes:
        done: updates by run, of those that had any.
        tensors: their parameters and moments, on every device alike.
        given: answers that the stage's prompts hold.
        number: of this device's next checkpoint: they are dropped in this order, and `done` may step back.
    """

    done: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Answers] = field(default_factory=dict)
    number: int = 0

    @torch.no_grad()
    def enter(self, stage: TeamStage) -> None:
        """Gives a trainer's stage its share of it."""
        stage.done = self.done
        for r in stage.runs:
            if r.name not in self.done:
                continue
            for i, p in zip(stage.places[r.name], r.parameters, strict=True):
                p.copy_(self.tensors[f"value|{r.name}|{i}"])
                moments = {m: self.tensors[f"optimizer|{r.name}|{i}|{m}"].to(p.device, copy=True) for m in MOMENTS}
                step = torch.tensor(float(self.done[r.name]), device=p.device)
                r.optimizer.state[p] = {"step": step, **moments}


@dataclass(frozen=True)
class Keeper:
    """Writes one device's checkpoints of one stage.

    Attributes:
        folder: of this device, for checkpoints within a stage.
        stage: its index.
        run: see `run_id`.
        start: where it stood when this process took it up.
    """

    folder: Path
    stage: int
    run: str
    start: Progress

    def save(self, stage: TeamStage, update: int, number: int) -> None:
        """Keeps what this device trains.

        Args:
            update: that comes next.
            number: of this checkpoint, counted from where the stage was taken up.
        """
        tensors: dict[str, Tensor] = {}
        for r in stage.runs:
            done = min(max(update, self.start.done.get(r.name, 0)), r.total)
            if done and stage.places[r.name]:
                tensors[f"done|{r.name}"] = torch.tensor(done)
                for i, p in zip(stage.places[r.name], r.parameters, strict=True):
                    tensors[f"value|{r.name}|{i}"] = p.detach().clone()  # a view of memory that others share
                    state = r.optimizer.state[p].items()
                    tensors |= {f"optimizer|{r.name}|{i}|{key}": value for key, value in state}
        if tensors:
            at = self.start.number + number
            checkpoint.save(self.folder, Checkpoint(self.stage, at, self.run, tensors, stage.given))


def gathered(model: nn.Module, phase: Phase, folder: Path, stage: int, run: str) -> Progress:
    """What all devices together have kept of a stage; every device calls this."""
    mine = [c for c in checkpoint.load_all(folder, run) if c.stage == stage]
    offers: list[list[dict[str, Any]]] = from_all([_offer(c) for c in mine])
    groups = trainable_groups(model, phase.tasks, phase.sharing)
    done, tensors = dict[str, int](), dict[str, Tensor]()
    for tasks in phase.runs:
        owners = dict.fromkeys(o for t in tasks for o in phase.sharing.learns[t])
        parameters, name = [p for o in owners for p in groups[o]], "+".join(tasks)
        updates, holders = _latest(offers, name, len(parameters))
        if updates:
            done[name] = updates
            for rank in sorted({*holders}):
                held = {n: t for c in mine if _done(c).get(name) == updates for n, t in c.tensors.items()}
                places = [i for i, r in enumerate(holders) if r == rank]
                tensors |= _told(name, places, parameters, held, rank)
    given: dict[str, Any] = next((c["given"] for offer in offers for c in offer), {}) if done else {}
    answers = {t: {i: tuple(a) for i, a in found.items()} for t, found in given.items()}
    return Progress(done, tensors, answers, max((c.update for c in mine), default=-1) + 1)


def _done(c: Checkpoint) -> dict[str, int]:
    """Updates by run."""
    return {n.partition("|")[2]: int(t) for n, t in c.tensors.items() if n.startswith("done|")}


def _offer(c: Checkpoint) -> dict[str, Any]:
    places: dict[str, list[int]] = {}
    for name in c.tensors:
        what, _, rest = name.partition("|")
        if what == "value":
            run, _, place = rest.rpartition("|")
            places.setdefault(run, []).append(int(place))
    return {"done": _done(c), "places": places, "given": c.given}


def _latest(offers: Sequence[Sequence[dict[str, Any]]], run: str, count: int) -> tuple[int, list[int]]:
    """The latest update of which all parameters are there, and the rank that gives each; 0 where there is none."""
    found: dict[int, dict[int, int]] = {}
    for rank, offer in enumerate(offers):
        for kept in offer:
            if run in kept["done"]:
                holders = found.setdefault(kept["done"][run], {})
                for place in kept["places"][run]:
                    holders.setdefault(place, rank)
    whole = [u for u, holders in found.items() if len(holders) == count]
    return (max(whole), [found[max(whole)][i] for i in range(count)]) if whole else (0, [])


def _told(
    run: str, places: Sequence[int], parameters: Sequence[Tensor], held: Mapping[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """Some parameters of a run and their moments, as one rank tells all."""
    names = {
        name: parameters[i].shape
        for i in places
        for name in (f"value|{run}|{i}", *(f"optimizer|{run}|{i}|{m}" for m in MOMENTS))
    }
    sizes = [shape.numel() for shape in names.values()]
    if rank == dist.get_rank():
        message = torch.cat([held[name].flatten() for name in names])
    else:
        message = torch.empty(sum(sizes), dtype=parameters[0].dtype)
    dist.broadcast(message, rank)
    parts = message.split(sizes)  # type: ignore[no-untyped-call]
    return {name: part.view(shape) for (name, shape), part in zip(names.items(), parts, strict=True)}

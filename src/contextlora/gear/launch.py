"""A whole training by a plan, on one of its devices; torchrun starts this on all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from contextlora.config import RunConfig, TrainConfig
from contextlora.data.collate import Encoder
from contextlora.data.records import data_hash
from contextlora.errors import PlanError, RunError
from contextlora.evaluation.evaluate import Answers
from contextlora.gear.lean import Unseeing, release, units_left
from contextlora.gear.pipeline import PipelineTeamStage
from contextlora.gear.plan import Plan
from contextlora.gear.progress import WITHIN, Keeper, Progress, gathered
from contextlora.gear.runtime import (
    Team,
    TeamStage,
    ask_prerequisites,
    begins,
    exchange,
    prefix_of,
    stream,
    teams,
)
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import attached_state, decoder_layers
from contextlora.lora.sharing import Phase
from contextlora.models.inputs import ImageFeatures
from contextlora.models.prompts import lowest_block
from contextlora.training import checkpoint
from contextlora.training.loop import learning_ends, run_id, task_samples, training_examples
from contextlora.training.plan import planned, prepare, refuse_a_rival
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.runs import RunFolder
from contextlora.training.session import is_model, open_session
from contextlora.training.step import Order
from contextlora.training.track import Tracker
from contextlora.training.whole import align_base

LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
PATIENCE = timedelta(minutes=30)  # for a device that computes; one that is gone is noticed at once, by its connection


def train_planned(
    model: nn.Module,
    processor: Any,
    graph: TaskGraph,
    plan: Plan,
    *,
    me: str,
    data: str | Path,
    out: str | Path,
    config: TrainConfig,
    resume: bool = False,
    lean: bool = False,
    features: ImageFeatures | None = None,
    tracker: Tracker | None = None,
) -> nn.Module:
    """Trains by a plan, in place; every device of the plan calls this within one process group.

    Args:
        model, processor, graph, data, out, config, features, tracker: as in `train`.
        plan: of this graph, data and configuration.
        me: which of its devices this is.
        resume: go on from what the devices have kept, within a stage too, under this plan or another.
        lean: free the weights of units that this device does not run. Not with `context: predicted`, where every
            device asks its share of the questions, of the whole model.

    Returns:
        The model, with all blocks trained, on every device. With `lean`, units that it did not run compute NaN.

    Raises:
        PlanError: E410 another number of devices, E409 a plan of another graph.
        RunError: as `train`, E529 a parameter without gradient, E530 another device is gone.
    """
    if attached_state(model) is None:
        prepare(model, graph, config)
    check_model(plan, model)
    whole = planned(graph, None, config)
    _check(plan, [phase.tasks for phase in whole.phases])
    examples = training_examples(data, graph, config)
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    mine = teams(plan, me)
    data_sha256 = data_hash(data)  # reads every image: once
    here, run = Path(out) / me, run_id(graph, whole, config, data_sha256, model)
    folder = here / "checkpoints"
    first = _go_on(model, folder, run) if resume else 0
    if not resume:
        checkpoint.clear(folder)
    with tracker or Tracker(here) as watch, learning_ends(model, whole.answering), _with_others():
        for index, (phase, team) in list(enumerate(zip(whole.phases, mine, strict=True)))[first:]:
            again = resume and index == first
            start = gathered(model, phase, folder / WITHIN, index, run) if again else Progress()
            if lean and config.context != "predicted":
                release(model, units_left(plan, index, me))
            given = dict(start.given) or ask_prerequisites(reader, examples, phase.tasks, config)
            work = _Work(team, reader, examples, phase, config, given, start) if team else None
            keeper = Keeper(folder / WITHIN, index, run, start)
            if start.done:  # nobody goes on, and drops what is taken over from here, before all have kept it
                if work and work.stage:
                    keeper.save(work.stage, work.first, 0)
                dist.barrier()
            if work:
                work.run(watch, keeper)
            exchange(model, plan, index, phase.sharing)
            checkpoint.save(folder, checkpoint.Checkpoint(index + 1, 0, run, checkpoint.layer_tensors(model)))
            checkpoint.clear(folder / WITHIN)
    if dist.get_rank() == 0:
        adapter = Adapter.of(model, seed=config.seed, data=data_sha256, context=config.context)
        adapter.save(Path(out) / "adapter")
    return model


class _Work:
    """One stage of one device of a group.

    Attributes:
        stage: a trainer's; None on a device that streams ahead.
        first: the update that comes next.
    """

    def __init__(
        self,
        team: Team,
        reader: ImageFeatures,
        examples: Sequence[Any],
        phase: Phase,
        config: TrainConfig,
        given: dict[str, Answers],
        start: Progress,
    ):
        if team.part.start:
            reader = Unseeing(reader.model, reader.encoder)
        self.team, self.reader, self.done, self.config = team, reader, start.done, config
        phase = replace(phase, runs=tuple(r for r in phase.runs if set(r) <= set(team.group.tasks)))
        self.stage: TeamStage | None = None
        if team.trains:
            make = PipelineTeamStage if team.group.form == "pipeline" else TeamStage
            self.stage = make(team, reader, FrozenPrefix(reader, 0), examples, phase, config, given)
            start.enter(self.stage)
            self.orders: Sequence[Order] = self.stage.runs
            self.stage.prefix = prefix_of(team, reader, self.orders, self.stage.total, self.done)
        else:
            samples = {t: task_samples(reader, examples, t, config.context, given) for t in phase.tasks}
            at_once = config.model_copy(update={"batch_size": phase.batch_size(config.batch_size)})
            self.orders = [Order(run, [s for t in run for s in samples[t]], at_once) for run in phase.runs]
        self.first = begins(self.orders, self.done)

    def run(self, watch: Tracker, keeper: Keeper) -> None:
        """Does all of it that is left."""
        stage, first = self.stage, self.first
        if stage is None:
            stream(self.team, self.reader, self.orders, max(o.total for o in self.orders), self.done)
            return
        text = f"[{keeper.stage + 1}] {', '.join(self.team.group.tasks)} on {self.team.me}"
        watch.stage(text, stage.total, first)
        for update in range(first, stage.total):
            losses = stage.update(update)
            watch.log(update, {"stage": keeper.stage, "loss": losses})
            watch.advance(update + 1, f"loss {sum(losses.values()) / len(losses):.3f}")
            if update + 1 == stage.total or (update + 1) % self.config.checkpoint_every == 0:
                keeper.save(stage, update + 1, update + 1 - first)


@torch.no_grad()
def _go_on(model: nn.Module, folder: Path, run: str) -> int:
    """Takes over the blocks after the latest stage that any device has kept; returns the stage that comes next."""
    found = checkpoint.load_latest(folder, run)
    mine = 0 if found is None or found.update else found.stage
    stages = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(stages, torch.tensor([mine]))
    latest = max(int(s) for s in stages)
    source = next(i for i, s in enumerate(stages) if int(s) == latest)
    if latest:
        for name, block in checkpoint.layer_tensors(model).items():
            held = found.tensors[name].clone() if found and mine == latest else torch.empty_like(block, device="cpu")
            dist.broadcast(held, source)
            block.copy_(held)
    return latest


def _check(plan: Plan, stages: Iterable[tuple[str, ...]]) -> None:
    ours = [sorted(t) for t in stages]
    theirs = [sorted(t for p in s.groups for t in p.group.tasks) for s in plan.stages]
    if ours != theirs:
        raise PlanError("E409", f"the plan trains {theirs}, and this run {ours}; plan again")


def check_model(plan: Plan, model: nn.Module) -> None:
    """Raises PlanError E409 for a plan of another model, E405 if its prefixes reach into layers that train here."""
    units = len(decoder_layers(model)[1]) + 2
    if plan.units != units:
        text = f"the plan is of '{plan.model}', {plan.units} units; this model has {units}; plan again"
        raise PlanError("E409", text, where="units")
    plan.checked("the plan", lowest_block(model) + 1)


def refuse_a_second_run(config: RunConfig, plan: Plan, me: str, *, again: bool) -> None:
    """Raises RunError E521 or E522, on every device, where any of them holds what a training would throw away.

    Args:
        again: resume, or throw away; should some devices be told so and others not, what the others hold counts.
    """
    trained = RunFolder(config.out).has_adapter and not again
    begun = RunFolder(Path(config.out) / me).interrupted and not again
    held = [torch.zeros(2, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(held, torch.tensor([trained, begun], dtype=torch.long))
    for code, what, kept in (("E521", "a trained adapter", 0), ("E522", "an interrupted run", 1)):
        if who := [f"'{name}'" for name, h in zip(plan.devices, held, strict=False) if h[kept]]:
            text = f"{', '.join(who)} holds {what}; on all devices, go on with --resume, or throw it away with --force"
            raise RunError(code, text, where=config.out)


def _aligned(config: RunConfig, resume: bool, silent: bool) -> None:
    """The first device aligns the projector, if asked; all others must have what it made. Raises PlanError E409."""
    folder = RunFolder(config.out)
    if dist.get_rank() == 0:
        graph = TaskGraph.load(config.graph_path)
        align_base(config, graph, folder, again=not resume, silent=silent, say=lambda _: None)
    dist.barrier()
    if config.align.epochs is not None and not is_model(folder.base):
        text = "the first device of the plan has aligned the projector; copy that folder here, or share it"
        raise PlanError("E409", text, where=folder.base)


@contextmanager
def _with_others() -> Iterator[None]:
    """Turns what torch says of a lost connection into one clear error."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and not any(w in str(e) for w in LOST):
            raise
        text = f"another device is gone ({str(e).splitlines()[0][:100]}); start again with --resume"
        raise RunError("E530", f"{text}, with a new plan if it does not come back") from None


def _backend(config: RunConfig) -> str:
    """Gloo, and NCCL for what lies on GPUs where every process here has one; "cuda" then means its own."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not config.device.startswith("cuda") or torch.cuda.device_count() < here:
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cpu:gloo,cuda:nccl"


def launch(
    config: RunConfig,
    plan: Plan,
    *,
    device: str | None = None,
    resume: bool = False,
    force: bool = False,
    silent: bool = False,
) -> Path:
    """What `torchrun ... -m contextlora launch` does on each device. Returns the adapter's folder.

    Args:
        config: the run; its data and base model must lie on every device.
        plan: for this run.
        device: which of the plan's devices this is; None takes the one of this process's rank.
        resume: go on from what the devices have kept.
        force: throw away what an earlier training has left in `config.out`, and its adapter.
        silent: no progress bar.

    Raises:
        PlanError: E410 not started by torchrun, or by another number of devices. Otherwise as `train_planned`.
        RunError: E521 if an adapter would be overwritten, E522 an interrupted run; on all devices.
    """
    refuse_a_rival(config.train)
    if "RANK" not in os.environ:
        text = f"not started by torchrun; run: torchrun --nproc-per-node {len(plan.devices)} -m contextlora launch ..."
        raise PlanError("E410", text)
    dist.init_process_group(_backend(config), timeout=PATIENCE)
    try:
        rank = dist.get_rank()
        if rank >= len(plan.devices):
            text = f"the plan is for {len(plan.devices)} devices, and this is number {rank + 1}"
            raise PlanError("E410", text)
        me = device or plan.devices[rank]
        if plan.devices[rank] != me:
            raise PlanError("E410", f"'{me}' has rank {rank}, which the plan gives to '{plan.devices[rank]}'")
        refuse_a_second_run(config, plan, me, again=resume or force)
        _aligned(config, resume, silent)
        session = open_session(config, fresh=True)
        with Tracker(Path(config.out) / me, quiet=silent) as tracker:
            train_planned(
                session.model,
                session.processor,
                session.graph,
                plan,
                me=me,
                data=config.data,
                out=config.out,
                config=config.train,
                resume=resume,
                lean=True,
                features=session.reader,
                tracker=tracker,
            )
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return Path(config.out) / "adapter"

"""THE loop: levels of the graph one after another, the tasks of a level together in mixed batches (SEMANTICS 2)."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Batch, Encoder, Sample, collate
from contextlora.data.examples import Example, load_examples
from contextlora.data.noise import label_noise
from contextlora.data.records import data_hash
from contextlora.errors import DataError, RunError
from contextlora.evaluation.evaluate import Answers, context_for
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import adapted_layers, attached_state, gated_layers, graph_of, trainable_groups
from contextlora.lora.sharing import Phase, Plan, Sharing
from contextlora.models import fingerprint
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training import checkpoint
from contextlora.training.plan import LAYERS, planned, prepare
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.step import TaskRun
from contextlora.training.track import Tracker


def train(
    model: nn.Module,
    processor: Any,
    graph: TaskGraph,
    *,
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    tasks: Iterable[str] | None = None,
    resume: bool = False,
    features: ImageFeatures | None = None,
    tracker: Tracker | None = None,
    prefix: FrozenPrefix | None = None,
) -> nn.Module:
    """Trains the blocks of `tasks` along the graph, in place.

    Args:
        model: a frozen base model, or one with this graph's blocks attached (then training goes on from them).
        processor: the model's processor or tokenizer.
        graph: the workflow.
        data: the data folder; its split "train" is used.
        out: the run's folder: checkpoints/ while it runs, metrics.jsonl, and at the end adapter/.
        config: hyperparameters; None takes the paper's.
        tasks: which blocks to train; None means all. All other blocks stay byte-identical.
        resume: continue from the newest valid checkpoint in `out`, bit-exactly; without one, start.
        features: reused image features.
        tracker: where progress goes; None makes one in `out`.
        prefix: activations kept from other runs with the same base and the same lowest block, see `known_samples`.

    Returns:
        The model, blocks trained, nothing learning any more.

    Raises:
        DataError: E231 no training record. RunError: E510 a task without samples, E511 a non-finite gradient, E514
        stopped by Ctrl-C, resumable, E515 a non-finite loss, E516 a model with another graph's blocks, E520 checkpoints
        of another run. Whatever is raised, nothing of the model learns any more.
    """
    config = config or TrainConfig()
    if attached_state(model) is None:
        prepare(model, graph, config)
    _check_blocks(model, graph, config)
    examples = training_examples(data, graph, config)
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    plan = planned(graph, tasks, config)
    data_sha256 = data_hash(data)  # reads every image: once
    run = run_id(graph, plan, config, data_sha256, model)
    folder = Path(out) / "checkpoints"
    start = checkpoint.load_latest(folder, run) if resume else None
    if start is None:
        checkpoint.clear(folder)
    with (
        tracker or Tracker(Path(out)) as watch,
        learning_ends(model, plan.answering),
        _recomputing(model, config.activation_checkpointing),
        _ctrl_c() as stop,
    ):
        for index, phase in enumerate(plan.phases):
            if start is not None and index < start.stage:
                continue
            here = start if start is not None and index == start.stage else None
            kept = prefix or FrozenPrefix(reader, int(config.prefix_cache_gb * 2**30))
            stage = Stage(reader, kept, examples, phase, config, given=here.given if here else None)
            first = here.update if here else 0
            if here:
                stage.restore(here.tensors)
            elif phase.prepare:
                phase.prepare(adapted_layers(model).values())
            start = here = None  # its tensors are copied
            watch.stage(f"[{index + 1}/{len(plan.phases)}] {', '.join(r.name for r in stage.runs)}", stage.total, first)
            for update in range(first, stage.total):
                losses = stage.update(update)
                watch.log(update, {"stage": index, "loss": losses})
                watch.advance(update + 1, f"loss {sum(losses.values()) / len(losses):.3f}")
                ends = update + 1 == stage.total
                if ends or (update + 1) % config.checkpoint_every == 0 or stop.is_set():
                    at = checkpoint.Checkpoint(index, update + 1, run, stage.tensors(), stage.given)
                    checkpoint.save(folder, at)
                if stop.is_set():
                    raise RunError("E514", f"stopped after update {update + 1}; go on with --resume", where=out)
    if config.method == "paper":  # blocks of a rival do not answer along the graph: nothing to deploy
        Adapter.of(model, seed=config.seed, data=data_sha256, context=config.context).save(Path(out) / "adapter")
    checkpoint.clear(folder)
    return model


def training_examples(data: str | Path, graph: TaskGraph, config: TrainConfig) -> list[Example]:
    """The split "train": `max_train` of it drawn by the seed, and label noise, if the configuration asks for them."""
    examples = load_examples(data, graph, split="train")
    if not examples:
        raise DataError("E231", "no record of split 'train'", where=data)
    if config.max_train is not None and config.max_train < len(examples):
        drawn = random.Random(f"max_train {config.seed}").sample(range(len(examples)), config.max_train)
        examples = [examples[i] for i in sorted(drawn)]  # files often hold one class after another
    if not config.label_noise and config.noise_tasks is None:
        return examples
    return label_noise(examples, graph, config.label_noise, config.seed, config.noise_tasks)


def known_samples(reader: ImageFeatures, examples: Sequence[Example], config: TrainConfig) -> list[Sample]:
    """All samples of a run whose prompts are known before it starts: what a `FrozenPrefix` for several runs admits.

    Admitted together, they are computed in groups that do not depend on which run asks first.
    """
    if config.context == "predicted":
        return []
    return [s for t in reader.encoder.graph.names for s in task_samples(reader, examples, t, config.context, {})]


def run_id(graph: TaskGraph, plan: Plan, config: TrainConfig, data_sha256: str, model: nn.Module) -> str:
    """Identifies a run: a checkpoint of another configuration, graph, data or base model must not be resumed.

    The prefix cache counts too: what is computed with other samples may round differently.
    """
    settings = config.model_dump(exclude={"checkpoint_every"})
    layers = [(path, {n: str(t.dtype) for n, t in m.tensors().items()}) for path, m in adapted_layers(model).items()]
    base = [fingerprint(model), str(next(model.parameters()).dtype), layers]
    what = [graph.to_dict(), [phase.runs for phase in plan.phases], settings, data_sha256, base]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


class Stage:
    """A phase at work: runs that train side by side, and one update of all of them.

    Args:
        examples: of all tasks, or by task where each has its own.
        phase: the tasks of each run, which blocks are on, and which learn.
        given: the prerequisites' answers (`context: predicted`) where they are known already; a stage that is resumed
            must not ask again, because with delta > 0 the prerequisites have moved since.

    Attributes:
        total: updates until the longest of them is done.
        given: the prerequisites' answers that its prompts hold, by task and example id.
    """

    def __init__(
        self,
        reader: ImageFeatures,
        prefix: FrozenPrefix,
        examples: Sequence[Example] | Mapping[str, Sequence[Example]],
        phase: Phase,
        config: TrainConfig,
        given: dict[str, Answers] | None = None,
    ):
        self.model, self.reader, self.prefix = reader.model, reader, prefix
        self.penalty, self.weight = phase.penalty, config.penalty
        groups = trainable_groups(self.model, phase.tasks, phase.sharing)
        rate = config.gate_lr if phase.gates and config.gate_lr is not None else config.lr
        config = config.model_copy(update={"batch_size": phase.batch_size(config.batch_size), "lr": rate})
        self.given: dict[str, Answers] = given or {}
        self.runs: list[TaskRun] = []
        of = examples if isinstance(examples, Mapping) else dict.fromkeys(phase.tasks, examples)
        for tasks in phase.runs:
            owners = dict.fromkeys(o for t in tasks for o in phase.sharing.learns[t])
            samples = [s for t in tasks for s in task_samples(reader, of[t], t, config.context, self.given)]
            prefix.admit(samples)
            self.runs.append(TaskRun(tasks, samples, [p for o in owners for p in groups[o]], config))
        self._run_of = {t: r.name for r in self.runs for t in r.tasks}
        self.total = max(run.total for run in self.runs)

    def update(self, update: int) -> dict[str, float]:
        """One update of every run that still has one; returns the loss of each. Raises RunError E511, E515."""
        runs = [r for r in self.runs if update < r.total]
        losses = self._gradients(runs, update)
        try:
            clip(runs, losses, update)
        except RunError:
            for r in runs:  # alone: in a mixed batch 0 x inf spoils the others, and the first would be named
                for p in (p for other in runs for p in other.parameters):
                    p.grad = None
                clip([r], self._gradients([r], update), update)
            raise
        for r in runs:
            r.step(update)
        return losses

    def _gradients(self, runs: Sequence[TaskRun], update: int) -> dict[str, float]:
        """Adds up the gradients of one update's micro-batches, the k-th of every run in one; returns the losses."""
        micro = {r.name: r.micro_batches(update) for r in runs}
        tokens = {t: sum(len(s.answer) for batch in batches for s in batch) for t, batches in micro.items()}
        losses = dict.fromkeys(tokens, 0.0)
        for parts in zip_longest(*micro.values(), fillvalue=[]):
            batch = collate([s for part in parts for s in part], self.reader.encoder.pad)
            for task, value in self._backward(batch, tokens).items():
                losses[task] += value
        return losses

    def _backward(self, batch: Batch, tokens: dict[str, int]) -> dict[str, float]:
        """Adds the gradients of sum over runs of (sum of its answer tokens' loss / number of them in this update)."""
        inputs = self.reader.inputs(batch)
        with self.model.tasks(batch.tasks, batch.prompt), self.prefix.replay(batch, inputs):  # type: ignore[operator]
            nll = answer_nll(self.model, inputs, batch)
        weighted, values = self.weigh(batch, nll, tokens)
        (weighted.sum() + self._extra(batch, tokens)).backward()  # type: ignore[no-untyped-call]
        return values

    def weigh(self, batch: Batch, nll: Tensor, tokens: dict[str, int]) -> tuple[Tensor, dict[str, float]]:
        """Every sample's share of the update's loss, (samples,), and the sums of these by run."""
        by_sample = nll.new_zeros(len(batch.samples)).index_add(0, batch.owner.to(nll.device), nll)
        names = [self._run_of[t] for t in batch.tasks]
        weighted = by_sample * nll.new_tensor([1 / tokens[n] for n in names])
        values: dict[str, float] = {}
        for name, value in zip(names, weighted.tolist(), strict=True):
            values[name] = values.get(name, 0.0) + value
        return weighted, values

    def _extra(self, batch: Batch, tokens: dict[str, int]) -> Tensor | float:
        """The penalty of every run in the batch, by its share of the update's answer tokens; not in what is logged."""
        if self.penalty is None or not self.weight:
            return 0.0
        extra: Tensor | float = 0.0
        for r in self.runs:
            mine = sum(len(s.answer) for s in batch.samples if self._run_of[s.task] == r.name)
            if mine:
                share = self.weight * mine / tokens[r.name]
                extra = extra + self.penalty(adapted_layers(self.model).values(), r.tasks) * share
        return extra

    def tensors(self) -> dict[str, Tensor]:
        """All that the layers may change and the optimizers' states, for a checkpoint."""
        return checkpoint.layer_tensors(self.model) | {
            name: value for run in self.runs for name, value in run.state().items()
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        checkpoint.restore_layers(self.model, tensors)
        for run in self.runs:
            run.restore(tensors)


def clip(runs: Sequence[TaskRun], losses: dict[str, float], update: int) -> None:
    """Clips every task's gradients. Raises RunError E511, E515 where a gradient or loss is not finite."""
    for task, value in losses.items():
        if not math.isfinite(value):
            raise RunError("E515", f"loss of task '{task}' is {value} at update {update}; nothing applied")
    for r in runs:
        r.clip(update)


def _check_blocks(model: nn.Module, graph: TaskGraph, config: TrainConfig) -> None:
    """Raises RunError E516 if the model's blocks are not laid out as `graph` says, or are another method's."""
    laid = [{n: (g.block(n), g.scale_of(n), g.active(n)) for n in g.names} for g in (graph_of(model), graph)]
    if laid[0] != laid[1]:
        raise RunError("E516", f"the model has blocks of another graph than '{graph.name}'; detach(model) first")
    if bool(gated_layers(model)) == (config.method in LAYERS):
        raise RunError("E516", f"the model has layers of another method than '{config.method}'; detach(model) first")


def task_samples(
    reader: ImageFeatures, examples: Sequence[Example], task: str, context: str, given: dict[str, Answers]
) -> list[Sample]:
    """A task's training samples, prerequisites' answers in the prompt where `context` asks for them."""
    mine = [e for e in examples if task in e.answers]
    known = context_for(reader, mine, task, dict.fromkeys(reader.encoder.graph.names, context), given)
    return [reader.encoder.sample(e, task, answer=e.answers[task], known=known.get(e.id)) for e in mine]


@contextmanager
def learning_ends(model: nn.Module, answering: Sharing) -> Iterator[None]:
    """However the block ends, no parameter learns, no gradient is left, and tasks answer under `answering`."""
    try:
        yield
    finally:
        trainable_groups(model, [], answering)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a request that the loop honours between two updates; a second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Activation checkpointing of the language model's layers while it trains."""
    if not on:
        yield
        return
    decoder = model.get_decoder()  # type: ignore[operator]
    decoder.activation_checkpointing_enable({"use_reentrant": False})
    # transformers recomputes only in training mode: set on the layers alone, or dropout inside them would wake up too
    layers = [m for m in decoder.modules() if hasattr(m, "gradient_checkpointing")]
    modes = [m.training for m in layers]
    for m in layers:
        m.training = True
    try:
        yield
    finally:
        for m, mode in zip(layers, modes, strict=True):
            m.training = mode
        decoder.activation_checkpointing_disable()

"""THE loop: levels of the graph one after another, the tasks of a level together in mixed batches (SEMANTICS section 2)."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Batch, Encoder, Sample, collate
from contextlora.data.noise import label_noise
from contextlora.data.records import Example, data_hash, load_examples
from contextlora.errors import DataError, RunError
from contextlora.evaluation.evaluate import Answers, context_for
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, attached_state, gated_layers, trainable_groups
from contextlora.lora.gates import trainable_ranks
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training import checkpoint
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
) -> nn.Module:
    """Trains the blocks of `tasks` along the graph, in place.

    Args:
        model: a frozen base model, or one with this graph's blocks attached (then training goes on from them).
        processor: the model's processor or tokenizer.
        graph: the workflow.
        data: the data folder; its split "train" is used.
        out: the run's folder: checkpoints/ while it runs, metrics.jsonl.
        config: hyperparameters; None takes the paper's.
        tasks: which blocks to train; None means all. All other blocks stay byte-identical.
        resume: continue from the newest valid checkpoint in `out`, bit-exactly; without one, start.
        features: reused image features.
        tracker: where progress goes; None makes one in `out`.

    Returns:
        The model, blocks trained, nothing learning any more.

    Raises:
        DataError: E231 no training record. RunError: E510 a task without samples, E511 a non-finite gradient, E514
        stopped by Ctrl-C, resumable, E515 a non-finite loss, E520 checkpoints of another run.
    """
    config = config or TrainConfig()
    if attached_state(model) is None:
        attach(model, graph, layers=config.layers, targets=config.targets, seed=config.seed)
    examples = training_examples(data, graph, config)
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    plan = stages(graph, tasks, config)
    run = run_id(graph, plan, config, data)
    folder = Path(out) / "checkpoints"
    start = checkpoint.load_latest(folder, run) if resume else checkpoint.clear(folder)
    prefix = FrozenPrefix(reader, int(config.prefix_cache_gb * 2**30))
    with tracker or Tracker(Path(out)) as watch, _recomputing(model, config.activation_checkpointing), _ctrl_c() as stop:
        for index, names in enumerate(plan):
            if start is not None and index < start.stage:
                continue
            stage = Stage(reader, prefix, examples, names, config)
            first = 0
            if start is not None and index == start.stage:
                stage.restore(start.tensors)
                first = start.update
            watch.stage(f"[{index + 1}/{len(plan)}] {', '.join(names)}", stage.total, first)
            for update in range(first, stage.total):
                losses = stage.update(update)
                watch.log(update, {"stage": index, "loss": losses})
                watch.advance(update + 1, f"loss {sum(losses.values()) / len(losses):.3f}")
                if (update + 1) % config.checkpoint_every == 0 or stop.is_set():
                    checkpoint.save(folder, checkpoint.Checkpoint(index, update + 1, run, stage.tensors()))
                if stop.is_set():
                    raise RunError("E514", f"stopped after update {update + 1}; go on with --resume", where=out)
    trainable_groups(model, [])
    return model


def stages(graph: TaskGraph, tasks: Iterable[str] | None, config: TrainConfig) -> list[list[str]]:
    """The tasks that train together, stage after stage.

    With `schedule: level` these are the levels S_1..S_L. With `sequential`, and in a level where delta > 0 lets two
    tasks tune ranks of the same prerequisite, one task at a time in declared order (Algorithm 1).
    """
    wanted = set(graph.names if tasks is None else tasks)
    for name in wanted:
        graph.task(name)
    levels = [[t for t in level if t in wanted] for level in graph.levels()]
    plan: list[list[str]] = []
    for level in filter(None, levels):
        owners = [o for t in level for o in trainable_ranks(graph, t, config.frozen_ratio)]
        together = config.schedule == "level" and len(owners) == len(set(owners))
        plan += [level] if together else [[t] for t in level]
    return plan


def training_examples(data: str | Path, graph: TaskGraph, config: TrainConfig) -> list[Example]:
    """The split "train", cut to `max_train` and with label noise where the configuration asks for it."""
    examples = load_examples(data, graph, split="train")[: config.max_train]
    if not examples:
        raise DataError("E231", "no record of split 'train'", where=data)
    return label_noise(examples, graph, config.label_noise, config.seed) if config.label_noise else examples


def run_id(graph: TaskGraph, plan: list[list[str]], config: TrainConfig, data: str | Path) -> str:
    """Identifies a run: a checkpoint of another configuration, graph or data must not be resumed."""
    settings = config.model_dump(exclude={"checkpoint_every", "prefix_cache_gb"})
    what = [graph.to_dict(), plan, settings, data_hash(data)]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


class Stage:
    """Tasks that train together: their runs, and one update of all of them.

    Attributes:
        total: updates until the longest of them is done.
    """

    def __init__(
        self,
        reader: ImageFeatures,
        prefix: FrozenPrefix,
        examples: Sequence[Example],
        tasks: Sequence[str],
        config: TrainConfig,
    ):
        self.model, self.reader, self.prefix = reader.model, reader, prefix
        graph = reader.encoder.graph
        groups = trainable_groups(self.model, tasks, frozen_ratio=config.frozen_ratio)
        given: dict[str, Answers] = {}
        self.runs: list[TaskRun] = []
        for task in tasks:
            owners = trainable_ranks(graph, task, config.frozen_ratio)
            samples = _samples(reader, examples, task, config.context, given)
            prefix.admit(samples)
            self.runs.append(TaskRun(task, samples, [p for o in owners for p in groups[o]], config))
        self.total = max(run.total for run in self.runs)

    def update(self, update: int) -> dict[str, float]:
        """One update of every task that still has one; returns the loss of each. Raises RunError E511, E515."""
        runs = [r for r in self.runs if update < r.total]
        micro = {r.task: r.micro_batches(update) for r in runs}
        tokens = {t: sum(len(s.answer) for batch in batches for s in batch) for t, batches in micro.items()}
        losses = dict.fromkeys(tokens, 0.0)
        for parts in zip_longest(*micro.values(), fillvalue=[]):
            batch = collate([s for part in parts for s in part], self.reader.encoder.pad)
            for task, value in self._backward(batch, tokens).items():
                losses[task] += value
        for task, value in losses.items():
            if not torch.isfinite(torch.tensor(value)):
                raise RunError("E515", f"loss of task '{task}' is {value} at update {update}; nothing was changed by it")
        for r in runs:
            r.clip(update)
        for r in runs:
            r.step(update)
        return losses

    def _backward(self, batch: Batch, tokens: dict[str, int]) -> dict[str, float]:
        """Adds the gradients of sum over tasks of (sum of its answer tokens' loss / number of them in this update)."""
        inputs = self.reader.inputs(batch)
        with self.model.tasks(batch.tasks), self.prefix.replay(batch, inputs):  # type: ignore[operator]
            nll = answer_nll(self.model, inputs, batch)
        by_sample = torch.zeros(len(batch.samples), device=nll.device).index_add(0, batch.owner.to(nll.device), nll)
        share = torch.tensor([1 / tokens[t] for t in batch.tasks], device=nll.device)
        weighted = by_sample * share
        weighted.sum().backward()
        values: dict[str, float] = {}
        for task, value in zip(batch.tasks, weighted.tolist(), strict=True):
            values[task] = values.get(task, 0.0) + value
        return values

    def tensors(self) -> dict[str, Tensor]:
        """All blocks and the optimizers' states, for a checkpoint."""
        layers = gated_layers(self.model)
        blocks = {f"{side}|{path}": getattr(layer, side) for path, layer in layers.items() for side in "AB"}
        return blocks | {name: value for run in self.runs for name, value in run.state().items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        for path, layer in gated_layers(self.model).items():
            layer.A.copy_(tensors[f"A|{path}"])
            layer.B.copy_(tensors[f"B|{path}"])
        for run in self.runs:
            run.restore(tensors)


def _samples(
    reader: ImageFeatures, examples: Sequence[Example], task: str, context: str, given: dict[str, Answers]
) -> list[Sample]:
    """A task's training samples, prerequisites' answers in the prompt where `context` asks for them."""
    mine = [e for e in examples if task in e.answers]
    known = context_for(reader, mine, task, context, given)
    return [reader.encoder.sample(e, task, answer=e.answers[task], known=known.get(e.id)) for e in mine]


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
    decoder.train()  # transformers recomputes only in training mode
    try:
        yield
    finally:
        decoder.eval()
        decoder.activation_checkpointing_disable()

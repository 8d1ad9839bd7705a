"""Isolation and repair: one task's training answers were poisoned; what does it cost to put that right?

ContextLoRA, sections I-C ("Robust": compromised data "can be isolated and repaired") and VII-B: a task's data spoils
its own block, so that block is trained again, then the blocks trained on top of it. A joint adapter has no such part:
it goes on training on that task's clean answers, which may cost the other tasks, or starts all over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder
from contextlora.data.examples import load_examples
from contextlora.data.noise import label_noise
from contextlora.data.records import data_hash
from contextlora.errors import ConfigError
from contextlora.evaluation.evaluate import Answers, Evaluation, evaluate
from contextlora.evaluation.metrics import Accuracy, score
from contextlora.graph import TaskGraph
from contextlora.lora.attach import detach, gated_layers
from contextlora.lora.sharing import Plan
from contextlora.models.inputs import ImageFeatures
from contextlora.training import checkpoint
from contextlora.training.loop import run_id, train, training_examples
from contextlora.training.plan import count_trained, planned, prepare
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.track import Tracker

BLOCKWISE = ("paper", "lora-per-task", "hard-routing")  # each task's samples train its own block and no other


@dataclass(frozen=True)
class Step:
    """One training and what every task can do after it.

    Attributes:
        name: "clean", "poisoned", "repaired" and "descendants" with blocks, "continued" and "retrained" without.
        tasks: what was trained, in declared order.
        evaluation: accuracy and answers of all tasks.
        updates: optimizer updates, those of runs side by side counted each.
        samples: training samples seen, a sample once for each epoch and phase.
        seconds: of training, reading the data included, measuring not.
        parameters: how many were trained, each counted once.
    """

    name: str
    tasks: tuple[str, ...]
    evaluation: Evaluation
    updates: int
    samples: int
    seconds: float
    parameters: int


def isolate_and_repair(
    model: nn.Module,
    processor: Any,
    graph: TaskGraph,
    *,
    data: str | Path,
    split: str = "test",
    out: str | Path,
    config: TrainConfig,
    task: str,
    features: ImageFeatures | None = None,
    quiet: bool = False,
    single: int | None = None,
    prefix: FrozenPrefix | None = None,
    resume: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> list[Step]:
    """Trains clean, trains with one task poisoned, and repairs; all tasks are measured after every step.

    With a block for each task (paper, lora-per-task, hard-routing):

    0. "clean": everything on clean answers, for reference.
    1. "poisoned": everything, `task`'s answers shuffled among themselves.
    2. "repaired": `task`'s block reset and trained alone on clean answers. No other block changes by a byte.
    3. "descendants": the blocks trained on top of it, directly or through one another, reset and trained again; left
       out where there are none.

    With one run over all tasks (lora, hydralora, mole-joint, lori-d) after 0 and 1:

    2. "continued": the adapter goes on from there on clean answers of `task` alone, as many updates as the repair of
       a block that is trained with the same batch size (see `single`).
    3. "retrained": everything from scratch on clean answers. That is step 0 again, bit for bit: its weights and
       figures are taken, not computed twice.

    Repairs freeze prerequisites whole (frozen_ratio 1): otherwise they would change blocks that nothing is wrong with.
    For the same reason a run with delta > 0 is not fully isolated: what the poisoned task did to its prerequisites'
    first ranks stays.

    Args:
        model: the frozen base model; blocks that it has are replaced, and it ends with those of the last step.
        processor, graph, data, features: as in `train`.
        split: what is measured.
        out: a folder with one run's folder a step.
        config: of every training; `label_noise` is the poisoned share of the task's answers, 0 means all. Prompts that
            name prerequisites' answers name the models' own when measured.
        task: whose answers are poisoned.
        quiet: no progress bars.
        single: the batch size of "continued"; None takes the configuration's. A joint run whose batches hold all tasks
            has as many updates as a block only if its one task goes on in that block's batches.
        prefix: activations kept for trainings on clean answers, as in `train`; the poisoned one computes its own.
        resume: take the steps that `out` holds whole, and go on within the one that was stopped; without, start.
        told: which step is begun.

    Raises:
        ConfigError: E104 for an unknown task, E121 for a method that has neither blocks nor a single run. DataError:
            E209 for a task with free answers. RunError: E520 if `out` holds steps of other settings. Otherwise as
            `train`.
    """
    clean = config.model_copy(update={"label_noise": 0.0, "noise_tasks": None})
    poison = config.model_copy(update={"label_noise": config.label_noise or 1.0, "noise_tasks": (task,)})
    label_noise([], graph, poison.label_noise, poison.seed, (task,))  # refuses the task before hours of training
    joint = _is_joint(planned(graph, None, config), config.method)
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    bench = _Bench(model, processor, graph, Path(data), split, Path(out), reader, quiet, prefix, resume, told)

    steps = [bench.from_scratch("clean", clean)]
    kept = _weights(model) if joint else {}
    steps.append(bench.from_scratch("poisoned", poison))
    if joint:
        steps.append(
            bench.step("continued", (task,), clean.model_copy(update={"batch_size": single or clean.batch_size}))
        )
        checkpoint.restore_layers(model, kept)
        return [*steps, replace(steps[0], name="retrained")]
    repair = clean.model_copy(update={"frozen_ratio": 1.0})
    steps.append(bench.anew("repaired", (task,), repair))
    above = users(planned(graph, None, config), task)
    return [*steps, bench.anew("descendants", above, repair)] if above else steps


def users(plan: Plan, task: str) -> tuple[str, ...]:
    """The tasks that answer with `task`'s block, and those that answer with theirs, and so on, in declared order."""
    found, fresh = {task}, {task}
    while fresh:
        fresh = {t for t, on in plan.answering.active.items() if fresh.intersection(on)} - found
        found |= fresh
    return tuple(t for t in plan.answering.active if t in found and t != task)


def _is_joint(plan: Plan, method: str) -> bool:
    """Whether one run trains all tasks; False where each trains its own block. Raises ConfigError E121 for neither."""
    if method in BLOCKWISE:
        return False
    if [len(phase.runs) for phase in plan.phases] != [1]:
        text = f"'{method}' has no block that one task alone answers for, nor a single run to go on with"
        raise ConfigError("E121", f"{text}; repair can compare paper, lora-per-task or lora", where="train.method")
    return True


@dataclass
class _Bench:
    """What all steps share."""

    model: nn.Module
    processor: Any
    graph: TaskGraph
    data: Path
    split: str
    out: Path
    reader: ImageFeatures
    quiet: bool
    prefix: FrozenPrefix | None
    resume: bool
    told: Callable[[str], None]

    def from_scratch(self, name: str, config: TrainConfig) -> Step:
        """New layers, everything trained."""
        detach(self.model)
        prepare(self.model, self.graph, config)
        return self.step(name, self.graph.names, config)

    def anew(self, name: str, tasks: Sequence[str], config: TrainConfig) -> Step:
        """The tasks' blocks at their first values, and trained."""
        for layer in gated_layers(self.model).values():
            for t in tasks:
                layer.reset(t, config.seed)
        return self.step(name, tasks, config)

    def step(self, name: str, tasks: Sequence[str], config: TrainConfig) -> Step:
        """Trains `tasks` from where the model is, then measures all; takes both from `out` if they are there."""
        self.told(name)
        plan = planned(self.graph, tasks, config)
        parameters = count_trained(self.model, plan)
        run = run_id(self.graph, plan, config, data_hash(self.data), self.model)
        folder, done = self.out / name, self.out / name / "done"
        if not self.resume:
            checkpoint.clear(done)
            (folder / "seconds").unlink(missing_ok=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        if kept := checkpoint.load_latest(done, run):
            checkpoint.restore_layers(self.model, kept.tensors)
            result = self._scored(kept.given)
        else:
            with _clock(folder / "seconds"):
                self._train(folder, tasks, config)
            result = self._measure(config)
            checkpoint.save(done, checkpoint.Checkpoint(0, 0, run, _weights(self.model), result.answers))
        seconds = float((folder / "seconds").read_text())
        return Step(name, tuple(tasks), result, *self._seen(plan, config), seconds, parameters)

    def _train(self, folder: Path, tasks: Iterable[str], config: TrainConfig) -> None:
        train(
            self.model,
            self.processor,
            self.graph,
            data=self.data,
            out=folder,
            config=config,
            tasks=tasks,
            resume=self.resume,
            features=self.reader,
            tracker=Tracker(folder, quiet=self.quiet),
            prefix=None if config.label_noise else self.prefix,
        )

    def _measure(self, config: TrainConfig) -> Evaluation:
        return evaluate(
            self.model,
            self.processor,
            self.graph,
            data=self.data,
            split=self.split,
            context=config.context_asked,
            features=self.reader,
        )

    def _scored(self, answers: dict[str, Answers]) -> Evaluation:
        """The evaluation that gave these answers."""
        truth = {e.id: e.answers for e in load_examples(self.data, self.graph, split=self.split)}
        scores = {t: [score(a, truth[i][t]) for i, a in said.items()] for t, said in answers.items()}
        return Evaluation({t: Accuracy.of(s) for t, s in scores.items()}, answers)

    def _seen(self, plan: Plan, config: TrainConfig) -> tuple[int, int]:
        """Updates, those of runs side by side counted each, and training samples, once for each epoch and phase."""
        examples = training_examples(self.data, self.graph, config)
        updates = samples = 0
        for phase in plan.phases:
            for run in phase.runs:
                count = sum(t in e.answers for t in run for e in examples)
                updates += math.ceil(count / (phase.batch_size(config.batch_size) * config.accumulate))
                samples += count
        return config.epochs * updates, config.epochs * samples


@contextmanager
def _clock(path: Path) -> Iterator[None]:
    """Adds the seconds of the block, however it ends, to those in the file."""
    before, began = float(path.read_text()) if path.is_file() else 0.0, time.perf_counter()
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{before + time.perf_counter() - began}")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that training may have changed."""
    return {name: t.clone() for name, t in checkpoint.layer_tensors(model).items()}

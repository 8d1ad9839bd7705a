"""Measures that look inside: blocks masked, a task poisoned and repaired, losses and gradients, the time of a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from contextlora.data.collate import Batch
from contextlora.data.examples import Example, load_examples
from contextlora.errors import AdapterError
from contextlora.evaluation.blocks import block_effects
from contextlora.evaluation.evaluate import answer
from contextlora.evaluation.mechanism import answer_batches, gradient_alignment, layer_effects, mean_loss, start_loss
from contextlora.evaluation.metrics import score
from contextlora.lora.attach import detached
from contextlora.models.inputs import ImageFeatures
from contextlora.reports.bench import Bench, Opened, effort, prepared, shared_prefix, trained
from contextlora.reports.jobs import Job
from contextlora.training.loop import training_examples
from contextlora.training.plan import LAYERS
from contextlora.training.repair import BLOCKWISE, Step, isolate_and_repair

Scores = dict[str, dict[str, float]]  # by task, by item
BATCH = 4  # prompts at once (ContextLoRA section VII-A: "processing a batch of data")
BATCHES = 12  # timed, of each task
SAMPLES = 8  # in a batch whose loss or gradient is taken
LOSSES = 4  # batches of each task
IN_LAYERS = 2  # of them for the effects of single layers, which cost a pass for each layer and block


@dataclass(frozen=True)
class Measured:
    """What a measure found.

    Attributes:
        scores: by task and item, of the whole arm.
        cost: what the job took.
        parts: the same scores with something changed, by what was: a masked block, a step.
        part_cost: by part, the costs of it alone.
        detail: what else the measure's page shows, as JSON can hold it.
    """

    scores: Scores
    cost: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Scores] = field(default_factory=dict)
    part_cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    def more(self) -> dict[str, Any]:
        """What a result holds beside scores and cost; nothing where a measure has no more."""
        found = {"parts": self.parts, "part_cost": self.part_cost, "detail": self.detail}
        return {k: v for k, v in found.items() if v}


# --- masks -----------------------------------------------------------------------------------------------------------


def masks(bench: Bench, job: Job) -> Measured:
    """Trains, then asks every task with each of its blocks masked in turn (ContextLoRA section I-C).

    Parts are masked blocks. Roots are asked too: masking their only block leaves the base model, and for joint LoRA,
    where all blocks are on for all tasks, it shows whether a block belongs to anybody.

    Raises:
        AdapterError: E303 before any training, for a method whose layers hold no blocks of tasks.
    """
    _needs_blocks(job)
    with bench.opened(job) as o:
        cost = trained(o, job, bench.store.work(job.id), bench.told)
        bench.told("masking blocks")
        began = time.perf_counter()
        found = block_effects(
            o.model,
            o.processor,
            job.graph,
            data=o.folder,
            split=bench.recipe.split,
            tasks=job.graph.names,
            features=o.reader,
            context=job.config.context_asked,
        )
    parts: dict[str, Scores] = {b: {} for b in found.blocks}
    for task, by_block in found.without.items():
        for block, scores in by_block.items():
            parts[block][task] = dict(scores)
    whole = {t: dict(s) for t, s in found.whole.items()}
    return Measured(whole, {**cost, "eval_seconds": time.perf_counter() - began}, parts)


def _needs_blocks(job: Job) -> None:
    if job.config.method in LAYERS:
        text = f"the layers of '{job.config.method}' hold no blocks of tasks; compare paper, lora or lora-per-task"
        raise AdapterError("E303", text)


# --- repair ----------------------------------------------------------------------------------------------------------


def repair(bench: Bench, job: Job) -> Measured:
    """Trains clean, trains with one task's answers shuffled, and repairs (ContextLoRA section VII-B).

    Parts are the steps after the clean one, each with its costs.
    """
    assert job.poisoned is not None
    with bench.opened(job) as o:
        prepared(o, job)
        examples = training_examples(o.folder, job.graph, job.config)
        bench.told("computing what the layers below the blocks make of the samples")
        prefix = shared_prefix(o, job, examples)
        # a batch of a joint run holds samples of all tasks: its share of one makes as many updates as a block's repair
        single = max(1, job.config.batch_size // len(job.graph.names))
        steps = isolate_and_repair(
            o.model,
            o.processor,
            job.graph,
            data=o.folder,
            split=bench.recipe.split,
            out=bench.store.work(job.id),
            config=job.config,
            task=job.poisoned,
            features=o.reader,
            quiet=True,
            single=single,
            prefix=prefix,
            resume=True,
            told=lambda step: bench.told(f"training, {step}"),
        )
    truth = {e.id: e for e in load_examples(o.folder, job.graph, split=bench.recipe.split)}
    first, *others = steps
    costs = {s.name: _step_cost(s, job, examples, single) for s in steps}
    return Measured(
        _scored(first, truth),
        costs[first.name],
        {s.name: _scored(s, truth) for s in others},
        {s.name: costs[s.name] for s in others},
        {"poisoned": job.poisoned, "trained": {s.name: list(s.tasks) for s in steps}},
    )


def _scored(step: Step, truth: Mapping[str, Example]) -> Scores:
    said = step.evaluation.answers
    return {t: {i: score(a, truth[i].answers[t]) for i, a in answers.items()} for t, answers in said.items()}


def _step_cost(step: Step, job: Job, examples: Sequence[Example], single: int) -> dict[str, Any]:
    """Of one step; `updates` are a parameter's, as everywhere in a comparison, `all_updates` those of all runs."""
    c = job.config.model_copy(update={"batch_size": single}) if step.name == "continued" else job.config
    updates = effort(job.graph, examples, c, step.tasks)["updates"]
    return {
        "trained_parameters": step.parameters,
        "updates": updates,
        "all_updates": step.updates,
        "samples": step.samples,
        "train_seconds": step.seconds,
        "seconds_per_update": step.seconds / max(1, updates),
    }


# --- mechanism -------------------------------------------------------------------------------------------------------


def mechanism(bench: Bench, job: Job) -> Measured:
    """Trains, then takes losses and gradients on a few batches of the split (ContextLoRA section III).

    Scores are losses in nats a token by batch. Parts are the dependent tasks' with no block on ("none") and with their
    prerequisites' alone ("prerequisites"), which is where ContextLoRA starts to train them; only where a block is a
    task's own. The detail holds each dependent task's `layers` (paths, blocks, change of the loss) and `alignment`.

    Raises:
        AdapterError: E303 before any training, for a method whose layers hold no blocks of tasks.
    """
    _needs_blocks(job)
    with bench.opened(job) as o:
        cost = trained(o, job, bench.store.work(job.id), bench.told)
        began = time.perf_counter()
        batches = {t: _batches(bench, o, job, t) for t in job.graph.names}
        scores = {t: _numbered([mean_loss(o.reader, t, [one]) for one in b]) for t, b in batches.items()}
        parts: dict[str, Scores] = {}
        detail: dict[str, Any] = {}
        dependent = [t for t in job.graph.names if job.graph.task(t).after]
        for task in dependent if job.config.method in BLOCKWISE else ():
            bench.told(f"losses of {task}")
            starts = [start_loss(o.reader, task, [b]) for b in batches[task]]
            parts.setdefault("none", {})[task] = _numbered([s.base for s in starts])
            parts.setdefault("prerequisites", {})[task] = _numbered([s.given for s in starts])
            detail.setdefault("layers", {})[task] = _layers(o, task, batches[task])
        bench.told("comparing gradients")
        detail["alignment"] = _alignment(o, batches)
    return Measured(scores, {**cost, "eval_seconds": time.perf_counter() - began}, parts, detail=detail)


def _layers(o: Opened, task: str, batches: Sequence[Batch]) -> dict[str, Any]:
    found = layer_effects(o.reader, task, batches[:IN_LAYERS])
    layers, blocks = list(found.layers), list(found.blocks)
    return {"layers": layers, "blocks": blocks, "loss": found.loss, "change": found.change.tolist()}


def _alignment(o: Opened, batches: Mapping[str, Sequence[Batch]]) -> dict[str, Any]:
    """Cosines by task and task; null where a gradient is zero, which JSON has no number for."""
    fewest = min(map(len, batches.values()))
    found = gradient_alignment(o.reader, {t: b[:fewest] for t, b in batches.items()})
    cosine = [[None if math.isnan(x) else x for x in row] for row in found.cosine.tolist()]
    return {"tasks": list(found.tasks), "cosine": cosine}


def _batches(bench: Bench, o: Opened, job: Job, task: str) -> list[Batch]:
    return answer_batches(
        o.reader, o.folder, task, split=bench.recipe.split, size=SAMPLES, count=LOSSES, context=job.config.context_asked
    )


def _numbered(values: Sequence[float]) -> dict[str, float]:
    return {f"batch {i}": v for i, v in enumerate(values)}


# --- time ------------------------------------------------------------------------------------------------------------


def inference(bench: Bench, job: Job) -> Measured:
    """Seconds from four pictures and questions to their answers, batch after batch; nothing is trained.

    A batch's time holds decoding, the vision tower and the language model. First values of the blocks take the time
    that trained ones take. The plain base model (the part "base model") answers the very same batch right before or
    after, in turn, so that whatever else slows the machine down slows both.
    """
    with bench.opened(job) as o, bench.store.lock("timing"):
        cost = {"trained_parameters": prepared(o, job)} if job.kind == "trained" else {}
        examples = load_examples(o.folder, job.graph, split=bench.recipe.split)
        arm, base = Scores(), Scores()
        for task in job.graph.names:
            asked = [e for e in examples if task in e.answers]
            parts = [asked[i : i + BATCH] for i in range(0, len(asked) - BATCH + 1, BATCH)][: BATCHES + 1]
            arm[task], base[task] = {}, {}
            for i, part in enumerate(parts):
                bench.told(f"batch {i + 1} of {len(parts)}, {task}")
                first = (i + job.seed) % 2 == 0
                taken = {plain: _seconds(o, part, task, plain=plain) for plain in (not first, first)}
                if i:  # the first one warms up
                    arm[task][f"batch {i}"], base[task][f"batch {i}"] = taken[False], taken[True]
    return Measured(arm, cost, {"base model": base})


def _seconds(o: Opened, part: Sequence[Example], task: str, *, plain: bool) -> float:
    """Seconds for one batch, of the arm or of the base model."""
    with detached(o.model) if plain else nullcontext():
        fresh = ImageFeatures(o.model, o.reader.encoder)  # nothing remembered
        began = time.perf_counter()
        answer(fresh, part, task)
        return time.perf_counter() - began

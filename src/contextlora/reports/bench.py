"""The bench that jobs are done on: data and aligned bases made once, a model held open from job to job."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder
from contextlora.data.examples import Example, load_examples
from contextlora.data.scenes import build
from contextlora.graph import TaskGraph
from contextlora.lora.attach import detach
from contextlora.models import load_model, vision_fingerprint
from contextlora.models.inputs import ImageFeatures
from contextlora.models.projector import load_projector, save_projector
from contextlora.models.prompts import KnownPrompts
from contextlora.reports.jobs import Data, Job
from contextlora.reports.recipe import Recipe
from contextlora.reports.store import Store, read_number, write_whole
from contextlora.training.align import align
from contextlora.training.loop import known_samples, train, training_examples
from contextlora.training.plan import count_trained, planned, prepare
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.runs import peak_memory_mb
from contextlora.training.track import Tracker

Told = Callable[[str], None]
PROMPT_BYTES = 4 << 30


@dataclass(frozen=True)
class Opened:
    """A base model and what reads for it.

    Attributes:
        key: which base, which pictures and which graph: a job with the same one takes it over.
        model: without blocks.
        processor: its processor or tokenizer.
        reader: with the job's graph.
        folder: the data folder.
        prefixes: activations below the blocks that jobs share, by what decides them.
    """

    key: tuple[str, str, str]
    model: Any
    processor: Any
    reader: ImageFeatures
    folder: Path
    prefixes: dict[str, FrozenPrefix]


class Bench:
    """Opens what a job needs, and keeps it for the next.

    Args:
        recipe: whose jobs are done.
        store: the comparison's folder.
        told: what is going on at the moment, in a few words.
    """

    def __init__(self, recipe: Recipe, store: Store, told: Told):
        self.recipe, self.store, self.told = recipe, store, told
        self._opened: Opened | None = None

    def folder(self, data: Data) -> Path:
        """The data folder of a scenario, drawn if no process has done so yet."""
        if data.folder is not None:
            return data.folder
        place = self.store.path / "data" / f"{data.scenario}-{data.key}"
        with self.store.lock(f"data-{data.key}"):
            sizes = self.recipe.data.model_dump()
            return build(
                data.scenario, place, **sizes, progress=lambda done, n: self.told(f"drawing picture {done} of {n}")
            )

    @contextmanager
    def opened(self, job: Job) -> Iterator[Opened]:
        """The job's base model, plain; whatever is attached to it inside is taken off again."""
        key = (job.base, job.data.key, str(job.graph.to_dict()))
        held = self._opened
        if held is None or held.key != key:
            folder = self.folder(job.data)
            if held is not None and held.key[0] == key[0]:
                model, processor = held.model, held.processor
            else:
                self._opened = held = None  # two base models may be more than the memory holds
                model, processor = self._base(job, folder)
            reader = self._reader(model, processor, job.graph, folder)
            reader.prompts = KnownPrompts(model, PROMPT_BYTES)
            held = Opened(key, model, processor, reader, folder, {})
            self._opened = held
        try:
            yield held
        finally:
            detach(held.model)

    def _base(self, job: Job, folder: Path) -> tuple[Any, Any]:
        """The base model, its projector aligned on what the job may train on and nothing else."""
        how = {"dtype": self.recipe.dtype, "device": self.recipe.device}
        self.told("loading the base model")
        model, processor = load_model(job.model, **how)
        a, path = self.recipe.align, self.store.path / "bases" / f"{job.base}.safetensors"
        if a.epochs is None:
            return model, processor
        with self.store.lock(f"base-{job.base}"):
            if not path.is_file():
                # labels that are shuffled for training are shuffled here too: the projector learns from labels
                examples = training_examples(folder, job.data.graph, job.config)
                align(
                    model,
                    processor,
                    examples,
                    epochs=a.epochs,
                    batch_size=a.batch_size,
                    lr=a.lr,
                    progress=lambda what, done, n: self.told(f"aligning: {what} {done} of {n}"),
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                save_projector(model, part)
                part.rename(path)
        load_projector(model, path)  # also where it was made: a file rounds, and all jobs start from the same
        return model, processor

    def _reader(self, model: Any, processor: Any, graph: TaskGraph, folder: Path) -> ImageFeatures:
        """A reader that has seen every picture, so that no arm's times hold another's share of this work."""
        encoder = Encoder(processor, graph)
        if not encoder.sees_images:
            return ImageFeatures(model, encoder)
        place = self.store.path / "features" / vision_fingerprint(model).removeprefix("sha256:")[:32]
        reader = ImageFeatures(model, encoder, place)
        pictures = [e.image for e in load_examples(folder, graph) if e.image is not None]
        for i, picture in enumerate(pictures):
            reader.get(picture)
            self.told(f"looking at picture {i + 1} of {len(pictures)}")
        return reader


def prepared(opened: Opened, job: Job) -> int:
    """Puts a job's blocks on its model. Returns how many parameters it trains, routers included."""
    prepare(opened.model, job.graph, job.config)
    return count_trained(opened.model, planned(job.graph, None, job.config))


def trained(opened: Opened, job: Job, out: Path, told: Told) -> dict[str, Any]:
    """Makes a job's model ready and trains it; goes on where it was stopped.

    Args:
        out: where checkpoints go until the job is done.

    Returns:
        What it cost: trained parameters, updates, samples seen, seconds.

    Raises:
        RunError: E514 if stopped by Ctrl-C; as `train`.
    """
    graph, c = job.graph, job.config
    parameters, examples = prepared(opened, job), training_examples(opened.folder, job.graph, job.config)
    told("computing what the layers below the blocks make of the samples")
    prefix = shared_prefix(opened, job, examples)
    clock = out / "seconds"
    before, began = read_number(clock), time.perf_counter()
    try:
        with _Told(out, told) as tracker:
            train(
                opened.model,
                opened.processor,
                graph,
                data=opened.folder,
                out=out,
                config=c,
                resume=True,
                features=opened.reader,
                tracker=tracker,
                prefix=prefix,
            )
    finally:
        seconds = before + time.perf_counter() - began
        write_whole(clock, f"{seconds}")
    counts = effort(graph, examples, c)
    spent = {"train_seconds": seconds, "seconds_per_update": seconds / counts["updates"]}
    return {"trained_parameters": parameters, **counts, **spent}


def shared_prefix(opened: Opened, job: Job, examples: Sequence[Example]) -> FrozenPrefix | None:
    """What all jobs on the same base and samples share, computed before the clock starts."""
    c = job.config
    if c.context == "predicted":  # what the prompts say depends on the job
        return None
    key = repr((c.layers, c.targets, c.context, c.max_train, c.label_noise, c.seed if c.label_noise else None))
    if key not in opened.prefixes:
        opened.prefixes[key] = FrozenPrefix(opened.reader, int(c.prefix_cache_gb * 2**30))
        opened.prefixes[key].admit(known_samples(opened.reader, examples, c))
        opened.prefixes[key].fill()
    return opened.prefixes[key]


def effort(
    graph: TaskGraph, examples: Sequence[Example], config: TrainConfig, tasks: Sequence[str] | None = None
) -> dict[str, int]:
    """Updates that one parameter gets, at most, and samples seen by all tasks together, or by `tasks`.

    Methods can see the same samples in a different number of updates: joint LoRA's ranks move with the samples of
    every task, a task's own block only with its own.
    """
    most, samples = 0, 0
    for phase in planned(graph, tasks, config).phases:
        at_once = phase.batch_size(config.batch_size) * config.accumulate
        for run in phase.runs:
            count = sum(t in e.answers for e in examples for t in run)
            most = max(most, config.epochs * math.ceil(count / at_once))
            samples += config.epochs * count
    return {"updates": most, "samples": samples}


class _Told(Tracker):
    """A tracker that tells instead of showing bars of its own."""

    def __init__(self, folder: Path, told: Told):
        super().__init__(folder, quiet=True)
        self._told, self._what, self._total = told, "", 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Starts a new stage."""
        self._what, self._total = name, total

    def advance(self, done: int, note: str = "") -> None:
        """Tells how far it is."""
        self._told(f"training {self._what}: update {done} of {self._total}")


# --- the machine -----------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Starts counting the peak of memory anew, where the system allows it: jobs share a process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """The most memory held since `forget_peak`, in MB (10^6 bytes)."""
    found = {"peak_memory_mb": peak_memory_mb()}
    if torch.cuda.is_available():
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return found


def machine(device: str) -> dict[str, Any]:
    """What a job ran on, and when."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    threads = torch.get_num_threads()
    return {
        "machine": f"{name}, {threads} threads",
        "device": name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": str(torch.__version__),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def levels(graph: TaskGraph) -> Mapping[str, dict[str, Any]]:
    """By task its level, counted from 1, and whether it depends on another."""
    at = {t: i for i, level in enumerate(graph.levels(), 1) for t in level}
    return {t: {"level": at[t], "dependent": bool(graph.tasks[t].after)} for t in graph.names}

"""What `contextlora check` finds out before anything long starts: faults, memory, time, and whether an export works."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from contextlora.config import RunConfig, TrainConfig
from contextlora.data.collate import Sample, collate
from contextlora.data.examples import Example, load_examples
from contextlora.data.images import check_image, image_hash
from contextlora.data.records import SPLITS
from contextlora.errors import AdapterError, RunError
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import gated_layers, trainable_groups
from contextlora.lora.sharing import Plan
from contextlora.models.inputs import FEATURES, ImageFeatures
from contextlora.training.loop import Stage, training_examples
from contextlora.training.plan import planned, refuse_a_rival
from contextlora.training.prefix import GROUP, FrozenPrefix
from contextlora.training.runs import RunFolder
from contextlora.training.session import Session, open_session

TIMED_UPDATES = 2


@dataclass(frozen=True)
class Check:
    """What a run would cost. Times and memory are estimates from two real updates.

    Attributes:
        data: records by task and split.
        plan: the stages: tasks, updates, samples and estimated seconds.
        memory: bytes by what holds them.
        seconds: estimated time by what takes it.
        export: tasks whose export was written and read again.
        warnings: what is allowed but odd.
    """

    data: list[dict[str, Any]]
    plan: list[dict[str, Any]]
    memory: dict[str, int]
    seconds: dict[str, float]
    export: list[str]
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"estimate": True, **vars(self), "total_bytes": self.bytes, "total_seconds": self.total}

    @property
    def bytes(self) -> int:
        """Estimated memory of the run."""
        return sum(self.memory.values())

    @property
    def total(self) -> float:
        """Estimated seconds of the run."""
        return round(sum(self.seconds.values()), 1)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Rows for people, by title."""
        memory = {**self.memory, "together": self.bytes}
        seconds = {**self.seconds, "together": self.total}
        return {
            "data": self.data,
            "stages": [{**p, "seconds": _time(p["seconds"])} for p in self.plan],
            "memory, estimated": [{"what": k, "MB": f"{v / 1e6:,.1f}"} for k, v in memory.items()],
            "time, estimated": [{"what": k, "time": _time(v)} for k, v in seconds.items()],
            "export, tried": [{"node": t, "result": "loads again"} for t in self.export],
        }


def check_run(
    config: RunConfig, tasks: Iterable[str] | None = None, *, say: Callable[[str], None] = lambda _: None
) -> Check:
    """Checks a run as `run_training` would start it. Writes nothing but image features into the cache.

    Raises:
        ContextLoRAError: the first thing that would stop the run: configuration, graph, data, an image, the model.
    """
    refuse_a_rival(config.train)
    graph, folder = TaskGraph.load(config.graph_path), RunFolder(config.out)
    plan = planned(graph, tasks, config.train)
    stages = [phase.tasks for phase in plan.phases]
    everything = load_examples(config.data, graph)
    examples = training_examples(config.data, graph, config.train)
    counts = _counts(graph, everything, [t for names in stages for t in names])
    images = {e.image for e in everything if e.image is not None}
    for image in images:
        check_image(image)
    say(f"loading {config.model}")
    session = open_session(config, fresh=tasks is None, exact=True)
    say(f"timing {TIMED_UPDATES} updates and a pass of the frozen prefix")
    probe = _Probe(session, examples, config.train)
    cost = probe.measure(plan)
    updates = [_stage(probe, names, cost) for names in stages]
    new_images = _without_features(session, images)
    prefix_tokens = [probe.prefix_tokens(names) for names in stages]
    seconds = {
        "image features": cost.image * new_images,
        "frozen prefix": cost.prefix * sum(prefix_tokens),
        "updates": sum(u["seconds"] for u in updates),
    }
    memory = {
        **_weights(session, plan),
        "activations of a step": cost.activations,
        "prefix cache": min(int(config.train.prefix_cache_gb * 2**30), probe.token_bytes * max(prefix_tokens)),
        "image features": cost.image_bytes * len(images),
    }
    exported = _try_export(session, graph)
    rounded = {k: round(v, 1) for k, v in seconds.items()}
    return Check(counts, updates, memory, rounded, exported, _warnings(config, folder, memory))


@dataclass(frozen=True)
class _Cost:
    """Measured: seconds an image, a prefix token and an answered token; bytes of a step and of an image's features."""

    image: float
    prefix: float
    token: float
    activations: int
    image_bytes: int


class _Probe:
    """Times real work on a few samples of the run."""

    def __init__(self, session: Session, examples: Sequence[Example], config: TrainConfig):
        self.session, self.examples, self.config = session, examples, config
        self.prefix = FrozenPrefix(session.reader, int(config.prefix_cache_gb * 2**30))
        embedding = session.model.get_input_embeddings().weight
        self.token_bytes = embedding.shape[1] * embedding.element_size()
        self._samples: dict[str, list[Sample]] = {}

    def samples(self, task: str) -> list[Sample]:
        """A task's training samples, without context: that would have to be asked first."""
        if task not in self._samples:
            mine = [e for e in self.examples if task in e.answers]
            encode = self.session.reader.encoder.sample
            self._samples[task] = [encode(e, task, answer=e.answers[task]) for e in mine]
        return self._samples[task]

    def prefix_tokens(self, tasks: Sequence[str]) -> int:
        """Tokens of one stage that pass the layers below the lowest block once, and are kept while it trains."""
        return sum(len(s) for t in tasks for s in self.samples(t)) if self.prefix.depth else 0

    def measure(self, plan: Plan) -> _Cost:
        """Two real updates of the first stage, after one that warms up; the blocks are changed by it."""
        image, image_bytes = self._image()
        tasks = plan.phases[0].tasks
        few = self.config.batch_size * (TIMED_UPDATES + 1)
        shown = {e.id: e for t in tasks for e in [x for x in self.examples if t in x.answers][:few]}
        config = self.config.model_copy(update={"accumulate": 1, "context": "none", "epochs": TIMED_UPDATES + 1})
        stage = Stage(self.session.reader, self.prefix, list(shown.values()), plan.phases[0], config)
        activations = _saved_bytes(self.session.model, lambda: stage.update(0))
        timed = range(1, min(stage.total, TIMED_UPDATES + 1))
        tokens = sum(len(s) for r in stage.runs for k in timed if k < r.total for b in r.micro_batches(k) for s in b)
        for _ in range(2):  # the first time includes what is computed once only; the second counts
            began = time.perf_counter()
            for k in timed:
                stage.update(k)
            spent = time.perf_counter() - began
        return _Cost(image, self._prefix(tasks), spent / max(1, tokens), activations, image_bytes)

    def _image(self) -> tuple[float, int]:
        images = [e.image for e in self.examples if e.image is not None][:8]
        if not images:
            return 0.0, 0
        anew = ImageFeatures(self.session.model, self.session.reader.encoder)
        anew.get(images[0])
        began = time.perf_counter()
        found = [anew.get(image) for image in images[1:]] or [anew.get(images[0])]
        return (time.perf_counter() - began) / len(found), max(f[FEATURES].nbytes for f in found)

    def _prefix(self, tasks: Sequence[str]) -> float:
        """Seconds a token of one prefix pass over a group of samples."""
        if not self.prefix.depth:
            return 0.0
        group = collate(self.samples(tasks[0])[:GROUP], self.session.reader.encoder.pad)
        inputs = self.session.reader.inputs(group)
        began = time.perf_counter()
        with FrozenPrefix(self.session.reader, 0).replay(group, inputs):
            pass
        return (time.perf_counter() - began) / group.input_ids.numel()


def _stage(probe: _Probe, tasks: Sequence[str], cost: _Cost) -> dict[str, Any]:
    c = probe.config
    samples = {t: probe.samples(t) for t in tasks}
    for task, found in samples.items():
        if not found:
            raise RunError(
                "E510", f"task '{task}' has no training sample; add answers for it or leave it out (--tasks)"
            )
    updates = max(c.epochs * math.ceil(len(s) / (c.batch_size * c.accumulate)) for s in samples.values())
    tokens = c.epochs * sum(len(s) for found in samples.values() for s in found)
    count = sum(map(len, samples.values()))
    seconds = round(tokens * cost.token, 1)
    return {"tasks": ", ".join(tasks), "samples": count, "updates": updates, "tokens": tokens, "seconds": seconds}


def _counts(graph: TaskGraph, examples: Sequence[Example], wanted: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for task in graph.names:
        by_split = {s: sum(task in e.answers for e in examples if e.split == s) for s in SPLITS}
        if task in wanted and not by_split["train"]:
            raise RunError(
                "E510", f"task '{task}' has no training sample; add answers for it or leave it out (--tasks)"
            )
        rows.append({"task": task, "after": ", ".join(graph.prerequisites(task)), **by_split})
    return rows


def _weights(session: Session, plan: Plan) -> dict[str, int]:
    """Bytes of the base, of the blocks, and of gradients and AdamW's two moments for the largest stage."""
    layers = gated_layers(session.model).values()
    blocks = sum(m.nbytes for layer in layers for m in (layer.A, layer.B))
    a_rank = blocks // session.graph.total_rank
    ranks = []
    for phase in plan.phases:
        learns = [phase.sharing.learns[t] for t in phase.tasks]
        ranks.append(sum(max(counts.get(o, 0) for counts in learns) for o in session.graph.names))
    inside = {m.data_ptr() for layer in layers for m in (layer.A, layer.B)}
    base = {t.data_ptr(): t.nbytes for t in (*session.model.parameters(), *session.model.buffers())}
    weights = sum(n for at, n in base.items() if at not in inside)
    return {"frozen weights": weights, "blocks": blocks, "gradients, optimizer": 3 * max(ranks) * a_rank}


def _saved_bytes(model: Any, step: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward in `step`, weights apart; the same on every device."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


def _without_features(session: Session, images: Iterable[Path]) -> int:
    """How many images have no features on disk yet."""
    folder = session.reader.folder
    there = {p.stem for p in folder.glob("*.safetensors")} if folder else set[str]()
    return len({image_hash(i) for i in images} - there)


@torch.no_grad()
def _try_export(session: Session, graph: TaskGraph) -> list[str]:
    """Saves and exports every node with made-up values, and reads all of it again."""
    trainable_groups(session.model, [])
    for layer in gated_layers(session.model).values():
        layer.B.fill_(1e-3)
    adapter = Adapter.of(session.model)
    with TemporaryDirectory() as scratch:
        adapter.save(Path(scratch) / "adapter")
        if Adapter.load(Path(scratch) / "adapter").digest() != adapter.digest():
            raise AdapterError("E311", "an adapter that was just written reads differently", where=scratch)
        from safetensors.torch import load_file

        for task in graph.names:
            out = adapter.export(task, Path(scratch) / "node")
            found = load_file(out / "adapter_model.safetensors")
            if len(found) != 2 * len(adapter.layers):
                raise AdapterError("E311", f"the export of '{task}' holds {len(found)} matrices", where=out)
    return list(graph.names)


def _warnings(config: RunConfig, folder: RunFolder, memory: dict[str, int]) -> list[str]:
    found = []
    if folder.has_adapter:
        found.append(f"{folder.adapter} holds a trained adapter; `train` will ask for --tasks or --force")
    need = 2 * memory["blocks"] + (memory["frozen weights"] if config.align.epochs is not None else 0)
    home = next(p for p in (folder.path, *folder.path.resolve().parents) if p.exists())
    free = shutil.disk_usage(home).free
    if free < 3 * need:
        found.append(
            f"only {free / 1e6:,.0f} MB of disk are free at {home}; checkpoints want about {3 * need / 1e6:,.0f}"
        )
    if config.train.context == "predicted":
        found.append("context 'predicted' lets the model answer every prerequisite first; that time is not counted")
    return found


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"

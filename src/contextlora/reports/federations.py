"""What recipes measure of federations: accuracy after the rounds, budgets of layers, collisions of masks (SO-LoRA)."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contextlora.data.examples import Example, load_examples
from contextlora.errors import DataError
from contextlora.evaluation.evaluate import answer
from contextlora.evaluation.metrics import score
from contextlora.federated.aggregate import EVERYONE
from contextlora.federated.calibration import calibrate
from contextlora.federated.cluster import Member, cluster
from contextlora.federated.collisions import expected_rates, measured_rates
from contextlora.federated.federation import Federation
from contextlora.federated.local import first_batches
from contextlora.federated.measure import scores, where_prompts_go
from contextlora.federated.methods import first_local, put_on
from contextlora.federated.peer import Peer
from contextlora.federated.setup import channel_of, shares
from contextlora.federated.simulate import simulate
from contextlora.federated.slices import Slice
from contextlora.federated.sparsity import first_slice
from contextlora.lora.attach import detach
from contextlora.reports.bench import Bench, Opened
from contextlora.reports.jobs import Job
from contextlora.reports.probes import Measured, Scores
from contextlora.strict import validate
from contextlora.training.loop import known_samples
from contextlora.training.prefix import FrozenPrefix

NAMES = 2  # digits of a device's name
Asked = Mapping[str, list[Example]]


def federation(job: Job, folder: Path, out: Path, tasks: tuple[str, ...] | None = None) -> Federation:
    """The federation that a job simulates, of one device for each of `tasks`, or of as many as the recipe says."""
    keys, names = job.of_federation, job.graph.names
    whose = tasks or [names[i % len(names)] for i in range(job.federation["devices"])]
    return validate(
        Federation,
        {
            "exchange_every": keys.get("rounds", Federation.model_fields["rounds"].default),
            **keys,
            "name": "report",
            "model": job.model,
            "data": str(folder),
            "out": str(out),
            "seed": job.seed,
            "train": job.config.model_dump(exclude={"checkpoint_every"}),
            "devices": {f"d{i:0{NAMES}}": task for i, task in enumerate(whose)},
        },
        f"{job.title}, federation",
    )


# --- accuracy --------------------------------------------------------------------------------------------------------


def federated(bench: Bench, job: Job) -> Measured:
    """The first device's answers about every task after the last round; of `alone` each task's own device's.

    A job that was stopped begins again: devices that rejoin ask for whole values, which would count as the method's.
    """
    with bench.opened(job) as o:
        asked = questions(o, job, bench.recipe.split)
        if job.kind == "zero_shot":
            return Measured(_numbered({t: _plainly(o, mine, t) for t, mine in asked.items()}, asked))
        out = bench.store.work(job.id)
        runs = [(t,) for t in asked] if job.federation["alone"] else [None]
        found: Scores = {}
        costs, details, began = list[dict[str, Any]](), list[dict[str, Any]](), time.perf_counter()
        for tasks in runs:
            shutil.rmtree(out, ignore_errors=True)
            settings = federation(job, o.folder, out, tasks)
            with _layers_of(o, settings):
                bench.told(f"{len(settings.devices)} devices, {settings.rounds} rounds of {settings.aggregate}")
                start = time.perf_counter()
                peers = simulate(settings, silent=True, reader=o.reader, prefix=_below(o, job, settings), keep=False)
                costs.append({"train_seconds": time.perf_counter() - start})
                bench.told("asking")
                mine = asked if tasks is None else {t: asked[t] for t in tasks}
                right, detail = _answers(o, peers[min(peers)], mine, alone=tasks is not None)
                found |= right
                details.append(detail | _traffic(out))
                costs[-1] |= _costs(peers, detail, details[-1])
        shutil.rmtree(out, ignore_errors=True)
    cost = {k: float(np.mean([c[k] for c in costs if k in c])) for k in costs[-1]}
    cost["train_seconds"] = sum(c["train_seconds"] for c in costs)
    cost["eval_seconds"] = time.perf_counter() - began - cost["train_seconds"]
    return Measured(_numbered(found, asked), cost, detail={"runs": details})


def questions(o: Opened, job: Job, split: str) -> dict[str, list[Example]]:
    """What is asked of each task: as many of all, drawn once, the same for every arm and seed.

    Raises:
        DataError: E230 when a task has no example in the split.
    """
    examples, limit = load_examples(o.folder, job.graph, split=split), job.federation["questions"]
    found = {t: [e for e in examples if t in e.answers] for t in job.graph.names}
    for task, mine in found.items():
        if not mine:
            raise DataError("E230", f"no record of split '{split}' answers '{task}'", where=o.folder)
    count = min(*map(len, found.values()), limit or 1 << 30)
    drawn = {t: random.Random("questions").sample(range(len(mine)), count) for t, mine in found.items()}
    return {t: [mine[i] for i in sorted(drawn[t])] for t, mine in found.items()}


def _numbered(found: Scores, asked: Asked) -> Scores:
    """Scores by number instead of example: tasks of different examples then have a mean, over the k-th of each."""
    return {t: {f"{i:04}": found[t][e.id] for i, e in enumerate(asked[t])} for t in asked if t in found}


def _plainly(o: Opened, mine: list[Example], task: str) -> dict[str, float]:
    said = answer(o.reader, mine, task)
    return {e.id: score(said[e.id], e.answers[task]) for e in mine}


@contextmanager
def _layers_of(o: Opened, settings: Federation) -> Iterator[None]:
    """Inside, the method's layers are on the model."""
    put_on(o.model, o.reader.encoder.graph, settings)
    try:
        yield
    finally:
        detach(o.model)


def _below(o: Opened, job: Job, settings: Federation) -> FrozenPrefix:
    """Activations below the layers that learn, shared by all methods and seeds, in groups that none of them decides."""
    c = settings.train
    key = repr(("federated", c.layers, c.targets, settings.max_samples, sorted(settings.devices.items())))
    if key not in o.prefixes:
        made = o.prefixes[key] = FrozenPrefix(o.reader, int(c.prefix_cache_gb * 2**30))
        for name, mine in shares(settings).items():
            task = settings.devices[name].task
            made.admit([s for s in known_samples(o.reader, mine, c) if s.task == task])
    return o.prefixes[key]


def _answers(o: Opened, peer: Peer, asked: Asked, *, alone: bool) -> tuple[Scores, dict[str, Any]]:
    """A device's scores, and where its gate sent the prompts. One that is alone is told the task."""
    choice = "oracle" if alone and peer.owner != EVERYONE else peer.held.choice
    routes = where_prompts_go(peer, dict(asked)) if choice == "gate" else None
    known = o.reader.prompts
    o.reader.prompts = None if choice == "gate" else known  # its own look at a prompt would be cut short
    try:
        found = scores(peer, asked, choice)
    finally:
        o.reader.prompts = known
    detail: dict[str, Any] = {"choice": choice}
    if routes is not None:
        detail |= {"tasks": list(peer.gate_means()), "routes": routes.tolist()}
    return found, detail


def _traffic(out: Path) -> dict[str, Any]:
    """What metrics.jsonl says of all rounds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("bytes", "energy", "seconds", "asked", "reached", "clusters", "collisions", "loss")
    return {"rounds": [{k: line[k] for k in keys} for line in lines]}


def _costs(peers: Mapping[str, Peer], answered: Mapping[str, Any], detail: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of one run: what a device trains and sends, what that took, how often masks met."""
    rounds, trained = detail["rounds"], [p.local.own.active for p in peers.values()]
    sent = [sum(r["bytes"].values()) for r in rounds]
    asked = sum(r["asked"] for r in rounds)
    one = next(iter(peers.values()))
    found = {
        "trained_parameters": float(np.mean(trained)),
        "sent_parameters": float(np.mean(trained)) if any(r["asked"] for r in rounds) else 0.0,
        "sent_bytes": float(np.mean(sent)) / len(peers),
        "joules": float(np.mean([r["energy"] for r in rounds])),
        "collision": max(_counted({n: peers[n].local.own for n in group}) for group in rounds[-1]["clusters"]),
        "updates": float(one.local.update),
        "samples": float(one.local.update * one.settings.train.batch_size * one.settings.train.accumulate),
    }
    if asked:
        found["heard"] = sum(r["reached"] for r in rounds) / asked
    if "routes" in answered:
        routes = np.array(answered["routes"])[:-1]
        found["routed"] = float(routes[:, :-1].trace() / routes.sum())
    return found


# --- layers ----------------------------------------------------------------------------------------------------------


def layers(bench: Bench, job: Job) -> Measured:
    """Entropy (eq. 21) and share of active entries (eq. 22) of every linear, by task, from the first mini-batches."""
    with bench.opened(job) as o:
        parts: dict[str, Scores] = {}
        whole: Scores = {}
        s = federation(job, o.folder, bench.store.work(job.id), job.graph.names)
        mine = shares(s)
        with _layers_of(o, s):
            for name, device in s.devices.items():
                batches = first_batches(o.reader, mine[name], device.task, s.train, s.slices.calibration)
                found = calibrate(o.reader, device.task, batches)
                total = max(1, round(s.slices.share * found.entries))
                how = s.slices.model_dump(include={"allocation", "temperature", "floor"})
                masks = first_slice(found, total, **how).masks
                whole[device.task] = {layer: mask.rate for layer, mask in masks.items()}
                for layer, mask in masks.items():
                    depth = next(int(p) for p in layer.split(".") if p.isdecimal())
                    linear = layer.rpartition(".")[2]
                    for what, value in (("entropy", found.entropies[layer]), ("budget", mask.rate)):
                        place = parts.setdefault(f"{what} of layer {depth:02}", {}).setdefault(device.task, {})
                        place[linear] = value
    return Measured(whole, {"calibration": s.slices.calibration}, dict(sorted(parts.items())))


# --- collisions ------------------------------------------------------------------------------------------------------


def collisions(bench: Bench, job: Job) -> Measured:
    """max_l S_l over all devices and of the worst cluster, expected (eq. 19) and counted, for 2 devices and more."""
    with bench.opened(job) as o:
        s = federation(job, o.folder, bench.store.work(job.id))
        mine, slices = shares(s), dict[str, Slice]()
        with _layers_of(o, s):
            below = _below(o, job, s)
            for name, device in s.devices.items():
                bench.told(f"the mask of {name}")
                slices[name] = first_local(o.reader, mine[name], device.task, s, below).own
    counts = list(range(2, len(slices) + 1))
    parts = {str(n): _rates(s, dict(list(slices.items())[:n])) for n in counts}
    return Measured(parts[str(counts[-1])], {}, parts)


def _rates(s: Federation, slices: Mapping[str, Slice]) -> Scores:
    """The rates of some devices: all together, and in the clusters that a round's table gives."""
    names = list(slices)
    sizes = [m.size for m in slices[names[0]].masks.values()]
    sparsity = np.array([[m.rate for m in x.masks.values()] for x in slices.values()])
    bits = _bitmaps(slices)
    table = [Member(n, tuple(map(float, row)), 8 * slices[n].active) for n, row in zip(names, sparsity, strict=True)]
    air = channel_of(s.model_copy(update={"devices": {n: s.devices[n] for n in names}}))
    groups = cluster(table, air, s.planned).groups
    counted = cluster(table, air, s.planned, masks=dict(zip(names, bits, strict=True)), sizes=sizes)
    return {
        "all, expected": {"worst layer": float(expected_rates(sparsity).max())},
        "all, counted": {"worst layer": _counted(slices)},
        "clusters planned with eq. 19, counted": {
            "worst cluster": max(_counted({n: slices[n] for n in g}) for g in groups)
        },
        "clusters planned with counts, counted": {"worst cluster": float(max(counted.collisions))},
        "number of clusters, eq. 19": {"clusters": float(len(groups))},
        "number of clusters, counts": {"clusters": float(len(counted.groups))},
    }


def _bitmaps(slices: Mapping[str, Slice]) -> NDArray[np.uint8]:
    """(devices, bytes), as `MeasuredCollisions` takes them."""
    return np.stack([np.concatenate([m.bitmap() for m in x.masks.values()]) for x in slices.values()])


def _counted(slices: Mapping[str, Slice]) -> float:
    """max_l S_l of some devices' own masks."""
    sizes = [m.size for m in next(iter(slices.values())).masks.values()]
    return float(measured_rates(_bitmaps(slices), sizes).max())

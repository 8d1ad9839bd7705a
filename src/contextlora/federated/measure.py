"""What a device answers with all that it holds, and whether inputs find their adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from contextlora.data.collate import collate
from contextlora.data.examples import Example, load_examples
from contextlora.errors import DataError
from contextlora.evaluation.evaluate import answer, same_length
from contextlora.evaluation.metrics import Accuracy, score
from contextlora.federated.aggregate import EVERYONE
from contextlora.federated.federation import Federation
from contextlora.federated.layer import load_slice, sparse_layers
from contextlora.federated.local import sharing_of
from contextlora.federated.peer import Peer
from contextlora.federated.routing import pooled_prompts, routed
from contextlora.federated.taskgate import TaskGate, confusion
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attached_state, detached

Choice = Literal["gate", "oracle", "sum", "base"]
PROMPTS = 16  # in one pass that only looks at them


@dataclass(frozen=True)
class Measured:
    """Accuracy by task, and where prompts went.

    Attributes:
        choice: how an input found its adapter: by the gate, by its true task ("oracle"), all of them at once, or none.
        accuracy: by task.
        tasks, routes: the confusion matrix of the gate, rows true tasks, columns where prompts went, the last of both
            stands for none; (tasks + 1, tasks + 1).
    """

    choice: Choice
    accuracy: dict[str, Accuracy]
    tasks: tuple[str, ...]
    routes: NDArray[np.int64]

    def data(self) -> dict[str, Any]:
        """For a JSON file."""
        scores = {t: {"mean": a.mean, "low": a.low, "high": a.high, "count": a.count} for t, a in self.accuracy.items()}
        return {"choice": self.choice, "accuracy": scores, "tasks": self.tasks, "routes": self.routes.tolist()}


def questions(settings: Federation, graph: TaskGraph, split: str) -> dict[str, list[Example]]:
    """The examples of a split by task, of the tasks that devices have; known before the first round.

    Raises:
        DataError: E230 for a split that the federation's data lacks, or without a record of any of these tasks; E201
            to E208 for data that cannot be read or does not fit the graph.
    """
    examples = load_examples(settings.data, graph, split=split)
    tasks = {d.task for d in settings.devices.values()}
    found = {t: [e for e in examples if t in e.answers] for t in graph.names if t in tasks}
    if not any(found.values()):
        text = f"split '{split}' has no record of {', '.join(found)}"
        raise DataError("E230", text, where=settings.data)
    return found


def measure(peer: Peer, split: str, choice: Choice | None = None, limit: int | None = None) -> Measured:
    """Asks a device about a split of the federation's data.

    Args:
        peer: whose adapters answer.
        split: "valid" or "test".
        choice: None takes the one of its aggregation.
        limit: examples of each task, the first ones.

    Raises:
        DataError: as `questions` does.
    """
    choice = choice or peer.held.choice
    found = questions(peer.settings, peer.reader.encoder.graph, split)
    asked = {t: found.get(t, [])[:limit] for t in peer.gate_means()}
    routes = where_prompts_go(peer, asked)
    right = {t: Accuracy.of(list(s.values())) for t, s in scores(peer, asked, choice).items()}
    return Measured(choice, right, tuple(asked), routes)


def scores(peer: Peer, asked: Mapping[str, list[Example]], choice: Choice) -> dict[str, dict[str, float]]:
    """How right a device's answers are, by task and example, 0 to 1."""
    with _answering(peer, choice):
        found = {t: answer(peer.reader, mine, t) for t, mine in asked.items() if mine}
    return {t: {e.id: score(found[t][e.id], e.answers[t]) for e in asked[t]} for t in found}


@contextmanager
def _answering(peer: Peer, choice: Choice) -> Iterator[None]:
    model, graph = peer.reader.model, peer.reader.encoder.graph
    if choice == "base":
        with detached(model):
            yield
        return
    if (shared := peer.held.slices.get(("", EVERYONE))) is not None:  # the layers that trained it answer with it
        load_slice(model, shared)
        state = attached_state(model)
        assert state is not None
        state.sharing = sharing_of(state.graph, EVERYONE)
        yield
        return
    projections = {path: layer.A for path, layer in sparse_layers(model).items()}

    def project(task: str, layer: str) -> NDArray[np.float32]:
        rows = graph.block(task)
        return np.asarray(projections[layer][rows.start : rows.stop].float().cpu())

    with detached(model):
        gate = gate_of(peer) if choice == "gate" else None
        held = replace(peer.held, choice=choice)
        with routed(model, graph, held, project, gate=gate, k=peer.settings.gate.ranks):
            yield


def gate_of(peer: Peer) -> TaskGate:
    """The gate over all tasks that a device has heard of."""
    g = peer.settings.gate
    return TaskGate(peer.gate_means(), scaled=g.scaled, sharpness=g.sharpness, floor=g.floor, reach=g.reach)


def where_prompts_go(peer: Peer, asked: dict[str, list[Example]]) -> NDArray[np.int64]:
    """The confusion matrix of a device's gate over examples by task."""
    gate, reader = gate_of(peer), peer.reader
    true, found = list[str](), list[str | None]()
    with detached(reader.model):
        for task, mine in asked.items():
            samples = [reader.encoder.sample(e, task) for e in mine]
            for part in same_length(samples, PROMPTS):
                batch = collate([samples[i] for i in part], reader.encoder.pad)
                found += gate.routes(pooled_prompts(reader.model, reader.inputs(batch), prompt=batch.prompt))
                true += [task] * len(part)
    return confusion(gate.tasks, true, found)

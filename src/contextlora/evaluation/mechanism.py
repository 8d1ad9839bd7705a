"""Why a result came out as it did: losses and gradients of a trained model's blocks, for figures and for doubt.

ContextLoRA (section III) trains a task on top of its prerequisites' frozen blocks and claims that they help it start.
They may as well push it: a frozen block was trained to say *its* task's answers. Three measurements tell.

All work on a few batches of one task's samples with their answers (`answer_batches`), change nothing for good, and
count losses in nats per answer token, the end token included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contextlora.baselines import lora
from contextlora.data.collate import Batch, collate
from contextlora.data.examples import load_examples
from contextlora.errors import DataError, RunError
from contextlora.evaluation.blocks import active_blocks, without
from contextlora.evaluation.evaluate import context_for
from contextlora.lora.attach import attached_state, block_layers, decoder_layers, graph_of, opened, sharing_as
from contextlora.lora.layer import GatedLinear
from contextlora.models.inputs import ImageFeatures, answer_nll


def answer_batches(
    reader: ImageFeatures,
    data: str | Path,
    task: str,
    *,
    split: str = "test",
    size: int = 16,
    count: int | None = None,
    context: str = "none",
) -> list[Batch]:
    """The first samples of a task with their right answers, in the data's order.

    Args:
        reader: of the model to measure.
        size: samples a batch.
        count: at most this many batches; None takes all of the split.
        context: as in `evaluate`.

    Raises:
        DataError: E230 if the split has no sample of the task. ConfigError: E104 for an unknown task.
    """
    graph = reader.encoder.graph
    graph.task(task)
    found = [e for e in load_examples(data, graph, split=split) if task in e.answers]
    mine = found if count is None else found[: size * count]
    if not mine:
        raise DataError("E230", f"no record of split '{split}' answers task '{task}'", where=data)
    known = context_for(reader, mine, task, dict.fromkeys(graph.names, context), {})
    samples = [reader.encoder.sample(e, task, answer=e.answers[task], known=known.get(e.id)) for e in mine]
    return [collate(samples[i : i + size], reader.encoder.pad) for i in range(0, len(samples), size)]


# --- does a child start better on its prerequisites' blocks? ---------------------------------------------------------


@dataclass(frozen=True)
class StartLoss:
    """Mean answer loss of a task's samples, nats per answer token.

    Attributes:
        base: every block masked, which is where a task without prerequisites starts.
        given: the prerequisites' blocks on, its own at zero: where ContextLoRA starts to train it.
        trained: all its blocks on.
    """

    base: float
    given: float
    trained: float

    @property
    def push(self) -> float:
        """What the prerequisites' blocks add at the start: below zero they help, above they push their own answers."""
        return self.given - self.base


def start_loss(reader: ImageFeatures, task: str, batches: Sequence[Batch]) -> StartLoss:
    """How well a dependent task starts, with and without its prerequisites' blocks (ContextLoRA section III).

    Prerequisites are the other blocks that are on for it by the model's own sharing; without any, `given` is `base`.

    Raises:
        AdapterError: E303 on a model without blocks of tasks. ConfigError: E104, E120 for a task without a block on.
            RunError: E501 for batches of other tasks.
    """
    with sharing_as(reader.model, lambda now: without(now, task, active_blocks(now, task))):
        base = mean_loss(reader, task, batches)
    with sharing_as(reader.model, lambda now: without(now, task, (task,))):
        given = mean_loss(reader, task, batches)
    return StartLoss(base, given, mean_loss(reader, task, batches))


@torch.no_grad()
def mean_loss(reader: ImageFeatures, task: str, batches: Sequence[Batch]) -> float:
    """Mean loss under the task's gate, nats per answer token. Raises RunError E501 for batches of other tasks."""
    _check(task, batches)
    total, tokens = 0.0, 0
    for batch in batches:
        with reader.model.tasks(task):  # type: ignore[operator]
            nll = answer_nll(reader.model, reader.inputs(batch), batch)
        total += nll.double().sum().item()
        tokens += len(nll)
    return total / tokens


def _check(task: str, batches: Sequence[Batch]) -> None:
    if not batches:
        raise RunError("E501", f"no batch of task '{task}' to measure; see answer_batches")
    for other in {t for batch in batches for t in batch.tasks} - {task}:
        raise RunError("E501", f"a batch of task '{other}' where task '{task}' is measured")


# --- in which layers does a block work? ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEffects:
    """What a task loses when one block is masked in one layer alone.

    Attributes:
        layers: paths in the model, from the lowest: rows of `change`.
        blocks: the blocks that are on for the task, in declared order: its columns.
        loss: with everything on, nats per answer token.
        change: (layers, blocks) what masking adds to it; below zero the task does better without.
    """

    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    loss: float
    change: NDArray[np.float64]


def layer_effects(reader: ImageFeatures, task: str, batches: Sequence[Batch], *, linears: bool = False) -> LayerEffects:
    """Masks each of a task's blocks in one layer at a time.

    Costs one pass over `batches` for each layer and block: few samples will do.

    Args:
        linears: each linear layer on its own; else the linears of a decoder layer together.

    Raises:
        AdapterError: E303 on a model without blocks of tasks. ConfigError: E104. RunError: E501, as `start_loss`.
    """
    groups = _by_layer(reader, linears)
    state = attached_state(reader.model)
    assert state is not None
    blocks = active_blocks(state.sharing, task)
    loss = mean_loss(reader, task, batches)
    change = np.zeros((len(groups), len(blocks)))
    for i, layers in enumerate(groups.values()):
        for j, block in enumerate(blocks):
            with _zeroed(layers, block):
                change[i, j] = mean_loss(reader, task, batches) - loss
    return LayerEffects(tuple(groups), blocks, loss, change)


def _by_layer(reader: ImageFeatures, linears: bool) -> dict[str, list[GatedLinear]]:
    """Layers with blocks, by their own path or by their decoder layer's."""
    found = block_layers(reader.model)
    depth = len(decoder_layers(reader.model)[0].split(".")) + 1
    groups: dict[str, list[GatedLinear]] = {}
    for path, layer in found.items():
        groups.setdefault(path if linears else ".".join(path.split(".")[:depth]), []).append(layer)
    return groups


@contextmanager
def _zeroed(layers: Iterable[GatedLinear], block: str) -> Iterator[None]:
    """The block's B is zero in these layers; afterwards its very bytes are back."""
    rows = [layer.block(block)[1] for layer in layers]
    kept = [b.clone() for b in rows]
    with torch.no_grad():
        try:
            for b in rows:
                b.zero_()
            yield
        finally:
            for b, values in zip(rows, kept, strict=True):
                b.copy_(values)


# --- do tasks pull the same parameters the same way? -----------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """How tasks' gradients agree.

    Attributes:
        tasks: rows and columns of `cosine`.
        cosine: (tasks, tasks), -1 to 1, the mean over batches; NaN where a gradient was zero.
    """

    tasks: tuple[str, ...]
    cosine: NDArray[np.float64]


def gradient_alignment(reader: ImageFeatures, batches: Mapping[str, Sequence[Batch]]) -> Alignment:
    """Cosine similarity of tasks' gradients with respect to the same parameters: every block, on for every task.

    That is joint LoRA's sharing (`baselines.lora.joint`), whatever the model was trained with: it shows the conflict
    that blocks avoid. The k-th batches of all tasks are compared and the cosines averaged over k. Gradients of small
    batches are noisy, which draws cosines towards zero: compare only figures of one batch size.

    Args:
        batches: by task, as many of each; the loss is each batch's mean over answer tokens.

    Raises:
        AdapterError: E303 on a model without blocks of tasks. ConfigError: E104. RunError: E501 for batches of other
            tasks, for none, or for numbers of them that differ.
    """
    graph = graph_of(reader.model)
    for task, mine in batches.items():
        graph.task(task)
        _check(task, mine)
    if len({len(mine) for mine in batches.values()}) != 1:
        counts = ", ".join(f"{t} {len(mine)}" for t, mine in batches.items())
        raise RunError("E501", f"gradients are compared batch by batch: give as many of each task, not {counts or 0}")
    with opened(reader.model, graph.names, lora.joint(graph, graph.names).answering) as groups:
        parameters = [p for group in groups.values() for p in group]
        cosines = [
            _cosines([_gradients(reader, batch, parameters) for batch in together])
            for together in zip(*batches.values(), strict=True)
        ]
    return Alignment(tuple(batches), np.mean(cosines, axis=0))


def _gradients(reader: ImageFeatures, batch: Batch, parameters: Sequence[torch.nn.Parameter]) -> tuple[Tensor, ...]:
    """Of the batch's mean loss; no `.grad` is touched."""
    with torch.enable_grad(), reader.model.tasks(batch.tasks):  # type: ignore[operator]
        loss = answer_nll(reader.model, reader.inputs(batch), batch).mean()
        return torch.autograd.grad(loss, parameters)


def _cosines(gradients: Sequence[Sequence[Tensor]]) -> NDArray[np.float64]:
    """(tasks, tasks) from every task's gradients, parameter by parameter: all of them at once would not fit twice."""
    inner = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for same in zip(*gradients, strict=True):
        flat = torch.stack([g.flatten() for g in same]).double()
        inner += (flat @ flat.T).cpu()
    size = inner.diagonal().sqrt()
    return np.asarray((inner / torch.outer(size, size)).numpy(), dtype=np.float64)

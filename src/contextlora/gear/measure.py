"""Measures a profile on this machine: times, saved bytes and weights of every unit.

Units are run one by one on the activations that really enter them, so that their times add up to the model's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from contextlora.config import RunConfig
from contextlora.data.collate import Encoder
from contextlora.errors import PlanError
from contextlora.gear.profile import Profile, Unit
from contextlora.graph import TaskGraph
from contextlora.lora.attach import adapted_layers, attach, decoder_layers, detach, trainable_parameters
from contextlora.models import load_model
from contextlora.models.inputs import TOKEN_INPUTS, log_likelihood

ANSWER = 6  # tokens of a sample whose loss is taken
Told = Callable[[str], None]


def measure(
    model: nn.Module,
    processor: Any,
    *,
    name: str,
    batches: Sequence[int] = (1, 2, 4, 8),
    tokens: int = 48,
    rank: int = 32,
    repeats: int = 5,
    told: Told = lambda _: None,
) -> Profile:
    """Profiles a plain model with blocks of `rank` ranks on all its layers; it is plain again afterwards.

    Args:
        model: any that `load_model` gives.
        processor: its processor or tokenizer.
        name: what the profile calls it.
        batches: batch sizes to time.
        tokens: of one sample; an image's count among them.
        rank: ranks that are active at once, a task's and its prerequisites' together.
        repeats: each time is the median of so many, after one that is not counted.
        told: what is going on, in a few words.

    Raises:
        PlanError: E403 for batch sizes that do not ascend from 1 or more.
    """
    if not batches or list(batches) != sorted({b for b in batches if b > 0}):
        raise PlanError("E403", f"batch sizes must ascend, got {list(batches)}", where="--batches")
    graph = TaskGraph.from_dict({"name": "profile", "rank": rank, "tasks": {"task": {"question": "?"}}})
    attach(model, graph)
    try:
        with model.tasks("task"):  # type: ignore[operator]
            parts = [_Clock(model, processor, graph, k, tokens, repeats).units(told) for k in batches]
    finally:
        detach(model)
    units = [_together([units[i] for units in parts]) for i in range(len(parts[0]))]
    dtype = next(model.parameters()).dtype
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return Profile(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        ranks=rank,
        cut=float(tokens * width * dtype.itemsize),
        batches=tuple(batches),
        units=tuple(units),
        machine=f"{_machine(model)}, {datetime.now(UTC).date()}",
    ).checked()


def measure_run(config: RunConfig, batches: Sequence[int], say: Told) -> Profile:
    """Profiles the model of a run, with as many ranks as its largest set of active blocks. Raises as `load_model`."""
    graph = TaskGraph.load(config.graph_path)
    model, processor = load_model(config.model, dtype=config.dtype, device=config.device)
    rank = max(sum(graph.rank_of(n) for n in graph.active(t)) for t in graph.names)
    return measure(model, processor, name=config.model, batches=batches, rank=rank, told=say)


def _together(units: Sequence[dict[str, Any]]) -> Unit:
    """One unit from its measurements at every batch size; bytes a sample are taken from the largest."""
    times = {key: tuple(u[key] for u in units) for key in ("forward", "input_grad", "weight_grad")}
    return Unit(**{**units[-1], **times})


class _Clock:
    """Times the units of a model for one batch size."""

    def __init__(self, model: Any, processor: Any, graph: TaskGraph, k: int, tokens: int, repeats: int):
        self.model, self.k, self.repeats = model, k, repeats
        self.encoder = Encoder(processor, graph)
        self.stack = list(decoder_layers(model)[1])
        self.device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (k, tokens), generator=generator).to(self.device)

    def units(self, told: Told) -> list[dict[str, Any]]:
        """All units, first to last."""
        told(f"batch of {self.k}: inputs")
        entering = self._entering()
        found = [self._inputs()]
        for i, (layer, (args, kwargs)) in enumerate(zip(self.stack, entering[:-1], strict=True)):
            told(f"batch of {self.k}: layer {i + 1} of {len(self.stack)}")
            run = _runner(layer, args, kwargs)
            width = sum(m.in_features + m.out_features for m in adapted_layers(layer).values())
            found.append(self._unit(f"layer {i}", run, args[0], _weights(layer), width))
        told(f"batch of {self.k}: head")
        head = self.model.get_output_embeddings()
        hidden = entering[-1][0][0]
        found.append(self._unit("head", self._head(head), hidden, _weights(head), 0))
        return found

    @torch.no_grad()
    def _entering(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What every layer is called with, and at the end what enters the output head's norm."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args or (kwargs["hidden_states"],)
            seen.append((given, {n: v for n, v in kwargs.items() if n != "hidden_states"}))

        hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self.stack]
        last: list[Tensor] = []
        hooks.append(self.stack[-1].register_forward_hook(lambda *a: last.append(_hidden(a[-1]))))
        try:
            self.model.get_decoder()(input_ids=self.ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [*seen, ((last[0],), {})]

    def _head(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        norm = getattr(self.model.get_decoder(), "norm", nn.Identity())
        answers = self.ids[:, -ANSWER:].flatten()

        def run(hidden: Tensor) -> Tensor:
            rows = norm(hidden)[:, -ANSWER:].reshape(-1, hidden.shape[-1])
            return -log_likelihood(head(rows), answers).sum()

        return run

    def _inputs(self) -> dict[str, Any]:
        """Embedding, and where the model sees pictures its vision tower and projector: forward alone."""
        embed = self.model.get_input_embeddings()
        weights, pixels = _weights(embed), self._pixels()
        if pixels is not None:
            language = {id(p) for p in self.model.get_decoder().parameters()}
            language |= {id(p) for p in self.model.get_output_embeddings().parameters()}
            weights += sum(p.nbytes for p in self.model.parameters() if id(p) not in language)

        def run() -> None:
            with torch.no_grad():
                embed(self.ids)
                if pixels is not None:
                    for _ in range(self.k):  # as ImageFeatures does: one picture at a time
                        self.model.get_image_features(**pixels)

        none = {"input_grad": 0.0, "weight_grad": 0.0, "saved": 0.0, "width": 0}
        return {"name": "inputs", "weights": float(weights), "forward": self._seconds(run), **none}

    def _pixels(self) -> dict[str, Tensor] | None:
        if not self.encoder.sees_images:
            return None
        picture = Image.new("RGB", (224, 224), (90, 120, 60))
        tensors = self.encoder.image_inputs(self.encoder.image_prompt, picture)
        given = {n: t.to(self.device) for n, t in tensors.items() if n not in TOKEN_INPUTS}
        given["pixel_values"] = given["pixel_values"].to(next(self.model.parameters()).dtype)
        return given

    def _unit(
        self, name: str, run: Callable[[Tensor], Tensor], hidden: Tensor, weights: float, width: int
    ) -> dict[str, Any]:
        """Forward alone, with the gradient of its input, and with that of its blocks as well."""

        def forward() -> None:
            with torch.no_grad():
                run(hidden)

        leaf = hidden.detach().clone().requires_grad_()

        def both() -> None:
            leaf.grad = None
            out = run(leaf)
            out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]

        alone = self._seconds(forward)
        trainable_parameters(self.model, [])
        frozen = self._seconds(both)
        learning = frozen
        if width:
            parameters = trainable_parameters(self.model, ["task"])
            learning = self._seconds(both)
            for p in parameters:
                p.grad = None
        with _saved() as kept:
            run(leaf)
        trainable_parameters(self.model, [])
        grads = {"input_grad": max(0.0, frozen - alone), "weight_grad": max(0.0, learning - frozen)}
        saved = kept[0] / self.k
        return {"name": name, "weights": float(weights), "saved": saved, "width": width, "forward": alone, **grads}

    def _seconds(self, run: Callable[[], None]) -> float:
        times = []
        for _ in range(self.repeats + 1):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - began)
        return median(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _runner(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        return _hidden(layer(hidden, *args[1:], **kwargs))

    return run


def _hidden(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _weights(module: nn.Module) -> float:
    return float(sum(p.nbytes for p in module.parameters() if not p.requires_grad))


@contextmanager
def _saved() -> Iterator[list[float]]:
    """Counts the bytes that a forward pass keeps for backward, each tensor once, weights not."""
    total, seen = [0.0], set[int]()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if not isinstance(t, nn.Parameter) and not t.is_leaf and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total


def _machine(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

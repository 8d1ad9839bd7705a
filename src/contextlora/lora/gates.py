"""Which ranks are on for each sample of a batch, and which of them may learn from it.

A gate is state, not a forward hook: activation checkpointing runs a layer's forward again during backward, when hooks
and contexts of the first run are gone, and would then train the wrong blocks without any error (SEMANTICS section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from contextlora.errors import RunError
from contextlora.graph import TaskGraph
from contextlora.lora.sharing import Sharing, along_graph


class Gate:
    """The gate rows of one batch, one row a sample (SEMANTICS section 1: s * g), over the ranks active in any sample.

    Attributes:
        tasks: task of each sample; a single one stands for every sample of any batch.
        ranks: the union of active ranks, as a slice where they are contiguous (then weights are views), else indices.
        active: (samples, ranks) scale of the block where the sample uses the rank, else exactly 0.
        learns: (samples, ranks) 1 where the sample may train the rank, else 0.
        columns: where each block that is active lies within `ranks`.
        teaches: the tasks some rank of whose block learns from some sample; no other block gets a gradient.
        stamp: a number that two gates share only if they are alike.
        prompt: (samples, tokens) True where a token belongs to the prompt, for methods that route by the whole prompt
            and must not see the answer; None where the pass holds nothing else.
        rows: for a pass that goes on from prompts passed before, which of them each sample goes on from.
    """

    prompt: Tensor | None = None
    rows: Tensor | None = None

    def __init__(self, graph: TaskGraph, tasks: Sequence[str], sharing: Sharing | None = None):
        sharing = sharing or along_graph(graph)
        self.tasks = tuple(tasks)
        used = dict.fromkeys(self.tasks)
        on = [n for n in graph.names if any(n in sharing.active[t] for t in used)]
        owned = [r for n in on for r in graph.block(n)]
        start = owned[0] if owned else 0  # every block may be masked: then no rank is on, and the base model answers
        contiguous = owned == list(range(start, start + len(owned)))
        self.ranks = slice(start, start + len(owned)) if contiguous else torch.tensor(owned)
        self.columns: dict[str, range] = {}
        at = 0
        for n in on:
            self.columns[n] = range(at, at := at + graph.rank_of(n))
        self.teaches = tuple(dict.fromkeys(n for t in used for n in sharing.learns[t] if n in self.columns))
        rows = {t: self._row(graph, t, at, sharing) for t in used}
        self.active = torch.stack([rows[t][0] for t in self.tasks])
        self.learns = torch.stack([rows[t][1] for t in self.tasks])
        self.stamp = torch.tensor(hash((self.tasks, sharing.stamp)))
        self._cast: dict[Any, tuple[slice | Tensor, Tensor, Tensor]] = {}

    def _row(self, graph: TaskGraph, task: str, width: int, sharing: Sharing) -> tuple[Tensor, Tensor]:
        active, learns = torch.zeros(2, width, dtype=torch.float64)
        for n in sharing.active[task]:
            active[self.columns[n].start : self.columns[n].stop] = graph.scale_of(n)
        for n, count in sharing.learns[task].items():
            if n in self.columns:  # else a router's, say, which the layer itself looks after
                learns[self.columns[n].start : self.columns[n].start + count] = 1
        return active, learns

    def rows_for(self, x: Tensor) -> tuple[slice | Tensor, Tensor, Tensor]:
        """`ranks`, and `active` and `learns` as (samples, 1, ..., ranks), for activations `x` (samples, ..., features).

        Raises RunError E501 if the batch is no multiple of the samples named.
        """
        batch = x.shape[0] if x.dim() > 2 else 1
        key = (batch, x.dim(), x.dtype, x.device, torch.is_inference_mode_enabled())
        if key not in self._cast:
            ranks = self.ranks.to(x.device) if isinstance(self.ranks, Tensor) else self.ranks
            self._cast[key] = (ranks, self.fit(self.active, x), self.fit(self.learns, x))
        return self._cast[key]

    def check(self, stamp: Tensor) -> None:
        """Raises RunError E502 if saved tensors were recomputed under another gate than this one."""
        if int(stamp) != int(self.stamp):
            raise RunError("E502", f"a layer that ran for tasks {self.tasks} was recomputed for others: {_INSIDE}")

    def fit(self, rows: Tensor, x: Tensor) -> Tensor:
        """One row (features) a sample as (samples, 1, ..., features), for activations `x`. Raises RunError E501."""
        batch = x.shape[0] if x.dim() > 2 else 1
        if rows.shape[0] not in (1, batch):  # beam search and option scoring repeat each sample in place
            if batch % rows.shape[0]:
                raise RunError("E501", f"a batch of {batch} samples under tasks for {rows.shape[0]}: {self.tasks}")
            rows = rows.repeat_interleave(batch // rows.shape[0], 0)
        shape = (rows.shape[0], *([1] * (x.dim() - 2)), rows.shape[1])
        return rows.to(x.device, x.dtype).reshape(shape)


_INSIDE = "call backward() inside its `with model.tasks(...)` when you checkpoint activations yourself"


class GateState:
    """The gate that a model's gated layers read now; shared by all of them, held by none in a module tree.

    One thread at a time: two threads that run one model under different tasks would read each other's gate.
    """

    def __init__(self, graph: TaskGraph):
        self.graph = graph
        self.sharing = along_graph(graph)
        self.current: Gate | None = None
        self._inside = False  # within `use`, where the gate, or None, is what the caller means
        self._used = False  # whether any gate was ever set

    def __getstate__(self) -> dict[str, Any]:  # a copy made inside a block is not inside that block
        return {**vars(self), "current": None, "_inside": False}

    def gate(self, tasks: str | Sequence[str]) -> Gate:
        """Builds the gate for one task name per sample, or for one task whatever the batch."""
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        if not names:
            raise RunError("E501", "no task named; give one name a sample, or one for all")
        for n in set(names):
            self.graph.task(n)
        return Gate(self.graph, names, self.sharing)

    @contextmanager
    def use(self, gate: Gate | None) -> Iterator[None]:
        """Makes `gate` the current one inside the block; None is the base model."""
        before = self.current, self._inside
        self.current, self._inside = gate, True
        self._used |= gate is not None
        try:
            yield
        finally:
            self.current, self._inside = before

    def read(self) -> Gate | None:
        """The current gate; None outside any block.

        Raises RunError E502 in a recompute that may have lost its gate. What this cannot see is a *reentrant*
        checkpoint of the user's own, recomputed inside another task's block: it leaves no trace of its first run.
        """
        if self._used and not self._inside and torch._C._current_graph_task_id() != -1:
            raise RunError("E502", f"a layer is recomputed during backward outside any block: {_INSIDE}")
        return self.current


def carry_gate_into_recompute(model: nn.Module, state: GateState) -> None:
    """Makes transformers' activation checkpointing recompute each layer under the gate of its first run."""
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None and getattr(function, "carries_gate_of", None) is not state:
            function = getattr(function, "__wrapped__", function)  # was wrapped for a copy, or before detach
            module._gradient_checkpointing_func = _with_gate(function, state)  # type: ignore[assignment]


def _with_gate(checkpoint: Callable[..., Any], state: GateState) -> Callable[..., Any]:
    @wraps(checkpoint)
    def checkpoint_with_gate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gate = state.current

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            with state.use(gate):
                return function(*inner, **inner_kwargs)

        return checkpoint(run, *args, **kwargs)

    checkpoint_with_gate.carries_gate_of = state  # type: ignore[attr-defined]
    return checkpoint_with_gate

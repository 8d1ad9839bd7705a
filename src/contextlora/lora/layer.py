"""The gated linear layer, the only hot path: y = W x + B (s * g * (A x)), SEMANTICS section 1.

Shapes: x (samples, tokens, d_in), A (R, d_in), B (R, d_out). B is stored transposed, so that a task's block is one
contiguous row slice of both matrices and slicing, freezing, exporting and sending it are views.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlora.graph import TaskGraph
from contextlora.lora.gates import Gate, GateState


class AdaptedLinear(nn.Module):
    """A frozen linear layer with something small beside it that learns; every method's layer is one.

    Args:
        base: the frozen layer, `nn.Linear` or anything with in_features, out_features and a forward. It is called,
            never copied, so a quantised layer stays as it is.
        state: the model's shared gate.
        name: the layer's path in the model.
    """

    def __init__(self, base: nn.Module, state: GateState, name: str):
        super().__init__()
        self.base = base
        self.name = name
        self._state = state
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]

    @property
    def graph(self) -> TaskGraph:
        """The tasks that this layer serves."""
        return self._state.graph

    def open(self, counts: Mapping[str, int]) -> None:
        """Lets the named owners learn, a block its first so many ranks; everything else is frozen."""
        raise NotImplementedError

    def owned(self, owner: str) -> list[nn.Parameter]:
        """What was opened and belongs to `owner`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that training may change, for a checkpoint: the layer's own memory, not copies."""
        raise NotImplementedError


def first_values(seed: int, layer: str, owner: str, shape: tuple[int, int]) -> Tensor:
    """A's first values as in LoRA (Kaiming, a = sqrt 5: uniform within 1 / sqrt(d_in)), float64, (r, d_in).

    They depend on seed, layer and owner alone: declaring another task does not change them.
    """
    digest = hashlib.sha256(f"{seed}|{layer}|{owner}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(shape[1])


class GatedLinear(AdaptedLinear):
    """A frozen linear layer with one low-rank block for each task of a graph.

    A and B are buffers: no optimizer can reach them. What may learn is made a Parameter by `open`, as a view of the
    rows that may change and of nothing else, so that even weight decay cannot touch a frozen rank.

    Args:
        base, state, name: as in `AdaptedLinear`; with `seed` and a task's name, `name` decides the first values.
        dtype: of A and B.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, state: GateState, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__(base, state, name)
        device = next(base.parameters()).device
        ranks = state.graph.total_rank
        self.register_buffer("A", torch.empty(ranks, self.in_features, dtype=dtype, device=device))
        self.register_buffer("B", torch.zeros(ranks, self.out_features, dtype=dtype, device=device))
        self.learning = nn.ParameterDict()
        self._rows: dict[str, range] = {}
        for task in state.graph.names:
            self.reset(task, seed)

    @torch.no_grad()
    def reset(self, task: str, seed: int) -> None:
        """Gives a task's block its first values: A as in LoRA, B zero."""
        block = self.graph.block(task)
        first = first_values(seed, self.name, task, (len(block), self.in_features))
        self.A[block.start : block.stop] = first.to(self.A)
        self.B[block.start : block.stop] = 0

    def block(self, task: str) -> tuple[Tensor, Tensor]:
        """A task's own rows of A (r, d_in) and B (r, d_out), as views."""
        rows = self.graph.block(task)
        return self.A[rows.start : rows.stop], self.B[rows.start : rows.stop]

    def open(self, counts: Mapping[str, int]) -> None:
        """Makes the first `counts[task]` ranks of each named block Parameters; all other ranks become plain buffers."""
        self.learning = nn.ParameterDict()
        self._rows = {}
        for task, count in counts.items():
            start = self.graph.block(task).start
            self._rows[task] = range(start, start + count)
            self.learning[f"{task}_A"] = nn.Parameter(self.A[start : start + count])
            self.learning[f"{task}_B"] = nn.Parameter(self.B[start : start + count])

    def owned(self, owner: str) -> list[nn.Parameter]:
        return [self.learning[f"{owner}_{side}"] for side in "AB"] if owner in self._rows else []

    @contextmanager
    def open_again(self) -> Iterator[None]:
        """Whatever is opened inside, at the end what was open before is: the very Parameters an optimizer may hold."""
        before = self.learning, self._rows
        try:
            yield
        finally:
            self.learning, self._rows = before

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._be_views()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy and unpickling come by here
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._be_views()

    def _be_views(self) -> None:
        """Ties the learning parameters to A and B again; moving or copying a module gives each its own memory."""
        for task, rows in self._rows.items():
            self.learning[f"{task}_A"].data = self.A[rows.start : rows.stop]
            self.learning[f"{task}_B"].data = self.B[rows.start : rows.stop]

    def forward(self, x: Tensor) -> Tensor:
        gate = self._state.read()
        if gate is None:
            return self.base(x)  # type: ignore[no-any-return]
        taught = [t for t in gate.teaches if t in self._rows] if torch.is_grad_enabled() else []
        learning = [p for t in taught for p in self._learning(t)]
        columns = [gate.columns[t][: len(self._rows[t])] for t in taught]
        if self._plain(x):
            return _Gated.apply(x, self.base.weight, self.base.bias, self.A, self.B, gate, columns, *learning)  # type: ignore[no-any-return, no-untyped-call]
        y = self.base(x)
        return y + _Gated.apply(x.to(y.dtype), None, None, self.A, self.B, gate, columns, *learning)  # type: ignore[no-any-return, no-untyped-call]

    def _learning(self, task: str) -> tuple[Tensor, Tensor]:
        """What takes the gradients of an opened block's rows of A and B; one that needs none gets none."""
        return self.learning[f"{task}_A"], self.learning[f"{task}_B"]

    def _plain(self, x: Tensor) -> bool:
        """Whether base and block can share one kernel: an ordinary frozen linear without hooks, outside autocast.

        Offloading replaces a layer's forward, and some quantisers its weight by a tensor subclass: those are called.
        """
        base = self.base
        return (
            type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and x.dtype == base.weight.dtype
            and "forward" not in vars(base)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and not any(p.requires_grad for p in base._parameters.values() if p is not None)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def extra_repr(self) -> str:
        return f"blocks={{{', '.join(f'{t}: {self.graph.rank_of(t)}' for t in self.graph.names)}}}"


class _Gated(torch.autograd.Function):
    """y = [W x + b] + (s g * (x A^T)) B with its hand-written gradient; without W only the low-rank term.

    dx = dy W + (s g * (dy B^T)) A over all active ranks: a frozen block still passes gradient on.
    dA = (learns * s g * (dy B^T))^T x and dB = (learns * s g * (x A^T))^T dy over the learning ranks alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gate: Gate,
        columns: list[range],
        *learning: Tensor,
    ) -> Tensor:
        ranks, active, learns = gate.rows_for(x)
        a, b = A[ranks].to(x.dtype), B[ranks].to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        h = _times(flat @ a.T, active, x)
        y = h @ b if weight is None else F.linear(flat, weight, bias).addmm_(h, b)
        ctx.save_for_backward(flat, weight, a, b, h, active, learns, gate.stamp)
        ctx.columns, ctx.shape, ctx.gate, ctx.master = columns, x.shape, gate, A.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        flat, weight, a, b, h, active, learns, stamp = ctx.saved_tensors
        ctx.gate.check(stamp)  # saved tensors may come from a recompute
        dy = dy.reshape(-1, dy.shape[-1])
        dh = _times(dy @ b.T, active, ctx)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dh @ a if weight is None else (dy @ weight).addmm_(dh, a)
            dx = dx.view(ctx.shape)
        grads: list[Tensor | None] = []
        if ctx.columns:
            start = min(c.start for c in ctx.columns)  # one product for all blocks: thin ones cost as much as wide ones
            span = slice(start, max(c.stop for c in ctx.columns))
            dA = (_times(dh, learns, ctx)[:, span].T @ flat).to(ctx.master) if any(ctx.needs_input_grad[7::2]) else None
            dB = (_times(h, learns, ctx)[:, span].T @ dy).to(ctx.master)
            for rows in (slice(c.start - start, c.stop - start) for c in ctx.columns):
                grads += [None if dA is None else dA[rows], dB[rows]]
        return dx, None, None, None, None, None, None, *grads


def _times(h: Tensor, rows: Tensor, like: Any) -> Tensor:
    """h (samples * tokens, ranks) times one row (ranks) for each sample."""
    return (h.view(*like.shape[:-1], h.shape[-1]) * rows).view(h.shape)

"""What a device holds, answering: adapters stacked beside each frozen linear, found by gate and top-k (SO-LoRA eq. 29).

    y = W x + s B topk(g . A x)

A and B hold the ranks of all adapters one below the other, and g repeats each adapter's gate over its ranks. The gate
is decided once for a prompt, before any adapter touches it: a pass of the base model up to one layer gives the input
that `taskgate` reads. A prompt that is foreign to all tasks gets the base model's output, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contextlora.baselines.beside import SCALE
from contextlora.errors import PeerError, RunError
from contextlora.federated.aggregate import Held
from contextlora.federated.slices import Layer
from contextlora.federated.taskgate import TaskGate
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, decoder_layers, detach, is_linear
from contextlora.lora.gates import GateState
from contextlora.lora.layer import AdaptedLinear

Project = Callable[[str, Layer], NDArray[np.float32]]  # a task's frozen A of a layer, (r, d_in)


@contextmanager
def routed(
    model: nn.Module,
    graph: TaskGraph,
    held: Held,
    project: Project,
    *,
    gate: TaskGate | None = None,
    k: int | None = None,
    depth: int | None = None,
) -> Iterator[Router]:
    """Inside, the model answers with what the device holds; afterwards it is the plain base model.

    With "gate", tasks named by `model.tasks(...)` do not matter, only prompts do; with "oracle" they decide. A pass
    that goes on from cached keys and values keeps the gates of its prompts.

    Args:
        model: plain; its output head and whatever is no language linear are left alone.
        graph: the tasks that may be asked, with their scales alpha / r; other blocks have the scale 2.
        project: gives the A that is derived from the shared seed.
        gate: of every task that is held; needed where `held.choice` is "gate".
        k: ranks that answer for a token; None takes as many as the largest adapter of the layer has, with those of its
            prerequisites.
        depth: the decoder layer whose input the gate reads; see `pooled_prompts`.

    Raises:
        PeerError: E618 if the gate does not know a task that is held, E619 if the model has not one of its layers.
    """
    tasks = [task for _, task in held.slices]
    missing = [t for t in tasks if gate is None or t not in gate.tasks] if held.choice == "gate" else []
    if missing:
        raise PeerError("E618", f"no mean of the prompts of '{missing[0]}': a gate cannot find its adapter")
    router = Router(tasks, held.choice, gate, _tap(model, depth), _together(graph, tasks), _image_token(model))

    def make(found: Mapping[str, nn.Module], state: GateState) -> dict[str, RoutedLinear]:
        layers = dict.fromkeys(layer for s in held.slices.values() for layer in s.masks)
        if unknown := [layer for layer in layers if layer not in found]:
            raise PeerError("E619", "the model has no such linear layer", where=unknown[0])
        router.state = state
        return {p: RoutedLinear(found[p], state, p, router, _blocks(graph, held, project, p), k) for p in layers}

    attach(model, graph, make=make)
    decoder = model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])
    hooks = [
        model.register_forward_pre_hook(router.read, with_kwargs=True),
        decoder.register_forward_pre_hook(router.look, with_kwargs=True),
    ]
    try:
        yield router
    finally:
        for hook in hooks:
            hook.remove()
        detach(model)


def _together(graph: TaskGraph, tasks: Sequence[str]) -> Tensor:
    """Which adapters a task needs, (adapters, adapters): its own and its prerequisites', as it was trained."""
    needs = [graph.active(t) if t in graph.names else (t,) for t in tasks]
    return torch.tensor([[float(other in own) for other in tasks] for own in needs])


def _blocks(graph: TaskGraph, held: Held, project: Project, layer: Layer) -> list[tuple[int, Tensor, Tensor]]:
    """The adapters that a layer has: their places among all that are held, A and s B."""
    blocks = []
    for place, ((_, task), s) in enumerate(held.slices.items()):
        if layer in s.masks:
            scale = graph.scale_of(task) if task in graph.names else SCALE
            blocks.append((place, torch.as_tensor(project(task, layer)), scale * torch.as_tensor(s.dense(layer))))
    return blocks


class Router:
    """The gates of the adapters a device holds, for the prompts that were passed last.

    Attributes:
        gates: (prompts, adapters), in the order of `Held.slices`; None before any prompt and for other choices.
        together: which adapters are on with each, (adapters, adapters): a task's prerequisites with its own.
        state: the model's gate state, of which "oracle" reads the tasks and all read which prompts a pass goes on from.
    """

    state: GateState

    def __init__(
        self,
        tasks: Sequence[str],
        choice: str,
        gate: TaskGate | None,
        tap: nn.Module,
        together: Tensor,
        image: int | None = None,
    ):
        self.tasks, self.choice, self.gate, self.tap, self.together = tuple(tasks), choice, gate, tap, together
        self.image = image
        self._ids: Tensor | None = None
        self.gates: Tensor | None = None

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs: which of a prompt's tokens are words; the decoder is given no ids beside pictures."""
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def look(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: decides the gates if the pass begins with prompts."""
        past, ids, self._ids = kwargs.get("past_key_values"), self._ids, None
        if self.gate is None or self.choice != "gate" or (past is not None and past.get_seq_length()):
            return
        self.gates = None  # the base model looks at the prompts
        alone = {**kwargs, "past_key_values": None, "use_cache": False}
        now = self.state.current
        mask = kwargs.get("attention_mask") if now is None or now.prompt is None else now.prompt
        words = _words(mask, ids, self.image)
        pooled = _mean_over(words, _entering(self.tap, lambda: decoder.forward(*args, **alone)))
        columns = [self.gate.tasks.index(t) for t in self.tasks]
        self.gates = self._spread(torch.from_numpy(self.gate.gates(pooled)[:, columns]))

    def _spread(self, gates: Tensor) -> Tensor:
        """Gates (prompts, adapters), those of prerequisites at least as high as those of the tasks that need them."""
        return (gates[:, :, None] * self.together.to(gates)).amax(1)

    def gates_for(self, x: Tensor) -> Tensor | None:
        """(samples, adapters) for activations x (samples, tokens, d_in); None means the base model.

        Raises RunError E501 if the batch is no multiple of the prompts.
        """
        gates, now = self.gates, self.state.current
        if self.choice == "sum":
            gates = torch.ones(1, len(self.tasks))
        elif self.choice == "oracle" and now is not None:
            gates = self._spread(torch.tensor([[float(t == own) for t in self.tasks] for own in now.tasks]))
        if gates is None:
            return None
        if self.choice == "gate" and now is not None and now.rows is not None:
            gates = gates[now.rows.cpu()]
        if len(x) % len(gates):
            raise RunError("E501", f"a batch of {len(x)} samples goes on from {len(gates)} routed prompts")
        return gates.repeat_interleave(len(x) // len(gates), 0).to(x)


class RoutedLinear(AdaptedLinear):
    """A frozen linear with the ranks of several adapters beside it. It does not train.

    Args:
        base, state, name: as in `AdaptedLinear`.
        router: the model's.
        blocks: of each adapter its column in the gates, A (r, d_in) and B (r, d_out) with its scale.
        k: as in `routed`.
    """

    A: Tensor
    B: Tensor
    adapter: Tensor

    def __init__(
        self,
        base: nn.Module,
        state: GateState,
        name: str,
        router: Router,
        blocks: Sequence[tuple[int, Tensor, Tensor]],
        k: int | None,
    ):
        super().__init__(base, state, name)
        weight = next(base.parameters())
        kind = weight.dtype if weight.is_floating_point() else torch.float32
        self.register_buffer("A", torch.cat([a for _, a, _ in blocks]).to(weight.device, kind))
        self.register_buffer("B", torch.cat([b for _, _, b in blocks]).to(weight.device, kind))
        places = [torch.full((len(a),), place) for place, a, _ in blocks]
        self.register_buffer("adapter", torch.cat(places).to(weight.device))
        ranks = torch.zeros(len(router.tasks))
        ranks[[place for place, _, _ in blocks]] = torch.tensor([float(len(a)) for _, a, _ in blocks])
        largest = int((router.together @ ranks).max())
        self.k = len(self.A) if router.choice == "sum" else k or largest
        self._router = router

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        whole = x if x.dim() > 2 else x[None]
        gates = self._router.gates_for(whole)
        rows = None if gates is None else gates.any(1).nonzero().flatten()
        if gates is None or rows is None or not len(rows):
            return y
        more = self._answer(whole[rows], gates[rows]).to(y.dtype)
        if len(rows) == len(gates):
            return y + more.view(y.shape)
        return y.index_add(0, rows, more)  # the other samples' numbers stay as they are

    def _answer(self, x: Tensor, gates: Tensor) -> Tensor:
        """s B topk(g . A x) of samples with a gate that is not 0, (samples, tokens, d_out)."""
        on = gates.any(0)[self.adapter]  # ranks of adapters that nobody uses cost nothing
        a, b, adapter = (self.A, self.B, self.adapter) if on.all() else (self.A[on], self.B[on], self.adapter[on])
        z = (x.to(a.dtype) @ a.T) * gates[:, adapter].view(len(x), *([1] * (x.dim() - 2)), -1).to(a.dtype)
        return top_k(z, self.k) @ b

    def extra_repr(self) -> str:
        return f"ranks={len(self.A)}, k={self.k}"


def top_k(z: Tensor, k: int) -> Tensor:
    """z with all but the k largest |z| of the last dimension set to 0; of equal ones the first stay."""
    if k >= z.shape[-1]:
        return z
    size = z.abs()
    least = size.topk(k, dim=-1).values[..., -1:]
    above, level = size > least, size == least
    return z * (above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True))))


@torch.no_grad()
def pooled_prompts(
    model: nn.Module, inputs: Mapping[str, Any], *, depth: int | None = None, prompt: Tensor | None = None
) -> NDArray[np.float32]:
    """What the gate reads of a batch of prompts, (prompts, d): one layer's input averaged over the tokens.

    It is the input of the layer's first linear, behind its norm: the stream between the layers is ruled by a few
    outliers that all prompts have in common, and does not tell tasks apart. A picture's own tokens do not count: there
    are more of them than words, and every task may be asked about the same picture.

    Args:
        model: outside any task; not within `routed`.
        inputs: keyword arguments of the model, with its attention mask if there is padding.
        depth: of the decoder layer; None takes one sixth of the way up, which is what looking costs of a prompt's pass.
        prompt: (prompts, tokens) True where a token counts, if not as in the attention mask.
    """
    hidden = _entering(_tap(model, depth), lambda: model(**{**inputs, "use_cache": False}))
    counts = inputs.get("attention_mask") if prompt is None else prompt
    return _mean_over(_words(counts, inputs.get("input_ids"), _image_token(model)), hidden)


def _image_token(model: nn.Module) -> int | None:
    """What stands for a picture's tokens in a prompt; None of a text model."""
    return getattr(model.config, "image_token_id", None)


def _words(counts: Tensor | None, ids: Tensor | None, image: int | None) -> Tensor | None:
    """`counts` (prompts, tokens) without a picture's tokens."""
    if ids is None or image is None:
        return counts
    return ids != image if counts is None else counts.to(ids.device).bool() & (ids != image)


def _tap(model: nn.Module, depth: int | None) -> nn.Module:
    """The linear whose input is read: the first of the decoder layer."""
    stack = decoder_layers(model)[1]
    layer = stack[len(stack) // 6 if depth is None else depth]
    return next(m for m in layer.modules() if is_linear(m))


class _Reached(Exception):
    """Ends a forward pass at the layer to read, carrying its input."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@torch.no_grad()
def _entering(tap: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of `tap` in a pass that ends there."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    hook = tap.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise AssertionError("the model never reached its own decoder layer")


def _mean_over(mask: Tensor | None, hidden: Tensor) -> NDArray[np.float32]:
    """Means of hidden (prompts, tokens, d) over the tokens of a mask (prompts, tokens), (prompts, d)."""
    if mask is None:
        mask = torch.ones(hidden.shape[:2])
    weights = mask.to(hidden.device, torch.float32)[..., None]
    pooled: NDArray[np.float32] = ((hidden.float() * weights).sum(1) / weights.sum(1)).cpu().numpy()
    return pooled

"""Putting a graph's blocks on a model, choosing what learns, and taking them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from contextlora.config import select_layers
from contextlora.errors import AdapterError, RunError, did_you_mean
from contextlora.graph import TaskGraph
from contextlora.lora.gates import GateState, carry_gate_into_recompute
from contextlora.lora.layer import AdaptedLinear, GatedLinear
from contextlora.lora.sharing import Sharing, along_graph

Model = TypeVar("Model", bound=nn.Module)
Make = Callable[[Mapping[str, nn.Module], GateState], Mapping[str, AdaptedLinear]]
STATE = ("contextlora_state", "tasks")  # what `attach` sets on a model beside its layers


def attach(
    model: Model,
    graph: TaskGraph,
    *,
    layers: str = "all",
    targets: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    make: Make | None = None,
) -> Model:
    """Replaces the language model's linear layers by `GatedLinear`, in place, and adds `model.tasks`.

    Args:
        model: a transformers causal LM or image-text model. Vision tower, projector and output head are left alone.
        graph: the tasks, their blocks and order.
        layers: which decoder layers: "all", "top 1/3", "bottom 1/2", or a range such as "20-29".
        targets: names of linear layers, e.g. ["q_proj", "v_proj"]; None takes all linears of those decoder layers.
        seed: decides the first values of A.
        dtype: of A and B; float32 whatever the model's, as master weights.
        make: builds other layers instead, for the linears by path: see `baselines`.

    Returns:
        The same model. `with model.tasks(names):` sets one task a sample; outside it the model is the base model.

    Raises:
        AdapterError: E301 already attached, E302 no decoder layers or targets found.
    """
    if attached_state(model) is not None:
        raise AdapterError("E301", "the model has blocks attached already; call detach(model) first")
    prefix, stack = decoder_layers(model)
    state = GateState(graph)
    found = {
        f"{prefix}.{i}.{name}": module
        for i in select_layers(layers, len(stack))
        for name, module in stack[i].named_modules()
        if is_linear(module)
    }
    if targets is not None:
        found = _only(found, [targets] if isinstance(targets, str) else targets)
    if not found:
        raise AdapterError("E302", "no linear layer to attach to", where=prefix)
    model.requires_grad_(False)
    make = make or layers_of(GatedLinear, seed=seed, dtype=dtype)
    for path, layer in make(found, state).items():
        model.set_submodule(path, layer)
    model.contextlora_state = state  # type: ignore[assignment]
    model.tasks = partial(_tasks, model)  # type: ignore[assignment]
    return model


def layers_of(kind: Callable[..., AdaptedLinear], **given: object) -> Make:
    """What `attach` needs to put layers of one kind on a model, all built with `given`."""
    return lambda found, state: {path: kind(base, state, path, **given) for path, base in found.items()}


def _only(found: dict[str, nn.Module], targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linears whose last name is one of `targets`. Raises AdapterError E302 for a name that none of them has."""
    known = dict.fromkeys(path.rpartition(".")[2] for path in found)
    for t in targets:
        if t not in known:
            raise AdapterError("E302", f"no linear layer '{t}'.{did_you_mean(t, known)} There are: {', '.join(known)}.")
    return {path: m for path, m in found.items() if path.rpartition(".")[2] in targets}


def detach(model: Model) -> Model:
    """Puts the base layers back, in place; a model without blocks is left as it is. Base weights stay frozen."""
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, layer.base)
    for name in STATE:
        if name in model.__dict__:
            delattr(model, name)
    return model


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the plain base model, at its own speed; afterwards its very layers are back."""
    layers, kept = adapted_layers(model), {n: model.__dict__[n] for n in STATE if n in model.__dict__}
    detach(model)
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        model.__dict__.update(kept)


def attached_state(model: nn.Module) -> GateState | None:
    """The gate state of a model with blocks, None of a plain one."""
    return model.__dict__.get("contextlora_state")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that `attach` put there, whatever the method, by their path in the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def gated_layers(model: nn.Module) -> dict[str, GatedLinear]:
    """Those of them that hold blocks of a graph and nothing else: what an adapter can be made of."""
    return {n: m for n, m in model.named_modules() if type(m) is GatedLinear}


def block_layers(model: nn.Module) -> dict[str, GatedLinear]:
    """`gated_layers` of a model that must have some. Raises AdapterError E303 where no task owns a block."""
    graph_of(model)
    found = gated_layers(model)
    if not found:
        raise AdapterError("E303", "the model has layers of a method in which no task owns a block; use paper or lora")
    return found


def graph_of(model: nn.Module) -> TaskGraph:
    """The attached graph. Raises AdapterError E303 on a plain model."""
    state = attached_state(model)
    if state is None:
        raise AdapterError("E303", "the model has no blocks; call attach(model, graph) first")
    return state.graph


def trainable_parameters(
    model: nn.Module, tasks: Iterable[str], *, frozen_ratio: float | None = None
) -> list[nn.Parameter]:
    """Opens all that may change when `tasks` train, and closes everything else.

    Args:
        model: a model with blocks attached.
        tasks: the tasks that train; none of them freezes everything.
        frozen_ratio: 1 - delta; None takes the graph's.

    Returns:
        The parameters, requires_grad on these alone. They are views of the learning ranks: an optimizer over them,
        with weight decay or without, cannot move any other rank.
    """
    sharing = along_graph(graph_of(model), frozen_ratio)
    return [p for group in trainable_groups(model, tasks, sharing).values() for p in group]


def trainable_groups(
    model: nn.Module, tasks: Iterable[str], sharing: Sharing | None = None
) -> dict[str, list[nn.Parameter]]:
    """As `trainable_parameters`, by owner, for any way of sharing blocks and any method's layers."""
    graph, names = graph_of(model), [tasks] if isinstance(tasks, str) else list(tasks)
    sharing = sharing or along_graph(graph)
    counts: dict[str, int] = {}
    for task in names:
        graph.task(task)
        for owner, count in sharing.learns[task].items():
            counts[owner] = max(count, counts.get(owner, 0))
    model.requires_grad_(False)
    state = attached_state(model)
    assert state is not None
    state.sharing = sharing
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.open(counts)
    return {o: [p for layer in layers for p in layer.owned(o)] for o in counts}


@contextmanager
def sharing_as(model: nn.Module, change: Callable[[Sharing], Sharing]) -> Iterator[Sharing]:
    """Inside, tasks that are entered (`with model.tasks(...)`) use the blocks of the changed sharing, ever after not.

    Raises:
        AdapterError: E303 on a model without blocks of tasks. RunError: E501 within a task, whose gate is set already.
    """
    block_layers(model)
    state = attached_state(model)
    assert state is not None
    if state.current is not None:
        raise RunError("E501", "a task is entered already and would not notice; mask blocks outside `model.tasks(...)`")
    before = state.sharing
    state.sharing = change(before)
    try:
        yield state.sharing
    finally:
        state.sharing = before


@contextmanager
def opened(model: nn.Module, tasks: Iterable[str], sharing: Sharing) -> Iterator[dict[str, list[nn.Parameter]]]:
    """`trainable_groups` for a while: at the end the sharing, what learned and requires_grad are as they were."""
    with ExitStack() as undo:
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        undo.callback(lambda: [p.requires_grad_(flag) for p, flag in wanted])
        undo.enter_context(sharing_as(model, lambda _: sharing))
        for layer in block_layers(model).values():
            undo.enter_context(layer.open_again())
        yield trainable_groups(model, tasks, sharing)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and list of the language model's decoder layers. Raises AdapterError E302."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    stack = getattr(decoder, "layers", max(lists, key=len, default=None))  # elsewhere called `h` or `blocks`
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module is stack:
            return path, module
    raise AdapterError("E302", f"{type(model).__name__}: no decoder with a list of layers found")


def is_linear(module: nn.Module) -> bool:
    """A linear layer, quantised or not: it has weights of its own and the two feature counts."""
    own = any(True for _ in module.parameters(recurse=False))
    return own and hasattr(module, "in_features") and hasattr(module, "out_features")


@contextmanager
def going_on(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, passes go on with answers to prompts that were passed before: sample i to the prompt `rows[i]`."""
    state = attached_state(model)
    gate = state.current if state else None
    if gate is not None:
        gate.rows = rows
    try:
        yield
    finally:
        if gate is not None:
            gate.rows = None


@contextmanager
def _tasks(model: nn.Module, tasks: str | Sequence[str], prompt: Tensor | None = None) -> Iterator[None]:
    """`model.tasks`: one task name a sample of the batch, or one name for all of them. `prompt` is as in `Gate`."""
    state = attached_state(model)
    assert state is not None
    carry_gate_into_recompute(model, state)
    gate = state.gate(tasks)
    gate.prompt = prompt
    with state.use(gate):
        yield

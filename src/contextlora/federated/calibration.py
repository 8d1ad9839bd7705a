"""What a task's first mini-batches say of each layer, streamed: no activation is kept beyond its batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contextlora.data.collate import Batch
from contextlora.errors import PeerError
from contextlora.federated.layer import SparseLinear, load_slice, sparse_layers
from contextlora.federated.slices import Layer, Mask, Slice
from contextlora.federated.sparsity import Calibration, entropy
from contextlora.lora.attach import attached_state, graph_of, trainable_groups
from contextlora.lora.sharing import along_graph
from contextlora.models.inputs import ImageFeatures, answer_nll, at_least_float32


def calibrate(reader: ImageFeatures, task: str, batches: Iterable[Batch], *, spectra: bool = True) -> Calibration:
    """One forward and backward pass for each mini-batch, with the task's B at zero; afterwards nothing learns.

    It takes, for every layer, one dense gradient (r, d_out) and for its spectrum one Gram matrix of
    min(d_in, d_out)^2 float64, however many mini-batches there are.

    Args:
        reader: of a model with sparse layers. The task's block is set to zero; its prerequisites are on.
        task: whose slice is to be laid out.
        batches: the first n mini-batches of its training; the loss of each is what an update takes, the mean over its
            answer tokens.
        spectra: measure the entropies too, which only "entropy" needs.

    Raises:
        PeerError: E605 for a model without sparse layers, E606 while the task learns, E607 for no mini-batch, for a
            gradient that is not finite, for spectra of weights that are quantised.
    """
    model, layers = reader.model, sparse_layers(reader.model)
    measured = {path: _Spectrum(layer) for path, layer in layers.items()} if spectra else {}
    tokens = 0
    with _whole_block_learns(model, layers, task):
        for batch in batches:
            inputs = reader.inputs(batch)
            real = inputs["attention_mask"].bool()
            with _seen_by(measured, layers, real), model.tasks(batch.tasks, batch.prompt):  # type: ignore[operator]
                loss = answer_nll(model, inputs, batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            tokens += int(real.sum())
        if not tokens:
            raise PeerError("E607", "no mini-batch to calibrate with", where=task)
        scores = {path: _score(layer, task) for path, layer in layers.items()}
    return Calibration(task, scores, {path: s.entropy(tokens) for path, s in measured.items()}, tokens)


class _Spectrum:
    """The singular values of W0 X for inputs X (d_in, N) that come in batches.

    They are those of F X, F = W0 or, where W0 is tall, the triangle of its QR: at most min(d_in, d_out) rows. F X (F
    X)^T is summed up in float64, because squares of small singular values drown in float32 beside those of the few
    directions that language models blow up.
    """

    def __init__(self, layer: SparseLinear):
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            text = "entropies need plain weights; use the allocation 'uniform' or 'global'"
            raise PeerError("E607", text, where=layer.name)
        exact = at_least_float32(weight.detach())
        self.factor = torch.linalg.qr(exact, mode="r").R if layer.out_features > layer.in_features else exact
        self.gram = exact.new_zeros(len(self.factor), len(self.factor), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Takes the inputs (n, d_in) of some tokens."""
        z = (x.to(self.factor.dtype) @ self.factor.T).double()
        self.gram.addmm_(z.T, z)

    def entropy(self, tokens: int) -> float:
        """H / log R of sigma(W0 X / sqrt N) (eq. 20, 21), R = min(d_in, d_out, N)."""
        squares = torch.linalg.eigvalsh(self.gram / tokens).clamp_min(0)
        return entropy(squares.sqrt().cpu().numpy(), min(self.factor.shape[0], tokens))


@contextmanager
def _seen_by(measured: Mapping[Layer, _Spectrum], layers: Mapping[Layer, SparseLinear], real: Tensor) -> Iterator[None]:
    """Inside, what enters the layers is added to their spectra, of `real` tokens (samples, tokens) alone."""
    with ExitStack() as hooks:
        for path, spectrum in measured.items():

            def add(_: nn.Module, args: tuple[Tensor, ...], spectrum: _Spectrum = spectrum) -> None:
                spectrum.add(args[0].detach()[real])

            hooks.callback(layers[path].register_forward_pre_hook(add).remove)
        yield


@contextmanager
def _whole_block_learns(model: nn.Module, layers: Mapping[Layer, SparseLinear], task: str) -> Iterator[None]:
    """Inside, all of a task's B learns, from zero; afterwards it is zero, and nothing learns."""
    graph, state = graph_of(model), attached_state(model)
    assert state is not None
    shapes = {path: (graph.rank_of(task), layer.out_features) for path, layer in layers.items()}
    none = {path: Mask(shape, np.empty(0, np.int64)) for path, shape in shapes.items()}
    whole = {path: Mask(shape, np.arange(shape[0] * shape[1])) for path, shape in shapes.items()}
    zero = Slice(task, none, dict.fromkeys(none, np.empty(0, np.float32)))
    before = state.sharing
    load_slice(model, zero, learns=whole)
    try:
        trainable_groups(model, [task], along_graph(graph, 1.0))
        yield
    finally:
        trainable_groups(model, [], before)
        load_slice(model, zero)


def _score(layer: SparseLinear, task: str) -> NDArray[np.float32]:
    """|sum of the gradients of B| (r, d_out). Raises PeerError E607 if it is not finite."""
    gradient = layer.owned(task)[0].grad
    assert gradient is not None
    if not bool(gradient.isfinite().all()):
        raise PeerError("E607", f"the gradients of '{task}' are not finite; is the base model sound?", where=layer.name)
    return gradient.abs().float().view(-1, layer.out_features).cpu().numpy()

"""The gated layer with sparse slices: A is fixed by the shared seed, B learns where a mask lets it (SO-LoRA eq. 3, 6).

    y = W x + s_t (B_t . M_t) A_t x                                                    (SEMANTICS section 1)

What learns is a flat vector of the active entries and nothing else, so that gradient, Adam's moments and weight decay
exist for these alone. B stays dense in memory, for the kernel and for slices that came from other devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contextlora.errors import PeerError
from contextlora.federated.projection import independent, projection
from contextlora.federated.slices import Layer, Mask, Slice
from contextlora.lora.attach import Make, adapted_layers, graph_of, layers_of
from contextlora.lora.export import CONFIG, node, peft_files, peft_targets
from contextlora.lora.folder import write_folder
from contextlora.lora.gates import GateState
from contextlora.lora.layer import GatedLinear


class Part(Protocol):
    """Something of a layer that learns and is sent: its B, its A, or its weights."""

    def shape(self, owner: str) -> tuple[int, int]:
        """Of what `owner` has of it."""

    def active(self, owner: str) -> Mask:
        """The entries that learn here."""

    def owned(self, owner: str) -> list[nn.Parameter]:
        """What is open of it now."""

    def values(self, owner: str, mask: Mask) -> NDArray[np.float32]:
        """What it holds in the entries of `mask`."""

    def load(self, owner: str, values: NDArray[np.float32], learns: Mask) -> None:
        """Makes it these values, of which `learns` may learn."""


class SparseLinear(GatedLinear):
    """A gated layer whose blocks learn in the active entries of B.

    Attributes:
        mask: (R, d_out), True where an entry of B may learn on this device. B may hold more: what devices with the
            same task and other masks have trained is used, but neither trained nor sent from here.
        orthogonal: blocks of A are so among tasks, else independent Gaussians, as LoRI has them.
    """

    mask: Tensor
    orthogonal = True

    def __init__(
        self, base: nn.Module, state: GateState, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__(base, state, name, seed=seed, dtype=dtype)
        self.register_buffer("mask", torch.zeros(self.B.shape, dtype=torch.bool, device=self.B.device))

    @torch.no_grad()
    def reset(self, task: str, seed: int) -> None:
        """Gives a task's block its first values: A from the shared seed, B zero."""
        rows = self.graph.block(task)
        first = (projection if self.orthogonal else independent)(self.graph, self.name, self.in_features, seed)
        self.A[rows.start : rows.stop] = first[rows.start : rows.stop].to(self.A)
        self.B[rows.start : rows.stop] = 0

    def open(self, counts: Mapping[str, int]) -> None:
        """Makes the active entries in the first `counts[task]` rows of each named block of B a Parameter (n,)."""
        self.settle()
        self.learning = nn.ParameterDict()
        self._rows = {}
        for task, count in counts.items():
            start = self.graph.block(task).start
            at = self.mask[start : start + count].flatten().nonzero().squeeze(1)
            if len(at):
                self._rows[task] = range(start, start + count)
                self.learning[f"{task}_B"] = nn.Parameter(self.B[start : start + count].flatten()[at])
                self.learning[f"{task}_at"] = nn.Parameter(at, requires_grad=False)  # to move and copy with the values

    def owned(self, owner: str) -> list[nn.Parameter]:
        return [self.learning[f"{owner}_B"]] if owner in self._rows else []

    def tensors(self) -> dict[str, Tensor]:
        """The learning values; masks and the slices of others change between runs, not within one."""
        return {f"values of {t}": self.learning[f"{t}_B"].detach() for t in self._rows}

    def block(self, task: str) -> tuple[Tensor, Tensor]:
        self.settle()
        return super().block(task)

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the learning values in their places in B, whatever changed them: the fused optimizers leave no trace."""
        for task, rows in self._rows.items():
            values, at = self.learning[f"{task}_B"], self.learning[f"{task}_at"]
            # through .data: mostly they are there already, and that must not spoil what an earlier pass has saved
            self.B.data[rows.start : rows.stop].view(-1)[at] = values

    def forward(self, x: Tensor) -> Tensor:
        self.settle()
        return super().forward(x)

    def _learning(self, task: str) -> tuple[Tensor, Tensor]:
        """A, which needs no gradient, and a stand-in for the rows of B that hands theirs on to the active values."""
        rows, values = self._rows[task], self.learning[f"{task}_B"]
        whole = values.new_zeros(len(rows) * self.out_features).scatter(0, self.learning[f"{task}_at"], values)
        return self.A[rows.start : rows.stop], whole.view(len(rows), -1)

    def _be_views(self) -> None:
        """The learning values are no views of B; `settle` ties them."""

    # --- slices ------------------------------------------------------------------------------------------------------

    def parts(self) -> Mapping[Layer, Part]:
        """What learns of it, by the name it is sent under."""
        return {self.name: self}

    def shape(self, task: str) -> tuple[int, int]:
        """r and d_out of a task's B."""
        return self.graph.rank_of(task), self.out_features

    def active(self, task: str) -> Mask:
        """M of eq. 3: the entries of a task's B, (r, d_out), that learn here."""
        rows = self.graph.block(task)
        at = self.mask[rows.start : rows.stop].flatten().nonzero().squeeze(1)
        return Mask((len(rows), self.out_features), at.cpu().numpy())

    def values(self, task: str, mask: Mask) -> NDArray[np.float32]:
        """What a task's B holds in the entries of `mask`, (n,)."""
        b = self.block(task)[1].detach().reshape(-1).cpu()
        if mask.whole:
            return b.float().numpy().copy()
        return b[torch.from_numpy(mask.indices)].float().numpy()

    @torch.no_grad()
    def load(self, task: str, values: NDArray[np.float32], learns: Mask) -> None:
        """Makes a task's B these values (r, d_out), of which `learns` may learn when it is opened."""
        rows = self.graph.block(task)
        self.B[rows.start : rows.stop] = torch.from_numpy(values).to(self.B)
        mask = self.mask[rows.start : rows.stop]
        mask.fill_(False).view(-1)[torch.from_numpy(learns.indices).to(mask.device)] = True


def layers(seed: int, dtype: torch.dtype = torch.float32) -> Make:
    """What `attach` needs to put sparse layers on a model; all devices of a federation share the seed."""
    return layers_of(SparseLinear, seed=seed, dtype=dtype)


class GaussianLinear(SparseLinear):
    """A sparse layer whose blocks of A are independent of one another, as LoRI draws them."""

    orthogonal = False


def gaussian_layers(seed: int) -> Make:
    """What `attach` needs to put LoRI's layers on a model."""
    return layers_of(GaussianLinear, seed=seed)


def learning_parts(model: nn.Module) -> dict[Layer, Part]:
    """All of a model that a device trains and sends, by name. Raises PeerError E605 for a plain model."""
    found: dict[Layer, Part] = {}
    for layer in adapted_layers(model).values():
        parts = getattr(layer, "parts", None)
        if parts is not None:
            found |= parts()
    if not found:
        raise PeerError("E605", "the model has no sparse layers; attach(model, graph, make=layers(seed)) first")
    return found


def sparse_layers(model: nn.Module) -> dict[Layer, SparseLinear]:
    """The sparse layers of a model by path. Raises PeerError E605 if it has none."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not found:
        raise PeerError("E605", "the model has no sparse layers; attach(model, graph, make=layers(seed)) first")
    return found


def to_slice(model: nn.Module, task: str, masks: Mapping[Layer, Mask] | None = None) -> Slice:
    """A task's slice as it is on the model now, float32.

    Args:
        model: with sparse layers attached.
        task: whose slice.
        masks: which entries, by layer; None takes those that learn here, which is what a device sends.

    Raises:
        PeerError: E605 for a model without sparse layers. ConfigError: E104 for an unknown task.
    """
    found = learning_parts(model)
    masks = {path: layer.active(task) for path, layer in found.items()} if masks is None else dict(masks)
    return Slice(task, masks, {path: layer.values(task, masks[path]) for path, layer in found.items()})


def load_slice(model: nn.Module, slice_: Slice, learns: Mapping[Layer, Mask] | None = None) -> None:
    """Makes a task's block on the model this slice, zero outside it. Other tasks' blocks keep every bit.

    Args:
        model: with sparse layers attached; the task must not learn at the moment.
        slice_: the task's slice.
        learns: which entries learn once the task is opened; None is all of the slice's.

    Raises:
        PeerError: E605 for other layers or shapes than the model's, E606 while the task learns.
        ConfigError: E104 for an unknown task.
    """
    found = learning_parts(model)
    learns = slice_.masks if learns is None else learns
    for masks in (slice_.masks, learns):
        _check_layers(found, slice_.task, masks)
    for path, layer in found.items():
        if layer.owned(slice_.task):
            raise PeerError("E606", "learns now; load its slice between two runs", where=slice_.task)
        layer.load(slice_.task, slice_.dense(path), learns[path])


def _check_layers(found: Mapping[Layer, Part], task: str, masks: Mapping[Layer, Mask]) -> None:
    for path in sorted(found.keys() | masks.keys()):
        wanted = found[path].shape(task) if path in found else None
        got = masks[path].shape if path in masks else None
        if got != wanted:
            raise PeerError("E605", f"'{task}' has a mask of shape {got} here, wanted {wanted}", where=path)


def export(model: nn.Module, task: str, out: str | Path, base: str = "") -> Path:
    """Writes a task and its prerequisites as one plain PEFT LoRA, which loads without contextlora.

    Args:
        model: with sparse layers, the slices loaded.
        task: what is to be deployed.
        out: the folder to write.
        base: name or path of the base model, for PEFT.

    Raises:
        PeerError: E605 for a model without sparse layers. AdapterError: E319 if `out` cannot be written.
    """
    graph, found = graph_of(model), sparse_layers(model)
    blocks = {t: {path: layer.block(t) for path, layer in found.items()} for t in graph.active(task)}
    rank = sum(graph.rank_of(t) for t in blocks)
    files = peft_files(node(graph, blocks, task), rank, base, peft_targets(model, found))
    return write_folder(out, files, marker=CONFIG)

"""The same model in plain PyTorch, for rivals: every gated linear as a frozen one with A, B and a mask over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from model import ANSWER, Setting
from torch import Tensor, nn

from contextlora.data.collate import Sample
from contextlora.lora.attach import gated_layers
from contextlora.models.inputs import ImageFeatures


class Mask:
    """Which ranks are on, times their scale, for each sample of the batch that is under way: (samples, 1, R)."""

    def __init__(self, setting: Setting):
        graph = setting.graph
        self.rows = torch.zeros(len(graph.names), 1, graph.total_rank)
        for i, task in enumerate(graph.names):
            block = graph.block(task)
            self.rows[i, 0, block.start : block.stop] = graph.scale_of(task)
        self.now = self.rows


class Masked(nn.Module):
    """y = W x + B (mask * (A x)), A (R, d_in) and B (R, d_out) as Parameters."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, mask: Mask):
        super().__init__()
        self.base, self.mask = base, mask
        self.A, self.B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + ((x @ self.A.T) * self.mask.now) @ self.B
        return out


def plain(setting: Setting, reader: ImageFeatures) -> tuple[nn.Module, Mask]:
    """Replaces the gated linears of the reader's model, in place."""
    model, mask = reader.model, Mask(setting)
    for path, layer in gated_layers(model).items():
        model.set_submodule(path, Masked(layer.base, layer.A, layer.B, mask))
    return model, mask


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """All A and B by the names that `reference` has."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def apart(gradients: Mapping[str, Tensor | None], reference: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest gradient of the same parameter; inf where there is none."""
    found = [
        float((g - reference[n]).abs().max() / reference[n].abs().max()) if g is not None else math.inf
        for n, g in gradients.items()
    ]
    return max(found, default=0.0)


class Loss(nn.Module):
    """Runs a model on samples: their shares of an update's loss, summed."""

    def __init__(self, setting: Setting, model: nn.Module, mask: Mask):
        super().__init__()
        self.model, self.setting, self.mask = model, setting, mask

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scalar."""
        ids, tasks = tensors(self.setting, samples)
        self.mask.now = self.mask.rows[tasks]
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator, union-attr]
        return loss(self.setting, self.model, hidden, ids).sum()


def tensors(setting: Setting, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids (samples, tokens) and the tasks' numbers (samples,)."""
    names = setting.graph.names
    ids = torch.tensor([[*s.prompt, *s.answer] for s in samples])
    return ids, torch.tensor([names.index(s.task) for s in samples])


def loss(setting: Setting, model: nn.Module, normed: Tensor, ids: Tensor) -> Tensor:
    """Every sample's share of its task's mean over the answer tokens of an update, (samples,)."""
    logits = model.lm_head(normed[:, -ANSWER - 1 : -1].reshape(-1, normed.shape[-1]))  # type: ignore[operator]
    nll = nn.functional.cross_entropy(logits, ids[:, -ANSWER:].reshape(-1), reduction="none")
    return nll.view(len(ids), ANSWER).sum(1) / (ANSWER * setting.batch)

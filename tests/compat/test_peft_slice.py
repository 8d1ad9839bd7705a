"""A sparse slice, exported, is a plain PEFT LoRA: stock PEFT gives the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from contextlora.federated.layer import export, layers, load_slice, sparse_layers
from contextlora.federated.slices import Mask, Slice
from contextlora.lora.attach import attach

peft = pytest.importorskip("peft")


def loaded(model, graph):
    """Every task's slice, a fifth of its entries, on the model."""
    attach(model, graph, make=layers(0))
    rng = np.random.default_rng(0)
    for task in graph.names:
        masks, values = {}, {}
        for path, layer in sparse_layers(model).items():
            shape = (graph.rank_of(task), layer.out_features)
            on = np.flatnonzero(rng.random(shape[0] * shape[1]) < 0.2).astype(np.int64)
            masks[path], values[path] = Mask(shape, on), rng.standard_normal(len(on)).astype(np.float32)
        load_slice(model, Slice(task, masks, values))
    return model


@pytest.mark.parametrize("task", ["light", "action"])
@torch.no_grad()
def test_stock_peft_gives_the_same_logits(tmp_path, task):
    model = loaded(tiny.llama()[0], tiny.graph())
    ids = torch.randint(0, len(tiny.WORDS), (2, 9), generator=torch.Generator().manual_seed(5))
    with model.tasks(task):
        ours = model(input_ids=ids).logits
    folder = export(model, task, tmp_path / task, base="tiny")
    base = tiny.llama()[0]
    plain = base(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (plain - ours).abs().max() > 0.1

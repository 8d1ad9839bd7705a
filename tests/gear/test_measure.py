"""A measured profile of a tiny model: counts against the model itself; times are only times."""

from __future__ import annotations

import pytest
import torch

import tiny
from contextlora.errors import PlanError
from contextlora.gear.measure import measure
from contextlora.lora.attach import adapted_layers, attach, attached_state


def test_units_are_the_models():
    model, processor = tiny.llama(torch.float32)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    found = measure(model, processor, name="tiny", batches=(1, 3), tokens=12, rank=4, repeats=1)
    assert [u.name for u in found.units] == ["inputs", "layer 0", "layer 1", "layer 2", "head"]
    assert attached_state(model) is None
    assert set(before) == {n for n, _ in model.named_parameters()}
    head = model.get_output_embeddings().weight.nbytes
    embedding = model.get_input_embeddings().weight.nbytes
    hidden = model.get_input_embeddings().weight.shape[1]
    assert (found.units[0].weights, found.units[-1].weights) == (embedding, head)
    layers = model.get_decoder().layers
    assert [u.weights for u in found.units[1:-1]] == [sum(p.nbytes for p in la.parameters()) for la in layers]
    assert found.cut == 12 * hidden * 4
    attach(model, tiny.graph())
    width = sum(m.in_features + m.out_features for m in adapted_layers(model.get_decoder().layers[0]).values())
    assert {u.width for u in found.units[1:-1]} == {width}
    assert all(len(u.forward) == 2 and min(u.forward) > 0 for u in found.units)
    assert found.units[0].input_grad == (0.0, 0.0)
    assert found.units[1].saved > 12 * hidden * 4, "at least its own input is kept for backward"
    assert not found.synthetic


@pytest.mark.parametrize("family", [tiny.llava, tiny.idefics3, tiny.qwen25vl])
def test_models_that_see(family):
    """The vision tower and projector belong to the inputs; every weight of the model is counted once."""
    model, processor = family(torch.float32)
    found = measure(model, processor, name="tiny", batches=(1,), tokens=8, rank=4, repeats=1)
    norm = sum(p.nbytes for p in model.get_decoder().norm.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    again = model.get_output_embeddings().weight.nbytes if tied else 0
    assert sum(u.weights for u in found.units) + norm - again == sum(p.nbytes for p in model.parameters())
    assert found.units[0].forward[0] > 0


def test_saved_bytes_grow_with_tokens_and_not_with_the_batch():
    """They are given a sample."""
    model, processor = tiny.llama(torch.float32)
    short, long = (
        measure(model, processor, name="tiny", batches=(2,), tokens=n, rank=4, repeats=1).units[1].saved
        for n in (8, 16)
    )
    single = measure(model, processor, name="tiny", batches=(1,), tokens=8, rank=4, repeats=1).units[1].saved
    assert 1.8 < long / short < 2.6
    assert single == pytest.approx(short, rel=0.1)


@pytest.mark.parametrize("batches", [(), (0, 1), (2, 1), (2, 2)])
def test_batch_sizes_ascend(batches):
    model, processor = tiny.llama(torch.float32)
    with pytest.raises(PlanError, match="E403 --batches: batch sizes must ascend"):
        measure(model, processor, name="tiny", batches=batches)

"""A device without unit 0 asks for no feature of a picture, and freed units are not missed above and below a cut."""

from __future__ import annotations

import pytest
import torch

import tiny
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.gear.lean import Unseeing, held_bytes, release
from contextlora.lora.attach import attach, decoder_layers, trainable_parameters
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.models.prompts import entering
from contextlora.training.prefix import hidden_before

MODELS = {"llava": tiny.llava, "idefics3": tiny.idefics3, "qwen25vl": tiny.qwen25vl}


def made(kind, tmp_path):
    """A model with blocks, a batch of two tasks about four pictures, and inputs as they are on one device."""
    model, processor = MODELS[kind](torch.float64)
    graph = tiny.graph()
    attach(model, graph, dtype=torch.float64)
    trainable_parameters(model, ["weather", "light"])
    encoder = Encoder(processor, graph)
    reader = ImageFeatures(model, encoder)
    examples = load_examples(tiny.write_data(tmp_path, train=4, test=1, images=True), graph, split="train")
    samples = [encoder.sample(e, t, answer=e.answers[t]) for e in examples for t in ("weather", "light")]
    return model, reader, collate(samples, encoder.pad)


@pytest.mark.parametrize("kind", MODELS)
def test_two_devices_that_hold_a_half_each_lose_what_one_does(kind, tmp_path, monkeypatch):
    model, reader, batch = made(kind, tmp_path)
    inputs, weights = reader.inputs(batch), held_bytes(model)
    with torch.no_grad(), model.tasks(batch.tasks, batch.prompt):
        want = answer_nll(model, inputs, batch)
    lower, _ = MODELS[kind](torch.float64)
    attach(lower, tiny.graph(), dtype=torch.float64)
    release(lower, [0, 1])
    with torch.no_grad(), lower.tasks(batch.tasks, batch.prompt):
        hidden = hidden_before(lower, 1, ImageFeatures(lower, reader.encoder).inputs(batch))
    release(model, [2, 3, 4])
    monkeypatch.setattr(model, "get_image_features", None)
    blind = Unseeing(model, reader.encoder)
    with torch.no_grad(), model.tasks(batch.tasks, batch.prompt):
        with entering(list(decoder_layers(model)[1]), 1, hidden):
            got = answer_nll(model, blind.inputs(batch), batch)
        assert torch.equal(got, want)
        assert answer_nll(model, blind.inputs(batch), batch).isnan().all(), "a freed unit must not go unnoticed"
    assert held_bytes(model) < weights
    norms = model.get_decoder().norm.weight.nbytes
    both = [*model.parameters(), *lower.parameters()]
    freed = sum(8 for p in both if p.untyped_storage().nbytes() == 8)  # one number is left of each
    assert held_bytes(model) + held_bytes(lower) == weights + norms + freed


def test_a_weight_that_a_kept_unit_shares_stays():
    model, _ = tiny.llama(tie_word_embeddings=True)
    release(model, [4])
    assert not model.get_input_embeddings().weight.isnan().any()
    release(model, [1])
    assert model.get_input_embeddings().weight.isnan().all()

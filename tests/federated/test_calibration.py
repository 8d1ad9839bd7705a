"""Calibration against brute force: autograd of a dense B, the SVD of W0 X / sqrt N, one batch at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.errors import PeerError
from contextlora.federated.calibration import calibrate
from contextlora.federated.layer import layers, load_slice, sparse_layers, to_slice
from contextlora.federated.local import first_batches
from contextlora.federated.slices import Mask, Slice
from contextlora.federated.sparsity import first_slice
from contextlora.lora.attach import attach, trainable_groups
from contextlora.models.inputs import ImageFeatures, answer_nll

CONFIG = TrainConfig(batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"), train=12, test=1)


def world(folder, dtype=torch.float64):
    graph = tiny.graph()
    model, processor = tiny.llama(dtype)
    attach(model, graph, make=layers(0, dtype))
    reader = ImageFeatures(model, Encoder(processor, graph))
    return reader, load_examples(folder, graph, split="train")


def filled(model, task):
    """The first five entries of a task's B set to something in every layer."""
    masks = {p: Mask((v.graph.rank_of(task), v.out_features), np.arange(5)) for p, v in sparse_layers(model).items()}
    load_slice(model, Slice(task, masks, {p: np.full(5, 0.3, np.float32) for p in masks}))


def test_scores_equal_the_gradients_of_a_dense_b_at_zero(folder):
    """The oracle adds s (x A^T) B to each layer's output by a hook of its own, and sums autograd's gradients."""
    reader, examples = world(folder)
    for root in ("weather", "light"):
        filled(reader.model, root)  # prerequisites that were trained are on
    batches = first_batches(reader, examples, "action", CONFIG, 3)
    found = calibrate(reader, "action", batches, spectra=False)

    model, graph = reader.model, reader.encoder.graph
    want, hooks = {}, []
    for path, layer in sparse_layers(model).items():
        b = want[path] = torch.zeros(graph.rank_of("action"), layer.out_features).double().requires_grad_()
        a = layer.block("action")[0]

        def add(_, args, out, a=a, b=b):
            return out + graph.scale_of("action") * (args[0] @ a.T @ b)

        hooks.append(layer.register_forward_hook(add))
    for batch in batches:
        with model.tasks("action"):
            answer_nll(model, reader.inputs(batch), batch).mean().backward()
    for h in hooks:
        h.remove()
    assert found.scores.keys() == want.keys()
    for path, b in want.items():
        np.testing.assert_allclose(found.scores[path], b.grad.abs().numpy(), rtol=1e-5, atol=1e-9)
    assert all(s.any() for s in found.scores.values())


def test_entropies_equal_brute_force_svd_over_real_tokens(folder):
    """Tall, square and wide layers; padding does not count."""
    reader, examples = world(folder)
    batches = first_batches(reader, examples, "weather", CONFIG, 4)
    assert any((b.attention_mask == 0).any() for b in batches)
    found = calibrate(reader, "weather", batches)
    inputs = {path: [] for path in sparse_layers(reader.model)}
    for path, layer in sparse_layers(reader.model).items():
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs[path].append(args[0].detach()))
    with torch.no_grad():
        for b in batches:
            reader.model(**reader.inputs(b))
    shapes = set()
    for path, layer in sparse_layers(reader.model).items():
        x = torch.cat([part[b.attention_mask.bool()] for part, b in zip(inputs[path], batches, strict=True)]).numpy()
        assert len(x) == found.tokens
        w0 = layer.base.weight.detach().numpy()
        sigma = np.linalg.svd(w0 @ x.T / np.sqrt(len(x)), compute_uv=False)
        p = sigma / sigma.sum()
        h = -(p[p > 1e-12] * np.log(p[p > 1e-12])).sum() / np.log(min(*w0.shape, len(x)))
        assert found.entropies[path] == pytest.approx(h, abs=2e-6)
        shapes.add(np.sign(w0.shape[0] - w0.shape[1]))
    assert shapes == {-1, 0, 1}


def test_float32_is_close_to_float64(folder):
    batches_of = {}
    for dtype in (torch.float32, torch.float64):
        reader, examples = world(folder, dtype)
        batches_of[dtype] = calibrate(reader, "weather", first_batches(reader, examples, "weather", CONFIG, 4))
    one, other = batches_of.values()
    for path in one.entropies:
        assert one.entropies[path] == pytest.approx(other.entropies[path], abs=1e-4)
        np.testing.assert_allclose(one.scores[path], other.scores[path], rtol=1e-3, atol=1e-4)


def test_streaming_equals_one_batch_of_all(folder):
    """The sum of the mini-batches' mean losses is n times the mean where their answers are as long."""
    reader, examples = world(folder)
    parts = first_batches(reader, examples, "light", CONFIG, 4)
    assert {len(s.answer) for b in parts for s in b.samples} == {2}
    at_once = collate([s for b in parts for s in b.samples], reader.encoder.pad)
    streamed, whole = calibrate(reader, "light", iter(parts)), calibrate(reader, "light", [at_once])
    assert streamed.tokens == whole.tokens
    for path in streamed.scores:
        np.testing.assert_allclose(streamed.scores[path], 4 * whole.scores[path], rtol=1e-5, atol=1e-9)
        # a token seen twice adds a direction of size 0, of which squares leave 1e-8
        assert streamed.entropies[path] == pytest.approx(whole.entropies[path], abs=1e-7)


def test_afterwards_nothing_learns_and_only_this_tasks_block_was_touched(folder):
    reader, examples = world(folder)
    for task in ("weather", "light"):
        filled(reader.model, task)
    kept, sharing = to_slice(reader.model, "weather"), reader.model.contextlora_state.sharing
    found = calibrate(reader, "light", first_batches(reader, examples, "light", CONFIG, 1))
    assert not any(p.requires_grad for p in reader.model.parameters())
    assert to_slice(reader.model, "light").active == 0
    assert not any(layer.block("light")[1].any() for layer in sparse_layers(reader.model).values())
    assert all(np.array_equal(v, kept.values[p]) for p, v in to_slice(reader.model, "weather").values.items())
    assert reader.model.contextlora_state.sharing is sharing
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(reader.model).values())
    slice_ = first_slice(found, round(0.1 * found.entries))
    load_slice(reader.model, slice_)
    (group,) = trainable_groups(reader.model, ["light"]).values()
    assert sum(p.numel() for p in group) == slice_.active == round(0.1 * found.entries)


def test_calibrations_that_cannot_be_are_refused(folder):
    reader, examples = world(folder)
    with pytest.raises(PeerError, match="E607 light: no mini-batch"):
        calibrate(reader, "light", [])
    layer = sparse_layers(reader.model)["model.layers.1.mlp.up_proj"]
    weight = layer.base.weight.data
    layer.base.weight.data = torch.full_like(weight, float("nan"))
    with pytest.raises(PeerError, match=r"E607 model.*: the gradients of 'light' are not finite"):
        calibrate(reader, "light", first_batches(reader, examples, "light", CONFIG, 1), spectra=False)
    layer.base.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(PeerError, match=r"E607 model.layers.1.mlp.up_proj: entropies need plain weights"):
        calibrate(reader, "light", first_batches(reader, examples, "light", CONFIG, 1))

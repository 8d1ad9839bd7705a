"""A device's own training: round after round as in one go, bit for bit, on a model that it shares with others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import get_cosine_schedule_with_warmup

import tiny
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder
from contextlora.data.examples import load_examples
from contextlora.errors import PeerError
from contextlora.federated.calibration import calibrate
from contextlora.federated.layer import layers, load_slice, sparse_layers, to_slice
from contextlora.federated.local import Local, first_batches, local_run
from contextlora.federated.slices import Mask, Slice
from contextlora.federated.sparsity import first_slice
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures, answer_nll

CONFIG = TrainConfig(batch_size=4, lr=2e-2, weight_decay=0.1, max_grad_norm=1.0)
TOTAL = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"), train=24, test=1)


def world(folder, dtype=torch.float32, **more):
    graph = tiny.graph(**more)
    model, processor = tiny.llama(dtype)
    attach(model, graph, make=layers(0))
    return ImageFeatures(model, Encoder(processor, graph)), load_examples(folder, graph, split="train")


def begun(reader, examples, task, share=0.2):
    found = calibrate(reader, task, first_batches(reader, examples, task, CONFIG, 2))
    return Local.first(first_slice(found, round(share * found.entries)))


def same(one, other):
    assert one.task == other.task
    assert one.masks.keys() == other.masks.keys()
    for path in one.masks:
        assert np.array_equal(one.masks[path].indices, other.masks[path].indices)
        assert one.values[path].tobytes() == other.values[path].tobytes()


def run(reader, examples, at, updates, **more):
    return local_run(reader, examples, at, CONFIG, updates=updates, total=TOTAL, **more)


def test_it_learns_exactly_the_active_entries(folder):
    reader, examples = world(folder)
    start = begun(reader, examples, "weather", share=0.3)
    now, losses = run(reader, examples, start, TOTAL)
    assert len(losses) == TOTAL
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert now.own.active == start.own.active
    assert all(np.array_equal(now.learns[p].indices, start.learns[p].indices) for p in start.learns)
    moments = [t for n, t in now.optimizer.items() if n.endswith("exp_avg_sq")]
    assert sum(t.numel() for t in moments) == now.own.active
    assert np.mean([np.mean(v != 0) for v in now.own.values.values() if len(v)]) > 0.99
    assert not any(v.any() for v in start.block.values.values())  # the one it began with is as it was
    assert not any(p.requires_grad for p in reader.model.parameters())
    for path, layer in sparse_layers(reader.model).items():
        outside = np.setdiff1d(np.arange(layer.active("weather").size), now.learns[path].indices)
        assert not layer.block("weather")[1].numpy().ravel()[outside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_through_a_checkpoint_with_others_in_between_equal_one_go(folder, dtype):
    reader, examples = world(folder, dtype)
    start = begun(reader, examples, "weather")
    other = begun(reader, examples, "light")
    whole, losses = run(reader, examples, start, TOTAL)

    at, seen = start, []
    for updates in (1, 4, 0, 7):
        at, found = run(reader, examples, at, updates)
        seen += found
        other, _ = run(reader, examples[: 12 + updates], other, 2)
        at = Local.of_tensors("weather", load(save(at.tensors())))
        reader, _ = world(folder, dtype)  # another process: nothing but the checkpoint is left
    assert seen == losses
    assert at.update == TOTAL
    same(at.block, whole.block)
    same(at.own, whole.own)
    for name, value in whole.optimizer.items():
        assert torch.equal(at.optimizer[name], value)


def test_it_equals_a_plain_loop_over_a_dense_b_with_a_masked_gradient(folder):
    """Oracle: hooks add s (x A^T) B to the base's linears, stock AdamW steps the active entries, stock schedule."""
    reader, examples = world(folder, torch.float64)
    start = begun(reader, examples, "light", share=0.15)
    now, losses = run(reader, examples, start, 6)

    model, graph, b = reader.model, reader.encoder.graph, {}
    flat = {p: torch.zeros(len(m.indices), dtype=torch.float64, requires_grad=True) for p, m in start.learns.items()}
    for path, layer in sparse_layers(model).items():
        layer.load("light", np.zeros((3, layer.out_features), np.float32), start.learns[path])

        def add(module, args, out, path=path):
            return out + graph.scale_of("light") * (args[0] @ module.block("light")[0].double().T @ b[path])

        layer.register_forward_hook(add)
    optimizer = torch.optim.AdamW(flat.values(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay, fused=False)
    rates = get_cosine_schedule_with_warmup(optimizer, 1, TOTAL).lr_lambdas[0]
    batches, want = first_batches(reader, examples, "light", CONFIG, 6), []
    for k, batch in enumerate(batches):
        for path, layer in sparse_layers(model).items():
            at = torch.from_numpy(start.learns[path].indices)
            b[path] = torch.zeros(3 * layer.out_features).double().index_put((at,), flat[path]).view(3, -1)
        loss = answer_nll(model, reader.inputs(batch), batch).mean()
        want.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat.values(), CONFIG.max_grad_norm)
        optimizer.param_groups[0]["lr"] = CONFIG.lr * (rates(k) if k else 1.0)  # the first update is not wasted
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(want, rel=1e-4)
    for path, v in flat.items():
        np.testing.assert_allclose(now.own.values[path], v.detach().numpy(), rtol=1e-3, atol=1e-5)


def test_values_from_devices_with_the_same_task_are_used_and_left_as_they_are(folder):
    reader, examples = world(folder)
    start = begun(reader, examples, "weather")
    rng = np.random.default_rng(0)
    around, values = {}, {}
    for path, mask in start.learns.items():
        rest = np.setdiff1d(np.arange(mask.size), mask.indices)
        some = np.sort(rng.choice(rest, len(rest) // 4, replace=False))
        around[path] = Mask(mask.shape, np.union1d(some, mask.indices[::2]))  # and not all of the device's own
        values[path] = np.where(np.isin(around[path].indices, some), 0.05, 0).astype(np.float32)
    now, _ = run(reader, examples, Local(Slice("weather", around, values), start.learns), 5)
    alone, _ = run(reader, examples, start, 5)
    for path, mask in start.learns.items():
        held, dense = now.block.masks[path].indices, now.block.dense(path).ravel()
        assert np.array_equal(held, np.union1d(around[path].indices, mask.indices))
        assert (dense[np.setdiff1d(held, mask.indices)] == np.float32(0.05)).all()
        assert np.array_equal(now.own.values[path], dense[mask.indices])
    assert any(now.own.values[p].tobytes() != alone.own.values[p].tobytes() for p in start.learns)


def test_a_child_learns_beside_its_prerequisites_slices_which_stay(folder):
    reader, examples = world(folder, frozen_ratio=0.0)  # what the graph lets tune elsewhere is others' property here
    roots = {t: run(reader, examples, begun(reader, examples, t), TOTAL)[0] for t in ("weather", "light")}
    start = begun(reader, examples, "action")
    losses = {}
    for beside in (False, True):
        for t, root in roots.items():
            empty = Slice(t, root.block.masks, {p: np.zeros_like(v) for p, v in root.block.values.items()})
            load_slice(reader.model, root.block if beside else empty)
        _, losses[beside] = run(reader, examples, start, 4)
    assert losses[True] != losses[False]
    for t, root in roots.items():
        same(to_slice(reader.model, t), root.block)


def test_runs_that_cannot_be_are_refused(folder):
    reader, examples = world(folder)
    start = begun(reader, examples, "weather")
    with pytest.raises(PeerError, match="E608 weather: 13 updates after 0, but 12 in all"):
        run(reader, examples, start, TOTAL + 1)
    empty = {p: Mask(m.shape, m.indices[:0]) for p, m in start.learns.items()}
    with pytest.raises(PeerError, match="E608 weather: has no active entry"):
        run(reader, examples, Local(start.block, empty), 1)

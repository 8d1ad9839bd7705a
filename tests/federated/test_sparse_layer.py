"""Sparse layers against the dense gated layer and autograd: active entries learn as they would, nothing else moves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
from contextlora.errors import PeerError
from contextlora.federated.layer import SparseLinear, layers, load_slice, sparse_layers, to_slice
from contextlora.federated.slices import Mask, Slice
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, trainable_groups
from contextlora.lora.gates import GateState
from contextlora.lora.sharing import along_graph
from contextlora.training.checkpoint import layer_tensors, restore_layers

D_IN, D_OUT = 12, 7


def layer_of(graph, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    base = nn.Linear(D_IN, D_OUT, dtype=dtype).requires_grad_(False)
    return SparseLinear(base, GateState(graph), "some.layer", seed=seed, dtype=dtype)


def drawn(rng, graph, task, share=0.4):
    """A mask and float32 values."""
    shape = (graph.rank_of(task), D_OUT)
    indices = np.flatnonzero(rng.random(shape[0] * shape[1]) < share).astype(np.int64)
    return Mask(shape, indices), rng.standard_normal(len(indices)).astype(np.float32)


def dense(mask, values):
    return Slice("t", {"l": mask}, {"l": values}).dense("l")


def gated(layer, x, task):
    with layer._state.use(layer._state.gate(task)):
        return layer(x)


def plain(layer, x, task, a, b):
    """W x + sum of s_t B_t A_t x over the task and its prerequisites."""
    y = layer.base(x)
    for t in layer.graph.active(task):
        rows = layer.graph.block(t)
        y = y + layer.graph.scale_of(t) * (x @ a[rows.start : rows.stop].T @ b[rows.start : rows.stop])
    return y


def test_active_gradients_equal_autograd_of_the_dense_formula_and_dx_too(random_graph):
    for seed in range(30):
        graph, rng = random_graph(seed), np.random.default_rng(seed)
        layer = layer_of(graph, seed=seed)
        masks = {}
        for t in graph.names:
            masks[t], values = drawn(rng, graph, t)
            layer.load(t, dense(masks[t], values), masks[t])
        task = graph.names[seed % len(graph.names)]
        layer.open({task: graph.rank_of(task)})
        x = torch.randn(2, 5, D_IN).double().requires_grad_()
        weights = torch.randn(2, 5, D_OUT).double()
        y = gated(layer, x, task)
        (y * weights).sum().backward()

        x2, a, b = (t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B))
        want = plain(layer, x2, task, a, b)
        (want * weights).sum().backward()
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
        mine = layer.owned(task)
        assert sum(p.numel() for p in mine) == len(masks[task].indices)
        for p in mine:  # none if the draw left nothing active
            rows = graph.block(task)
            all_of_it = b.grad[rows.start : rows.stop].flatten()
            assert (all_of_it != 0).sum() > len(p)  # the dense formula would have moved more
            torch.testing.assert_close(p.grad, all_of_it[masks[task].indices], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_only_active_entries_move_even_with_weight_decay(chain, fused):
    """Three steps of AdamW equal those of a dense B with a masked gradient on the active entries; no other moves."""
    rng, layer = np.random.default_rng(0), layer_of(chain)
    for t in chain.names:
        mask, values = drawn(rng, chain, t)
        holds = dense(mask, values)
        if t == "child":  # an entry that a device with the same task sent, outside this one's mask
            free = np.setdiff1d(np.arange(mask.size), mask.indices)[:4]
            holds.ravel()[free] = 3.0
        layer.load(t, holds, mask)
    layer.open({"child": 3})
    before, a = layer.B.clone(), layer.A.clone()
    mask, rows = layer.active("child"), chain.block("child")
    twin = nn.Parameter(before[rows.start : rows.stop].flatten()[mask.indices].clone())
    optimizers = [torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=fused) for p in (layer.owned("child"), [twin])]
    for _ in range(3):
        x = torch.randn(2, 4, D_IN).double()
        gated(layer, x, "child").square().sum().backward()
        b = before.clone()
        b[rows.start : rows.stop].view(-1)[mask.indices] = twin.detach()
        b.requires_grad_()
        plain(layer, x, "child", a, b).square().sum().backward()
        twin.grad = b.grad[rows.start : rows.stop].flatten()[mask.indices]
        for o in optimizers:
            o.step()
            o.zero_grad()
    state = optimizers[0].state[layer.owned("child")[0]]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (len(mask.indices),)
    after = layer.block("child")[1].flatten()
    torch.testing.assert_close(after[mask.indices], twin.detach(), rtol=1e-9, atol=1e-9)
    still = torch.ones(layer.B.shape, dtype=torch.bool)
    still[rows.start : rows.stop].view(-1)[mask.indices] = False
    assert torch.equal(layer.B[still], before[still])
    assert not torch.equal(layer.B[~still], before[~still])
    assert torch.equal(layer.A, a)


def test_several_passes_before_one_backward(chain):
    """Nothing that a forward pass saved is spoilt by the next one."""
    layer, mask = layer_of(chain), Mask((4, D_OUT), np.arange(0, 28, 3))
    layer.load("root", dense(mask, np.ones(10, np.float32)), mask)
    layer.open({"root": 4})
    (values,) = layer.owned("root")
    x = torch.randn(1, 3, D_IN).double().requires_grad_()
    (gated(layer, x, "root").sum() + gated(layer, 2 * x, "root").sum()).backward()
    twice = values.grad.clone()
    values.grad = None
    gated(layer, 3 * x, "root").sum().backward()
    torch.testing.assert_close(values.grad, twice)


def test_a_mixed_batch_gives_each_task_the_gradient_of_its_own_samples_even_recomputed(chain):
    layer, masks = layer_of(chain), {}
    for k, t in enumerate(chain.names):
        masks[t], values = drawn(np.random.default_rng(k), chain, t)
        layer.load(t, dense(masks[t], values), masks[t])
    layer.open({t: chain.rank_of(t) for t in ("stranger", "child")})
    x, tasks = torch.randn(3, 5, D_IN).double(), ["child", "stranger", "child"]
    for t in ("stranger", "child"):
        gated(layer, x[[s == t for s in tasks]], t).square().sum().backward()
    alone = {t: layer.owned(t)[0].grad for t in ("stranger", "child")}
    for t in alone:
        layer.owned(t)[0].grad = None
    with layer._state.use(layer._state.gate(tasks)):
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for t, want in alone.items():
        torch.testing.assert_close(layer.owned(t)[0].grad, want, rtol=1e-12, atol=1e-12)
        assert want.any()


def test_a_copy_has_values_of_its_own(chain):
    layer, mask = layer_of(chain), Mask((4, D_OUT), np.arange(0, 28, 3))
    layer.load("root", dense(mask, np.ones(10, np.float32)), mask)
    layer.open({"root": 4})
    with torch.no_grad():
        layer.owned("root")[0].mul_(2)  # not in B yet
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.owned("root")[0].add_(1)
    assert set(layer.block("root")[1].unique().tolist()) == {0.0, 2.0}
    assert set(other.block("root")[1].unique().tolist()) == {0.0, 3.0}
    other.float()
    with torch.no_grad():
        other.owned("root")[0].add_(1)
    assert set(other.block("root")[1].unique().tolist()) == {0.0, 4.0}


# --- on a model ------------------------------------------------------------------------------------------------------


GRAPH = TaskGraph.from_dict({"rank": 4, "tasks": {n: {"question": "?"} for n in "abc"}})


def model_of(graph=GRAPH, dtype=torch.float32, seed=0):
    model, _ = tiny.llama(dtype)
    return attach(model, graph, make=layers(seed))


def slice_of(model, task, seed, share=0.3):
    rng, graph = np.random.default_rng(seed), next(iter(sparse_layers(model).values())).graph
    masks, values = {}, {}
    for path, layer in sparse_layers(model).items():
        shape = (graph.rank_of(task), layer.out_features)
        n = round(share * shape[0] * shape[1])
        masks[path] = Mask(shape, np.sort(rng.choice(shape[0] * shape[1], n, replace=False)).astype(np.int64))
        values[path] = rng.standard_normal(n).astype(np.float32)
    return Slice(task, masks, values)


def same(one, other):
    assert one.task == other.task
    assert list(one.masks) == list(other.masks)
    for path in one.masks:
        assert one.masks[path].shape == other.masks[path].shape
        assert np.array_equal(one.masks[path].indices, other.masks[path].indices)
        assert one.values[path].tobytes() == other.values[path].tobytes()


@torch.no_grad()
def logits(model, task):
    ids = torch.randint(0, len(tiny.WORDS), (2, 9), generator=torch.Generator().manual_seed(5))
    with model.tasks(task):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_comes_back_as_it_was_loaded(dtype):
    model = model_of(dtype=dtype)
    for k, task in enumerate("abc"):
        load_slice(model, slice_of(model, task, k))
    for k, task in enumerate("abc"):
        same(to_slice(model, task), slice_of(model, task, k))


def test_loading_other_tasks_leaves_a_tasks_outputs_as_they_are_to_the_bit():
    model = model_of()
    load_slice(model, slice_of(model, "b", 0))
    before, base = logits(model, "b"), logits(model, "a")
    load_slice(model, slice_of(model, "a", 1))
    load_slice(model, slice_of(model, "c", 2, share=1.0))
    assert torch.equal(logits(model, "b"), before)
    assert not torch.equal(logits(model, "a"), base)


def test_what_lies_outside_the_learning_mask_is_used_but_not_sent():
    model = model_of()
    whole = slice_of(model, "a", 0, share=0.6)
    mine = {path: Mask(m.shape, m.indices[::2]) for path, m in whole.masks.items()}
    load_slice(model, whole)
    want = logits(model, "a")
    load_slice(model, whole, learns=mine)
    assert torch.equal(logits(model, "a"), want)
    sent = to_slice(model, "a")
    assert all(np.array_equal(sent.masks[p].indices, mine[p].indices) for p in mine)
    assert all(np.array_equal(sent.values[p], whole.values[p][::2]) for p in mine)
    same(to_slice(model, "a", whole.masks), whole)
    load_slice(model, sent)  # and a slice makes all of its block: nothing of an older one is left
    assert not torch.equal(logits(model, "a"), want)


def test_trainable_entries_are_the_sum_of_n_l():
    model = model_of()
    slices = {task: slice_of(model, task, k) for k, task in enumerate("ab")}
    for s in slices.values():
        load_slice(model, s)
    groups = trainable_groups(model, ["a", "b"], along_graph(GRAPH))
    for task, s in slices.items():
        assert sum(p.numel() for p in groups[task]) == s.active
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == slices["a"].active + slices["b"].active
    assert sum(t.numel() for t in layer_tensors(model).values()) == slices["a"].active + slices["b"].active


def test_a_checkpoint_of_the_layers_brings_the_values_back():
    model = model_of()
    load_slice(model, slice_of(model, "a", 0))
    (values,) = trainable_groups(model, ["a"]).values()
    kept, want = {n: t.clone() for n, t in layer_tensors(model).items()}, logits(model, "a")
    with torch.no_grad():
        for p in values:
            p.add_(1)
    assert not torch.equal(logits(model, "a"), want)
    restore_layers(model, kept)
    assert torch.equal(logits(model, "a"), want)
    same(to_slice(model, "a"), slice_of(model, "a", 0))


def test_tasks_with_other_ranks_of_prerequisites_learn_their_first_rows_alone():
    graph = tiny.graph(frozen_ratio=0.5)
    model = model_of(graph)
    for k, task in enumerate(graph.names):
        load_slice(model, slice_of(model, task, k))
    groups = trainable_groups(model, ["action"])
    for task, count in {"weather": 2, "light": 2, "action": 4}.items():
        held = slice_of(model, task, graph.names.index(task))
        first = sum(int((m.indices < count * m.shape[1]).sum()) for m in held.masks.values())
        assert sum(p.numel() for p in groups[task]) == first


def test_slices_that_do_not_fit_are_refused():
    model = model_of()
    good = slice_of(model, "a", 0)
    path = "model.layers.0.mlp.up_proj"
    short = Slice("a", *({p: v for p, v in part.items() if p != path} for part in (good.masks, good.values)))
    with pytest.raises(PeerError, match=rf"E605 {path}: 'a' has a mask of shape None here, wanted \(4, 48\)"):
        load_slice(model, short)
    wrong = {**good.masks, path: Mask((3, 64), good.masks[path].indices)}
    with pytest.raises(PeerError, match=r"E605 .*\(3, 64\) here, wanted \(4, 48\)"):
        load_slice(model, Slice("a", wrong, good.values))
    with pytest.raises(PeerError, match="E605"):
        load_slice(model, good, learns=wrong)
    with pytest.raises(PeerError, match="E605 the model has no sparse layers"):
        to_slice(tiny.llama()[0], "a")
    load_slice(model, good)
    trainable_groups(model, ["a"])
    with pytest.raises(PeerError, match="E606 a: learns now"):
        load_slice(model, good)


def test_disjoint_masks_share_one_dense_b_without_loss():
    """S = 0: summed up in one B, every task finds its slice again bit for bit. The plain mean (eq. 10) halves them."""
    model = model_of()
    one = slice_of(model, "a", 0)
    masks = {}
    for path, mask in one.masks.items():
        free = np.setdiff1d(np.arange(mask.size), mask.indices)
        masks[path] = Mask(mask.shape, free[::2])
    other = Slice("b", masks, {p: np.full(len(m.indices), 0.7, np.float32) for p, m in masks.items()})
    for path in masks:
        packed = one.dense(path) + other.dense(path)
        for s in (one, other):
            assert packed.ravel()[s.masks[path].indices].tobytes() == s.values[path].tobytes()
            mean = (packed / 2).ravel()[s.masks[path].indices]
            np.testing.assert_allclose(mean, s.values[path] / 2)

"""One task's schedule, clipping and state against transformers' and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from contextlora.config import TrainConfig
from contextlora.data.collate import Sample
from contextlora.data.sampler import epoch_batches
from contextlora.errors import RunError
from contextlora.training.step import TaskRun


def run_of(count=20, **config):
    samples = [Sample(str(i), "t", None, (1,) * (3 + i % 4), (2, 3)) for i in range(count)]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2))]
    return TaskRun(["t"], samples, parameters, TrainConfig(**config))


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0, 1), st.integers(1, 8), st.integers(1, 4), st.floats(1e-6, 1))
def test_warm_up_and_cosine_equal_transformers(count, epochs, ratio, batch, accumulate, lr):
    """The cosine is transformers'. The warm-up is one step ahead of it: its first update has rate 0 and is wasted."""
    run = run_of(count, epochs=epochs, warmup_ratio=ratio, batch_size=batch, accumulate=accumulate, lr=lr)
    assert run.total == epochs * math.ceil(count / (batch * accumulate))
    warmup = math.ceil(ratio * run.total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    (reference,) = get_cosine_schedule_with_warmup(optimizer, warmup, run.total).lr_lambdas
    for k in range(run.total):
        expected = reference(k + 1) if k < warmup - 1 else 1.0 if k < warmup else reference(k)
        assert run.lr(k) == pytest.approx(lr * expected, rel=1e-9, abs=1e-12 * lr)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_of_an_epoch_are_the_samplers_batches(count, batch, accumulate):
    run = run_of(count, epochs=2, batch_size=batch, accumulate=accumulate)
    for epoch in range(2):
        found = [run.micro_batches(epoch * run.per_epoch + k) for k in range(run.per_epoch)]
        assert all(1 <= len(update) <= accumulate for update in found)
        expected = epoch_batches(run.lengths, batch, seed=0, task="t", epoch=epoch)
        assert [[int(s.key) for s in b] for update in found for b in update] == expected


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_and_step_equal_plain_adamw(limit):
    run = run_of(epochs=1, lr=0.1, weight_decay=0.3, max_grad_norm=limit)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in run.parameters]
    plain = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.3, foreach=False, fused=False)
    for k in range(4):
        for p, twin in zip(run.parameters, twins, strict=True):
            p.grad = torch.full_like(p, 2.0 + k)
            twin.grad = p.grad.clone()
        norm = math.sqrt(sum(float(t.grad.square().sum()) for t in twins))
        for twin in twins:
            twin.grad *= min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        plain.param_groups[0]["lr"] = run.lr(k)
        plain.step()
        run.clip(k)
        run.step(k)
        assert all(p.grad is None for p in run.parameters)
        for p, twin in zip(run.parameters, twins, strict=True):
            assert torch.allclose(p, twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_non_finite_gradient_is_refused(value, limit):
    run = run_of(max_grad_norm=limit)
    before = [p.detach().clone() for p in run.parameters]
    run.parameters[1].grad = torch.tensor([0.0, value])
    with pytest.raises(RunError, match=r"E511 gradient of task 't' is (nan|inf) at update 7"):
        run.clip(7)
    assert all(torch.equal(p, b) for p, b in zip(run.parameters, before, strict=True))


def test_no_samples():
    with pytest.raises(RunError, match="E510 task 't'"):
        run_of(0)


def step(run, k):
    for i, p in enumerate(run.parameters):
        p.grad = torch.full_like(p, math.sin(k + i))
    run.clip(k)
    run.step(k)


def test_state_round_trip_among_other_tensors():
    one, two = run_of(lr=0.1), run_of(lr=0.1)
    for k in range(3):
        step(one, k)
    state = one.state()
    others = {"A|model.layers.0.x": torch.zeros(1), "B|t": torch.zeros(1), "optimizer|tt|0|exp_avg": torch.ones(1)}
    kept = {k: v.clone() for k, v in state.items()} | others
    two.restore(kept)
    for p, q in zip(one.parameters, two.parameters, strict=True):
        q.data.copy_(p.data)
    for k in range(3, 6):
        step(one, k)
        step(two, k)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters, two.parameters, strict=True))
    assert all(torch.equal(v, kept[k]) or k.endswith(("step", "avg", "sq")) for k, v in state.items())
    again = run_of()
    again.restore(kept)  # `two` went on with copies: what was kept is as it was
    assert all(v.item() == 3 for k, v in again.state().items() if k.endswith("step"))

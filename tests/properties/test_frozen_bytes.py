"""Training a task changes 0 bytes outside its allowed ranks, whatever the optimizer does with its parameters."""

import random

import pytest
import torch
from torch import nn

from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, gated_layers, trainable_parameters
from contextlora.lora.sharing import trainable_ranks

OPTIMIZERS = [
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
]


class Tiny(nn.Module):
    """Two "decoder layers" and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def raw(tensor):
    return tensor.detach().contiguous().view(torch.uint8).reshape(*tensor.shape[:1], -1).clone()


def steps(model, tasks, optimizer, *, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        with model.tasks(tasks):
            model(torch.randn(len(tasks), 3, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_one_task_at_a_time(random_graph, first, fill):
    for seed in range(first, first + 50):
        rng = random.Random(seed)
        graph = random_graph(seed, prerequisites=rng.choice(["direct", "all"]))
        ratio, task = rng.choice([1.0, 0.75, 0.5, 0.25, 0.0]), rng.choice(graph.names)
        torch.manual_seed(seed)
        model = attach(Tiny(), graph, seed=seed)
        fill(model, seed=seed)
        base = {n: raw(p) for n, p in model.named_parameters()}
        before = {n: (raw(m.A), raw(m.B)) for n, m in gated_layers(model).items()}
        allowed = {graph.block(n)[i] for n, c in trainable_ranks(graph, task, ratio).items() for i in range(c)}

        opened = trainable_parameters(model, [task], frozen_ratio=ratio)
        assert sum(p.numel() for p in opened) == len(allowed) * sum(5 + 6 for _ in before)
        # Every parameter of the model is the hardest case: what is frozen must be out of reach, not merely left out.
        steps(model, [task] * 2, OPTIMIZERS[seed % 2](model.parameters()))

        for n, m in gated_layers(model).items():
            for was, now in zip(before[n], (raw(m.A), raw(m.B)), strict=True):
                changed = {r for r in range(graph.total_rank) if not torch.equal(was[r], now[r])}
                assert changed == allowed, (seed, task, ratio)
        now = dict(model.named_parameters())
        assert all(torch.equal(raw(now[n]), was) for n, was in base.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_level_trained_together_leaves_all_others(random_graph, fill, optimizer):
    for seed in range(20):
        graph = random_graph(seed)
        for level in graph.levels():
            model = attach(Tiny(), graph)
            fill(model)
            before = {n: (raw(m.A), raw(m.B)) for n, m in gated_layers(model).items()}
            steps(model, level, optimizer(trainable_parameters(model, level)))
            allowed = {r for n in level for r in graph.block(n)}
            for n, m in gated_layers(model).items():
                for was, now in zip(before[n], (raw(m.A), raw(m.B)), strict=True):
                    changed = {r for r in range(graph.total_rank) if not torch.equal(was[r], now[r])}
                    assert changed == allowed, (seed, level)


def test_momentum_of_an_open_prerequisite_does_not_move_it_in_its_childs_steps(chain, fill):
    """Both are open; batches alternate. With ratio 1 the child's batches may not move the root by a byte."""
    model = attach(Tiny(), chain)
    fill(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model, ["root", "child"]), lr=0.1, weight_decay=0.5)
    steps(model, ["root"], optimizer)
    before = {n: [raw(b) for b in m.block("root")] for n, m in gated_layers(model).items()}
    steps(model, ["child", "child"], optimizer)
    for n, m in gated_layers(model).items():
        assert all(torch.equal(a, raw(b)) for a, b in zip(before[n], m.block("root"), strict=True))


def test_what_was_open_before_is_closed(chain, fill):
    model = attach(Tiny(), TaskGraph(chain.tasks, frozen_ratio=0.0))
    fill(model)
    old = trainable_parameters(model, ["child"])
    opened = trainable_parameters(model, ["stranger"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in opened}
    assert not {id(p) for p in old} & {id(p) for p in model.parameters()}
    assert trainable_parameters(model, []) == []
    assert not any(p.requires_grad for p in model.parameters())

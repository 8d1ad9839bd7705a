"""Shared by all tests: one thread each, random graphs, tiny random-weight models."""

from __future__ import annotations

import random
from typing import Any

import pytest

from contextlora.graph import TaskGraph

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _quiet():
    """One thread and one seed a test: two workers share the machine, and failures must repeat."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_graph(seed: int, *, most: int = 7, **more: Any) -> TaskGraph:
    """A random acyclic graph of 1 to `most` tasks, declared in an order that is seldom a topological one."""
    rng = random.Random(seed)
    order = [f"t{i}" for i in range(rng.randint(1, most))]
    density = rng.random()
    tasks = {}
    for i, name in enumerate(order):
        after = [p for p in order[:i] if rng.random() < density]
        rng.shuffle(after)
        tasks[name] = {"question": f"{name}?", "after": after, "rank": rng.randint(1, 4), "alpha": rng.choice([3, 8, 16])}
    declared = rng.sample(order, len(order))
    return TaskGraph.from_dict({"tasks": {n: tasks[n] for n in declared}, **more})


@pytest.fixture
def chain() -> TaskGraph:
    """child <- root, with a stranger between them: declared child first, so active blocks are apart and out of order."""
    q = {"question": "?"}
    tasks = {"child": {**q, "after": ["root"], "rank": 3}, "stranger": {**q, "rank": 2}, "root": {**q, "rank": 4}}
    return TaskGraph.from_dict({"name": "chain", "tasks": tasks})


def tiny_llama(**more: Any) -> Any:
    """A Llama of three layers with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, **more)).eval()


def fill(model: Any, scale: float = 0.2) -> None:
    """Gives B random values: at its first value, zero, a block does nothing and proves nothing."""
    import torch

    from contextlora.lora.attach import gated_layers

    for layer in gated_layers(model).values():
        layer.B.copy_(torch.randn_like(layer.B) * scale)

"""Shared by all tests: one thread each, random graphs, tiny models with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable
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


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_graph() -> Callable[..., TaskGraph]:
    """`random_graph(seed)`: 1 to `most` tasks, acyclic, declared in an order that is seldom a topological one."""

    def build(seed: int, *, most: int = 7, **more: Any) -> TaskGraph:
        rng = random.Random(seed)
        order = [f"t{i}" for i in range(rng.randint(1, most))]
        density = rng.random()
        tasks = {}
        for i, name in enumerate(order):
            after = [p for p in order[:i] if rng.random() < density]
            rng.shuffle(after)
            rank, alpha = rng.randint(1, 4), rng.choice([3.0, 8.0, 16.0])
            tasks[name] = {"question": f"{name}?", "after": after, "rank": rank, "alpha": alpha}
        return TaskGraph.from_dict({"tasks": {n: tasks[n] for n in rng.sample(order, len(order))}, **more})

    return build


@pytest.fixture
def chain() -> TaskGraph:
    """child <- root, with a stranger between: declared so that active blocks lie apart and out of training order."""
    tasks = {
        "child": {"question": "?", "after": ["root"], "rank": 3, "alpha": 16.0},
        "stranger": {"question": "?", "rank": 2},
        "root": {"question": "?", "rank": 4, "alpha": 3.0},
    }
    return TaskGraph.from_dict({"name": "chain", "tasks": tasks})


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """`tiny_llama()`: a Llama of three layers in eval mode, the same weights every time."""

    def build(**more: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TEXT, **more)).eval()

    return build


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """`fill(model)` gives B random values: at its first value, zero, a block does nothing and so proves nothing."""
    import torch

    from contextlora.lora.layer import GatedLinear

    def apply(model: Any, scale: float = 0.2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, GatedLinear):
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64) * scale)

    return apply

"""A ContextLoRA step equals stock PEFT with one adapter a task, the prerequisites active and frozen."""

import copy
import warnings

import pytest
import torch

from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, gated_layers, trainable_parameters

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture
def graph():
    q = {"question": "?"}
    tasks = {
        "child": {**q, "after": ["left", "right"], "rank": 3, "alpha": 16.0},
        "left": {**q, "rank": 2, "alpha": 5.0},
        "stranger": {**q, "rank": 5},
        "right": {**q, "rank": 4, "alpha": 8.0},
    }
    return TaskGraph.from_dict({"tasks": tasks})


def stock(model, ours, graph, task):
    """The same weights as one stock LoRA adapter a task; `task` learns, its prerequisites are active and frozen."""
    names = [task, *graph.prerequisites(task)]
    for n in names:
        scale = graph.scale_of(n)
        config = peft.LoraConfig(r=graph.rank_of(n), lora_alpha=scale * graph.rank_of(n), target_modules=TARGETS)
        model = peft.get_peft_model(model, config, adapter_name=n) if n == task else _add(model, n, config)
    model.base_model.set_adapter(names)
    for path, layer in gated_layers(ours).items():
        other = model.base_model.model.get_submodule(path)
        for n in names:
            A, B = layer.block(n)
            other.lora_A[n].weight.data = A.clone()
            other.lora_B[n].weight.data = B.T.clone()
    for name, p in model.named_parameters():
        p.requires_grad_(f".{task}." in name)
    return model


def _add(model, name, config):
    model.add_adapter(name, config)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("task", ["child", "right"])
def test_five_steps_of_adamw(graph, tiny_llama, fill, dtype, tolerance, task):
    model = tiny_llama().to(dtype)
    ours = attach(copy.deepcopy(model), graph, targets=TARGETS, dtype=dtype)
    fill(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = stock(model, ours, graph, task)
    opened = trainable_parameters(ours, [task])
    learning = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in opened) == sum(p.numel() for p in learning)

    settings = {"lr": 1e-2, "weight_decay": 0.1}
    a, b = torch.optim.AdamW(opened, **settings), torch.optim.AdamW(learning, **settings)
    frozen = {path: [m.clone() for m in (layer.A, layer.B)] for path, layer in gated_layers(ours).items()}
    for step in range(5):
        ids = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(step))
        a.zero_grad()
        b.zero_grad()
        with ours.tasks(task):
            loss = ours(input_ids=ids, labels=ids).loss
        other = theirs(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, other, rtol=tolerance, atol=tolerance)
        loss.backward()
        other.backward()
        a.step()
        b.step()

    moved = 0.0
    for path, layer in gated_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        for n in graph.active(task):
            A, B = layer.block(n)
            torch.testing.assert_close(A, other.lora_A[n].weight, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(B, other.lora_B[n].weight.T, rtol=tolerance, atol=tolerance)
        rows = graph.block(task)
        moved = max(moved, (layer.A - frozen[path][0])[rows.start : rows.stop].abs().max().item())
    assert moved > 1e-2  # the equality is one of trained weights

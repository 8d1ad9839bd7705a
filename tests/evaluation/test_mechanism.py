"""Losses, layers and gradients against hand computation on a tiny model; whatever is measured, nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from contextlora.baselines import lora
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder
from contextlora.errors import AdapterError, ConfigError, DataError, RunError
from contextlora.evaluation import mechanism as module
from contextlora.evaluation.blocks import without_block
from contextlora.evaluation.mechanism import (
    answer_batches,
    gradient_alignment,
    layer_effects,
    mean_loss,
    start_loss,
)
from contextlora.lora.attach import attach, attached_state, detach, gated_layers, trainable_groups
from contextlora.models.inputs import ImageFeatures
from contextlora.training.plan import prepare

TASKS = tiny.graph().names


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("words"), train=12, test=10)


@pytest.fixture
def reader(fill):
    model, processor = tiny.llama(torch.float64)
    attach(model, tiny.graph(), dtype=torch.float64)
    fill(model)
    return ImageFeatures(model, Encoder(processor, tiny.graph()))


def batches_of(reader, words, task="action", **more):
    return answer_batches(reader, words, task, **{"size": 4, **more})


def by_hand(reader, task, batches):
    """Mean over answer tokens, sample by sample without padding, from all logits."""
    values = []
    for sample in (s for batch in batches for s in batch.samples):
        ids = torch.tensor([sample.prompt + sample.answer])
        with torch.no_grad(), reader.model.tasks(task):
            logits = reader.model(input_ids=ids).logits[0]
        told = logits[len(sample.prompt) - 1 : -1].log_softmax(-1)
        values += [-told[i, token].item() for i, token in enumerate(sample.answer)]
    return sum(values) / len(values)


def everything(model):
    """Bytes, what learns, the very Parameters, gradients and the sharing."""
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    flags = [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()]
    return tensors, flags, id(attached_state(model).sharing), attached_state(model).current


def same(one, other):
    return one[1:] == other[1:] and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def measurements(reader, words):
    every = {t: batches_of(reader, words, t, count=2) for t in TASKS}
    return {
        "start_loss": lambda: start_loss(reader, "action", every["action"]),
        "layer_effects": lambda: layer_effects(reader, "action", every["action"]),
        "gradient_alignment": lambda: gradient_alignment(reader, every),
    }


NAMES = ["start_loss", "layer_effects", "gradient_alignment"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3])
@pytest.mark.parametrize("learns", [[], ["action"]])
def test_whatever_is_measured_nothing_has_changed(reader, words, monkeypatch, name, fails_at, learns):
    """Also when it fails in the middle, and when the model was learning."""
    trainable_groups(reader.model, learns)
    calls, real = [], module.answer_nll

    def fails(*args):
        calls.append(1)
        if len(calls) == fails_at:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(module, "answer_nll", fails)
    measure, before = measurements(reader, words)[name], everything(reader.model)
    if fails_at is None:
        measure()
    else:
        with pytest.raises(ZeroDivisionError):
            measure()
    assert same(before, everything(reader.model))


def test_batches_are_the_first_samples_with_their_answers(reader, words):
    batches = batches_of(reader, words)
    assert [len(b.samples) for b in batches] == [4, 4, 2]
    assert [len(b.samples) for b in batches_of(reader, words, count=2)] == [4, 4]
    assert {t for b in batches for t in b.tasks} == {"action"}
    assert all(s.answer[-1] == tiny.END for b in batches for s in b.samples)
    known = batches_of(reader, words, context="gold")[0].samples[0]
    assert len(known.prompt) > len(batches[0].samples[0].prompt)
    with pytest.raises(DataError, match=r"E230 .*no record of split 'valid' answers task 'action'"):
        batches_of(reader, words, split="valid")
    with pytest.raises(ConfigError, match="E104"):
        batches_of(reader, words, "acton")


def test_start_loss_by_hand(reader, words):
    batches = batches_of(reader, words)
    found = start_loss(reader, "action", batches)
    assert found.trained == pytest.approx(by_hand(reader, "action", batches), rel=1e-12)
    zero(reader, ["action"])
    assert found.given == pytest.approx(by_hand(reader, "action", batches), rel=1e-12)
    zero(reader, TASKS)
    assert found.base == pytest.approx(by_hand(reader, "action", batches), rel=1e-12)
    assert found.push == found.given - found.base
    assert len({found.base, found.given, found.trained}) == 3


def test_a_task_without_prerequisites_starts_at_the_base(reader, words):
    found = start_loss(reader, "weather", batches_of(reader, words, "weather"))
    assert found.push == 0


def zero(reader, blocks):
    for layer in gated_layers(reader.model).values():
        for block in blocks:
            layer.block(block)[1].zero_()


@pytest.mark.parametrize("linears", [False, True])
def test_layer_effects_by_hand(reader, words, linears):
    batches = batches_of(reader, words, count=1)
    found = layer_effects(reader, "action", batches, linears=linears)
    layers = gated_layers(reader.model)
    paths = list(layers) if linears else [f"model.layers.{i}" for i in range(3)]
    assert found.layers == tuple(paths)
    assert found.blocks == ("weather", "light", "action")
    assert found.loss == pytest.approx(by_hand(reader, "action", batches), rel=1e-12)
    assert found.change.shape == (len(paths), 3)
    for i, path in list(enumerate(paths))[::3]:
        for j, block in enumerate(found.blocks):
            kept = {p: m.B.clone() for p, m in layers.items()}
            for p, m in layers.items():
                if p == path or p.startswith(f"{path}."):
                    m.block(block)[1].zero_()
            assert found.change[i, j] == pytest.approx(by_hand(reader, "action", batches) - found.loss, abs=1e-12)
            for p, m in layers.items():
                m.B.copy_(kept[p])
    assert np.abs(found.change).min() > 0


def test_with_blocks_in_one_layer_its_effect_is_the_whole_block(fill, words):
    model, processor = tiny.llama(torch.float64)
    attach(model, tiny.graph(), layers="1-1", dtype=torch.float64)
    fill(model)
    reader = ImageFeatures(model, Encoder(processor, tiny.graph()))
    batches = batches_of(reader, words)
    found = layer_effects(reader, "action", batches)
    assert found.layers == ("model.layers.1",)
    for j, block in enumerate(found.blocks):
        with without_block(model, "action", block):
            masked = mean_loss(reader, "action", batches)
        assert found.change[0, j] == pytest.approx(masked - found.loss, abs=1e-12)


def test_gradient_alignment_by_hand(reader, words):
    """All blocks of every layer as one vector, by ordinary backward passes under joint LoRA's plan."""
    every = {t: batches_of(reader, words, t, size=3, count=2) for t in ("weather", "action")}
    found = gradient_alignment(reader, every)
    assert found.tasks == ("weather", "action")
    plan, graph = lora.joint(tiny.graph(), TASKS), tiny.graph()
    wanted = []
    for k in range(2):
        vectors = []
        for task in every:
            groups = trainable_groups(reader.model, graph.names, plan.answering)
            batch = every[task][k]
            with reader.model.tasks(task):
                logits = reader.model(**reader.inputs(batch)).logits
                told = logits[batch.predicts].log_softmax(-1)
                (-told.gather(1, batch.targets[:, None]).mean()).backward()
            vectors.append(torch.cat([p.grad.flatten() for group in groups.values() for p in group]))
        assert len(vectors[0]) == sum(m.A.numel() + m.B.numel() for m in gated_layers(reader.model).values())
        wanted.append(torch.nn.functional.cosine_similarity(*vectors, dim=0).item())
    assert found.cosine[0, 1] == found.cosine[1, 0] == pytest.approx(sum(wanted) / 2, abs=1e-12)
    assert np.diag(found.cosine) == pytest.approx(1)


def test_a_gradient_of_zero_has_no_direction(reader, words, monkeypatch):
    every = {t: batches_of(reader, words, t, count=1) for t in ("weather", "action")}
    real = module.answer_nll
    monkeypatch.setattr(module, "answer_nll", lambda m, i, b: real(m, i, b) * (b.tasks[0] == "weather"))
    assert np.isnan(gradient_alignment(reader, every).cosine).tolist() == [[False, True], [True, True]]


def test_batches_must_be_the_tasks_own(reader, words):
    light, action = batches_of(reader, words, "light"), batches_of(reader, words)
    for measure in (start_loss, layer_effects):
        with pytest.raises(RunError, match="E501 a batch of task 'light' where task 'action' is measured"):
            measure(reader, "action", light)
        with pytest.raises(RunError, match="E501 no batch of task 'action'"):
            measure(reader, "action", [])
        with pytest.raises(ConfigError, match="E104"):
            measure(reader, "acton", action)
    with pytest.raises(RunError, match="E501 a batch of task 'light'"):
        gradient_alignment(reader, {"action": light})
    with pytest.raises(RunError, match="give as many of each task, not light 3, action 1"):
        gradient_alignment(reader, {"light": light, "action": action[:1]})
    with pytest.raises(RunError, match="E501 gradients are compared batch by batch"):
        gradient_alignment(reader, {})
    with pytest.raises(ConfigError, match="E104"):
        gradient_alignment(reader, {"acton": action})


@pytest.mark.parametrize("name", NAMES)
def test_only_a_model_with_blocks_of_tasks_is_measured(reader, words, name):
    measure = measurements(reader, words)[name]
    detach(reader.model)
    with pytest.raises(AdapterError, match="E303"):
        measure()
    prepare(reader.model, tiny.graph(), TrainConfig(method="mole-joint"))
    with pytest.raises(AdapterError, match="E303"):
        measure()

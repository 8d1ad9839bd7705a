"""Masked blocks: exactly a zero B, nothing left behind, and a child that needs a parent's block shows it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import tiny
from contextlora.baselines import lora
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.errors import AdapterError, ConfigError, DataError, RunError
from contextlora.evaluation import blocks as module
from contextlora.evaluation.blocks import block_effects, without_block
from contextlora.evaluation.evaluate import evaluate
from contextlora.lora.attach import attach, attached_state, detach, gated_layers, opened, trainable_groups
from contextlora.lora.sharing import along_graph
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.loop import train
from contextlora.training.plan import prepare
from contextlora.training.track import Tracker


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("words"), train=12, test=6)


def filled(fill, graph=None, dtype=torch.float64):
    model, processor = tiny.llama(dtype)
    attach(model, graph or tiny.graph(), dtype=dtype)
    fill(model)
    return model, processor


def nll_of(model, processor, data, task):
    reader = ImageFeatures(model, Encoder(processor, tiny.graph()))
    examples = load_examples(data, tiny.graph(), split="test")
    batch = collate([reader.encoder.sample(e, task, answer=e.answers[task]) for e in examples], tiny.PAD)
    with torch.no_grad(), model.tasks(task):
        return answer_nll(model, reader.inputs(batch), batch)


def zero(model, block):
    for layer in gated_layers(model).values():
        layer.block(block)[1].zero_()


@pytest.mark.parametrize("task", ["action", "weather"])
def test_masking_a_block_is_exactly_a_zero_b(words, fill, task):
    """Also the only block of a task without prerequisites: then the base model answers."""
    model, processor = filled(fill)
    for block in tiny.graph().active(task):
        before = nll_of(model, processor, words, task)
        with without_block(model, task, block):
            masked = nll_of(model, processor, words, task)
        assert torch.equal(nll_of(model, processor, words, task), before)
        by_hand, _ = filled(fill)
        zero(by_hand, block)
        assert torch.equal(masked, nll_of(by_hand, processor, words, task))
        assert not torch.allclose(masked, before)
    if task == "weather":  # it has no other
        untrained = attach(detach(model), tiny.graph(), dtype=torch.float64)
        assert torch.equal(masked, nll_of(untrained, processor, words, task))


def test_only_the_named_task_loses_it_and_several_can_be_masked(words, fill):
    model, processor = filled(fill)
    before = {t: nll_of(model, processor, words, t) for t in ("weather", "action")}
    with without_block(model, "action", "weather"), without_block(model, "action", "light"):
        assert attached_state(model).sharing.active["action"] == ("action",)
        assert torch.equal(nll_of(model, processor, words, "weather"), before["weather"])
        assert not torch.allclose(nll_of(model, processor, words, "action"), before["action"])


def test_the_sharing_of_before_is_back_also_after_an_error(fill):
    model, _ = filled(fill)
    state = attached_state(model)
    mine = along_graph(tiny.graph())
    state.sharing = mine
    seen = []

    def fails_inside():
        with without_block(model, "action", "light"):
            seen.append(state.sharing.active["action"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert seen == [("weather", "action")]
    assert state.sharing is mine


@pytest.mark.parametrize(
    ("task", "block", "error", "says"),
    [
        (
            "weather",
            "light",
            ConfigError,
            "E120 the block of 'light' is not on for task 'weather', which uses: weather",
        ),
        ("action", "snow", ConfigError, "E120 the block of 'snow' is not on for task 'action'"),
        ("acton", "light", ConfigError, "E104 no task 'acton'; there are: weather, light, action"),
    ],
)
def test_a_block_that_is_not_on_cannot_be_masked(fill, task, block, error, says):
    model, _ = filled(fill)
    mine = attached_state(model).sharing
    with pytest.raises(error, match=says), without_block(model, task, block):
        pass
    assert attached_state(model).sharing is mine


def test_masking_needs_blocks_and_comes_before_the_task(fill):
    model, _ = filled(fill)
    with model.tasks("action"), pytest.raises(RunError, match="E501 a task is entered"):  # noqa: SIM117
        with without_block(model, "action", "light"):
            pass
    with pytest.raises(AdapterError, match="E303"), without_block(detach(model), "action", "light"):
        pass
    prepare(model, tiny.graph(), TrainConfig(method="hydralora"))
    with pytest.raises(AdapterError, match="E303 the model has layers of a method in which no task owns a block"):
        block_effects(model, tiny.tokenizer(), tiny.graph(), data="nowhere")


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """`again` asks what `weather` asks, after `weather` and `light`; only `weather` is trained."""
    tasks = tiny.graph().to_dict()["tasks"]
    del tasks["action"]
    tasks["again"] = {**tasks["weather"], "after": ["weather", "light"]}
    graph = tiny.graph(tasks=tasks)
    data = tiny.write_data(tmp_path_factory.mktemp("echo"), train=12, test=6)
    records = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for r in records:
        for part in ("answers", "questions"):
            r[part]["again"] = r[part]["weather"]
            del r[part]["action"]
    (data / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    model, processor = tiny.llama()
    config = TrainConfig(epochs=30, lr=1e-2)
    out = tmp_path_factory.mktemp("run")
    train(
        model, processor, graph, data=data, out=out, config=config, tasks=["weather"], tracker=Tracker(out, quiet=True)
    )
    return model, processor, graph, data


def test_a_child_shows_which_block_it_needs(echo):
    model, processor, graph, data = echo
    mine = attached_state(model).sharing
    effects = block_effects(model, processor, graph, data=data, split="train")
    assert effects.tasks == ("again",)
    assert effects.blocks == graph.names == ("weather", "light", "again")
    matrix = effects.matrix()
    assert matrix.shape == (1, 3)
    assert (
        effects.accuracy("again").mean
        == evaluate(model, processor, graph, data=data, split="train").accuracy["again"].mean
    )
    assert effects.accuracy("again").mean > 0.8
    assert matrix[0, 0] > 0.3
    assert matrix[0, 1] == matrix[0, 2] == 0, "untrained blocks do nothing"
    assert effects.accuracy("again", "weather").count == len(effects.whole["again"]) == 12
    assert effects.without["again"]["light"] == effects.whole["again"]
    assert attached_state(model).sharing is mine


def test_blocks_that_are_not_on_are_nan_and_joint_lora_has_all_on(echo):
    model, processor, graph, data = echo
    effects = block_effects(model, processor, graph, data=data, split="train", tasks=["weather", "again"])
    assert np.isnan(effects.matrix()[0]).tolist() == [False, True, True]
    joint, _ = tiny.llama()
    prepare(joint, graph, TrainConfig(method="lora"))
    trainable_groups(joint, [], lora.joint(graph, graph.names).answering)
    effects = block_effects(joint, processor, graph, data=data, split="train", tasks=["weather"])
    assert effects.matrix().tolist() == [[0, 0, 0]]


def test_prerequisites_that_answer_for_the_prompt_keep_their_blocks(echo, monkeypatch):
    model, processor, graph, data = echo
    asked = []
    real = module.answer
    monkeypatch.setattr(module, "answer", lambda *a, **k: asked.append(k["known"]) or real(*a, **k))
    block_effects(model, processor, graph, data=data, split="test", context="predicted")
    own = evaluate(model, processor, graph, data=data, split="test", tasks=["weather"]).answers["weather"]
    assert len(asked) == 4
    assert all({i: k["weather"] for i, k in known.items()} == own for known in asked)


def test_an_error_while_measuring_leaves_the_model_alone(echo, monkeypatch):
    model, processor, graph, data = echo
    mine, calls, real = attached_state(model).sharing, [], module.answer

    def fails(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return real(*args, **more)

    monkeypatch.setattr(module, "answer", fails)
    with pytest.raises(ZeroDivisionError):
        block_effects(model, processor, graph, data=data, split="test")
    assert attached_state(model).sharing is mine
    with pytest.raises(DataError, match="E230"):
        block_effects(model, processor, graph, data=data, split="valid")
    with pytest.raises(ConfigError, match="E104"):
        block_effects(model, processor, graph, data=data, tasks=["agian"])


def test_a_task_without_examples_has_no_accuracy(echo, tmp_path):
    model, processor, graph, data = echo
    records = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for r in records:
        del r["answers"]["again"], r["questions"]["again"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert math.isnan(block_effects(model, processor, graph, data=tmp_path, split="test").matrix()[0, 0])


def test_what_is_opened_for_a_while_is_closed_and_what_was_open_is_open(fill):
    model, _ = filled(fill)
    graph = tiny.graph()
    mine = trainable_groups(model, ["action"])["action"]
    mine[0].grad = torch.ones_like(mine[0])
    seen = {}

    def fails_inside():
        with opened(model, graph.names, along_graph(graph)) as groups:
            seen.update({t: {id(p) for p in group} for t, group in groups.items()})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert set(seen) == set(graph.names)
    assert not {id(p) for p in mine} & set.union(*seen.values())
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in mine}
    assert mine[0].grad.eq(1).all()
    layer = next(iter(gated_layers(model).values()))
    assert layer.owned("action")[0] is mine[0]
    assert layer.owned("weather") == []

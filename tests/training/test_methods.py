"""Rivals on the same layer: each against an oracle of its own, and all through one conformance test."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from contextlora.baselines.olora import LAMBDA, orthogonality
from contextlora.config import RunConfig, TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.errors import ConfigError
from contextlora.evaluation.evaluate import evaluate
from contextlora.lora.attach import attached_state, gated_layers
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.loop import Stage, training_examples
from contextlora.training.plan import RIVALS, planned
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.whole import run_training

ALIKE = tiny.graph(tasks={t: {**v, "rank": 4} for t, v in tiny.graph().to_dict()["tasks"].items()})


def first_stage(model, processor, data, graph, at=0, **config):
    settings = TrainConfig(epochs=1, **config)
    reader = ImageFeatures(model, Encoder(processor, graph))
    plan = planned(graph, None, settings)
    examples = training_examples(data, graph, settings)
    return Stage(reader, FrozenPrefix(reader, 0), examples, plan.stages[at], plan, settings)


@pytest.mark.parametrize("method", ["paper", *RIVALS])
def test_every_method_trains_the_same_number_of_parameters_and_learns(runs, words, method):
    model, processor = runs.attached(graph=ALIKE)
    start = runs.blocks(model)
    plan = planned(ALIKE, None, TrainConfig(method=method))
    trained = {(t, n) for stage in plan.stages for run in stage for t in run for n in plan.training.learns[t]}
    assert {n for _, n in trained} == set(ALIKE.names)
    assert sorted(t for stage in plan.stages for run in stage for t in run) == sorted(ALIKE.names)
    runs.train(model, processor, words, graph=ALIKE, method=method, epochs=40, out=runs.folder / "run")
    after = runs.blocks(model)
    assert all(not torch.equal(start[k], after[k]) for k in start), "every block has learned"
    assert not any(p.requires_grad for p in model.parameters())
    answers = evaluate(model, processor, ALIKE, data=words, split="train").accuracy
    last = plan.stages[-1][-1][-1]  # earlier ones may be forgotten: with O-LoRA they are
    assert answers[last].mean > 0.6
    assert (runs.folder / "run" / "adapter").exists() == (method == "paper")
    assert attached_state(model).sharing == plan.answering


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_resumes_bit_for_bit(runs, words, method, monkeypatch):
    whole = runs.trained(words, graph=ALIKE, method=method, checkpoint_every=1)
    model, processor = runs.attached(graph=ALIKE)
    out, update, count = runs.folder / "cut", Stage.update, []

    def stops(self, number):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return update(self, number)

    monkeypatch.setattr(Stage, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        runs.train(model, processor, words, graph=ALIKE, method=method, checkpoint_every=1, out=out)
    model, processor = runs.attached(graph=ALIKE)
    runs.train(model, processor, words, graph=ALIKE, method=method, checkpoint_every=1, out=out, resume=True)
    again = runs.blocks(model)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_joint_lora_is_one_peft_lora_of_the_same_rank(runs, words):
    """Loss and every gradient of a mixed batch equal stock PEFT's with r = R."""
    model, processor = runs.attached(graph=ALIKE, fill=0.1)
    stage = first_stage(model, processor, words, ALIKE, method="lora", batch_size=9)
    (run,) = stage.runs
    losses = stage._gradients([run], 0)
    base, _ = tiny.llama(torch.float64)
    targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    twin = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, target_modules=targets))
    layers = gated_layers(model)
    for path, layer in layers.items():
        other = twin.base_model.model.get_submodule(path)
        other.lora_A.default.weight.data = layer.A.clone()
        other.lora_B.default.weight.data = layer.B.T.clone()
    batch = collate(run.micro_batches(0)[0], stage.reader.encoder.pad)
    assert len(set(batch.tasks)) > 1
    loss = answer_nll(twin.base_model.model, stage.reader.inputs(batch), batch).mean()
    loss.backward()
    assert losses[run.name] == pytest.approx(loss.item(), rel=1e-9)
    for path, layer in layers.items():
        other = twin.base_model.model.get_submodule(path)
        mine = [torch.cat([layer.learning[f"{t}_{s}"].grad for t in ALIKE.names]) for s in "AB"]
        assert torch.allclose(mine[0], other.lora_A.default.weight.grad, rtol=1e-8, atol=1e-12)
        assert torch.allclose(mine[1], other.lora_B.default.weight.grad.T, rtol=1e-8, atol=1e-12)


def test_lora_per_task_is_the_paper_without_edges(runs, words):
    tasks = {t: {k: x for k, x in v.items() if k != "after"} for t, v in ALIKE.to_dict()["tasks"].items()}
    alone = runs.trained(words, graph=tiny.graph(tasks=tasks))
    rival = runs.trained(words, graph=ALIKE, method="lora-per-task")
    assert tiny.furthest(alone, rival) == 0


def test_o_lora_adds_its_penalty_and_leaves_old_blocks(runs, words):
    model, processor = runs.attached(graph=ALIKE, fill=0.1)
    stage = first_stage(model, processor, words, ALIKE, at=1, method="o-lora")
    layers = gated_layers(model).values()
    value = orthogonality(layers, "light")
    expected = LAMBDA * sum((la.block("weather")[0] @ la.block("light")[0].T).abs().sum().item() for la in layers)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    for layer in layers:
        old = layer.block("weather")[0]
        closed = LAMBDA * torch.sign(layer.block("light")[0] @ old.T) @ old
        assert torch.allclose(layer.learning["light_A"].grad, closed)
    before = runs.blocks(model)
    stage.update(0)
    after = runs.blocks(model)
    assert {k[1] for k in before if not torch.equal(before[k], after[k])} == {"light"}
    assert planned(ALIKE, None, TrainConfig(method="o-lora")).answering.active["weather"] == ALIKE.names


def test_a_rival_is_not_deployed(tmp_path):
    with pytest.raises(ConfigError, match=r"E114 train.method: 'lora' makes no adapter"):
        run_training(RunConfig(out=str(tmp_path), train=TrainConfig(method="lora")))

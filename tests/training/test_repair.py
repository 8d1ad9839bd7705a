"""Isolation and repair: what changes is what was repaired, to the byte, and the steps count what they cost."""

from __future__ import annotations

import pytest
import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.errors import ConfigError, DataError, RunError
from contextlora.evaluation.evaluate import evaluate
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import adapted_layers, attached_state, gated_layers
from contextlora.training import repair as module
from contextlora.training.loop import Stage
from contextlora.training.plan import count_trained, planned, prepare
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.repair import isolate_and_repair, users

RANKS = {t: {**v, "rank": 4} for t, v in tiny.graph().to_dict()["tasks"].items()}
CHAIN = tiny.graph(
    tasks={
        **RANKS,
        "action": {**RANKS["action"], "after": ["light"]},
        "light": {**RANKS["light"], "after": ["weather"]},
    }
)


class NoPrefix(FrozenPrefix):
    """Keeps nothing."""

    depth = 0


class Spied:
    """The steps, and the layers' bytes after each training."""

    def __init__(self, monkeypatch, folder, data, graph=None, **config):
        self.graph, self.bytes, self.trained, real = graph or tiny.graph(), [], [], module.train

        def train(model, *args, **more):
            real(model, *args, **more)
            self.trained.append(more["config"])
            self.bytes.append(everything(model))
            return model

        monkeypatch.setattr(module, "train", train)
        self.model, self.processor = tiny.llama()
        self.config = TrainConfig(**{"epochs": 2, "lr": 1e-2, "batch_size": 4, **config})
        self.more = {"data": data, "split": "train", "out": folder, "config": self.config, "quiet": True}

    def run(self, task="weather", **more):
        return isolate_and_repair(self.model, self.processor, self.graph, task=task, **{**self.more, **more})

    def changed(self, before, after):
        """The blocks whose bytes differ between two trainings."""
        one, other = self.bytes[before], self.bytes[after]
        return {
            t
            for t in self.graph.names
            for path, side in one
            if not torch.equal(rows(one, path, side, self.graph, t), rows(other, path, side, self.graph, t))
        }


def rows(state, path, side, graph, task):
    block = graph.block(task)
    return state[path, side][block.start : block.stop]


def everything(model):
    return {(path, n): t.clone() for path, m in adapted_layers(model).items() for n, t in m.tensors().items()}


@pytest.mark.parametrize("more", [{}, {"frozen_ratio": 0.5}, {"context": "gold"}, {"method": "lora-per-task"}])
def test_repair_changes_the_repaired_blocks_and_no_other_byte(monkeypatch, tmp_path, words, more):
    spied = Spied(monkeypatch, tmp_path, words, **more)
    steps = spied.run()
    alone = more.get("method") == "lora-per-task"
    assert [s.name for s in steps] == ["clean", "poisoned", "repaired"] + ["descendants"] * (not alone)
    assert [s.tasks for s in steps[2:]] == [("weather",), ("action",)][: len(steps) - 2]
    assert spied.changed(1, 2) == {"weather"}
    if alone:
        assert spied.changed(0, 1) == {"weather"}
    else:
        assert spied.changed(0, 1) == {"weather", "action"} | ({"light"} if "frozen_ratio" in more else set())
        assert spied.changed(2, 3) == {"action"}
    assert {c.label_noise for c in spied.trained[:1] + spied.trained[2:]} == {0.0}
    assert (spied.trained[1].label_noise, spied.trained[1].noise_tasks) == (1.0, ("weather",))
    assert not any(p.requires_grad for p in spied.model.parameters())


def test_sequential_repair_ends_where_clean_training_does(monkeypatch, tmp_path, words):
    """Reset and trained in the same order, repaired blocks are those of a run that never was poisoned."""
    spied = Spied(monkeypatch, tmp_path, words, schedule="sequential")
    steps = spied.run()
    assert all(torch.equal(v, spied.bytes[3][k]) for k, v in spied.bytes[0].items())
    assert steps[3].evaluation == steps[0].evaluation


def test_a_dependent_task_is_poisoned_and_repaired_alone(monkeypatch, tmp_path, words):
    spied = Spied(monkeypatch, tmp_path, words)
    assert [s.name for s in spied.run("action")] == ["clean", "poisoned", "repaired"]
    assert spied.changed(0, 1) == spied.changed(1, 2) == {"action"}


def test_blocks_on_top_of_blocks_are_descendants_too():
    assert users(planned(CHAIN, None, TrainConfig()), "weather") == ("light", "action")
    assert users(planned(CHAIN, None, TrainConfig()), "light") == ("action",)
    assert users(planned(CHAIN, None, TrainConfig(method="lora-per-task")), "weather") == ()


@pytest.mark.parametrize("method", ["lora", "hydralora", "mole-joint", "lori-d"])
def test_a_joint_adapter_goes_on_or_starts_over(monkeypatch, tmp_path, words, method):
    graph = tiny.graph(tasks=RANKS)
    spied = Spied(monkeypatch, tmp_path, words, graph, method=method)
    steps = spied.run()
    assert [s.name for s in steps] == ["clean", "poisoned", "continued", "retrained"]
    assert [s.tasks for s in steps] == [graph.names, graph.names, ("weather",), graph.names]
    paper = Spied(monkeypatch, tmp_path / "paper", words, graph).run()
    assert (steps[2].updates, steps[2].samples) == (paper[2].updates, paper[2].samples)
    moved = {k for k in spied.bytes[1] if not torch.equal(spied.bytes[1][k], spied.bytes[2][k])}
    assert moved == {k for k in spied.bytes[1] if k[1] != "mask"}, "all of the adapter, on one task's answers"
    again, processor = tiny.llama()
    prepare(again, graph, spied.config)
    module.train(again, processor, graph, data=words, out=tmp_path / "again", config=spied.config)
    fresh = everything(again)
    assert all(torch.equal(v, fresh[k]) for k, v in everything(spied.model).items()), "as if trained once more"
    assert steps[3].evaluation == steps[0].evaluation
    assert attached_state(spied.model).sharing == attached_state(again).sharing


def test_what_a_comparison_asks_for(monkeypatch, tmp_path, words):
    """A joint adapter goes on in batches of its own size; trainings on clean answers share what is below the blocks."""
    spied, told, prefixes, real = Spied(monkeypatch, tmp_path, words, method="lora"), [], [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **more: (prefixes.append(more["prefix"]), real(*a, **more))[1])
    shared = NoPrefix.__new__(NoPrefix)
    steps = spied.run(single=2, told=told.append, prefix=shared)
    assert told == ["clean", "poisoned", "continued"]
    assert prefixes == [shared, None, shared]
    assert [c.batch_size for c in spied.trained] == [4, 4, 2]
    assert (steps[2].updates, steps[2].samples) == (12, 24)


def test_steps_count_what_they_cost(monkeypatch, tmp_path, words):
    """12 records, 4 of which do not answer light: with 4 a batch 3, 2 and 3 updates an epoch."""
    spied = Spied(monkeypatch, tmp_path, words)
    steps = spied.run()
    assert [s.updates for s in steps] == [16, 16, 6, 6]
    assert [s.samples for s in steps] == [64, 64, 24, 24]
    wide = sum(m.in_features + m.out_features for m in gated_layers(spied.model).values())
    assert [s.parameters for s in steps] == [11 * wide, 11 * wide, 4 * wide, 4 * wide]
    assert steps[0].parameters == count_trained(spied.model, planned(spied.graph, None, spied.config))
    assert all(s.seconds > 0 for s in steps)
    last = evaluate(spied.model, spied.processor, spied.graph, data=words, split="train")
    assert steps[-1].evaluation == last
    assert set(last.accuracy) == set(spied.graph.names)
    for s in steps:
        assert set(Adapter.load(tmp_path / s.name / "adapter").blocks) == set(spied.graph.names)


def test_poison_hurts_and_repair_heals(monkeypatch, tmp_path, words):
    steps = Spied(monkeypatch, tmp_path, words, epochs=30).run()
    clean, poisoned, repaired, descendants = ({t: a.mean for t, a in s.evaluation.accuracy.items()} for s in steps)
    assert clean["weather"] > 0.9
    assert poisoned["weather"] < 0.7
    assert repaired["weather"] > 0.9
    assert clean["light"] == poisoned["light"] == repaired["light"] == descendants["light"]
    assert descendants["action"] >= clean["action"] - 0.1


def test_the_configured_share_is_poisoned(monkeypatch, tmp_path, words):
    spied = Spied(monkeypatch, tmp_path, words, label_noise=0.25, noise_tasks=("light",))
    spied.run("action")
    assert [(c.label_noise, c.noise_tasks) for c in spied.trained] == [
        (0.0, None),
        (0.25, ("action",)),
        (0.0, None),
    ]


@pytest.mark.parametrize("method", ["paper", "lora"])
@pytest.mark.parametrize("at", [2, 9, 15])
def test_stopped_anywhere_it_goes_on_to_the_same_end(monkeypatch, tmp_path, words, method, at):
    """Stopped in step 0, 1 or 2, in a new process the same weights, answers and counts come out."""
    how = {"method": method, "epochs": 1, "checkpoint_every": 1}
    whole = Spied(monkeypatch, tmp_path / "whole", words, **how)
    steps, end = whole.run(), everything(whole.model)
    first, updates, real = Spied(monkeypatch, tmp_path / "cut", words, **how), [], Stage.update

    def stops(self, number):
        updates.append(1)
        if len(updates) == at:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(Stage, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    monkeypatch.setattr(Stage, "update", real)
    assert not any(p.requires_grad for p in first.model.parameters())
    second = Spied(monkeypatch, tmp_path / "cut", words, **how)
    again = second.run(resume=True)
    assert len(second.trained) < len(whole.trained) or at == 2
    same = ("name", "tasks", "evaluation", "updates", "samples", "parameters")
    assert [[getattr(s, k) for k in same] for s in again] == [[getattr(s, k) for k in same] for s in steps]
    assert all(torch.equal(end[k], t) for k, t in everything(second.model).items())


def test_begun_anew_or_with_other_settings_it_takes_nothing_over(monkeypatch, tmp_path, words):
    Spied(monkeypatch, tmp_path, words, epochs=1).run()
    anew = Spied(monkeypatch, tmp_path, words, epochs=1)
    steps = anew.run()
    assert len(anew.trained) == len(steps)
    with pytest.raises(RunError, match=r"E520 .*other settings"):
        Spied(monkeypatch, tmp_path, words, epochs=1, lr=2e-2).run(resume=True)


@pytest.mark.parametrize("method", ["o-lora", "mole", "lori-s"])
def test_a_method_with_nothing_to_repair_is_refused(monkeypatch, tmp_path, words, method):
    spied = Spied(monkeypatch, tmp_path, words, tiny.graph(tasks=RANKS), method=method)
    with pytest.raises(ConfigError, match=rf"E121 train.method: '{method}' has no block that one task alone"):
        spied.run()
    assert spied.trained == []


def test_a_task_that_cannot_be_poisoned_is_refused_before_any_training(monkeypatch, tmp_path, words):
    spied = Spied(monkeypatch, tmp_path, words)
    with pytest.raises(ConfigError, match=r"E104 no task 'wether'"):
        spied.run("wether")
    free = {**tiny.graph().to_dict()["tasks"], "weather": {"question": "weather ?"}}
    with pytest.raises(DataError, match="E209 noise_tasks: task 'weather' has free answers"):
        Spied(monkeypatch, tmp_path, words, tiny.graph(tasks=free)).run()
    assert spied.trained == []

"""Whole federations on a tiny model: what arrives, what is learnt, and what goes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tiny
from contextlora.data.collate import Encoder
from contextlora.errors import ConfigError, RunError
from contextlora.federated.federation import Federation
from contextlora.federated.layer import layers
from contextlora.federated.measure import measure
from contextlora.federated.peer import Peer
from contextlora.federated.simulate import simulate
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures
from contextlora.strict import validate

DEVICES = {"a": "weather", "b": "weather", "c": "light", "d": "action"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tiny.write_data(tmp_path_factory.mktemp("words"), train=16, test=4)
    (folder / "graph.yaml").write_text(json.dumps(tiny.graph().to_dict()))  # JSON is YAML
    return folder


def reader():
    model, processor = tiny.llama(torch.float32)
    graph = tiny.graph()
    attach(model, graph, make=layers(0))
    return ImageFeatures(model, Encoder(processor, graph))


def settings(words, out, **more):
    given = {
        "data": str(words),
        "out": str(out),
        "rounds": 4,
        "updates": 2,
        "exchange_every": 2,
        "train": {"lr": 0.02, "batch_size": 2},
        "slices": {"share": 0.3, "calibration": 2},
        "limits": {"collision": 1.0},
        "devices": DEVICES,
    }
    return validate(Federation, {**given, **more}, "test")


def run(words, out, **more):
    resume = more.pop("resume", False)
    return simulate(settings(words, out, **more), silent=True, resume=resume, reader=reader())


def rounds(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    """Whether two slices are the same bytes."""
    return all(
        np.array_equal(one.masks[la].indices, other.masks[la].indices)
        and one.values[la].tobytes() == other.values[la].tobytes()
        for la in one.masks
    )


def test_everyone_learns_and_has_everyones_adapter(words, tmp_path):
    peers = run(words, tmp_path / "run")
    found = rounds(tmp_path / "run")
    assert [r["clusters"] for r in found] == [[["a", "b", "c", "d"]]] * 4
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert all(r["reached"] == r["asked"] == 12 for r in found)
    for peer in peers.values():
        assert {task for _, task in peer.held.slices} == set(DEVICES.values())
        assert not peer.refused
        assert (tmp_path / "run" / "adapters" / peer.name / "adapter_model.safetensors").is_file()
    assert found[2]["bytes"]["slices"] < 0.8 * found[1]["bytes"]["slices"], "differences are shorter than values"


def test_two_runs_are_the_same_bytes(words, tmp_path):
    one, other = run(words, tmp_path / "one"), run(words, tmp_path / "other")
    for name in DEVICES:
        assert all(same(one[name].held.slices[k], s) for k, s in other[name].held.slices.items())


def test_devices_of_one_task_average_what_they_both_train(words, tmp_path, monkeypatch):
    """Where both are active it is their mean, elsewhere the one that is; up to bf16."""
    own, aggregate = {}, Peer.aggregate

    def kept(self):
        own[self.name] = self.local.own
        aggregate(self)

    monkeypatch.setattr(Peer, "aggregate", kept)
    peers = run(words, tmp_path / "run", rounds=1, updates=3, wire={"full": "bf16", "delta": None})
    for layer in own["a"].masks:
        a, b = (own[n].dense(layer) for n in "ab")
        active = [set(own[n].masks[layer].indices.tolist()) for n in "ab"]
        assert active[0] & active[1]
        both = np.zeros(a.size)
        both[list(active[0] & active[1])] = 1
        want = (a + b) / (1 + both.reshape(a.shape))
        for n in "ab":
            assert np.allclose(peers[n].held.slices["", "weather"].dense(layer), want, atol=0.06 * 2**-8)
        assert np.abs(want).max() > 0.01


def test_single_devices_meet_only_when_clusters_exchange(words, tmp_path):
    peers = run(words, tmp_path / "run", limits={"collision": 0.0})
    found = rounds(tmp_path / "run")
    assert found[0]["clusters"] == [["a"], ["b"], ["c"], ["d"]]
    assert [sum(v for k, v in r["bytes"].items() if k != "rows") > 0 for r in found] == [False, True, False, True]
    for peer in peers.values():
        assert {task for _, task in peer.held.slices} == set(DEVICES.values())


def test_across_clusters_gateways_pass_on_what_their_cluster_has(words, tmp_path, monkeypatch):
    from contextlora.federated import planner as module

    def two(members, *_):
        from contextlora.federated.cluster import Clustering

        there = sorted(m.id for m in members)
        groups = [tuple(n for n in there if n in half) for half in ("ac", "bd")]
        return Clustering(tuple(g for g in groups if g), (0.0, 0.0), {})

    monkeypatch.setattr(module, "cluster", two)
    peers = run(words, tmp_path / "run")
    for peer in peers.values():
        assert {task for _, task in peer.held.slices} == set(DEVICES.values())
        assert {n: h.version for n, h in peer.heard.items()} == dict.fromkeys(DEVICES, 4)
    assert rounds(tmp_path / "run")[1]["bytes"]["inward"] > 0


@pytest.mark.parametrize("what", ["drop", "late", "corrupt", "partition", "kill"])
def test_faults_cost_only_what_they_hit(words, tmp_path, what):
    faults = [{"what": what, "who": ["b"], "rounds": [1, 2]}]
    peers = run(words, tmp_path / "run", rounds=5, faults=faults)
    found = rounds(tmp_path / "run")
    assert [len(r["losses"]) for r in found] == [4, 3, 3, 4, 4] if what == "kill" else [4] * 5
    if what != "late":
        whole = [["a", "b", "c", "d"]]
        assert [r["clusters"] == whole for r in found] == [True, False, False, True, True]
    assert peers["a"].heard["b"].version == 5, "it is back"
    assert peers["c"].heard["a"].version == 5
    refused = sum((p.refused for p in peers.values()), start=peers["a"].refused.__class__())
    assert bool(refused) == (what in ("corrupt", "late"))


def test_a_round_with_nobody_there_passes(words, tmp_path):
    peers = run(words, tmp_path / "run", faults=[{"what": "kill", "who": list(DEVICES), "rounds": [1, 1]}])
    assert [len(r["losses"]) for r in rounds(tmp_path / "run")] == [4, 0, 4, 4]
    assert {p.local.update for p in peers.values()} == {6}, "nobody was there to tell them of the round they missed"


def test_a_stopped_run_goes_on_from_the_last_round_all_have_kept(words, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    out = tmp_path / "run"
    train, count = Peer.train, []

    def stops(self):
        count.append(self.name)
        if len(count) == 11:  # the third device in the third round
            raise Stopped
        train(self)

    monkeypatch.setattr(Peer, "train", stops)
    with pytest.raises(Stopped):
        run(words, out)
    monkeypatch.undo()
    peers = run(words, out, resume=True)
    assert [r["step"] for r in rounds(out)] == [0, 1, 2, 3]
    assert {p.local.update for p in peers.values()} == {8}
    with pytest.raises(RunError, match="E520"):
        run(words, out, resume=True, seed=1)


def test_an_unknown_task_is_named(words, tmp_path):
    with pytest.raises(ConfigError, match=r"E104 devices\.a: no task 'wether'\. Did you mean 'weather'"):
        run(words, tmp_path / "run", devices={"a": "wether"})


def test_what_a_device_holds_answers_for_every_task(words, tmp_path):
    """After enough rounds device a answers all tasks, of which it trained one; the oracle's choice is the best."""
    peers = run(words, tmp_path / "run", rounds=20, updates=4, slices={"share": 0.5, "calibration": 6})
    found = {choice: measure(peers["a"], "train", choice) for choice in ("oracle", "gate", "base")}
    assert set(found["oracle"].accuracy) == set(DEVICES.values())
    right = {choice: sum(a.mean for a in m.accuracy.values()) / 3 for choice, m in found.items()}
    assert right["oracle"] > 0.7
    assert right["oracle"] >= right["gate"] > right["base"]
    assert found["oracle"].accuracy["action"].mean > found["base"].accuracy["action"].mean, "with its prerequisites"
    routes = found["gate"].routes
    assert routes.sum() == sum(a.count for a in found["gate"].accuracy.values())
    assert json.loads(json.dumps(found["gate"].data()))["routes"] == routes.tolist()


def test_all_devices_answer_alike_once_they_have_met(words, tmp_path):
    peers = run(
        words, tmp_path / "run", rounds=2, wire={"full": "bf16", "delta": None}, devices={"a": "weather", "b": "light"}
    )
    one, other = (measure(peers[n], "test").data() for n in "ab")
    assert one["tasks"] == other["tasks"] == ("weather", "light")
    assert one["routes"] == other["routes"]

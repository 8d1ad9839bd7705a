"""Whole federations on a tiny model: what arrives, what is learnt, and what goes wrong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import tiny
from contextlora.data.collate import Encoder
from contextlora.errors import ConfigError, RunError
from contextlora.federated.aggregate import Update, ours
from contextlora.federated.collisions import expected_rates
from contextlora.federated.layer import layers
from contextlora.federated.measure import measure
from contextlora.federated.memory import resident
from contextlora.federated.pack import load_packed
from contextlora.federated.peer import Peer
from contextlora.federated.setup import channel_of
from contextlora.federated.simulate import simulate
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures
from federated.federation import content, small, write_words

DEVICES = {"a": "weather", "b": "weather", "c": "light", "d": "action"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"))


def reader():
    model, processor = tiny.llama(torch.float32)
    graph = tiny.graph()
    attach(model, graph, make=layers(0))
    return ImageFeatures(model, Encoder(processor, graph))


def settings(words, out, **more):
    return small(words, out, **{"devices": DEVICES, **more})


def run(words, out, **more):
    how = {k: more.pop(k) for k in ("resume", "force") if k in more}
    return simulate(settings(words, out, **more), silent=True, reader=reader(), **how)


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
        assert not peer.post.refused
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

    def two(members, *_, **__):
        from contextlora.federated.cluster import Clustering

        there = sorted(m.id for m in members)
        groups = [tuple(n for n in there if n in half) for half in ("ac", "bd")]
        return Clustering(tuple(g for g in groups if g), (0.0, 0.0), {})

    monkeypatch.setattr(module, "cluster", two)
    peers = run(words, tmp_path / "run")
    for peer in peers.values():
        assert {task for _, task in peer.held.slices} == set(DEVICES.values())
        assert {n: h.version for n, h in peer.post.heard.items()} == dict.fromkeys(DEVICES, 4)
    assert rounds(tmp_path / "run")[1]["bytes"]["inward"] > 0


def test_collisions_are_counted_after_the_first_exchange(words, tmp_path):
    """Round 0 goes by eq. 19, all later ones by the masks that travelled in it."""
    pair = {"a": "weather", "b": "weather"}
    peers = run(words, tmp_path / "run", devices=pair, limits={"collision": 1.0}, exchange_every=2)
    masks = [list(peers[n].local.learns.values()) for n in "ab"]
    rates = np.array([[m.rate for m in of] for of in masks])
    counted = [len(np.intersect1d(x.indices, y.indices)) / x.size for x, y in zip(*masks, strict=True)]
    first, second, *later = (r["collisions"][0] for r in rounds(tmp_path / "run"))
    assert first == pytest.approx(expected_rates(rates).max())
    assert second == later[0] == later[1] == max(counted) != first


def test_devices_tell_the_rates_that_they_have_measured(words, tmp_path):
    """Every row of the last round names what the channel gave its sender in the round before."""
    radio = {"control": "full", "measured": True, "radius": "50 m"}
    peers = run(words, tmp_path / "run", radio=radio, limits={"collision": 1.0, "deadline": "5 s"})
    air = channel_of(settings(words, tmp_path / "run", radio=radio))
    found = [r["clusters"] for r in rounds(tmp_path / "run")]
    assert found == [[["a", "b", "c", "d"]]] * 4
    for peer in peers.values():
        for name, standing in peer.table.items():
            assert standing.rates == {n: int(air.rate(2, name, n)) for n in DEVICES if n != name} or name == peer.name
        assert peer.clustering == peers["a"].clustering


def test_rates_are_measured_at_full_power_only(words, tmp_path):
    with pytest.raises(ConfigError, match=r"radio\.control to 'full'"):
        settings(words, tmp_path, radio={"measured": True})


def test_the_yaml_asks_for_means_that_liars_cannot_turn(words, tmp_path, monkeypatch):
    three, aggregate, seen = {"a": "weather", "b": "weather", "c": "weather"}, Peer.aggregate, []

    def watched(self):
        before = [Update(self.name, self.local.own, 1, self.round + 1, self.cluster), *self.fresh.values()], self.held
        aggregate(self)
        seen.append((*before, self.held))

    monkeypatch.setattr(Peer, "aggregate", watched)
    run(words, tmp_path / "run", devices=three, rounds=2, mean={"liars": 1, "clip": 2.0})
    assert len(seen) == 6
    for (own, *arrived), before, after in seen:
        assert len(arrived) == 2
        assert content(ours(own, arrived, before, liars=1, clip=2.0)) == content(after)
        assert content(ours(own, arrived, before)) != content(after)


def test_a_packed_cluster_is_one_b_and_what_is_lost_is_measured(words, tmp_path):
    """Two tasks of equal rank would be needed to lose nothing; one task is its own pack, to the bit."""
    one = {"a": "weather", "b": "weather"}
    peers = run(words, tmp_path / "run", devices=one, rounds=2, pack=True)
    for name in one:
        packed = load_packed(tmp_path / "run" / "packed" / f"{name}.safetensors")
        assert packed.collision == 0
        assert same(packed.slice("weather"), peers[name].held.slices["", "weather"])
    said = []
    asked = settings(words, tmp_path / "two", devices={"a": "weather", "c": "light"}, rounds=2, pack=True)
    simulate(asked, silent=True, reader=reader(), say=said.append)
    assert all(re.match("[ac] is not packed: E612", s) for s in said), "tasks of different ranks"
    assert len(said) == 2


@pytest.mark.parametrize("what", ["drop", "late", "corrupt", "partition", "kill"])
def test_faults_cost_only_what_they_hit(words, tmp_path, what):
    faults = [{"what": what, "who": ["b"], "rounds": [1, 2]}]
    peers = run(words, tmp_path / "run", rounds=5, faults=faults)
    found = rounds(tmp_path / "run")
    assert [len(r["losses"]) for r in found] == [4, 3, 3, 4, 4] if what == "kill" else [4] * 5
    if what != "late":
        whole = [["a", "b", "c", "d"]]
        assert [r["clusters"] == whole for r in found] == [True, False, False, True, True]
    assert peers["a"].post.heard["b"].version == 5, "it is back"
    assert peers["c"].post.heard["a"].version == 5
    refused = sum((p.post.refused for p in peers.values()), start=peers["a"].post.refused.__class__())
    assert bool(refused) == (what in ("corrupt", "late"))


def test_a_round_with_nobody_there_passes(words, tmp_path):
    peers = run(words, tmp_path / "run", faults=[{"what": "kill", "who": list(DEVICES), "rounds": [1, 1]}])
    assert [len(r["losses"]) for r in rounds(tmp_path / "run")] == [4, 0, 4, 4]
    assert {p.local.update for p in peers.values()} == {6}, "nobody was there to tell them of the round they missed"


class Stopped(Exception):
    pass


def stopped(words, out, monkeypatch, after, **more):
    """A run that is cut off when devices have trained `after` times."""
    train, count = Peer.train, []

    def stops(self):
        count.append(self.name)
        if len(count) > after:
            raise Stopped
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(Peer, "train", stops)
        with pytest.raises(Stopped):
            run(words, out, **more)


def told(out):
    """All of metrics.jsonl but when it was; what was told twice counts as it was last told."""
    return {r["step"]: {k: v for k, v in r.items() if k != "time"} for r in rounds(out)}


FAULTS = [
    {"what": "kill", "who": ["b"], "rounds": [1, 2]},
    {"what": "late", "who": ["c"], "rounds": [1, 3]},
    {"what": "corrupt", "who": ["d"], "rounds": [2, 2]},
]


@pytest.mark.parametrize(
    ("after", "how"),
    [
        (10, {"aggregate": "hard_routing"}),
        (10, {"limits": {"collision": 0.0}, "wire": {"full": "bf16"}}),  # alone, they exchange through gateways only
        (8, {"faults": FAULTS}),  # b is gone when all are stopped
        (12, {"faults": FAULTS}),  # b comes back just when all go on
        (15, {"faults": FAULTS, "rounds": 5}),
        (9, {"together": 3}),
        (12, {"together": 3, "faults": FAULTS}),
        (9, {"rounds": 4, "faults": [{"what": "kill", "who": ["b"], "rounds": [2, 2]}]}),  # b is gone when all go on
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(words, tmp_path, monkeypatch, after, how):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = run(words, whole, **how)
    stopped(words, cut, monkeypatch, after, **how)
    assert 0 < len(rounds(cut)) < len(rounds(whole))
    other = run(words, cut, resume=True, **how)
    assert told(cut) == told(whole)
    for name in DEVICES:
        assert content(other[name].held) == content(one[name].held)
        mine = [(run_ / "adapters" / name / "adapter_model.safetensors").read_bytes() for run_ in (whole, cut)]
        assert mine[0] == mine[1]
        assert other[name].post.inbox.seen.keys() == one[name].post.inbox.seen.keys()


def test_what_all_devices_know_is_kept_once(words, tmp_path):
    """The checkpoint of four devices that know each other is little more than four times that of a device alone."""
    sizes = []
    for devices in ({"a": "weather"}, dict.fromkeys("abcd", "weather")):
        run(words, tmp_path / str(len(devices)), devices=devices, rounds=3)
        (newest, _) = sorted((tmp_path / str(len(devices)) / "kept").iterdir(), reverse=True)
        sizes.append(sum(f.stat().st_size for f in newest.iterdir()))
    assert 3 < sizes[1] / sizes[0] < 5.5


def test_another_federations_checkpoint_is_refused(words, tmp_path, monkeypatch):
    stopped(words, tmp_path / "run", monkeypatch, 10)
    with pytest.raises(RunError, match="E520"):
        run(words, tmp_path / "run", resume=True, seed=1)


def test_a_second_run_throws_nothing_away_unasked(words, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped(words, out, monkeypatch, 10)
    with pytest.raises(RunError, match=r"E522 .*--resume.*--force"):
        run(words, out)
    run(words, out, resume=True)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"E521 .*--force"):
        run(words, out)
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    run(words, out, rounds=2, force=True)
    assert [r["step"] for r in rounds(out)] == [0, 1]
    assert (out / "notes.txt").read_text() == "mine"


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


@pytest.mark.slow
def test_a_hundred_devices_are_the_base_and_their_active_values(words, tmp_path):
    """Twice the devices take twice the memory, though each knows all others; and none has a model of its own."""
    found = {}
    for count in (50, 100):
        devices = {f"d{i:03d}": {"task": list(DEVICES.values())[i % 4], "data": str(words)} for i in range(count)}
        how = {"devices": devices, "rounds": 2, "updates": 1, "slices": {"share": 0.3, "calibration": 1}}
        peers = run(words, tmp_path / str(count), radio={"cast": "broadcast"}, **how)
        assert len({id(p.reader.model) for p in peers.values()}) == 1
        assert all(len(p.post.heard) == count for p in peers.values()), "all have met"
        found[count] = resident(peers.values()), sum(p.local.own.active for p in peers.values())
    for kind in ("own", "held", "known"):
        assert found[100][0][kind] < 2.3 * found[50][0][kind], kind
    memory, active = found[100]
    assert memory["own"] < 40 * active, "values, moments and twice eight bytes of place, and steps and learning rates"
    assert memory["known"] < 24 * active + 100 * 2000, "place, two versions, messages: once, not for each receiver"

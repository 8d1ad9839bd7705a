"""fleet.yaml, profiles and work: what users write, and what they get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from contextlora.config import TrainConfig
from contextlora.errors import ConfigError, PlanError
from contextlora.gear.fleet import Fleet
from contextlora.gear.planning import load_fleet, load_profile, shipped
from contextlora.gear.profile import Profile
from contextlora.gear.units import show_bytes
from contextlora.gear.work import work_of
from contextlora.graph import TaskGraph

TWO = {"desk": {"memory": "16 GB"}, "nano": {"memory": "4 GB", "speed": 0.3}}
WIFI = {"rate": "100 Mbit/s", "delay": "2 ms"}


def test_quantities_are_read_as_people_write_them():
    f = Fleet.from_dict({"devices": TWO, "medium": {**WIFI, "relay": True}})
    assert (f.devices["desk"].memory, f.devices["nano"].memory) == (16e9, 4e9)
    assert f.delay("desk", "nano") == 2e-3
    assert f.airtime("desk", "nano", 1e6) == pytest.approx(2 * 8e6 / 100e6)
    assert f.airtime("desk", "desk", 1e6) == 0
    link = Fleet.from_dict({"devices": TWO, "links": [{"between": ["nano", "desk"], "rate": "1 GB/s"}]})
    assert link.airtime("desk", "nano", 1e9) == pytest.approx(1)
    assert show_bytes(1.25e9) == "1.25 GB"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"medium": {**WIFI, "rate": "-3 Mbit/s"}}, r"E103 .*medium.rate: should be a quantity such as 100 Mbit/s"),
        ({"medium": {**WIFI, "rate": -3}}, r"E103 .*medium.rate: should be greater than 0"),
        ({"medium": {**WIFI, "rate": "100 MB"}}, r"E103 .*medium.rate: should be a quantity such as 100 Mbit/s"),
        ({"devices": {"desk": {"memory": "lots"}}}, r"E103 .*memory: should be a quantity such as 6 GB, got 'lots'"),
        ({"devices": {}}, r"E103 .*devices"),
        ({"devices": {"desk": {"memory": 1, "sped": 2}}}, r"E103 .*unknown key.*Did you mean 'speed'"),
        ({"medium": None}, r"E402 .*no link between 'desk' and 'nano'; add one"),
        ({"medium": None, "links": [{"between": ["desk", "nanno"], "rate": 1}]}, r"E401 .*no device 'nanno'.*'nano'"),
        ({"medium": None, "links": [{"between": ["desk", "desk"], "rate": 1}]}, r"E402 .*a link from 'desk' to itself"),
        ({"medium": None, "links": [{"between": ["desk", "nano"], "rate": 1}] * 2}, r"E402 .*two links between"),
        ({"links": [{"between": ["desk", "nano"], "rate": 1}]}, r"E402 .*one or the other"),
        ({"devices": {"a": {"memory": 1, "speed": 1, "profile": "x.json"}}}, r"E402 .*both a speed and a profile"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(change, said):
    with pytest.raises((ConfigError, PlanError), match=said):
        Fleet.from_dict({"devices": TWO, "medium": WIFI, **change}, "fleet.yaml")


@given(st.integers(1, 40))
def test_times_between_measured_batches_lie_between_them(k):
    p = small.profile()
    seconds = p.seconds("forward", k)
    table = np.array([u.forward for u in p.units])
    if k <= 4:
        assert (seconds >= table[:, 0] - 1e-12).all()
        assert (seconds <= table[:, -1] + 1e-12).all()
    else:
        assert np.allclose(seconds, table[:, -1] * k / 4)


def test_profiles_survive_a_file_and_others_are_refused(tmp_path: Path):
    path = tmp_path / "p.json"
    small.profile().save(path)
    assert Profile.load(path) == small.profile()
    data = json.loads(path.read_text())
    for change, said in (
        ({"format": 9}, "E403 .*format 9"),
        ({"batches": [2, 1, 4]}, "E403 .*must ascend"),
        ({"batches": [1, 2]}, "E403 .*3 times for 2 batch sizes"),
        ({"units": []}, "E103 .*units"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises((PlanError, ConfigError), match=said):
            Profile.load(path)
    path.write_text("{")
    with pytest.raises(PlanError, match=r"E403 .*no profile can be read"):
        Profile.load(path)
    with pytest.raises(PlanError, match=r"E407 no profile 'lava-7b'\. Did you mean 'llava-7b'"):
        load_profile("lava-7b")


def test_what_is_shipped_loads():
    assert {"three-jetsons", "desk-and-boards", "eight-mixed"} <= set(shipped(".yaml"))
    assert all(load_fleet(n).synthetic for n in shipped(".yaml"))
    assert all(load_profile(n).synthetic for n in shipped(".json"))
    big, small_ = load_profile("llava-13b"), load_profile("llava-7b")
    assert sum(u.weights for u in big.units) == pytest.approx(2 * 13.35e9, rel=0.03)
    assert sum(u.weights for u in small_.units) == pytest.approx(2 * 7.06e9, rel=0.03)


TASKS = {"a": {"question": "?"}, "b": {"question": "?"}, "c": {"question": "?", "after": ["a"], "rank": 4}}


def test_work_follows_the_graph():
    graph = TaskGraph.from_dict({"rank": 8, "tasks": TASKS})
    samples = {"a": 10, "b": 5, "c": 10}
    w = work_of(graph, TrainConfig(batch_size=2, epochs=3), samples, 8, range(2, 6))
    assert [[t.name for t in s] for s in w.stages] == [["a", "b"], ["c"]]
    assert [(t.ranks, t.active) for s in w.stages for t in s] == [(8, 8), (8, 8), (4, 12)]
    assert (w.batch, w.epochs, w.lowest, w.highest) == (2, 3, 3, 6)
    assert w.intervals(w.stages[0]) == [(3, 2, 2), (2, 2, 1), (4, 2, 0), (6, 1, 0)]
    tuned = work_of(graph, TrainConfig(frozen_ratio=0.5), samples, 8, range(2, 6))
    assert [t.ranks for s in tuned.stages for t in s] == [8, 8, 8]
    with pytest.raises(PlanError, match=r"E404 task 'b' has no training sample"):
        work_of(graph, TrainConfig(), {"a": 1, "c": 1}, 8, range(6))
    with pytest.raises(PlanError, match=r"E404 blocks on layers 2 to 6 of a model with 6"):
        work_of(graph, TrainConfig(), samples, 8, range(2, 7))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 4))
def test_intervals_hold_every_update(counts, batch, epochs):
    tasks = {f"t{i}": {"question": "?"} for i in range(len(counts))}
    w = work_of(
        TaskGraph.from_dict({"tasks": tasks}),
        TrainConfig(batch_size=batch, epochs=epochs),
        dict(zip(tasks, counts, strict=True)),
        5,
        range(3),
    )
    found = w.intervals(w.stages[0])
    assert sum(steps * active for steps, active, _ in found) == sum(epochs * -(-n // batch) for n in counts)
    assert sum(steps * first for steps, _, first in found) == sum(-(-n // batch) for n in counts)

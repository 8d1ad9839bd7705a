"""kill -9 within a stage: whoever goes on, by whatever plan, ends where an undisturbed training does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny
from contextlora.gear.plan import Group
from processes import CHILD, ROOTS, A, B, alone, ends, part, pipeline

CONFIG = {"epochs": 2, "batch_size": 3, "lr": 1e-2, "layers": "2-2", "weight_decay": 0.1, "checkpoint_every": 2}
LAST = [Group(tasks=CHILD, form="single", trainers=[part(A)], size=2)]


def streamed(source, trainer, **more):
    return Group(
        tasks=ROOTS,
        form="single",
        trainers=[part(trainer, 3)],
        size=2,
        ahead="streamed",
        prefix=[part(source, 0, 3)],
        cut=3,
        cache=True,
        **more,
    )


SPLIT = [[pipeline(0, 2, 3, 5)], LAST]
APART = [
    [
        Group(tasks=("weather",), form="single", trainers=[part(A)], size=2),
        Group(tasks=("light",), form="single", trainers=[part(B)], size=4),
    ],
    LAST,
]
SHARED = [[Group(tasks=ROOTS, form="data", trainers=[part(B), part(A, seconds=2.0)], size=2)], LAST]
ALONE = [[Group(tasks=ROOTS, form="single", trainers=[part(A)], size=3)], LAST]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("words"), train=10, test=2)


@pytest.fixture(scope="module")
def want(words, tmp_path_factory):
    """Of a single process."""
    return alone(words, tmp_path_factory.mktemp("alone"), torch.float64, **CONFIG)


def worst(got, want):
    return max((got[k] - want[k]).abs().max().item() for k in want)


def updates(tmp_path, device):
    """The first stage's, in the order in which a device did them."""
    lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if line["stage"] == 0]


def test_the_same_plan_ends_with_the_same_bits_and_another_one_within_rounding(tmp_path, words, want):
    """The trainer dies in the second epoch, when all that it needs had been streamed and cached."""
    plan, dies = [[streamed(B, A)], LAST], {"device": "a", "stage": 0, "update": 7}
    whole = ends(tmp_path / "whole", words, plan, "float64", **CONFIG)
    assert worst(whole["a"], want) < 1e-9
    ends(tmp_path / "killed", words, plan, "float64", dies=dies, **CONFIG)
    assert updates(tmp_path / "killed", "a") == [*range(7)]
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    again = ends(tmp_path / "killed", words, plan, "float64", resume=True, **CONFIG)
    assert all(torch.equal(again[d][k], whole[d][k]) for d in whole for k in want)
    assert updates(tmp_path / "killed", "a")[-2:] == [6, 7], "only what came after the last checkpoint is done again"
    other = ends(tmp_path / "other", words, SPLIT, "float64", resume=True, **CONFIG)
    assert all(worst(other[d], want) < 1e-9 for d in "abc")
    assert updates(tmp_path / "other", "b")[-2:] == [6, 7]


@pytest.mark.slow
def test_tasks_that_stand_at_different_updates_go_on_in_one_group(tmp_path, words, want):
    """b dies early with `light`, while a ends `weather`: then both train both, each task from where it stood."""
    ends(tmp_path, words, APART, "float64", dies={"device": "b", "stage": 0, "update": 3}, **CONFIG)
    assert updates(tmp_path, "a") == [*range(8)]
    got = ends(tmp_path, words, SHARED, "float64", resume=True, **CONFIG)
    assert all(worst(blocks, want) < 1e-9 for blocks in got.values())
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    again = [(line["step"], sorted(line["loss"])) for line in lines if line["stage"] == 0][-6:]
    assert again == [(u, ["light"]) for u in range(2, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["the same", "without b"])
def test_a_pipeline_killed_while_one_of_it_writes(tmp_path, words, want, rest):
    """a has kept update 4 and b only 2: both go on from 2. Without b, its layers are lost: from the stage's start."""
    plan = [[pipeline(0, 4, 5, devices=(A, B))], LAST]
    config = {**CONFIG, "layers": "all"}
    want = alone(words, tmp_path / "alone", torch.float64, **config)
    ends(tmp_path, words, plan, "float64", dies={"device": "b", "stage": 0, "saving": 4}, **config)
    plan = plan if rest == "the same" else ALONE
    got = ends(tmp_path, words, plan, "float64", resume=True, **config)
    assert all(worst(blocks, want) < 1e-9 for blocks in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_twice_under_three_plans(tmp_path, words, want, seed):
    plans = {"streamed": [[streamed(B, A)], LAST], "split": SPLIT, "apart": APART, "shared": SHARED}
    first, second, third = [[*plans][(seed + step * i) % 4] for i, step in enumerate((0, 1, 2))]
    ends(tmp_path, words, plans[first], "float64", dies={"device": "a", "stage": 0, "update": 3 + seed}, **CONFIG)
    ends(
        tmp_path, words, plans[second], "float64", resume=True, dies={"device": "a", "stage": 0, "update": 7}, **CONFIG
    )
    got = ends(tmp_path, words, plans[third], "float64", resume=True, **CONFIG)
    assert all(worst(blocks, want) < 1e-9 for blocks in got.values())

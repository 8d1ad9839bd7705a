"""Plans carried out by real processes: every division of the work ends where a single process does."""

from __future__ import annotations

import json
import signal

import pytest
import torch

import tiny
from contextlora.errors import PlanError
from contextlora.gear import launch
from contextlora.gear.plan import Group
from contextlora.lora.attach import attach
from processes import CHILD, ROOTS, A, B, C, alone, apart, ends, ordered, part, pipeline, plan, together

SINGLE = {
    "task-parallel": [
        [
            Group(tasks=("weather",), form="single", trainers=[part(A)], size=2),
            Group(tasks=("light",), form="single", trainers=[part(B)], size=4),
        ],
        [Group(tasks=CHILD, form="single", trainers=[part(B)], size=4)],
    ],
    "data, uneven": [
        [Group(tasks=ROOTS, form="data", trainers=[part(A, seconds=1), part(B, seconds=2.5)], size=1)],
        [Group(tasks=CHILD, form="data", trainers=[part(B), part(A), part(C)], size=1)],
    ],
}
TOP = {
    "streamed": [
        [
            Group(
                tasks=ROOTS,
                form="single",
                trainers=[part(A, 3)],
                size=2,
                ahead="streamed",
                prefix=[part(B, 0, 3)],
                cut=3,
            )
        ],
        [
            Group(
                tasks=CHILD,
                form="single",
                trainers=[part(B, 3)],
                size=2,
                ahead="streamed",
                prefix=[part(A, 0, 3)],
                cut=3,
                cache=True,
            )
        ],
    ],
    "streamed from two to two": [
        [
            Group(
                tasks=ROOTS,
                form="data",
                trainers=[part(A, 2), part(B, 2)],
                size=1,
                ahead="streamed",
                prefix=[part(C, 0, 2)],
                cut=2,
            )
        ],
        [
            Group(
                tasks=CHILD,
                form="single",
                trainers=[part(A, 3)],
                size=1,
                ahead="streamed",
                prefix=[part(B, 0, 3), part(C, 0, 3)],
                cut=3,
                cache=True,
            )
        ],
    ],
    "local cache": [
        [Group(tasks=ROOTS, form="single", trainers=[part(A)], size=2, ahead="local", cut=3, cache=True)],
        [Group(tasks=CHILD, form="data", trainers=[part(A), part(B)], size=1)],
    ],
}


PIPELINES = {
    "two, uneven": [[pipeline(0, 2, 5)], [pipeline(0, 4, 5, tasks=CHILD, devices=(B, A), size=1)]],
    "three, odd sizes": [[pipeline(0, 2, 3, 5, size=4)], [pipeline(0, 1, 3, 5, tasks=CHILD, size=2)]],
    "beside a single": [
        [
            pipeline(0, 3, 5, tasks=("weather",), size=1),
            Group(tasks=("light",), form="single", trainers=[part(C)], size=3),
        ],
        [pipeline(0, 2, 5, tasks=CHILD)],
    ],
}
PIPELINES_ABOVE = {
    "a frozen first stage": [[pipeline(0, 2, 5)], [pipeline(0, 3, 5, tasks=CHILD)]],
    "a cut within the frozen part": [
        [pipeline(0, 1, 2, 5)],
        [pipeline(0, 4, 5, tasks=CHILD, ahead="local", cut=3, cache=True)],
    ],
    "streamed to a pipeline": [
        [pipeline(3, 4, 5, ahead="streamed", prefix=[part(C, 0, 3)], cut=3, cache=True)],
        [pipeline(2, 4, 5, tasks=CHILD, ahead="streamed", prefix=[part(C, 0, 2)], cut=2)],
    ],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("words"), train=10, test=2)


ALWAYS = ("data, uneven", "streamed", "two, uneven", "local cache")  # one of each kind


def marked(names, always=ALWAYS):
    return [n if n in always else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", marked([*SINGLE, *TOP, *PIPELINES, *PIPELINES_ABOVE]))
def test_every_division_ends_where_one_process_does(tmp_path, words, name):
    layers = "all" if name in {**SINGLE, **PIPELINES} else "2-2"
    config = {"epochs": 2, "batch_size": 3, "lr": 1e-2, "layers": layers, "weight_decay": 0.1}
    want = alone(words, tmp_path / "alone", torch.float64, **config)
    plans = {**SINGLE, **TOP, **PIPELINES, **PIPELINES_ABOVE}
    got = ends(tmp_path, words, plans[name], "float64", **config)
    for device, blocks in got.items():
        worst = max((blocks[k] - want[k]).abs().max().item() for k in want)
        assert worst < 1e-9, f"{device}: {worst}"
        assert json.loads((tmp_path / f"{device}.json").read_text()) == weights_left(plans[name], device)
    assert (tmp_path / "adapter" / "manifest.json").is_file()


def weights_left(stages, device):
    """Bytes of the units that a device has still to run, stage after stage, counted by name; a freed weight has 8."""
    model, _ = tiny.llama(torch.float64)
    parts = [[(p.device, range(p.start, p.stop)) for g in s for p in (*g.prefix, *g.trainers)] for s in stages]
    found = []
    for i in range(len(stages)):
        mine = {u for stage in parts[i:] for d, units in stage if d == device for u in units}
        kept = {f"layers.{u - 1}." for u in mine} | ({"embed"} if 0 in mine else set()) | {"model.norm."}
        kept |= {"lm_head"} if 4 in mine else set()
        found.append(sum(8 * (p.numel() if any(k in n for k in kept) else 1) for n, p in model.named_parameters()))
    return found


@pytest.mark.parametrize("name", marked(["data, uneven", "streamed"], ("streamed",)))
def test_prerequisites_answers_are_asked_in_shares_and_told_to_all(tmp_path, words, name):
    config = {"epochs": 1, "batch_size": 3, "lr": 1e-2, "layers": "all" if name in SINGLE else "2-2"}
    silent = alone(words, tmp_path / "silent", torch.float64, **config)
    want = alone(words, tmp_path / "alone", torch.float64, context="predicted", **config)
    assert any((want[k] - silent[k]).abs().max() > 1e-3 for k in want), "the answers in the prompt matter"
    got = ends(tmp_path, words, {**SINGLE, **TOP}[name], "float64", context="predicted", **config)
    for device, blocks in got.items():
        worst = max((blocks[k] - want[k]).abs().max().item() for k in want)
        assert worst < 1e-9, f"{device}: {worst}"


def test_a_plan_that_does_not_fit_the_model_is_refused_before_anyone_waits():
    model, _ = tiny.llama(torch.float32)
    attach(model, tiny.graph(), layers="2-2")
    launch.check_model(plan(*TOP["streamed"]), model)
    deeper = [
        Group(
            tasks=ROOTS, form="single", trainers=[part(A, 4)], size=2, ahead="streamed", prefix=[part(B, 0, 4)], cut=4
        )
    ]
    with pytest.raises(PlanError, match=r"E405 the plan, stages\.0\.groups\.0\.group: the prefix ends at unit 4"):
        launch.check_model(plan(deeper), model)
    with pytest.raises(PlanError, match=r"E409 units: the plan is of 'tiny', 6 units; this model has 5"):
        launch.check_model(plan(*TOP["streamed"]).model_copy(update={"units": 6}), model)


def test_a_killed_device_ends_the_others_and_the_rest_go_on(tmp_path, words):
    """b dies in the second stage; a says so within 30 s, and goes on alone from the first stage to the same end."""
    config = {"epochs": 2, "batch_size": 3, "lr": 1e-2}
    want = alone(words, tmp_path / "alone", torch.float64, **config)
    ordered(tmp_path, words, SINGLE["task-parallel"], "float64", config, dies={"device": "b", "stage": 1})
    a, b = workers = apart(tmp_path, ("a", "b"))
    b.wait(60)
    assert b.returncode == -signal.SIGKILL
    said = a.wait(30)
    assert a.returncode != 0
    assert "E530 another device is gone" in said
    assert len(workers) == 2
    rest = [
        [Group(tasks=ROOTS, form="single", trainers=[part(A)], size=2)],
        [Group(tasks=CHILD, form="single", trainers=[part(A)], size=2)],
    ]
    got = together(tmp_path, words, rest, "float64", resume=True, **config)["a"]
    assert max((got[k] - want[k]).abs().max().item() for k in want) < 1e-9
    stages = {json.loads(line)["stage"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()}
    assert stages == {0, 1}

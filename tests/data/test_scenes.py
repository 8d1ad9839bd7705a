"""The rendered scenarios: same seed same bytes, keys that follow from the facts, folders that are never overwritten."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from contextlora.data.scenes import SCENARIOS, build, city, factory, iov, render, scenario_graph
from contextlora.errors import ContextLoRAError, DataError
from contextlora.graph import TaskGraph

SCENES = {"iov": iov, "factory": factory, "city": city}
SHAPES = {
    "iov": {"vehicles": (), "weather": (), "road": (), "strategy": ("vehicles", "weather", "road")},
    "iov-weak": {"light": (), "sign": (), "road": (), "strategy": ("light", "sign", "road")},
    "factory": {"helmets": (), "activities": (), "risk": ("helmets", "activities"), "response": ("risk",)},
    "city": {"place": (), "event": (), "density": (), "response": ("event", "density")},
}
LEVELS = {
    "iov": (3, 1),
    "iov-six": (4, 2),
    "iov-eight": (5, 2, 1),
    "iov-weak": (3, 1),
    "factory": (2, 1, 1),
    "city": (3, 1),
}
ROADS = [("normal",), ("wet",), ("broken",), ("narrowed",), ("wet", "narrowed"), ("broken", "narrowed")]
ACTIVITIES = [*itertools.combinations(factory.ACTIVITIES, 1), *itertools.combinations(factory.ACTIVITIES, 2)]
RULES = {
    "strategy": (iov.strategy, (iov.VEHICLES, iov.WEATHER, ROADS)),
    "headlights": (iov.headlights, (iov.LIGHT, iov.WEATHER)),
    "brake": (iov.brake, (iov.PEDESTRIANS, tuple(iov.BRAKE))),
    "risk": (factory.risk, (factory.HELMETS, ACTIVITIES)),
    "factory response": (factory.RESPONSE.__getitem__, (tuple(factory.RESPONSE),)),
    "city response": (city.response, (city.EVENT, city.DENSITY)),
}


def scene_of(scenario: str):
    return SCENES[scenario.split("-")[0]]


def facts_of(scenario: str, count: int) -> list[dict]:
    return [scene_of(scenario).facts(np.random.default_rng((7, i))) for i in range(count)]


def digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha.hexdigest()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(scenario, tmp_path):
    small = {"train": 3, "valid": 1, "test": 2}
    a, b, c = (build(scenario, tmp_path / n, seed=s, **small) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert digest(a) == digest(b) != digest(c)
    pictures = [p.read_bytes() for f in (a, c) for p in sorted((f / "images").iterdir())]
    assert len(set(pictures)) == 12


def test_a_build_is_a_data_folder(tmp_path):
    seen = []
    folder = build(
        "iov", tmp_path / "iov", train=3, valid=2, test=1, progress=lambda done, total: seen.append((done, total))
    )
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert [r["split"] for r in records] == ["train"] * 3 + ["valid"] * 2 + ["test"]
    assert seen == [(i, 6) for i in range(1, 7)]
    graph = TaskGraph.load(folder / "graph.yaml")
    for r in records:
        assert set(r) == {"id", "image", "answers", "facts", "split"}
        assert tuple(r["answers"]) == graph.names
        with Image.open(folder / r["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (224, 224))


def test_variants_of_one_scene_show_the_same_pictures():
    pictures = [render(name, 5)[0].tobytes() for name in SCENARIOS if name.startswith("iov")]
    assert len(pictures) == 4
    assert len(set(pictures)) == 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_graphs_load_and_have_the_shape_of_the_paper(scenario, tmp_path):
    scenario_graph(scenario).save(tmp_path / "graph.yaml")
    graph = TaskGraph.load(tmp_path / "graph.yaml")
    assert graph.name == scenario
    assert tuple(len(level) for level in graph.levels()) == LEVELS[scenario]
    if scenario in SHAPES:
        assert {name: graph.prerequisites(name) for name in graph.names} == SHAPES[scenario]
    assert len(graph.names) == {"iov-six": 6, "iov-eight": 8}.get(scenario, 4)
    for task in graph.tasks.values():
        assert all(o == o.lower() and 1 <= len(o.split()) <= 4 for o in task.options)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_answers_are_valid_and_every_option_is_used(scenario):
    graph, used = scenario_graph(scenario), Counter()
    several = set()
    for facts in facts_of(scenario, 1000):
        key = scene_of(scenario).answers(facts)
        for name, task in graph.tasks.items():
            assert set(key[name]) <= set(task.options)
            assert 1 <= len(key[name]) == len(set(key[name])) <= task.choose
            used.update((name, o) for o in key[name])
            several |= {name} if len(key[name]) > 1 else set()
    assert set(used) == {(n, o) for n, t in graph.tasks.items() for o in t.options}
    assert several == {n for n, t in graph.tasks.items() if t.choose > 1}
    for (name, option), count in used.items():
        assert 50 <= count <= (550 if not graph.tasks[name].after else 700), (name, option, count)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_root_can_be_read_off_another(scenario):
    """Guessing one root from another beats guessing it from nothing by a few points at the most."""
    keys = [scene_of(scenario).answers(f) for f in facts_of(scenario, 3000)]
    roots = scenario_graph(scenario).levels()[0]
    for a, b in itertools.permutations(roots, 2):
        pairs, alone = Counter((k[a], k[b]) for k in keys), Counter(k[b] for k in keys)
        best: dict = {}
        for (x, _), count in pairs.items():
            best[x] = max(best.get(x, 0), count)
        assert (sum(best.values()) - max(alone.values())) / len(keys) < 0.06, (a, b)


@pytest.mark.parametrize("name", RULES)
def test_every_prerequisite_matters(name):
    rule, domains = RULES[name]
    for position, domain in enumerate(domains):
        rest = itertools.product(*(d for i, d in enumerate(domains) if i != position))
        changed = [r for r in rest if len({rule(*r[:position], v, *r[position:]) for v in domain}) > 1]
        assert changed, position


@pytest.mark.parametrize("scenario", ["iov-eight", "factory", "city"])
def test_dependent_answers_are_functions_of_the_prerequisites_answers(scenario):
    """Two pictures with the same answers to P(v) have the same answer to v."""
    graph, seen = scenario_graph(scenario), {}
    for facts in facts_of(scenario, 2000):
        key = scene_of(scenario).answers(facts)
        for name in (n for n in graph.names if graph.prerequisites(n)):
            given_ = (name, *(key[p] for p in graph.prerequisites(name)))
            assert seen.setdefault(given_, key[name]) == key[name]


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.sampled_from(SCENARIOS))
def test_facts_survive_json(seed, index, scenario):
    facts = scene_of(scenario).facts(np.random.default_rng((seed, index)))
    assert json.loads(json.dumps(facts)) == facts


class Stop(Exception):
    pass


def test_an_interrupted_build_is_drawn_again_and_a_finished_one_left_alone(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    small = {"train": 4, "valid": 0, "test": 1}
    with pytest.raises(Stop):
        build("city", tmp_path / "a", progress=stop, **small)
    assert not (tmp_path / "a/data.jsonl").exists()
    (tmp_path / "a/images/00001.jpg").write_bytes(b"torn")
    build("city", tmp_path / "a", **small)
    assert digest(tmp_path / "a") == digest(build("city", tmp_path / "b", **small))

    drawn = []
    build("city", tmp_path / "a", progress=lambda done, total: drawn.append(done), **small)
    assert drawn == []


@pytest.mark.parametrize("left", [(), ("images",), ("images", "scenario.json.part")])
def test_a_build_interrupted_before_its_stamp_goes_on(left, tmp_path):
    for name in left:
        (tmp_path / name).mkdir() if name == "images" else (tmp_path / name).write_text("{")
    assert (build("factory", tmp_path, train=1, valid=0, test=0) / "data.jsonl").exists()


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    photos = tmp_path / "photos"
    (photos / "images").mkdir(parents=True)
    (photos / "images/00000.jpg").write_bytes(b"a real photograph")
    other = build("city", tmp_path / "other", train=1, valid=0, test=0)
    a_file = tmp_path / "file"
    a_file.write_text("x")
    before = digest(tmp_path)
    for folder in (mine, photos, other, a_file):
        with pytest.raises(DataError) as e:
            build("city", folder, train=2, valid=0, test=0)
        assert e.value.code == "E222"
        assert str(folder) in str(e.value)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda f: build("iov-sex", f), "E220"),
        (lambda f: build("iov", f, train=0, valid=0, test=0), "E221"),
        (lambda f: build("iov", f, train=-1), "E221"),
        (lambda f: build("iov", f, seed=-1), "E221"),
    ],
)
def test_bad_arguments_are_named(call, code, tmp_path):
    with pytest.raises(ContextLoRAError) as e:
        call(tmp_path / "x")
    assert e.value.code == code
    assert not (tmp_path / "x").exists()

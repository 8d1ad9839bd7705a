"""Masks, repair, mechanism and time as measures of a comparison: what results keep, and what pages make of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import parsed
from typer.testing import CliRunner

from contextlora.cli import app
from contextlora.data.examples import load_examples
from contextlora.data.scenes import scenario_graph
from contextlora.errors import AdapterError, ConfigError
from contextlora.reports import probes
from contextlora.reports.comparison import page
from contextlora.reports.grids import Grid, as_html, as_text
from contextlora.reports.jobs import expand
from contextlora.reports.kinds import KINDS, Style
from contextlora.reports.measures import MEASURES
from contextlora.reports.recipe import load_recipe
from contextlora.reports.reproduce import Reproduced, reproduce
from contextlora.reports.statistics import Interval
from contextlora.reports.store import Store
from contextlora.reports.tables import Findings, as_data
from contextlora.reports.views import VIEWS, inference, mechanism, sections
from contextlora.reports.views.masks import drawn, points_lost
from contextlora.reports.views.repair import costs_of_steps, stages
from tiny_llava import save_tiny_llava

GRAPH = scenario_graph("iov")
TASKS = list(GRAPH.names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make a smoke preset one of a second or two."""
    folder = save_tiny_llava(tmp_path_factory.mktemp("tiny"))
    return [f"model={folder}", "data={train: 8, valid: 1, test: 6}", "train.layers=all", "train.lr=0.3", "seeds=1"]


def made(name: str, out: Path, words: list[str]) -> tuple[Reproduced, dict[str, Any], list[dict[str, str]]]:
    """A recipe's smoke preset: what it made, the results by arm, and the rows of results.csv."""
    found = reproduce(name, "smoke", overrides=words, out=out, silent=True)
    parsed(found.page.read_text())
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = {r["job"]["arm"]: r for r in found.findings.results.values()}
    return found, json.loads(json.dumps(results)), rows


def test_every_kind_can_be_measured_and_shown():
    assert KINDS.keys() == MEASURES.keys() == VIEWS.keys()


@pytest.mark.parametrize("name", ["interpretability", "repair", "mechanism", "inference"])
def test_a_page_before_anything_is_done(name: str, tmp_path: Path):
    recipe = load_recipe(name, "smoke")
    text = page(Findings(recipe, expand(recipe), Store(tmp_path)), ["contextlora"])
    parsed(text)
    assert "0 of" in text


# --- masks -----------------------------------------------------------------------------------------------------------


def test_masks_from_recipe_to_page(tmp_path: Path, tiny: list[str]):
    found, results, rows = made("interpretability", tmp_path / "out", tiny)
    ours, joint = results["ContextLoRA"], results["LoRA"]
    assert list(ours["scores"]) == TASKS
    assert {b: list(of) for b, of in ours["parts"].items()} == {
        b: [t for t in TASKS if b in GRAPH.active(t)] for b in TASKS
    }
    assert {b: list(of) for b, of in joint["parts"].items()} == dict.fromkeys(TASKS, TASKS)
    assert len(ours["parts"]["weather"]["strategy"]) == 6
    masked = [(r["task"], r["masked"]) for r in rows if r["arm"] == "ContextLoRA"]
    assert len(masked) == len(set(masked)) == 4 + 3 + 4
    assert ("strategy", "nothing") in masked
    text = found.page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 1
    assert text.count('<div class="figure"><svg') == 2
    assert "Points lost without a block, iov" in text


def test_points_lost_are_paired_over_items():
    whole, without = {"a": 1.0, "b": 1.0, "c": 0.5}, {"a": 0.0, "b": 1.0, "c": 0.5}
    result = {"scores": {"weather": whole}, "parts": {"weather": {"weather": without}}}
    lost = points_lost({0: result, 1: result}, GRAPH)
    assert list(lost) == [("weather", "weather")]
    value = lost["weather", "weather"]
    assert (value.mean, value.seeds, value.items) == (pytest.approx(1 / 3), 2, 3)
    assert "+33" in drawn(lost, GRAPH)


# --- repair ----------------------------------------------------------------------------------------------------------


def test_repair_from_recipe_to_page(tmp_path: Path, tiny: list[str]):
    found, results, rows = made("repair", tmp_path / "out", tiny)
    ours, joint = results["ContextLoRA"], results["LoRA"]
    assert list(ours["parts"]) == ["poisoned", "repaired", "descendants"]
    assert list(joint["parts"]) == ["poisoned", "continued", "retrained"]
    assert ours["detail"] == {
        "poisoned": "vehicles",
        "trained": {"clean": TASKS, "poisoned": TASKS, "repaired": ["vehicles"], "descendants": ["strategy"]},
    }
    for result in (ours, joint):
        assert all(len(s) == 6 for part in result["parts"].values() for s in part.values())
    # 8 pictures, one epoch: a block's own batches hold 1, joint ones 4 of 4 tasks, and 1 where one task goes on
    assert [ours["cost"][k] for k in ("updates", "all_updates", "samples")] == [8, 32, 32]
    costs = ours["part_cost"]["repaired"], joint["part_cost"]["continued"]
    assert [(c["updates"], c["all_updates"], c["samples"]) for c in costs] == [(8, 8, 8)] * 2
    assert costs[0]["trained_parameters"] * 4 == costs[1]["trained_parameters"]
    assert joint["parts"]["retrained"] == joint["scores"]
    assert ours["parts"]["repaired"]["weather"] == ours["parts"]["poisoned"]["weather"], "another block is not touched"
    assert {(r["step"], r["samples"]) for r in rows if r["arm"] == "LoRA"} == {
        ("clean", "32"),
        ("poisoned", "32"),
        ("continued", "8"),
        ("retrained", "32"),
    }
    assert len(rows) == 2 * 4 * 4
    heads, table = costs_of_steps(found.findings)
    assert len(table) == 8
    assert table[2][:4] == ["iov", "ContextLoRA", "repaired", "vehicles"]
    assert len(heads) == len(table[0])
    text = found.page.read_text()
    assert "iov, LoRA, vehicles poisoned" in text
    assert "Of the clean training." in text
    assert [len(g.columns) for g in sections(found.findings)[0].grids] == [4, 3, 4]


def test_steps_that_an_arm_has_not_are_left_out():
    assert stages({}) == {}
    assert stages({0: {"parts": {"poisoned": {}, "repaired": {}}}}) == {
        "clean": "",
        "poisoned": "poisoned",
        "repaired or continued": "repaired",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("poisoned={}", r"E122 repair: which task of 'iov' is poisoned\? Add poisoned: \{iov: TASK\}, .*: vehicles, "),
        ("poisoned={iov: vehicle}", r"E104 poisoned.iov: 'iov' has no task 'vehicle'\. Did you mean 'vehicles'\?"),
        ("train.label_noise=0.5", "E122 repair: repair shuffles all answers"),
        ("sweep={noise_tasks: [[road]]}", "E122 repair: repair shuffles all answers"),
        ("arms.LoRA={zero_shot: true}", "E103 .*repair is not taken of zero_shot arms, only of trained"),
        ("measure=masks", "E103 .*only `measure: repair` poisons a task"),
    ],
)
def test_a_repair_that_makes_no_sense(given: str, said: str):
    with pytest.raises(ConfigError, match=said):
        expand(load_recipe("repair", "smoke", [given]))


def test_ids_name_the_poisoned_task():
    first, second = ({j.id for j in expand(load_recipe("repair", "smoke", w))} for w in ([], ["poisoned.iov=road"]))
    assert not first & second


# --- mechanism -------------------------------------------------------------------------------------------------------


def test_mechanism_from_recipe_to_page(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "SAMPLES", 2)
    found, results, rows = made("mechanism", tmp_path / "out", tiny)
    ours, joint = results["ContextLoRA"], results["LoRA"]
    assert {t: len(s) for t, s in ours["scores"].items()} == dict.fromkeys(TASKS, 3)
    assert {p: list(of) for p, of in ours["parts"].items()} == {"none": ["strategy"], "prerequisites": ["strategy"]}
    assert "parts" not in joint
    layers = ours["detail"]["layers"]["strategy"]
    assert layers["blocks"] == TASKS
    assert np.shape(layers["change"]) == (3, 4)
    for result in (ours, joint):
        cosine = np.array(result["detail"]["alignment"]["cosine"])
        assert cosine.diagonal() == pytest.approx(np.ones(4))
    assert [r["blocks"] for r in rows if r["arm"] == "ContextLoRA"] == ["all"] * 4 + ["none", "prerequisites"]
    grids = sections(found.findings)[0].grids
    push = grids[1].rows["iov", "strategy", "ContextLoRA"]["push"]
    parts = ours["parts"]
    expected = [parts["prerequisites"]["strategy"][i] - parts["none"]["strategy"][i] for i in parts["none"]["strategy"]]
    assert push.mean == pytest.approx(np.mean(expected))
    assert found.page.read_text().count('<div class="figure"><svg') == 1 + 2


def test_a_zero_gradient_leaves_its_cell_empty():
    empty = {"detail": {"alignment": {"tasks": ["a", "b"], "cosine": [[1.0, None], [None, 1.0]]}}}
    svg = mechanism._cosines({0: empty})
    assert svg.count("+1.00") == 2
    assert "nan" not in svg


@pytest.mark.parametrize("name", ["interpretability", "mechanism"])
def test_a_method_without_blocks_is_refused_before_it_trains(
    name: str, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probes, "trained", lambda *_: pytest.fail("trained"))
    with pytest.raises(AdapterError, match="E303 iov · h · seed 0: the layers of 'hydralora' hold no blocks of tasks"):
        reproduce(name, "smoke", overrides=[*tiny, "arms={h: {method: hydralora}}"], out=tmp_path, silent=True)


# --- time ------------------------------------------------------------------------------------------------------------


def test_drift_is_not_in_the_ratio(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    """The machine slows down with every batch, and the arm takes twice what the base model takes beside it."""
    order = list[bool]()

    def seconds(o: Any, part: Any, task: str, *, plain: bool) -> float:
        order.append(plain)
        return (1 if plain else 2) * 1.1 ** ((len(order) - 1) // 2)

    monkeypatch.setattr(probes, "_seconds", seconds)
    words = [*tiny, "data={train: 4, valid: 0, test: 16}", "arms={ContextLoRA: {}}"]
    found, results, rows = made("inference", tmp_path / "out", words)
    assert order[:6] == [False, True, True, False, False, True]
    assert list(results["ContextLoRA"]["scores"]["road"]) == ["batch 1", "batch 2", "batch 3"]
    for row in sections(found.findings)[0].grids[1].rows.values():
        assert (row["ratio"].low, row["ratio"].mean, row["ratio"].high) == pytest.approx((2, 2, 2))
    assert {r["model"] for r in rows} == {"arm", "base model"}
    assert "differences" not in as_data(found.findings)


def test_a_ratio_against_hand_computation():
    found = inference.ratio(np.array([[2.0, 8.0]]), np.array([[1.0, 1.0]]))
    assert (found.mean, found.low, found.high) == pytest.approx((4, 2, 8))


def test_both_answer_the_same_and_the_arm_is_back_after(tmp_path: Path, tiny: list[str]):
    from contextlora.lora.attach import attached_state, gated_layers
    from contextlora.reports.bench import Bench, prepared
    from contextlora.reports.store import Store

    recipe = load_recipe("inference", "smoke", tiny)
    bench = Bench(recipe, Store(tmp_path), lambda _: None)
    job = expand(recipe)[0]
    with bench.opened(job) as o:
        prepared(o, job)
        before, state = gated_layers(o.model), attached_state(o.model)
        part = load_examples(o.folder, job.graph, split="test")[:2]
        assert all(probes._seconds(o, part, "weather", plain=plain) > 0 for plain in (True, False))
        assert gated_layers(o.model) == before
        assert attached_state(o.model) is state


# --- tables ----------------------------------------------------------------------------------------------------------


def test_what_excludes_no_difference_is_marked():
    style = Style(1, 1, higher=False, against=1.0)
    rows = {
        ("x",): {"slow": Interval(2, 1.5, 3, 2, 9), "even": Interval(1, 0.5, 2, 1, 9), "one": Interval(2, 2, 2, 1, 1)}
    }
    grid = Grid("t", ["task"], ["slow", "even", "one", "none"], rows, style, 2)
    assert as_text(grid) == [
        {
            "task": "x",
            "slow": "2.0 (1.5 to 3.0) *",
            "even": "1.0 (0.5 to 2.0, 1 seed)",
            "one": "2.0 (2.0 to 2.0, 1 seed)",
            "none": "",
        }
    ]
    assert as_html(grid).count('class="bad"') == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interpretability", "repair", "mechanism", "inference"])
def test_the_shipped_smokes_on_the_embedded_model(name: str, tmp_path: Path):
    sizes = "data={train: 8, valid: 1, test: 8, seed: 7}"
    words = ["report", name, "--preset", "smoke", "--out", str(tmp_path / "out"), "--json", "--set", sizes]
    done = CliRunner().invoke(app, [*words, "--set", "arms={ContextLoRA: {batch_size: 1}}", "--set", "seeds=1"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["done"], said["total"]) == (1, 1)
    assert said["tables"][0]["rows"]

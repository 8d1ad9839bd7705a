"""Recipes about federations on a tiny model: results, pages, and numbers against counts made here."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_page import parsed

from contextlora.errors import ConfigError
from contextlora.reports.jobs import expand
from contextlora.reports.recipe import load_recipe, recipes
from contextlora.reports.reproduce import reproduce
from tiny_llava import save_tiny_llava

SMOKE = {"data": {"train": 8, "valid": 1, "test": 6}, "train": {"lr": 0.01, "layers": "all"}, "seeds": 1}
SLICES = {"share": 0.3, "calibration": 1}
FEDERATION = {"rounds": 2, "updates": 1, "max_samples": 4, "slices": SLICES, "limits": {"collision": 1.0}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("tiny")))


def results(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in sorted((out / "results").glob("*.json"))]
    return sorted(found, key=lambda r: r["job"]["arm"])


def made(folder: Path, tiny: str, **more: Any) -> Path:
    data = {"title": "t", "paper": "p", "model": tiny, "scenarios": ["iov"], "presets": {"smoke": SMOKE}, **more}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_methods_are_simulated_asked_and_shown_once(tmp_path: Path, tiny: str) -> None:
    arms = {
        "ours": {"federation": {"aggregate": "ours"}},
        "told": {"federation": {"aggregate": "hard_routing"}},
        "full": {"federation": {"aggregate": "full"}},
        "alone": {"federation": {"aggregate": "ffa"}, "alone": True},
        "base": {"zero_shot": True},
    }
    more = {"measure": "federated", "arms": arms, "federation": FEDERATION, "devices": 5, "questions": 5}
    path = made(tmp_path, tiny, **more)
    shown = reproduce(path, "smoke", out=tmp_path / "out", silent=True)
    alone, base, full, ours, told = results(tmp_path / "out")
    for r in (alone, base, full, ours, told):
        assert {t: sorted(s) for t, s in r["scores"].items()} == {
            t: [f"{i:04}" for i in range(5)] for t in ("vehicles", "weather", "road", "strategy")
        }
    assert alone["cost"]["sent_parameters"] == 0 < alone["cost"]["trained_parameters"]
    assert alone["cost"]["trained_parameters"] < full["cost"]["trained_parameters"]
    assert ours["cost"]["sent_bytes"] < full["cost"]["sent_bytes"]
    assert ours["cost"]["trained_parameters"] == told["cost"]["trained_parameters"]
    assert {a["updates"] for a in (alone["cost"], full["cost"], ours["cost"])} == {2.0}
    (run,) = ours["detail"]["runs"]
    assert np.sum(run["routes"]) == 4 * 5
    assert [r["clusters"] for r in run["rounds"]] == [[[f"d{i:02}" for i in range(5)]]] * 2
    text = (tmp_path / "out" / "report.html").read_text()
    parsed(text)
    for title in ("Distance to hard routing", "What travelled", "Where the gate sent prompts"):
        assert title in text
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {r["arm"] for r in rows} == set(arms)
    assert all(float(r["sent_bytes"]) > 0 for r in rows if r["arm"] in ("ours", "full"))
    assert shown.findings.done == shown.findings.total == 5
    begun = {p.name: p.read_text() for p in (tmp_path / "out" / "claims").iterdir()}
    reproduce(path, "smoke", out=tmp_path / "out", silent=True)
    assert begun == {p.name: p.read_text() for p in (tmp_path / "out" / "claims").iterdir()}


def test_more_devices_are_a_line_and_collide_more(tmp_path: Path, tiny: str) -> None:
    arms = {"ours": {}, "LoRA": {"federation": {"aggregate": "fedavg_lora"}}}
    more = {"measure": "federated", "arms": arms, "federation": FEDERATION, "sweep": {"devices": [2, 4]}}
    path = made(tmp_path, tiny, **more, figure="lines", questions=2)
    reproduce(path, "smoke", out=tmp_path / "out", silent=True)
    found = {(r["job"]["arm"], r["job"]["point"]["devices"]): r["cost"] for r in results(tmp_path / "out")}
    assert found["LoRA", 2]["collision"] == found["LoRA", 4]["collision"] == 1
    assert 0 < found["ours", 2]["collision"] < found["ours", 4]["collision"] < 1
    assert "worst collision rate of a cluster" in (tmp_path / "out" / "report.html").read_text()


def test_budgets_of_all_layers_are_the_share_and_entropies_are_shares(tmp_path: Path, tiny: str) -> None:
    arms = {a: {"federation": {"slices": {**SLICES, "allocation": a}}} for a in ("entropy", "uniform")}
    reproduce(made(tmp_path, tiny, measure="layers", arms=arms), "smoke", out=tmp_path / "out", silent=True)
    entropy, uniform = results(tmp_path / "out")
    for rates in uniform["scores"].values():
        assert max(rates.values()) - min(rates.values()) < 0.02
        assert np.mean(list(rates.values())) == pytest.approx(0.3, abs=0.01)
    for r in (entropy, uniform):
        found = [
            v
            for part, tasks in r["parts"].items()
            if part.startswith("entropy")
            for t in tasks.values()
            for v in t.values()
        ]
        assert 0 < min(found) < max(found) <= 1
    parsed((tmp_path / "out" / "report.html").read_text())


def test_collisions_are_those_of_the_devices_own_masks(tmp_path: Path, tiny: str, monkeypatch: Any) -> None:
    from contextlora.reports import federations

    kept: dict[int, Any] = {}
    rates = federations._rates

    def look(s: Any, slices: Any) -> Any:
        kept[len(slices)] = slices
        return rates(s, slices)

    monkeypatch.setattr(federations, "_rates", look)
    limits = {**FEDERATION, "limits": {"collision": 0.1}}
    more = {"measure": "collisions", "arms": {"ours": {}}, "federation": limits, "devices": 3}
    reproduce(made(tmp_path, tiny, **more), "smoke", out=tmp_path / "out", silent=True)
    (r,) = results(tmp_path / "out")
    for n, slices in kept.items():
        worst = 0.0
        for layer, mask in slices["d00"].masks.items():
            sets = [set(x.masks[layer].indices.tolist()) for x in slices.values()]
            met = set().union(*(a & b for a, b in combinations(sets, 2)))
            worst = max(worst, len(met) / mask.size)
        assert r["parts"][str(n)]["all, counted"]["worst layer"] == pytest.approx(worst)
        assert r["parts"][str(n)]["clusters planned with counts, counted"]["worst cluster"] <= 0.1
    parsed((tmp_path / "out" / "report.html").read_text())


def test_one_receiver_costs_the_same_by_either_cast_and_outage_holds(
    tmp_path: Path, tiny: str, monkeypatch: Any
) -> None:
    from contextlora.reports import airtime

    monkeypatch.setattr(airtime, "RUNS", 300)
    arms = {c: {"federation": {"radio": {"cast": c, "outage": 0.2}}} for c in ("broadcast", "unicast")}
    more = {"measure": "radio", "arms": arms, "sweep": {"devices": [2, 4]}}
    reproduce(made(tmp_path, tiny, **more), "smoke", out=tmp_path / "out", silent=True)
    found = {(r["job"]["arm"], r["job"]["point"]["devices"]): r["parts"] for r in results(tmp_path / "out")}
    assert found["broadcast", 2] == found["unicast", 2]
    for size in airtime.SIZES:
        (many,), (few,) = (found[c, 4]["per joule"][size].values() for c in ("broadcast", "unicast"))
        assert many > few
    (missed,) = found["broadcast", 2]["missed"]["1.05 MB"].values()
    assert 0 < missed < 0.2, "more power than planned for is left for most links"
    parsed((tmp_path / "out" / "report.html").read_text())


def test_keys_that_no_federation_has_are_refused_and_named(tmp_path: Path, tiny: str) -> None:
    path = made(tmp_path, tiny, measure="federated", arms={"ours": {}}, federation={"ronds": 2})
    with pytest.raises(ConfigError, match="E103 federation: ronds: unknown key"):
        expand(load_recipe(path, "smoke"))
    path = made(tmp_path, tiny, arms={"ours": {"federation": {"rounds": 2}}})
    with pytest.raises(ConfigError, match="federation, devices: only for measure federated"):
        load_recipe(path, "smoke")


@pytest.mark.parametrize("name", [n for n in recipes() if n.startswith("so-lora")])
def test_shipped_smoke_presets_need_no_data(name: str) -> None:
    found = load_recipe(name, "smoke")
    jobs = expand(found)
    assert found.scenarios == ("iov",)
    assert len({j.id for j in jobs}) >= len(found.arms)
    for preset in ("laptop", "gpu"):
        load_recipe(name, preset, ["scenarios=[iov]"])

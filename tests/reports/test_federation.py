"""A federation's page: what it says is what metrics.jsonl says, and it stands alone."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_page import EVIL, parsed
from typer.testing import CliRunner

import tiny
from contextlora.cli import app
from contextlora.data.collate import Encoder
from contextlora.errors import RunError
from contextlora.federated.federation import Federation, load_federation, save_federation
from contextlora.federated.layer import layers
from contextlora.federated.live import live
from contextlora.federated.simulate import simulate
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures
from contextlora.reports import federation_figures as figures
from contextlora.reports.federation import REFUSALS, is_federation, page, write_federation_report
from contextlora.reports.rounds import read_rounds, read_settings
from federated.federation import small, write_words

DEVICES = {"ant": "weather", "bee": "weather", "cat": "action"}


def settings(words: Path, out: Path, **more: Any) -> Federation:
    one = {"updates": 1, "slices": {"share": 0.3, "calibration": 1}, "radio": {"step": "5 m"}}
    return small(words, out, **{"devices": DEVICES, **one, **more})


def run(found: Federation, **how: Any) -> Path:
    model, processor = tiny.llama(torch.float32)
    graph = tiny.graph()
    attach(model, graph, make=layers(0))
    simulate(found, reader=ImageFeatures(model, Encoder(processor, graph)), **{"silent": True, **how})
    return Path(found.out)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"), train=12)


@pytest.fixture(scope="module")
def seen(words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in which a device is corrupted and another one killed, and what the terminal showed of it."""
    faults = [
        {"what": "corrupt", "who": ["bee"], "rounds": [1, 1]},
        {"what": "kill", "who": ["cat"], "rounds": [3, 3]},
    ]
    console = Console(file=StringIO(), force_terminal=True, width=140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contextlora.federated.simulate.live", partial(live, console=console))
        folder = run(settings(words, tmp_path_factory.mktemp("run"), faults=faults), silent=False)
    return folder, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def folder(seen: tuple[Path, str], tmp_path: Path) -> Path:
    """The run's folder, to do with as one likes."""
    return Path(shutil.copytree(seen[0], tmp_path / "run", ignore=shutil.ignore_patterns("kept", "adapters")))


@pytest.fixture(scope="module")
def text(seen: tuple[Path, str]) -> str:
    """The run's page."""
    return write_federation_report(seen[0]).read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose figures are empty, where it is their tables that matter: drawing takes a second."""
    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


class Tables(HTMLParser):
    """The tables of a page, each row by its heads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []
        self.cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self.cell is not None
            self.found[-1][-1].append(self.cell)
            self.cell = None

    def by(self, head: str) -> list[dict[str, str]]:
        """The rows of the table whose first head is `head`."""
        heads, *rows = next(t for t in self.found if t[0][0] == head)
        return [dict(zip(heads, row, strict=True)) for row in rows]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_every_device_and_cluster_is_named(folder: Path, text: str):
    tables, last = Tables(text), lines(folder)[-1]
    rows = {r["device"]: r for r in tables.by("device")}
    assert {n: r["task"] for n, r in rows.items()} == DEVICES
    assert rows["cat"]["cluster of"] == "not heard", "it is dead"
    assert rows["cat"]["rounds there"] == "3"
    assert number(rows["ant"]["last loss"]) == pytest.approx(last["losses"]["ant"], abs=5e-5)
    assert [r["which"].split(", ") for r in tables.by("cluster of")] == last["clusters"]
    assert [number(r["worst collision"]) for r in tables.by("cluster of")] == pytest.approx(
        last["collisions"], abs=5e-5
    )


def test_the_table_of_rounds_is_metrics_jsonl(folder: Path, text: str):
    rows, found = Tables(text).by("round"), lines(folder)
    assert len(rows) == len(found) == 4
    for row, r in zip(rows, found, strict=True):
        assert int(row["round"]) == r["step"]
        assert int(row["devices"]) == len(r["losses"])
        assert int(row["clusters"]) == len(r["clusters"])
        assert number(row["loss"]) == pytest.approx(r["loss"], abs=5e-5)
        for slot in ("rows", "slices"):
            assert number(row[f"{slot}, bytes"]) == r["bytes"].get(slot, 0)
        assert number(row["bytes"]) == sum(r["bytes"].values()) > 0
        for head, key in (("J", "energy"), ("s on the air", "seconds")):
            assert number(row[head]) == pytest.approx(r[key], rel=1e-3)
        assert (int(row["reached"]), int(row["asked"])) == (r["reached"], r["asked"])
        assert number(row["worst collision"]) == pytest.approx(max(r["collisions"]), abs=5e-5)
        assert row["refused"] == (", ".join(f"{c}: {n}" for c, n in sorted(r["refused"].items())) or "0")


def test_it_stands_alone(folder: Path, text: str):
    tags = parsed(text)
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == 5
    assert all(link.startswith(("data:", "#")) for link in tags.links)
    assert not re.search(r'(?:src|href)\s*=\s*"?https?:|url\((?!#)|@import', text)
    drawn = text[text.index("<svg") : text.index("</svg>")]
    for name in ("ant", "bee", "cat", "cluster of ant", "not heard"):
        assert f">{name}</text>" in drawn, name
    assert write_federation_report(folder, folder / "sub" / "again.html").read_text() == text


def test_a_round_tells_what_it_refused_itself(folder: Path, text: str):
    found = [r["refused"] for r in lines(folder)]
    assert found[0] == found[3] == {}
    assert sum(found[1].values()) > 0
    rows = Tables(text).by("code")
    assert {r["code"]: int(r["messages"]) for r in rows} == {
        code: sum(f.get(code, 0) for f in found) for code in {c for f in found for c in f}
    }
    assert all(r["what it means"] == REFUSALS[r["code"]] for r in rows)


def test_codes_mean_what_the_documentation_says():
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    documented = dict(re.findall(r"^\| (E\d+) \| (.*) \|$", text, re.MULTILINE))
    assert {code: documented[code] for code in REFUSALS} == REFUSALS


def test_a_cut_line_is_none_and_a_repeated_round_counts_as_last_told(folder: Path, undrawn: None):
    found = lines(folder)
    again = {**found[1], "loss": 7.25}
    kept = [*found[:3], again, found[2]]
    text = "\n".join(json.dumps(x) for x in kept) + '\n{"time": 1.0, "st'
    (folder / "metrics.jsonl").write_text(text)
    rows = Tables(write_federation_report(folder).read_text()).by("round")
    assert [r["round"] for r in rows] == ["0", "1", "2"]
    assert rows[1]["loss"] == "7.2500"


def test_a_round_whose_line_was_lost_leaves_a_gap(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_bytes("\n".join([found[0], "\0\xff{]", *found[2:]]).encode("latin-1"))
    parsed(write_federation_report(folder).read_text())
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    (axes,) = figures.loss_by_device(read_rounds(folder), {}).axes
    assert np.isnan(axes.lines[0].get_ydata()).tolist() == [False, True, False, False]


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "stage": 0, "loss": {"light": 2.0}}\n', '{"step": 0, "lo'])
def test_where_no_round_has_ended(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert not is_federation(tmp_path)
    with pytest.raises(RunError, match=r"E525 .*metrics\.jsonl has no round that has ended"):
        write_federation_report(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.startswith("error E525")


def test_the_command_knows_a_federation(folder: Path, undrawn: None):
    done = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"report": str(folder / "report.html")}
    assert (folder / "report.html").read_text() == page(read_rounds(folder), read_settings(folder), "run")


def test_figures_draw_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    rounds, found = read_rounds(folder), lines(folder)
    (axes,) = figures.loss_by_device(rounds, DEVICES).axes
    for line, name in zip(axes.lines, sorted(DEVICES), strict=False):
        expected = [r["losses"].get(name, np.nan) for r in found]
        assert np.array_equal(line.get_ydata(), expected, equal_nan=True), name
    (axes,) = figures.bytes_by_slot(rounds).axes
    tops = np.array([p.get_data().values for p in axes.patches])
    assert tops[-1] * 1e6 == pytest.approx([sum(r["bytes"].values()) for r in found])
    assert tops[0] * 1e6 == pytest.approx([r["bytes"]["rows"] for r in found])
    above, below = figures.energy_and_reach(rounds).axes
    assert above.patches[0].get_data().values == pytest.approx([r["energy"] for r in found])
    for stairs, key in zip(below.patches, ("asked", "reached"), strict=True):
        assert stairs.get_data().values.tolist() == [r[key] for r in found]
    (axes,) = figures.collision_rates(rounds, 0.5).axes
    assert axes.patches[0].get_data().values == pytest.approx([max(r["collisions"]) for r in found])
    assert axes.lines[0].get_ydata() == [0.5, 0.5]


def test_the_map_puts_devices_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    rounds, last = read_rounds(folder), lines(folder)[-1]
    (axes,) = figures.device_map(rounds, 200.0).axes
    assert {t.get_text(): [*t.xy] for t in axes.texts} == last["positions"]
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    want = {f"cluster of {g[0]}": [last["positions"][n] for n in g] for g in last["clusters"] if len(g) > 1}
    assert want.items() <= drawn.items()
    assert drawn["not heard"] == [last["positions"]["cat"]]
    ways = figures.ways(rounds)
    assert ways["bee"] == [tuple(r["positions"]["bee"]) for r in lines(folder)]
    still = [r.model_copy(update={"positions": rounds[0].positions}) for r in rounds]
    assert figures.ways(still) == {}


def test_without_settings_or_positions(folder: Path, undrawn: None):
    (folder / "federation.yaml").unlink()
    assert "not kept beside the rounds" in write_federation_report(folder).read_text()
    bare = [{k: v for k, v in r.items() if k != "positions"} for r in lines(folder)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, bare)))
    text = write_federation_report(folder).read_text()
    assert parsed(text).seen.count("svg") == 4
    assert {r["device"] for r in Tables(text).by("device")} == set(DEVICES)


def test_over_a_measured_channel_there_is_no_map(words: Path, tmp_path: Path, undrawn: None):
    pairs = [f"0,{a},{b},50e6" for a in ("ant", "bee") for b in ("ant", "bee") if a != b]
    (tmp_path / "rates.csv").write_text("\n".join(["round,from,to,rate_bit_s", *pairs]))
    two = {"ant": "weather", "bee": "light"}
    folder = run(settings(words, tmp_path / "run", rounds=2, trace=str(tmp_path / "rates.csv"), devices=two))
    text = write_federation_report(folder).read_text()
    assert parsed(text).seen.count("svg") == 4
    assert "No map: the channel was measured" in text
    assert [r["which"] for r in Tables(text).by("cluster of")] == ["ant, bee"]


def test_a_single_device(words: Path, tmp_path: Path):
    folder = run(settings(words, tmp_path / "run", rounds=1, devices={"ant": "weather"}))
    text = write_federation_report(folder).read_text()
    assert parsed(text).seen.count("svg") == 5
    assert [(r["device"], r["cluster of"]) for r in Tables(text).by("device")] == [("ant", "ant")]
    assert "No message was refused." in text


def test_names_from_a_file_are_never_markup(folder: Path):
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"bee"', json.dumps(EVIL)).replace("E627", "<b>"))
    text = write_federation_report(folder).read_text()
    assert "script" not in parsed(text).seen
    assert EVIL in {r["device"] for r in Tables(text).by("device")}


def test_many_devices_and_rounds_stay_a_page(folder: Path):
    one = lines(folder)[0]
    names = [f"d{i:03d}" for i in range(60)]
    groups = [names[i : i + 3] for i in range(0, 60, 3)]
    many = {
        **one,
        "losses": dict.fromkeys(names, 1.0),
        "clusters": groups,
        "collisions": [0.01] * 20,
        "positions": {n: [i, -i] for i, n in enumerate(names)},
    }
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps({**many, "step": i}) for i in range(510)))
    path = write_federation_report(folder)
    text = path.read_text()
    assert len(Tables(text).by("round")) == 500
    assert "metrics.jsonl has all 510" in text
    assert {r["cluster of"] for r in Tables(text).by("cluster of")} == {g[0] for g in groups}
    assert all(f">{n}</text>" in text for n in names)
    assert path.stat().st_size < 2e6


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_the_terminal_shows_the_rounds(seen: tuple[Path, str]):
    folder, shown = seen
    final = shown[shown.rindex("worst collision") :]
    for r in lines(folder):
        cells = [str(r["step"]), f"{r['loss']:.3f}", str(len(r["losses"])), str(len(r["clusters"]))]
        cells += [f"{sum(r['bytes'].values()) / 1e6:.3f}", f"{r['energy']:.3g}", f"{r['reached']}/{r['asked']}"]
        cells += [f"{max(r['collisions']):.3f}", str(sum(r["refused"].values()))]
        assert re.search(r"\s*│\s*".join(map(re.escape, cells)), final), cells
    assert "4/4" in final


def test_the_settings_are_kept(folder: Path, seen: tuple[Path, str]):
    found = load_federation(folder / "federation.yaml")
    assert found.out == str(folder)
    assert {n: d.task for n, d in found.devices.items()} == DEVICES
    faults = [(f.what, f.who, f.rounds) for f in found.faults]
    assert faults == [("corrupt", ("bee",), (1, 1)), ("kill", ("cat",), (3, 3))]


def test_kept_settings_mean_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    devices = {"ant": {"task": "weather", "data": "mine"}, "bee": "weather"}
    given = settings(Path("words"), Path("run"), trace="rates.csv", graph="graph.yaml", devices=devices)
    save_federation(given, Path("run/federation.yaml"))
    monkeypatch.chdir("/")
    found = load_federation(tmp_path / "run" / "federation.yaml")
    at = {k: str(tmp_path / getattr(given, k)) for k in ("data", "graph", "out", "trace")}
    home = {"ant": given.devices["ant"].model_copy(update={"data": str(tmp_path / "mine")})}
    assert found == given.model_copy(update={**at, "devices": {**given.devices, **home}})


def test_a_run_anew_forgets_the_rounds_of_the_last(words: Path, tmp_path: Path):
    two = {"ant": "weather"}
    run(settings(words, tmp_path / "run", rounds=3, devices=two))
    run(settings(words, tmp_path / "run", rounds=2, devices=two), force=True)
    assert [r.step for r in read_rounds(tmp_path / "run")] == [0, 1]

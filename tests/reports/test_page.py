"""report.html: whole, self-contained, and nothing that came from a file is markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from contextlora.errors import RunError
from contextlora.graph import TaskGraph
from contextlora.reports.figures import accuracy_bars, loss_curves, smooth
from contextlora.reports.page import embedded, write_report

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Every tag that is opened, and whether all are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return tags


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with hostile text wherever text can be."""
    tasks = {"weather": {"question": EVIL, "options": [EVIL, "rain"]}, "act": {"question": "?", "after": ["weather"]}}
    TaskGraph.from_dict({"name": EVIL, "tasks": tasks}).save(tmp_path / "graph.yaml")
    (tmp_path / "config.yaml").write_text(json.dumps({"data": EVIL, "graph": "graph.yaml", "out": "."}))
    Image.new("RGB", (900, 300), "red").save(tmp_path / "a.png")
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 10}
    answers = {"weather": {"question": EVIL, "said": [EVIL], "truth": ["rain"]}}
    evaluation = {
        "before": {"how": {}, "tasks": {"weather": {**score, "mean": 0.25}}},
        "after": {"how": {"split": EVIL, "method": "likelihood", "context": "none"}, "tasks": {"weather": score}},
        "majority": {"weather": 0.31},
        "samples": [{"id": EVIL, "image": str(tmp_path / "a.png"), "answers": answers}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "run.json").write_text(json.dumps({"state": EVIL, "peak_memory_mb": 1234, "phases": {EVIL: 1.5}}))
    lines = [json.dumps({"step": i, "stage": 0, "loss": {"weather": 3.0 / (i + 1)}}) for i in range(50)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 50, "lo']))
    return tmp_path


def test_everything_is_there_escaped_and_self_contained(run: Path):
    path = write_report(run)
    text = path.read_text()
    tags = parsed(text)
    assert "script" not in tags.seen
    assert EVIL not in text
    assert tags.seen.count("svg") == 3
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in tags.links)
    assert not re.search(r'(?:src|href)\s*=\s*"?https?:|url\((?!#)|@import', text)
    for said in ("0.310", "0.250", "<b>0.500</b>", "0.400 to 0.600", "1,234 MB", "truth: rain", "1.5 s"):
        assert said in text, said


def test_the_same_run_gives_the_same_page(run: Path):
    assert write_report(run).read_bytes() == write_report(run, run / "sub" / "again.html").read_bytes()


def test_a_run_that_has_only_begun(run: Path):
    for name in ("evaluation.json", "run.json", "metrics.jsonl"):
        (run / name).unlink()
    text = write_report(run).read_text()
    parsed(text)
    assert text.count('class="empty"') == 3


def test_a_damaged_evaluation_is_as_none(run: Path):
    (run / "evaluation.json").write_text("{")
    assert "Not measured yet" in write_report(run).read_text()


def test_where_no_report_can_be(run: Path, tmp_path: Path):
    with pytest.raises(RunError, match="E525"):
        write_report(tmp_path / "nothing")
    with pytest.raises(RunError, match="E523"):
        write_report(run, run / "config.yaml" / "x.html")


def test_pictures_are_small_and_a_lost_one_is_grey(run: Path):
    assert len(embedded(run / "a.png")) < 20_000
    assert embedded(run / "gone.png").startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("name", ["_hidden", "$x^2$", "a<b", "ordinary"])
def test_figures_show_any_name_as_it_is(name: str):
    for svg in (loss_curves({name: [2.0, 1.0]}), accuracy_bars({}, {name: (0.5, 0.4, 0.6)}, {})):
        parsed(svg)
        assert name.lstrip("_").replace("<", "&lt;") in svg


def test_smoothing_is_a_running_mean():
    values = [float(i % 7) for i in range(100)]
    expected = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(100)]
    assert smooth(values) == pytest.approx(expected)
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]

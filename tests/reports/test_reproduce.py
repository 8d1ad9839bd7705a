"""A comparison from its recipe to its page: on a tiny model, by several processes, killed, half-written, imported."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_page import EVIL, parsed
from typer.testing import CliRunner

from contextlora.cli import app
from contextlora.data.examples import load_examples
from contextlora.data.scenes import build, scenario_graph
from contextlora.errors import ConfigError, DataError, RunError
from contextlora.reports import bench as bench_module
from contextlora.reports.jobs import FORMAT, expand, unique
from contextlora.reports.recipe import load_recipe
from contextlora.reports.reproduce import reproduce
from contextlora.reports.store import Store
from contextlora.reports.tables import ALL
from contextlora.reports.work import work
from contextlora.training import loop
from tiny_llava import save_tiny_llava

# on top of the shared preset, whose layers a tiny model has not
SMOKE = {"data": {"train": 8, "valid": 1, "test": 6}, "train": {"lr": 0.01, "layers": "all"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def recipe(tmp_path: Path, tiny: str) -> Path:
    """A recipe of six jobs that take a second or two."""
    data = {
        "title": EVIL,
        "paper": EVIL,
        "model": tiny,
        "scenarios": ["iov"],
        "arms": {"ours": {"method": "paper"}, EVIL: {"method": "lora"}, "base": {"zero_shot": True}},
        "published": {"note": EVIL, "rows": {EVIL: {EVIL: 93, "other": None}}},
        "presets": {"smoke": SMOKE},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def begun(out: Path) -> dict[str, int]:
    """How often each job was begun."""
    ids = [p.stem for p in (out / "results").glob("*.json")]
    return {i: len((out / "claims" / i).read_text().splitlines()) for i in ids}


def numbers(out: Path) -> dict[str, Any]:
    """All that results say, times and machine apart."""
    found = {p.stem: json.loads(p.read_text()) for p in (out / "results").glob("*.json")}
    return {i: (r["scores"], r["mean"], r["graph"], r["job"], r["cost"].get("updates")) for i, r in found.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Any]:
    """The numbers of a comparison that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    path = recipe.__wrapped__(folder, tiny)  # type: ignore[attr-defined]
    reproduce(path, "smoke", out=folder / "out", silent=True)
    return numbers(folder / "out")


def test_from_recipe_to_page(recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["report", str(recipe), "--preset", "smoke", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "5 of 5 jobs done" in done.stdout
    assert "minus each other" in done.stdout
    text = (out / "report.html").read_text()
    tags = parsed(text)
    assert "script" not in tags.seen
    assert EVIL not in text
    assert tags.seen.count("svg") == 1
    assert all(link.startswith("#") for link in tags.links)
    assert "jobs are done" not in text
    assert "not printed" in text
    assert "samples seen" in text
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 4  # the base model stands under both seeds
    assert {r["seed"] for r in rows} == {"0", "1"}
    strategy = next(r for r in rows if r["task"] == "strategy" and r["arm"] == "ours")
    assert (strategy["dependent"], strategy["level"], strategy["items"]) == ("True", "2", "6")
    assert (strategy["updates"], strategy["samples"]) == ("2", "32")
    assert int(strategy["trained_parameters"]) > 1000
    assert not any((out / "work").iterdir())
    before = numbers(out)
    again = CliRunner().invoke(app, ["report", str(recipe), "--preset", "smoke", "--out", str(out), "--json"])
    found = json.loads(again.stdout)
    assert (found["done"], found["total"]) == (5, 5)
    assert {x["task"] for x in found["accuracy"]} == {"vehicles", "weather", "road", "strategy", ALL}
    assert {x["seeds"] for x in found["differences"]} == {2}
    assert next(c for c in found["costs"] if c["arm"] == EVIL)["samples"] == 32
    assert numbers(out) == before
    assert set(begun(out).values()) == {1}  # nothing was done twice


def test_two_processes_share_the_jobs(recipe: Path, tmp_path: Path, straight: dict[str, Any]):
    made = reproduce(recipe, "smoke", out=tmp_path / "out", processes=2, silent=True)
    assert made.findings.done == made.findings.total == 5
    assert set(begun(tmp_path / "out").values()) == {1}
    assert numbers(tmp_path / "out") == straight
    assert {r["made"]["threads"] for r in made.findings.results.values()} == {max(1, (os.cpu_count() or 1) // 2)}


def test_the_job_of_a_killed_process_is_gone_on_with(recipe: Path, tmp_path: Path, straight: dict[str, Any]):
    out = tmp_path / "out"
    given = ["--set", "train.checkpoint_every=1"]
    command = [sys.executable, "-c", "from contextlora.cli import main; main()", "report", str(recipe)]
    command += ["--preset", "smoke", "--out", str(out), "--json", *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(1200):
        if list(out.glob("work/*/checkpoints/[0-9]*")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob("work/*/checkpoints/*"))
    made = reproduce(recipe, "smoke", out=out, overrides=given[1:], silent=True)
    assert made.findings.done == 5
    assert sorted(begun(out).values())[-1] == 2
    assert numbers(out).keys() == straight.keys()
    assert {i: n[:3] for i, n in numbers(out).items()} == {i: n[:3] for i, n in straight.items()}


@pytest.mark.slow
def test_of_two_processes_one_is_killed(recipe: Path, tmp_path: Path, straight: dict[str, Any]):
    """The other takes its job over, from its checkpoint; whoever waits for both never notices."""
    out, killed = tmp_path / "out", list[int]()

    def kill() -> None:
        while not killed:
            for folder in out.glob("work/*/checkpoints"):
                killed.append(int((out / "claims" / folder.parent.name).read_text().split()[0]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    given = ["train.checkpoint_every=1"]
    made = reproduce(recipe, "smoke", out=out, processes=2, overrides=given, silent=True)
    killer.join()
    assert made.findings.done == 5
    assert sorted(begun(out).values()) == [1, 1, 1, 1, 2]
    assert {i: n[:3] for i, n in numbers(out).items()} == {i: n[:3] for i, n in straight.items()}


def test_an_error_names_its_job(recipe: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="E111 iov · ours · seed 0: layers 'top third'"):
        reproduce(recipe, "smoke", out=tmp_path / "out", overrides=["train.layers=top third"], silent=True)


def test_a_process_that_another_has_left_takes_over(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While a job is claimed, others are done and this one is waited for; once let go of, it is done too."""
    settings = load_recipe(recipe, "smoke")
    jobs, store = expand(settings), Store(tmp_path / "out")
    held = store.claim(jobs[0].id)
    assert held.__enter__()
    waits: list[int] = []

    def let_go(_: float) -> None:
        waits.append(len(list(store.results.glob("*.json"))))
        held.__exit__(None, None, None)

    monkeypatch.setattr("contextlora.reports.work.time.sleep", let_go)
    work(settings, jobs, store)
    assert waits == [4]
    assert all(store.result(j.id) for j in jobs)


def test_ctrl_c_leaves_a_page_and_the_same_command_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, Any]
):
    real, count = loop.Stage.update, [0]

    def interrupted(self: loop.Stage, update: int) -> dict[str, float]:
        count[0] += 1
        if count[0] == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, update)

    monkeypatch.setattr(loop.Stage, "update", interrupted)
    words = ["report", str(recipe), "--preset", "smoke", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 130
    assert "error E514" in done.stderr
    assert "the same command goes on" in done.stderr
    text = (tmp_path / "out/report.html").read_text()
    parsed(text)
    assert "of 5 jobs are done" in text
    assert CliRunner().invoke(app, words).exit_code == 0
    assert numbers(tmp_path / "out") == straight


def test_ctrl_c_on_several_processes(recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from contextlora.cli import main; main()", "report", str(recipe)]
    command += ["--preset", "smoke", "--out", str(out), "--processes", "2", "--set", "train.epochs=500"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  jobs that a shell starts with & ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for _ in range(1200):
        if any(p.stat().st_size for p in out.glob("work/*/metrics.jsonl")):  # an update is done
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "error E514" in said
    assert "Traceback" not in said
    assert list(out.glob("work/*/checkpoints/*"))
    for claim in (out / "claims").iterdir():  # nobody works on
        with Store(out).claim(claim.name) as free:
            assert free


def test_an_error_of_a_process_is_told_as_such(recipe: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="E111"):
        reproduce(recipe, "smoke", out=tmp_path / "o", processes=2, overrides=["train.layers=top third"], silent=True)


def test_half_a_result_is_done_again_and_one_of_another_format_refused(recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = ["arms={base: {zero_shot: true}}", "seeds=1"]
    reproduce(recipe, "smoke", out=out, overrides=words, silent=True)
    before = numbers(out)
    path = next((out / "results").glob("*.json"))
    whole = path.read_text()
    for half in ("", whole[:100], "{}", "[]"):
        path.write_text(half)
        reproduce(recipe, "smoke", out=out, overrides=words, silent=True)
        assert numbers(out) == before
    path.write_text(json.dumps({**json.loads(whole), "format": FORMAT + 1}))
    with pytest.raises(RunError, match="E526") as e:
        reproduce(recipe, "smoke", out=out, overrides=words, silent=True)
    assert path.name in str(e.value)
    assert "delete it" in str(e.value)


def test_alignment_sees_what_training_sees(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Labels that are poisoned for training are poisoned for the projector too; test pictures are not shown to it."""
    seen: list[Any] = []
    real = bench_module.align
    monkeypatch.setattr(
        bench_module, "align", lambda m, p, examples, **k: (seen.append(examples), real(m, p, examples, **k))
    )
    words = ["align.epochs=0", "sweep={label_noise: [0.0, 0.5]}", "arms={ours: {}, base: {zero_shot: true}}", "seeds=1"]
    made = reproduce(recipe, "smoke", out=tmp_path / "out", overrides=words, silent=True)
    assert len(seen) == len(list((tmp_path / "out/bases").iterdir())) == 2  # both arms share a base
    jobs = [j for j in unique(made.findings.jobs) if j.kind == "trained"]
    folder = next((tmp_path / "out/data").iterdir())
    for job, examples in zip(jobs, seen, strict=True):
        assert examples == loop.training_examples(folder, job.graph, job.config)
    assert seen[0] != seen[1]


def test_imported_answers(recipe: Path, tmp_path: Path):
    sizes = {"train": 8, "valid": 1, "test": 6, "seed": 7}
    examples = load_examples(build("iov", tmp_path / "data", **sizes), scenario_graph("iov"))
    lines = [{"id": e.id, "answers": {t: list(a) for t, a in e.answers.items()}} for e in examples]
    lines[-1]["answers"]["strategy"] = []
    (tmp_path / "iov.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [f"arms.outside.answers={tmp_path}/{{scenario}}.jsonl", "seeds=1"]
    made = reproduce(recipe, "smoke", out=tmp_path / "out", overrides=words, silent=True)
    found = {x.task: x.value.mean for x in made.findings.lines if x.arm == "outside"}
    assert found == pytest.approx({"vehicles": 1, "weather": 1, "road": 1, "strategy": 5 / 6, ALL: 23 / 24})
    lines[0]["id"], lines[1]["answers"]["wether"] = "nobody", ["rain"]
    (tmp_path / "iov.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[2]])))
    with pytest.raises(DataError, match="E224") as e:
        reproduce(recipe, "smoke", out=tmp_path / "out", overrides=words, silent=True)
    assert "3 faults" in str(e.value)
    assert "no example 'nobody'" in str(e.value)
    assert "Did you mean 'weather'?" in str(e.value)
    assert "twice" in str(e.value)


def test_inference_is_timed_round_by_round(tiny: str, tmp_path: Path):
    words = [f"model={tiny}", "seeds=2"]
    found = reproduce("inference", "smoke", overrides=words, out=tmp_path / "out", silent=True).findings
    assert found.done == 4
    assert {(x.value.seeds, x.value.items) for x in found.lines} == {(2, 3)}
    assert all(0 < x.value.mean < 10 for x in found.lines)


def test_only_one_scenario_now(recipe: Path, tmp_path: Path):
    words = ["scenarios=[iov, factory]", "arms={base: {zero_shot: true}}", "seeds=1"]
    found = reproduce(recipe, "smoke", out=tmp_path / "o", overrides=words, only=["factory"], silent=True).findings
    assert (found.done, found.total) == (1, 2)
    assert found.missing == ["iov · base · seed 0"]
    assert {x.scenario for x in found.lines} == {"factory"}


def test_lines_over_a_sweep_read_at_the_last_task(recipe: Path, tmp_path: Path):
    words = ["sweep={frozen_ratio: [0.0, 1.0]}", "figure=lines", "read=last", "arms={ours: {}}", "seeds=1"]
    made = reproduce(recipe, "smoke", out=tmp_path / "out", overrides=words, silent=True)
    assert [(x.point, x.task) for x in made.findings.lines] == [
        ((("frozen_ratio", v),), "strategy") for v in (0.0, 1.0)
    ]
    assert [x.point for x in made.findings.differences] == [(("frozen_ratio", 1.0),)]
    assert made.findings.differences_title == "ours minus itself at frozen_ratio 0.0"
    parsed(made.page.read_text())
    assert "frozen_ratio" in (tmp_path / "out/results.csv").read_text().splitlines()[0].split(",")


def test_a_data_folder_is_a_scenario(recipe: Path, tmp_path: Path):
    folder = build("factory", tmp_path / "mine", train=6, valid=1, test=4, seed=3)
    words = [f"scenarios=[{folder}]", "arms={ours: {}}", "seeds=1"]
    made = reproduce(recipe, "smoke", out=tmp_path / "out", overrides=words, silent=True)
    assert made.findings.done == 1
    assert not (tmp_path / "out/data").exists()


def test_the_shipped_smoke_on_the_embedded_model(tmp_path: Path):
    words = ["report", "accuracy", "--preset", "smoke", "--out", str(tmp_path / "out"), "--json"]
    words += ["--set", "seeds=1", "--set", "data={train: 8, valid: 1, test: 4, seed: 7}"]
    words += ["--set", "arms={ContextLoRA: {method: paper}, LoRA: {method: lora}}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["done"] == 2

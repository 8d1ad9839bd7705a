"""Whole commands on a tiny model with random weights: what a user types, and what a user gets wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from contextlora.cli import app
from contextlora.data.collate import Encoder
from contextlora.lora.adapter import Adapter
from tiny_llava import save_tiny_llava

COMMANDS = [
    "init",
    "check",
    "train",
    "eval",
    "ask",
    "export",
    "plug",
    "drop",
    "plan",
    "launch",
    "report",
    "demo",
    "federate",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("CONTEXTLORA_DEBUG", raising=False)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


def ok(*words: object) -> Any:
    """Runs a command that must succeed and returns its JSON."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*words: object) -> str:
    """Runs a command that must fail with one clear error, and returns it."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def files(folder: Path) -> dict[str, str]:
    """The sha256 of every file, by its path in the folder."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)}


def edit_graph(project: Path, **tasks: dict[str, Any] | None) -> None:
    """Adds, changes or (None) removes tasks of a project's graph.yaml."""
    path = project / "data" / "graph.yaml"
    graph = yaml.safe_load(path.read_text())
    for name, task in tasks.items():
        if task is None:
            del graph["tasks"][name]
        else:
            graph["tasks"][name] = {**graph["tasks"].get(name, {}), **task}
    path.write_text(yaml.safe_dump(graph, sort_keys=False))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"))


def make(folder: Path, tiny: Path) -> Path:
    """A fresh project on the tiny model."""
    assert run("init", folder).exit_code == 0
    text = (folder / "config.yaml").read_text()
    text = (
        text.replace("model: smol", f"model: {tiny}").replace("epochs: 2", "epochs: 1").replace("lr: 0.002", "lr: 0.01")
    )
    text = text.replace("context: gold", "context: none").replace("top 1/3", "all")
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    project = make(tmp_path_factory.mktemp("project") / "p", tiny)
    ok("train", project / "config.yaml", "--eval", "valid")
    return project


@pytest.fixture
def project(trained_once: Path, tmp_path: Path) -> Path:
    """A trained project of the test's own."""
    return Path(shutil.copytree(trained_once, tmp_path / "p"))


# --- the list, the help, the shape of errors -------------------------------------------------------------------------


def test_the_commands_are_these():
    alone = [c.name or c.callback.__name__ for c in app.registered_commands]  # type: ignore[union-attr]
    assert [*alone, *(g.name for g in app.registered_groups)] == COMMANDS


def test_help_names_every_command_and_nothing_alone_is_help():
    for words in ([], ["--help"]):
        done = run(*words)
        assert done.exit_code == 0
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
        assert "..." not in done.stdout.split("Commands:")[1]  # no sentence is cut short


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str):
    assert run(command, "--help").exit_code == 0


def test_help_imports_little_and_takes_little_time():
    code = (
        "import sys, time; from contextlora.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'numpy', 'PIL', 'matplotlib', 'pydantic', 'rich')\n"
        "print([m for m in heavy if m in sys.modules], time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, _, seconds = done.stderr.strip().rpartition(" ")
    assert modules == "[]"
    assert float(seconds) < 2  # of processor time, whatever else runs; 0.15 s on an idle machine


def test_version():
    assert run("--version").stdout.strip().count(".") == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tran"], "E107", "Did you mean 'train'?"),
        (["train"], "E107", "Missing argument"),
        (["train", "x.yaml", "--epochs", "3"], "E107", "No such option"),
        (["eval", "x.yaml", "--split", "tset"], "E107", "tset"),
        (["train", "missing.yaml"], "E102", "no such file"),
        (["check", "missing.yaml"], "E102", "no such file"),
        (["eval", "missing"], "E102", "no such file"),
        (["ask", "missing", "--task", "x"], "E310", "no such adapter folder"),
        (["export", "missing", "--task", "x", "--out", "y"], "E310", "no such adapter folder"),
        (["plug", "missing", "other"], "E310", "no such adapter folder"),
        (["drop", "missing", "x"], "E310", "no such adapter folder"),
        (["report", "missing"], "E115", "no recipe and no run's folder"),
        (["report", "acuracy"], "E115", "Did you mean 'accuracy'?"),
        (["report", "accuracy", "--preset", "laptp"], "E115", "Did you mean 'laptop'?"),
        (["report", "rad"], "E116", "--set scenarios="),
        (["report", "accuracy", "--only", "iow"], "E116", "Did you mean 'iov'?"),
        (["report", "accuracy", "--set", "seed=2"], "E103", "Did you mean 'seeds'?"),
        (["report", "accuracy", "--set", "arms.LoRA.method=loar"], "E103", "'lora'"),
        (["report", "missing.yaml"], "E102", "no such file"),
        (["demo", "--scene", "iow"], "E524", "Did you mean 'iov'?"),
        (["init", "x", "--scene", "cty"], "E220", "Did you mean 'city'?"),
        (["init", "x", "--yolo", "y"], "E108", "--recipe"),
        (["init", "x", "--scene", "iov", "--llava", "y"], "E108", "one source"),
        (["init", "x", "--llava", "missing.json"], "E223", "cannot be read"),
    ],
)
def test_wrong_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: str, said: str):
    monkeypatch.chdir(tmp_path)
    error = refused(*words)
    assert error.startswith(f"error {code} ")
    assert said in error


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONTEXTLORA_DEBUG", "1")
    assert type(run("train", "missing.yaml").exception).__name__ == "ConfigError"


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("contextlora.config.load", lambda *_: 1 / 0)
    done = run("train", "x.yaml")
    assert done.exit_code == 1
    assert done.stderr.startswith("error E599 unexpected ZeroDivisionError: division by zero")


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_from_nothing_to_a_report(tmp_path: Path, tiny: Path):
    project = make(tmp_path / "new", tiny)
    config = project / "config.yaml"
    found = ok("check", config)
    assert [r["train"] for r in found["data"]] == [24, 24, 24]
    assert [p["updates"] for p in found["plan"]] == [6, 6]
    assert found["estimate"] is True
    assert found["export"] == ["light", "road", "action"]
    assert not (project / "runs").exists()
    assert run("check", config).stdout.endswith("ready to train; times and memory are estimates\n")

    made = ok("train", config)
    assert made["tasks"] == ["light", "road", "action"]
    assert made["stale"] == {}
    scores = ok("eval", config, "--split", "valid")["tasks"]
    assert scores.keys() == {"light", "road", "action"}
    assert all(s["count"] == 6 and 0 <= s["low"] <= s["mean"] <= s["high"] <= 1 for s in scores.values())
    assert "95 %" in run("eval", config, "--tasks", "road", "--method", "generate", "--context", "gold").stdout

    answers = ok("ask", project / "runs", "--image", project / "data/images/30.png", "--task", "all")["answers"]
    assert list(answers) == ["light", "road", "action"]
    ok("export", project / "runs", "--task", "action", "--out", tmp_path / "node")
    assert json.loads((tmp_path / "node/adapter_config.json").read_text())["r"] == 24
    path = Path(ok("report", project / "runs")["report"])
    assert path.read_text().count("<figure>") == 6


def test_eval_of_an_adapter_folder_finds_its_data_or_asks_for_it(project: Path, tmp_path: Path):
    here = ok("eval", project / "runs/adapter", "--split", "valid")
    alone = shutil.copytree(project / "runs/adapter", tmp_path / "alone")
    assert "--data" in refused("eval", alone)
    assert ok("eval", alone, "--data", project / "data", "--split", "valid") == here


def test_accuracy_is_kept_in_adapter_and_run(project: Path):
    manifest = json.loads((project / "runs/adapter/manifest.json").read_text())
    kept = json.loads((project / "runs/evaluation.json").read_text())
    for task in ("light", "road", "action"):
        assert manifest["tasks"][task]["metrics"]["valid accuracy"] == kept["after"]["tasks"][task]["mean"]
    assert kept["majority"]["light"] == pytest.approx(1 / 3)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_a_task_is_asked_as_it_was_trained(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained with labels in the prompt, a dependent task gets its prerequisites' own answers; one without, none."""
    config = project / "config.yaml"
    asking = ["ask", project / "runs", "--image", project / "data/images/30.png", "--task", "action"]
    ok("train", config, "--tasks", "action", "--set", "train.context=gold", "--eval", "valid")
    assert Adapter.load(project / "runs" / "adapter").records["action"].context == "gold"
    assert {t: Adapter.load(project / "runs" / "adapter").context(t) for t in ("action", "light")} == {
        "action": "predicted",
        "light": "none",
    }
    kept = json.loads((project / "runs" / "evaluation.json").read_text())["after"]
    assert kept["how"]["context"] == "predicted"
    told = ok("eval", project / "runs", "--split", "valid", "--tasks", "light,action")
    assert told["context"] == {"light": "none", "action": "predicted"}
    said: list[dict[str, object]] = []
    sample = Encoder.sample
    monkeypatch.setattr(
        Encoder,
        "sample",
        lambda *a, **k: said.append(k.get("known")) or sample(*a, **k),  # type: ignore[func-returns-value]
    )
    for words in (["eval", config, "--split", "valid", "--tasks", "action"], asking):
        for context, tells in (("none", False), ("predicted", True), (None, True)):
            said.clear()
            ok(*words, *(["--context", context] if context else []))
            assert any(said) == tells, (words[0], context)


def test_ask_by_question_and_with_context(project: Path):
    image = ["--image", project / "data/images/30.png"]
    assert ok("ask", project / "runs", *image, "--question", "is the road dry or wet")["answers"].keys() == {"road"}
    assert ok("ask", project / "runs", *image, "--task", "action", "--context", "predicted")["answers"]["action"]
    assert run("ask", project / "runs", *image, "--task", "road").stdout.startswith("road: ")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--task", "raod"], "E104"),
        (["--task", "my road"], "E104"),
        (["--question", "How tall is the tower?"], "E108"),
        ([], "E108"),
        (["--task", "all", "--question", "Why?"], "E108"),
        (["--task", "road", "--image", "missing.png"], "E206"),
        (["--task", "road", "--image", "CONFIG"], "E211"),
        (["--task", "road", "--context", "gold"], "E107"),
    ],
)
def test_asking_wrongly(project: Path, words: list[str], code: str):
    words = [str(project / "config.yaml") if w == "CONFIG" else w for w in words]
    assert refused("ask", project / "runs", *words).startswith(f"error {code} ")


# --- growing, shrinking ----------------------------------------------------------------------------------------------


def with_new_task(project: Path) -> None:
    edit_graph(project, who={"question": "who ?", "options": ["a", "b"], "after": ["action"]})
    path = project / "data" / "data.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, r in enumerate(records):
        r["answers"]["who"] = ["ab"[i % 2]]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_new_task_leaves_every_other_byte(project: Path):
    before = files(project / "runs/adapter/tasks")
    with_new_task(project)
    done = ok("train", project / "config.yaml", "--tasks", "who")
    assert done["tasks"] == ["light", "road", "action", "who"]
    assert done["stale"] == {}
    after = files(project / "runs/adapter/tasks")
    assert {k: v for k, v in after.items() if not k.startswith("who/")} == before
    assert set(after) - set(before) == {"who/adapter_config.json", "who/adapter_model.safetensors"}
    assert ok("eval", project / "config.yaml", "--split", "valid")["tasks"].keys() == {"light", "road", "action", "who"}


def test_a_new_task_in_the_adapters_own_graph(project: Path):
    """The graph beside the blocks may be edited too; the run is told to read that one."""
    with_new_task(project)
    inner = project / "runs/adapter/graph.yaml"
    shutil.move(project / "data/graph.yaml", inner)
    (project / "data/graph.yaml").write_text((project / "runs/graph.yaml").read_text())
    assert f"--set graph={inner}" in refused("train", project / "config.yaml", "--tasks", "who")
    assert ok("train", project / "config.yaml", "--tasks", "who", "--set", f"graph={inner}")["stale"] == {}


def test_a_changed_task_trains_alone_and_its_children_say_so(project: Path):
    before = files(project / "runs/adapter/tasks")
    edit_graph(project, road={"question": "is the road wet ?"})
    image = ["--image", project / "data/images/30.png"]
    done = ok("train", project / "config.yaml", "--tasks", "road")
    assert done["stale"] == {"action": "prerequisite 'road' was retrained after this task"}
    changed = {k for k, v in files(project / "runs/adapter/tasks").items() if before[k] != v}
    assert changed == {"road/adapter_model.safetensors"}
    warned = ok("ask", project / "runs", *image, "--task", "action")["warnings"]
    assert warned == ["'action' should be trained again: prerequisite 'road' was retrained after this task"]
    assert ok("train", project / "config.yaml", "--tasks", "action")["stale"] == {}
    assert ok("ask", project / "runs", *image, "--task", "action")["warnings"] == []


def test_a_task_taken_out_of_the_graph(project: Path):
    edit_graph(project, light=None, action={"after": ["road"]})
    assert ok("eval", project / "config.yaml", "--split", "valid")["tasks"].keys() == {"road", "action"}
    stale = ok("train", project / "config.yaml", "--tasks", "road")["stale"]
    assert stale == {"action": "prerequisite 'light' was removed"}
    assert not (project / "runs/adapter/tasks/light").exists()


def test_drop_and_plug(project: Path, tmp_path: Path):
    whole, other = files(project / "runs/adapter/tasks"), tmp_path / "other"
    ok("export", project / "runs", "--task", "light,road", "--out", other)
    dropped = ok("drop", project / "runs", "light")
    assert dropped["tasks"] == ["road", "action"]
    assert dropped["stale"] == {"action": "prerequisite 'light' was removed"}
    asked = run("ask", project / "runs", "--image", project / "data/images/00.png", "--task", "action")
    assert "warning: 'action' should be trained again: prerequisite 'light' was removed" in asked.stderr
    assert "E104" in refused("export", project / "runs", "--task", "action,light", "--out", tmp_path / "n")
    assert ok("plug", project / "runs", other)["stale"] == {}
    assert files(project / "runs/adapter/tasks") == whole
    assert "E316" in refused("plug", project / "runs", other, "--task", "light")
    assert "E104" in refused("drop", project / "runs", "lihgt")


def test_export_merged_is_a_model_of_its_own(project: Path, tmp_path: Path):
    from contextlora.models import load_model

    assert ok("export", project / "runs", "--task", "road", "--out", tmp_path / "m", "--merged")["kind"] == "model"
    model, _ = load_model(tmp_path / "m")
    assert "contextlora" not in str(model.config)
    assert "E108" in refused("export", project / "runs", "--task", "road,light", "--out", tmp_path / "x", "--merged")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_second_run_over_the_first_is_refused(project: Path):
    before = files(project / "runs")
    assert refused("train", project / "config.yaml").startswith("error E521 ")
    assert files(project / "runs") == before
    assert ok("train", project / "config.yaml", "--resume")["tasks"] == ["light", "road", "action"]
    assert files(project / "runs") == before


def test_force_trains_all_anew(project: Path):
    first = ok("train", project / "config.yaml", "--force")
    other = ok("train", project / "config.yaml", "--force", "--set", "train.seed=1")
    assert ok("train", project / "config.yaml", "--force")["sha256"] == first["sha256"] != other["sha256"]


def test_resume_alone_means_the_tasks_of_the_last_run(project: Path):
    before = files(project / "runs/adapter/tasks")
    ok("train", project / "config.yaml", "--tasks", "road")
    assert ok("train", project / "config.yaml", "--resume")["stale"] == {}  # same data, same seed: the same block
    assert files(project / "runs/adapter/tasks") == before
    assert refused("train", project / "config.yaml", "--resume", "--set", "train.lr=1").startswith("error E521 ")


def test_layers_given_once_hold_for_all_later_commands(project: Path):
    ok("train", project / "config.yaml", "--force", "--set", "train.layers=top 1/3")
    assert ok("eval", project / "config.yaml", "--split", "valid")["tasks"]
    assert "E315" in refused("train", project / "config.yaml", "--tasks", "road")


def test_training_again_forgets_what_was_measured(project: Path):
    edit_graph(project, road={"question": "is the road wet ?"})
    ok("train", project / "config.yaml", "--tasks", "road")
    assert json.loads((project / "runs/evaluation.json").read_text())["after"]["tasks"].keys() == {"light", "action"}
    steps = (project / "runs/metrics.jsonl").read_text().splitlines()
    assert sum("road" in json.loads(line)["loss"] for line in steps) == 6


def test_alignment_makes_a_base_of_the_runs_own(tmp_path: Path, tiny: Path):
    project = make(tmp_path / "p", tiny)
    ok("train", project / "config.yaml", "--set", "align.epochs=1")
    base = files(project / "runs/base")
    manifest = json.loads((project / "runs/adapter/manifest.json").read_text())
    assert manifest["base"] == str(project / "runs/base")
    again = ["train", project / "config.yaml", "--set", "align.epochs=1"]
    ok(*again, "--tasks", "action")
    assert files(project / "runs/base") == base
    image = ["--image", project / "data/images/30.png", "--task", "all"]
    here = ok("ask", project / "runs", *image)
    shutil.move(project / "runs", tmp_path / "moved")
    assert ok("ask", tmp_path / "moved", *image) == here


def test_the_runs_folder_is_a_configuration(project: Path):
    """The copies in a run's folder say the same as the originals."""
    again = ok("train", project / "runs", "--force")["sha256"]
    assert again == ok("train", project / "config.yaml", "--force")["sha256"]


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path, tiny: Path):
    project = make(tmp_path / "p", tiny)
    ok("train", project / "config.yaml", "--set", "out=straight", "--set", "train.epochs=8")
    words = [project / "config.yaml", "--set", "train.epochs=8"]
    command = [sys.executable, "-c", "from contextlora.cli import main; main()", "train", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    metrics = project / "runs/metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "error E514" in said
    assert "Traceback" not in said
    assert refused("train", *words).startswith("error E522 ")
    assert not (project / "runs/adapter").exists()
    resumed = ok("train", *words, "--resume")
    assert files(project / "runs/adapter/tasks") == files(project / "straight/adapter/tasks")
    assert not (project / "runs/checkpoints").exists()
    assert len(resumed["tasks"]) == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--tasks", "my road"], "E105"),
        (["--tasks", "road,"], "E105"),
        (["--tasks", "raod"], "E104"),
        (["--set", "train.epoch=1"], "E103"),
        (["--set", "train.epochs"], "E107"),
        (["--set", "train.layers=top third", "--force"], "E111"),
        (["--set", "model=missing/folder/x", "--force"], "E332"),
        (["--set", "data=missing", "--set", "graph=data/graph.yaml", "--force"], "E201"),
        (["--set", "train.layers=0-1", "--tasks", "road"], "E315"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_training_wrongly(project: Path, command: str, words: list[str], code: str):
    if command == "check":
        words = [w for w in words if w != "--force"]
    if command == "check" and code == "E332":
        shutil.rmtree(project / "runs")  # `check` opens what `train --tasks` would, with the adapter
    before = files(project / "runs/adapter") if (project / "runs").exists() else {}
    assert refused(command, project / "config.yaml", *words).startswith(f"error {code} ")
    assert not before or files(project / "runs/adapter") == before


@pytest.mark.parametrize("name", ["config.yaml", "data/graph.yaml", "data/data.jsonl"])
@pytest.mark.parametrize("command", ["train", "check", "eval"])
def test_empty_files(project: Path, command: str, name: str):
    (project / name).write_text("")
    shutil.rmtree(project / "runs")
    assert refused(command, project / "config.yaml").split()[1] in ("E102", "E103", "E201", "E310")


def test_a_task_without_samples_is_found_by_check(project: Path):
    edit_graph(project, who={"question": "who ?", "options": ["a", "b"]})
    assert refused("check", project / "config.yaml", "--tasks", "who").startswith("error E510 ")
    assert "who" in refused("train", project / "config.yaml", "--tasks", "who")


def test_a_damaged_picture_is_found_by_check(project: Path):
    (project / "data/images/07.png").write_bytes(b"no picture")
    assert refused("check", project / "config.yaml").startswith("error E211 ")


def test_init_never_overwrites(project: Path, tmp_path: Path):
    before = files(project)
    assert refused("init", project).startswith("error E109 ")
    assert files(project) == before
    assert ok("init", tmp_path / "scene", "--scene", "city", "--train", 3, "--valid", 1, "--test", 1)
    assert refused("init", tmp_path / "scene", "--scene", "city").startswith("error E109 ")


def test_init_imports_instructions(tmp_path: Path):
    asked = [{"instruction": f"is {i} even ?", "output": "ab"[i % 2]} for i in range(6)]
    (tmp_path / "even.json").write_text(json.dumps(asked))
    made = Path(ok("init", tmp_path / "p", "--instructions", tmp_path / "even.json")["config"])
    assert yaml.safe_load((made.parent / "data/graph.yaml").read_text())["tasks"].keys() == {"even"}
    quiz = "what croaks ? Answer1: a frog Answer2: a stone\nAnswer format: answer1/answer2"
    (tmp_path / "quiz.json").write_text(json.dumps([{"instruction": quiz, "answer": "answer1"}]))
    spelled = Path(ok("init", tmp_path / "q", "--instructions", tmp_path / "quiz.json", "--spell-out")["config"])
    assert json.loads((spelled.parent / "data/data.jsonl").read_text())["answers"] == {"quiz": ["a frog"]}
    assert refused("init", tmp_path / "r", "--spell-out").startswith("error E108 ")


# --- several devices -------------------------------------------------------------------------------------------------

FLEET = {
    "devices": {"desk": {"memory": "2 GB"}, "board": {"memory": "2 GB", "speed": 0.5}},
    "medium": {"rate": "100 Mbit/s", "delay": "1 ms"},
}


def test_measure_plan_and_launch(tiny: Path, tmp_path: Path):
    """What a user does with two devices; it ends where `train` does on one."""
    project = make(tmp_path / "p", tiny)
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET))
    costs, plan = tmp_path / "costs.json", tmp_path / "plan.json"
    ok("plan", project, "--profile", costs, "--sizes", "1,2")
    where = ("--fleet", tmp_path / "fleet.yaml", "--costs", costs)
    said = run("plan", project, *where, "--sizes", "1,2", "--out", plan, "--pictures", tmp_path / "pictures")
    assert said.exit_code == 0, said.output
    assert "s in all, predicted" in said.stdout
    assert {p.name for p in (tmp_path / "pictures").iterdir()} >= {"timeline.svg", "step-1.svg"}
    made = json.loads(plan.read_text())
    share = {"form": "data", "ahead": "none", "prefix": [], "cut": 0, "cache": False, "size": 1}
    parts = [{"device": d, "start": 0, "stop": made["units"], "seconds": s} for d, s in (("desk", 1.0), ("board", 2.0))]
    for stage in made["stages"]:  # whatever is quickest for so small a model: both devices shall work here
        tasks = [t for g in stage["groups"] for t in g["group"]["tasks"]]
        stage["groups"] = [{**stage["groups"][0], "group": {**share, "tasks": tasks, "trainers": parts}}]
    plan.write_text(json.dumps(made))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "contextlora", "launch", str(plan), str(project), "--json", "--set", "dtype=float32"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    single = make(tmp_path / "single", tiny)
    ok("train", single, "--set", "dtype=float32")
    alone, both = (Adapter.load(p / "runs" / "adapter") for p in (single, project))
    assert set(both.blocks) == set(alone.blocks)
    for task, block in alone.blocks.items():
        for path, pair in block.items():
            for side, other in zip(pair, both.blocks[task][path], strict=True):
                assert (side - other).abs().max() < 1e-4
    refused_by_both(command[command.index("-m", 3) :], env, tmp_path)


def refused_by_both(command: list[str], env: dict[str, str], tmp_path: Path):
    """A second launch, without torchrun, which would end the other; only the first device holds the adapter."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    elsewhere = [[], ["--set", f"out={tmp_path / 'elsewhere'}"]]
    both = [
        subprocess.Popen(
            [sys.executable, *command, *more], env=env | there | {"RANK": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i, more in enumerate(elsewhere)
    ]
    for one in both:
        said = one.communicate(timeout=60)[1]
        assert one.returncode == 2, said
        assert "E521" in said
        assert "holds a trained adapter" in said
    assert not (tmp_path / "elsewhere").exists()


def test_plans_that_cannot_be(project: Path, tmp_path: Path):
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET))
    assert "E108 plan: planning wants --fleet and --costs" in refused("plan", project)
    assert "E407 no profile 'llava-7'" in refused("plan", project, "--fleet", "three-jetsons", "--costs", "llava-7")
    assert "E407 no fleet 'jetsons'" in refused("plan", project, "--fleet", "jetsons", "--costs", "llava-7b")
    where = ("--fleet", tmp_path / "fleet.yaml", "--costs", "llava-7b")
    assert "E406" in refused("plan", project, *where)
    assert "E108 --sizes: 'a' should be whole numbers" in refused("plan", project, *where, "--sizes", "a")
    assert "E405" in refused("launch", tmp_path / "none.json", project)

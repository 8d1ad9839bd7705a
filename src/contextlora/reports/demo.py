"""The demonstration: from drawn pictures to a deployable node, on the embedded model, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contextlora.config import AlignConfig, RunConfig, TrainConfig
from contextlora.data.examples import load_examples
from contextlora.data.scenes import SCENARIOS, build
from contextlora.errors import RunError, did_you_mean
from contextlora.evaluation.ask import ask
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.reports.page import write_report
from contextlora.training.runs import RunFolder
from contextlora.training.session import Session, measure
from contextlora.training.track import counting
from contextlora.training.whole import run_training

# The demo's own numbers: chosen for ten minutes on two cores, not the paper's Table II.
PICTURES: dict[str, Any] = {"train": 1000, "valid": 50, "test": 200}
SEED = 1  # of the pictures: how hard they are to tell was tuned on those of seed 0
TRAIN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 4,
    "lr": 2e-3,
    "layers": "top 1/3",
    "context": "gold",
    "prefix_cache_gb": 4.0,
    "checkpoint_every": 50,
}
QUICK_PICTURES: dict[str, Any] = {"train": 64, "valid": 8, "test": 24}
QUICK_TRAIN: dict[str, Any] = {**TRAIN, "epochs": 1, "checkpoint_every": 10}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """What the demonstration made.

    Attributes:
        folder: the run's folder.
        node: the exported PEFT LoRA.
        report: report.html.
        before, after: accuracy by task on split test.
        phases: seconds by phase.
        peak_memory_mb: of the process.
    """

    folder: Path
    node: Path
    report: Path
    before: dict[str, float]
    after: dict[str, float]
    phases: dict[str, float]
    peak_memory_mb: int


def demo(
    out: str | Path = "runs/demo",
    *,
    scene: str = "iov",
    quick: bool = False,
    model: str = "smol",
    train: dict[str, Any] | None = None,
    silent: bool = False,
    say: Say = print,
) -> Demo:
    """Runs the demonstration; an interrupted one goes on, a finished one is shown again.

    Args:
        out: the run's folder.
        scene: which rendered scenario.
        quick: tiny sizes, to see that everything works.
        model: the base model.
        train: hyperparameters instead of the demo's own.
        silent: no progress bars.
        say: told of each step.

    Raises:
        RunError: E524 for an unknown scene, E514 if stopped by Ctrl-C: run again to go on.
    """
    if scene not in SCENARIOS:
        raise RunError("E524", f"no scene '{scene}'.{did_you_mean(scene, SCENARIOS)} Known: {', '.join(SCENARIOS)}")
    folder = RunFolder(out)
    config = _config(folder.path, quick, model, train)
    sizes = QUICK_PICTURES if quick else PICTURES
    say(f"1. drawing {sum(sizes.values())} pictures of scene '{scene}' into {config.data}")
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.phase("draw pictures"), counting(silent) as count:
        build(scene, config.data, **sizes, seed=SEED, progress=lambda done, total: count("drawing", done, total))
    graph = TaskGraph.load(config.graph_path)
    last = graph.levels()[-1][-1]
    say("2. training " + ", then ".join(" + ".join(level) for level in graph.levels()))
    session = run_training(config, resume=True, evaluate_on="test", before=True, silent=silent, say=say)
    _measure_if_killed(session, config, folder, silent)
    say(f"3. exporting '{last}' with its prerequisites as one plain PEFT LoRA")
    with folder.phase("export"):
        node = Adapter.load(folder.adapter).export(last, folder.path / "export" / last)
    _show_one(session, config, say)
    with folder.phase("report"):
        report = write_report(folder.path)
    facts, scores = folder.facts(), folder.evaluation()
    before, after = ({t: a["mean"] for t, a in scores[k]["tasks"].items()} for k in ("before", "after"))
    return Demo(folder.path, node, report, before, after, facts["phases"], facts["peak_memory_mb"])


def _config(out: Path, quick: bool, model: str, train: dict[str, Any] | None) -> RunConfig:
    settings = {**(QUICK_TRAIN if quick else TRAIN), **(train or {})}
    align = AlignConfig(epochs=None if quick else 0)  # 64 pictures are too few: the shipped projector serves
    return RunConfig(model=model, data=str(out / "data"), out=str(out), align=align, train=TrainConfig(**settings))


def _measure_if_killed(session: Session, config: RunConfig, folder: RunFolder, silent: bool) -> None:
    """A run that was killed between training and evaluation is measured now."""
    after = folder.evaluation().get("after", {}).get("tasks", {})
    if set(after) != set(session.graph.names):
        with folder.phase("evaluate after"):
            measure(session, config.data, "test", folder=folder, silent=silent)


def _show_one(session: Session, config: RunConfig, say: Say) -> None:
    """One test picture, asked everything."""
    assert session.adapter is not None
    example = load_examples(config.data, session.graph, split="test")[0]
    asked = ask(session.reader, session.adapter, image=example.image, task="all")
    say(f"4. one picture it has never seen: {example.image}")
    for task, found in asked.answers.items():
        truth = ", ".join(example.answers[task])
        said = ", ".join(found)
        say(f"   {asked.questions[task]}\n     {said}" + ("" if said == truth else f"   (truth: {truth})"))


def as_json(made: Demo) -> str:
    """One JSON object for machines."""
    return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in vars(made).items()})

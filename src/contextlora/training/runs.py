"""The run folder: what a run leaves behind, and what `--resume`, `eval` and `report` find again.

config.yaml and graph.yaml (as used), metrics.jsonl, checkpoints/ (while it runs), adapter/, base/ (only after an
alignment of its own), run.json (facts: state, times, memory) and evaluation.json (accuracy and a few answers).
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from contextlora.config import RunConfig, load
from contextlora.data.examples import Example
from contextlora.errors import AdapterError, RunError
from contextlora.evaluation.evaluate import Evaluation
from contextlora.evaluation.metrics import score
from contextlora.graph import TaskGraph
from contextlora.lora.folder import existing
from contextlora.training.checkpoint import left_in

SAMPLES = 6


class RunFolder:
    """Paths within a run's folder, and its two small JSON files.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter, self.base = self.path / "adapter", self.path / "base"
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.config, self.graph = self.path / "config.yaml", self.path / "graph.yaml"
        self._facts, self._evaluation = self.path / "run.json", self.path / "evaluation.json"

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def has_adapter(self) -> bool:
        """Whether a training has ended here."""
        try:
            return bool(existing(self.adapter))
        except AdapterError:
            return False

    @property
    def interrupted(self) -> bool:
        """Whether a training has left checkpoints here."""
        return left_in(self.checkpoints)

    def refuse_a_second_run(self, config: RunConfig, tasks: Sequence[str] | None, *, resume: bool, force: bool) -> None:
        """Raises RunError E521 or E522 where training would throw away what is here."""
        if resume and self.finished(tasks or ()) and load(self.config).train != config.train:
            raise RunError("E521", "is finished, with other settings; use another `out`, or --force", where=self.path)
        if resume or force:
            return
        if self.interrupted:
            text = "holds an interrupted run; go on with --resume, or throw it away with --force"
            raise RunError("E522", text, where=self.path)
        if self.has_adapter and tasks is None:
            text = "holds a trained adapter; name what to train with --tasks, or train all anew with --force"
            raise RunError("E521", text, where=self.path)

    def finished(self, tasks: Sequence[str]) -> bool:
        """Whether the last run here trained exactly `tasks` and came to its end."""
        facts = self.facts()
        return self.has_adapter and facts.get("state") == "done" and facts.get("tasks") == list(tasks)

    def begin(self, config: RunConfig, tasks: Sequence[str], *, resume: bool, fresh: bool) -> None:
        """Makes the folder, with copies of configuration and graph that `train FOLDER` can be called with again.

        Args:
            config: the run.
            tasks: what it trains.
            resume: keep what is known of these tasks' training so far.
            fresh: throw away everything that a run left here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            for folder in (self.adapter, self.checkpoints, *((self.base,) if config.align.epochs is None else ())):
                shutil.rmtree(folder, ignore_errors=True)
            for path in (self.metrics, self._facts, self._evaluation):
                path.unlink(missing_ok=True)
        if not (self.graph.exists() and self.graph.samefile(config.graph_path)):
            shutil.copyfile(config.graph_path, self.graph)
        moved = {"data": str(Path(config.data).resolve()), "graph": self.graph.name, "out": "."}
        if Path(config.model).is_dir():
            moved["model"] = str(Path(config.model).resolve())
        text = yaml.safe_dump(config.model_dump(mode="json") | moved, sort_keys=False, allow_unicode=True)
        self.config.write_text(text, encoding="utf-8")
        if not resume:
            self._forget(tasks)
        self.note(state="running", tasks=list(tasks))

    def _forget(self, tasks: Sequence[str]) -> None:
        """Drops losses and accuracies of `tasks`: they train anew."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            self.metrics.write_text("".join(x for x in lines if not set(_losses(x)) & set(tasks)), encoding="utf-8")
        if scores := self.evaluation():
            for name in ("before", "after"):
                for task in tasks:
                    scores.get(name, {}).get("tasks", {}).pop(task, None)
            for sample in scores.get("samples", []):
                sample["answers"] = {t: a for t, a in sample["answers"].items() if t not in tasks}
            _write(self._evaluation, scores)

    def losses(self) -> dict[str, list[float]]:
        """The loss of every update, by task. A resumed run repeats some updates; the last record of each counts."""
        found: dict[str, dict[int, float]] = {}
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        for line in lines:
            for task, loss in _losses(line).items():
                found.setdefault(task, {})[int(json.loads(line)["step"])] = loss
        return {task: [steps[i] for i in sorted(steps)] for task, steps in found.items()}

    # --- run.json and evaluation.json --------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """run.json, or nothing."""
        return _read(self._facts)

    def note(self, **facts: Any) -> None:
        """Adds to run.json."""
        _write(self._facts, self.facts() | facts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase's wall time, interrupted or not, and keeps the peak of memory."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.path.is_dir():
                facts = self.facts()
                spent = facts.get("phases", {})
                spent[name] = round(spent.get(name, 0.0) + time.perf_counter() - began, 2)
                self.note(phases=spent, peak_memory_mb=max(peak_memory_mb(), facts.get("peak_memory_mb", 0)))

    def evaluation(self) -> dict[str, Any]:
        """evaluation.json, or nothing."""
        return _read(self._evaluation)

    def record(
        self,
        name: str,
        result: Evaluation,
        graph: TaskGraph,
        train: Sequence[Example],
        asked: Sequence[Example],
        **how: Any,
    ) -> None:
        """Keeps an evaluation as `name`, "before" or "after", with the majority class and a few answers beside it."""
        data = self.evaluation()
        old = data.get(name, {})
        tasks = old["tasks"] if old.get("how") == how else {}  # other tasks, measured in the same way
        data[name] = {"how": how, "tasks": tasks | {t: vars(a) for t, a in result.accuracy.items()}}
        data.setdefault("majority", {}).update({t: majority(t, train, asked) for t in result.accuracy})
        if name == "after":
            shown = asked[:: max(1, len(asked) // SAMPLES)][:SAMPLES]
            before = {s["id"]: s["answers"] for s in data.get("samples", [])}
            data["samples"] = [_sample(e, graph, result, before.get(e.id, {})) for e in shown]
        _write(self._evaluation, data)


def majority(task: str, train: Sequence[Example], asked: Sequence[Example]) -> float:
    """The score of always giving the training split's most frequent answer."""
    keys = Counter(e.answers[task] for e in train if task in e.answers)
    common = keys.most_common(1)[0][0] if keys else ()
    scores = [score(common, e.answers[task]) for e in asked if task in e.answers]
    return sum(scores) / len(scores) if scores else 0.0


def peak_memory_mb() -> int:
    """The most memory this process ever held, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def _sample(example: Example, graph: TaskGraph, result: Evaluation, before: Mapping[str, Any]) -> dict[str, Any]:
    said = {
        task: {
            "question": example.questions.get(task, graph.task(task).question),
            "said": list(answers[example.id]),
            "truth": list(example.answers[task]),
        }
        for task, answers in result.answers.items()
        if example.id in answers and task in example.answers
    }
    return {"id": example.id, "image": str(example.image) if example.image else None, "answers": {**before, **said}}


def _losses(line: str) -> dict[str, float]:
    """The losses in a line of metrics.jsonl; none in a line that a kill cut short."""
    try:
        losses = json.loads(line)["loss"]
    except (ValueError, KeyError, TypeError):
        return {}
    return losses if isinstance(losses, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)

"""report.html: one self-contained page about a run. Everything in it that came from files is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from importlib import resources
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from contextlora.config import RunConfig, load
from contextlora.data.images import open_image
from contextlora.errors import ContextLoRAError, RunError
from contextlora.evaluation.metrics import score
from contextlora.graph import TaskGraph
from contextlora.reports.figures import accuracy_bars, loss_curves
from contextlora.training.runs import RunFolder

SIDE = 448  # pixels; pictures are embedded no larger than this


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes report.html for a run's folder, whatever of it is there yet.

    Args:
        run: the run's folder.
        out: the file; None puts it into the folder.

    Raises:
        RunError: E525 if `run` is not a run's folder, E523 if the file cannot be written.
    """
    folder = RunFolder(run)
    if not folder.config.is_file() or not folder.graph.is_file():
        raise RunError("E525", "not a run's folder: expected config.yaml and graph.yaml", where=folder.path)
    path = Path(out) if out else folder.path / "report.html"
    page = page_for(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as e:
        raise RunError("E523", f"cannot be written: {e.strerror}", where=path) from None
    return path


def page_for(folder: RunFolder) -> str:
    """The page's text."""
    config, graph = load(folder.config), TaskGraph.load(folder.graph)
    facts, scores, losses = folder.facts(), folder.evaluation(), folder.losses()
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{graph.name}: {len(graph.names)} tasks on {_short(config.model)}"),
        subtitle=escape("One low-rank block for each task, trained along the graph by contextlora."),
        graph=graph.to_svg(),
        accuracy=_accuracy(scores, graph),
        curves=loss_curves(losses) if losses else _nothing("No update is recorded yet."),
        samples=_samples(scores.get("samples", [])),
        facts=_facts(config, graph, facts),
    )


def _accuracy(scores: Mapping[str, Any], graph: TaskGraph) -> str:
    after, before, majority = scores.get("after", {}), scores.get("before", {}), scores.get("majority", {})
    found = {t: after["tasks"][t] for t in graph.names if t in after.get("tasks", {})}
    if not found:
        return _nothing("Not measured yet: run contextlora eval on this folder.")
    first = {t: a["mean"] for t, a in before.get("tasks", {}).items()}
    bars = accuracy_bars(first, {t: (a["mean"], a["low"], a["high"]) for t, a in found.items()}, majority)
    rows = []
    for task, a in found.items():
        interval = f'<span class="range">{a["low"]:.3f} to {a["high"]:.3f}</span>'
        numbers = [_number(majority.get(task)), _number(first.get(task)), f"<b>{a['mean']:.3f}</b> {interval}"]
        cells = "".join(f'<td class="n">{n}</td>' for n in [*numbers, str(a["count"])])
        rows.append(f"<tr><td>{escape(task)}</td>{cells}</tr>")
    heads = "".join(f'<th class="n">{h}</th>' for h in ("most frequent answer", "before", "after, 95 %", "questions"))
    how = after.get("how", {})
    note = f"Split {how.get('split', '?')}, answers by {how.get('method', '?')}, context {how.get('context', '?')}."
    note += " An answer scores 1 if exactly right, 0.5 if it names only some of the right options, else 0."
    return f'{bars}<table><tr><th>task</th>{heads}</tr>{"".join(rows)}</table><p class="range">{escape(note)}</p>'


def _samples(samples: list[Mapping[str, Any]]) -> str:
    if not samples:
        return _nothing("None kept yet.")
    return f'<div class="samples">{"".join(map(_figure, samples))}</div>'


def _figure(sample: Mapping[str, Any]) -> str:
    lines = []
    for a in sample["answers"].values():
        points = score(a["said"], a["truth"])
        kind = "right" if points == 1 else "partly" if points else "wrong"
        truth = "" if points == 1 else f' <span class="truth">truth: {escape(", ".join(a["truth"]))}</span>'
        said = escape(", ".join(a["said"]) or "(no valid answer)")
        lines.append(f'<dt>{escape(a["question"])}</dt><dd class="{kind}">{said}{truth}</dd>')
    picture = f'<img alt="" src="{embedded(sample["image"])}">' if sample.get("image") else ""
    return f"<figure>{picture}<figcaption><dl>{''.join(lines)}</dl></figcaption></figure>"


def embedded(image: str | Path) -> str:
    """A picture as a data URL: a JPEG of at most SIDE pixels a side. A picture that is gone is a grey pixel."""
    try:
        picture = open_image(image)
    except ContextLoRAError:
        from PIL import Image

        picture = Image.new("RGB", (1, 1), "#cccccc")
    picture.thumbnail((SIDE, SIDE))
    data = BytesIO()
    picture.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _facts(config: RunConfig, graph: TaskGraph, facts: Mapping[str, Any]) -> str:
    t = config.train
    rows: dict[str, Any] = {
        "model": config.model,
        "parameters, frozen": _count(facts.get("parameters")),
        "parameters in blocks": _count(facts.get("block_parameters")),
        "linear layers with blocks": facts.get("layers"),
        "layers": t.layers,
        "ranks": ", ".join(f"{n} {graph.rank_of(n)}" for n in graph.names),
        "epochs": t.epochs,
        "batch size, a task": t.batch_size * t.accumulate,
        "learning rate": f"{t.lr:g}",
        "weight decay": f"{t.weight_decay:g}",
        "schedule": t.schedule,
        "frozen ratio": graph.frozen_ratio if t.frozen_ratio is None else t.frozen_ratio,
        "context": t.context,
        "label noise": t.label_noise or None,
        "seed": t.seed,
        "dtype": config.dtype,
        "device": facts.get("device"),
        "threads": facts.get("threads"),
        "data": config.data,
        "data, sha256": str(facts.get("data_sha256", ""))[:16],
        "peak memory": f"{facts['peak_memory_mb']:,} MB" if "peak_memory_mb" in facts else None,
        "state": facts.get("state"),
        **{f"time, {name}": f"{seconds:.1f} s" for name, seconds in facts.get("phases", {}).items()},
    }
    cells = [
        f"<div><span>{escape(k)}</span><span>{escape(str(v))}</span></div>"
        for k, v in rows.items()
        if v not in (None, "")
    ]
    return f'<div class="facts">{"".join(cells)}</div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model


def _nothing(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'

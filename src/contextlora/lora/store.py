"""An adapter as the files of its folder, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from contextlora.errors import AdapterError, ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.card import card
from contextlora.lora.export import CONFIG, WEIGHTS, Block, peft_files, read_block
from contextlora.lora.folder import MANIFEST, existing, read_file, read_manifest, seal
from contextlora.lora.record import Record, fits
from contextlora.strict import Strict, validate

if TYPE_CHECKING:
    from contextlora.lora.adapter import Adapter

GRAPH = "graph.yaml"


class _Targets(Strict):
    target_modules: list[str]
    layers_to_transform: list[int] | None


class _Manifest(Strict):
    """manifest.json, beside the lists that folder.py adds and checks."""

    base: str
    fingerprint: str
    seed: int
    layers: Annotated[dict[str, tuple[int, int]], Field(min_length=1)]
    targets: _Targets
    tasks: dict[str, Record]


def contents(adapter: Adapter, folder: Path) -> dict[str, bytes]:
    """The files of an adapter folder, the same bytes for the same adapter.

    graph.yaml keeps the text that `folder` has now, comments and all, while that says the same.
    """
    graph, records = adapter.graph, {t: r.model_dump() for t, r in adapter.records.items()}
    files: dict[str, bytes] = {}
    for task, block in adapter.blocks.items():
        alpha = graph.scale_of(task) * graph.rank_of(task)
        for name, data in peft_files(block, alpha, adapter.base, adapter.targets).items():
            files[f"tasks/{task}/{name}"] = data
    files[GRAPH] = _graph_text(graph, folder / GRAPH)
    files["graph.svg"] = graph.to_svg().encode()
    files["README.md"] = card(
        graph,
        {t: records[t] for t in adapter.blocks if t in records},
        base=adapter.base,
        fingerprint=adapter.fingerprint,
        layers=len(adapter.layers),
        stale=adapter.stale(),
    ).encode()
    manifest = {
        "base": adapter.base,
        "fingerprint": adapter.fingerprint,
        "seed": adapter.seed,
        "layers": {path: list(shape) for path, shape in adapter.layers.items()},
        "targets": dict(adapter.targets),
        "tasks": records,
    }
    return {**files, MANIFEST: seal(manifest, files)}


def parts(folder: str | Path, tasks: Sequence[str] | None) -> dict[str, Any]:
    """The fields of the adapter in a folder, with the blocks of `tasks` and their prerequisites; None reads all."""
    root = existing(folder)
    raw = read_manifest(root)
    if not (root / GRAPH).is_file():
        raise AdapterError("E310", f"it has no {GRAPH}", where=root)
    graph, m = TaskGraph.load(root / GRAPH), _checked(raw, root / MANIFEST)
    blocks = {}
    for task in graph.names if tasks is None else needed(graph, tasks):
        block = _read_task(root, task, raw, m.tasks.get(task), graph)
        if block is not None:
            blocks[task] = block
    return {
        "graph": graph,
        "blocks": blocks,
        "records": {t: m.tasks[t] for t in graph.names if t in m.tasks},
        "layers": m.layers,
        "base": m.base,
        "fingerprint": m.fingerprint,
        "targets": m.targets.model_dump(),
        "seed": m.seed,
    }


def needed(graph: TaskGraph, tasks: Iterable[str]) -> tuple[str, ...]:
    """`tasks` and the prerequisites whose blocks they use, in declared order."""
    active = {n for t in tasks for n in graph.active(t)}
    return tuple(n for n in graph.names if n in active)


def _read_task(root: Path, task: str, raw: Mapping[str, Any], record: Record | None, graph: TaskGraph) -> Block | None:
    """A task's block; None if its folder was pulled out, or the edited graph gives it another rank or scale."""
    place = root / "tasks" / task
    if not place.exists():
        return None
    if record is None:
        raise AdapterError("E310", f"not in {MANIFEST}; add it with `contextlora plug`", where=place)
    if not fits(record, graph, task):
        return None
    read_file(root, f"tasks/{task}/{CONFIG}", raw)
    return read_block(read_file(root, f"tasks/{task}/{WEIGHTS}", raw), place / WEIGHTS)


def _checked(raw: Mapping[str, Any], path: Path) -> _Manifest:
    try:
        body = {k: v for k, v in raw.items() if k not in ("format", "files")}
        body["layers"] = {p: tuple(shape) for p, shape in body["layers"].items()}
        return validate(_Manifest, body, path)
    except (ConfigError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError("E311", f"damaged: {e}", where=path) from None


def _graph_text(graph: TaskGraph, old: Path) -> bytes:
    try:
        if TaskGraph.load(old) == graph:
            return old.read_bytes()
    except (ConfigError, OSError):
        pass
    with TemporaryDirectory() as place:
        graph.save(Path(place) / GRAPH)
        return (Path(place) / GRAPH).read_bytes()

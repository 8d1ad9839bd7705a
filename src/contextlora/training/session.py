"""The one place that opens a model for use, and measures it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from contextlora.config import RunConfig, load
from contextlora.data.collate import Encoder
from contextlora.data.examples import load_examples
from contextlora.errors import AdapterError, ConfigError, ContextLoRAError
from contextlora.evaluation.evaluate import Evaluation, Method, evaluate
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import attach
from contextlora.lora.folder import MANIFEST, existing
from contextlora.models import load_model, vision_fingerprint
from contextlora.models.hub import quiet
from contextlora.models.inputs import ImageFeatures
from contextlora.training.runs import RunFolder
from contextlora.training.track import counting

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A model ready for use.

    Attributes:
        model: with the graph's blocks attached.
        processor: its processor or tokenizer.
        graph: the tasks.
        adapter: what was loaded into the blocks, None where nothing is trained yet.
        reader: gives the model its inputs, image features kept on disk.
        base: name or folder of the base model.
    """

    model: Any
    processor: Any
    graph: TaskGraph
    adapter: Adapter | None
    reader: ImageFeatures
    base: str


def open_session(
    source: RunConfig | str | Path,
    *,
    tasks: Sequence[str] | None = None,
    base: str | None = None,
    fresh: bool = False,
    exact: bool = False,
    device: str | None = None,
) -> Session:
    """Loads the base model and puts blocks on it.

    Args:
        source: a run's configuration (its graph, with the adapter in `out` if there is one), or an adapter folder.
        tasks: of an adapter folder, read these and their prerequisites alone.
        base: name or folder of the base model, where it is not the one that `source` names.
        fresh: leave an adapter in `out` alone and start from first values.
        exact: refuse an adapter in `out` that was made with other `layers` or `targets` than the configuration's.
        device: where to run; None takes the configuration's, or the CPU.

    Raises:
        ConfigError, AdapterError: for a graph, adapter or model that cannot be used or do not fit.
    """
    if isinstance(source, RunConfig):
        config, graph = source, TaskGraph.load(source.graph_path)
        folder = RunFolder(config.out)
        adapter = Adapter.load(folder.adapter).with_graph(graph) if folder.has_adapter and not fresh else None
        aligned = config.align.epochs is not None if adapter is None else Path(adapter.base).name == folder.base.name
        name = base or (str(folder.base) if aligned and is_model(folder.base) else config.model)
    else:
        home = find_adapter(source)
        adapter = Adapter.load(home, tasks)
        config, graph = _config_beside(home), adapter.graph
        name = base or _base_of(adapter, home)
    name = str(Path(name).resolve()) if is_model(Path(name)) else name
    model, processor = load_model(name, dtype=config.dtype, device=device or config.device)
    if isinstance(source, RunConfig) and (exact or adapter is None):
        attach(model, graph, layers=config.train.layers, targets=config.train.targets, seed=config.train.seed)
    if adapter is not None:
        adapter.apply(model, any_base=base is not None)
    encoder = Encoder(processor, graph)
    reader = ImageFeatures(model, encoder, feature_folder(model) if encoder.sees_images else None)
    return Session(model, processor, graph, adapter, reader, name)


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that `path` means: itself, or the one in a run's folder. Raises AdapterError E310."""
    path = Path(path).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / MANIFEST).is_file():
            return folder
    return existing(path / "adapter" if (path / "config.yaml").is_file() else path)


def feature_folder(model: Any) -> Path | None:
    """Where image features of exactly this tower and projector are kept; None where nothing can be written."""
    key = vision_fingerprint(model).removeprefix("sha256:")[:32]
    try:
        folder = cached_assets_path("contextlora", "features", key)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def measure(
    session: Session,
    data: str | Path,
    split: str,
    *,
    tasks: Sequence[str] | None = None,
    method: Method = "likelihood",
    context: str | None = None,
    folder: RunFolder | None = None,
    name: str = "after",
    silent: bool = True,
) -> Evaluation:
    """Accuracy on a split; with `folder` kept in its evaluation.json and, as "after", in its adapter.

    `context` is as in `evaluate`; None asks each task as it was trained, prerequisites' own answers in place of labels.
    `silent` shows no progress bar.
    """
    ways = ways_of(session, context)
    known = [t for t in session.graph.names if session.adapter is None or t in session.adapter.blocks]
    with counting(silent) as count:
        result = evaluate(
            session.model,
            session.processor,
            session.graph,
            data=data,
            split=split,
            tasks=known if tasks is None else tasks,
            method=method,
            context=ways,
            features=session.reader,
            progress=lambda done, total: count(f"measuring on {split}", done, total),
        )
    if folder is not None:
        examples = load_examples(data, session.graph)
        parts = [[e for e in examples if e.split == s] for s in ("train", split)]
        how = context or ("predicted" if "predicted" in ways.values() else "none")
        folder.record(name, result, session.graph, *parts, split=split, method=method, context=how)
        if name == "after" and folder.has_adapter:
            metrics = {t: {f"{split} accuracy": a.mean} for t, a in result.accuracy.items()}
            Adapter.of(session.model, metrics=metrics).save(folder.adapter)
    return result


def ways_of(session: Session, context: str | None = None) -> dict[str, str]:
    """What each task's prompt says of its prerequisites; with None as in its training, own answers for labels."""
    adapter = session.adapter
    return {t: context or (adapter.context(t) if adapter else "none") for t in session.graph.names}


def open_for_eval(
    source: RunConfig | str | Path, data: str | Path | None, *, base: str | None = None, device: str | None = None
) -> tuple[Session, RunFolder | None, Path]:
    """A session to measure, the run's folder that should keep the result (None if it is no run's data), and the data.

    Raises ConfigError E108 if nothing says which data to use.
    """
    if isinstance(source, RunConfig):
        config: RunConfig | None = source
        run = RunFolder(source.out)
        if not run.has_adapter:
            raise AdapterError("E310", "nothing is trained here yet; run contextlora train first", where=run.path)
    else:
        run = RunFolder(find_adapter(source).parent)
        config = load(run.config) if run.config.is_file() else None
    if data is None and config is None:
        raise ConfigError("E108", "no run lies around this adapter; name a data folder", where="--data")
    place = Path(data) if data is not None else Path(config.data if config else "")
    mine = config is not None and place.resolve() == Path(config.data).resolve() and run.graph.is_file()
    return open_session(source, base=base, device=device), run if mine else None, place


def export_merged(folder: str | Path, task: str, out: str | Path, *, base: str | None = None) -> Path:
    """Writes the base model with a task and its prerequisites merged in: see `Adapter.export_merged`."""
    adapter = Adapter.load(folder)
    session = open_session(folder, tasks=[task], base=base)
    with quiet():
        return adapter.export_merged(session.model, task, out, session.processor)


# --- finding things --------------------------------------------------------------------------------------------------


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _base_of(adapter: Adapter, home: Path) -> str:
    """The base that an adapter names; one that its run made lies beside it, wherever the run's folder has gone."""
    if Path(adapter.base).name == "base" and is_model(home.parent / "base"):
        return str(home.parent / "base")
    if not adapter.base:
        raise AdapterError("E314", "does not say which base model it belongs to; name it with --base", where=home)
    return adapter.base


def _config_beside(home: Path) -> RunConfig:
    """The configuration of the run that an adapter folder lies in, or the defaults."""
    path = home.parent / "config.yaml"
    try:
        return load(path) if path.is_file() else RunConfig()
    except ContextLoRAError:
        return RunConfig()

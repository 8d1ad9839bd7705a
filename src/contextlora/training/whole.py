"""A whole training run, from a configuration to a saved and measured adapter: what the command line calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from contextlora.config import RunConfig
from contextlora.data.records import data_hash
from contextlora.errors import ConfigError, RunError
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import gated_layers
from contextlora.models import load_model
from contextlora.models.hub import quiet
from contextlora.training.align import align
from contextlora.training.loop import train, training_examples
from contextlora.training.plan import refuse_a_rival
from contextlora.training.runs import RunFolder
from contextlora.training.session import Session, is_model, measure, open_session
from contextlora.training.track import Tracker, counting

Say = Callable[[str], None]


def run_training(
    config: RunConfig,
    tasks: Iterable[str] | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    evaluate_on: str | None = None,
    before: bool = False,
    silent: bool = False,
    say: Say = lambda _: None,
) -> Session:
    """A whole run: align if asked, train, save the adapter, evaluate if asked.

    Where `config.out` holds an adapter already, it is loaded first: `tasks` train anew and all other blocks stay
    byte-identical. A task's prerequisites are used as they are, trained or not.

    Args:
        config: the run.
        tasks: which blocks to train; None means all, or with `resume` those of the run that is resumed.
        resume: go on from the newest checkpoint, bit-exactly; a run that has ended is left as it is.
        force: throw away an interrupted run, and with `tasks` None the adapter too.
        evaluate_on: a split to measure accuracy on afterwards; kept in the adapter and in evaluation.json.
        before: measure on that split before training too.
        silent: no progress bar.
        say: told of what a user should know.

    Raises:
        RunError: E521 if a finished run would be overwritten, E522 an interrupted one; as `train`.
    """
    refuse_a_rival(config.train)
    graph, folder = TaskGraph.load(config.graph_path), RunFolder(config.out)
    named = list(tasks) if tasks is not None else folder.facts().get("tasks") if resume else None
    wanted = _wanted(graph, named, folder)
    folder.refuse_a_second_run(config, named, resume=resume, force=force)
    if resume and folder.finished(wanted):
        say("this run is finished; nothing to resume")
        return open_session(config)
    _writable(config)
    training_examples(config.data, graph, config.train)  # its faults before the model is loaded
    fresh = force and named is None
    with folder.phase("load and align"):
        if fresh or not folder.has_adapter:
            align_base(config, graph, folder, again=not resume, silent=silent, say=say)
        session = open_session(config, fresh=fresh, exact=True)
        folder.begin(config, wanted, resume=resume, fresh=fresh)  # only now is anything thrown away
    _say_what_is_untrained(session, wanted, say)
    for layer in gated_layers(session.model).values():
        for task in wanted:
            layer.reset(task, config.train.seed)
    if before and evaluate_on and not (resume and "before" in folder.evaluation()):
        say(f"measuring the untrained model on split {evaluate_on}")
        with folder.phase("evaluate before"):
            measure(session, config.data, evaluate_on, tasks=wanted, folder=folder, name="before", silent=silent)
    with folder.phase("train"), Tracker(folder.path, config.trackers, silent) as tracker:
        train(
            session.model,
            session.processor,
            graph,
            data=config.data,
            out=config.out,
            config=config.train,
            tasks=wanted,
            resume=resume,
            features=session.reader,
            tracker=tracker,
        )
    folder.note(state="done", base=session.base, data_sha256=data_hash(config.data), **_sizes(session))
    session = Session(
        session.model, session.processor, graph, Adapter.load(folder.adapter), session.reader, session.base
    )
    if evaluate_on:
        say(f"measuring the trained model on split {evaluate_on}")
        with folder.phase("evaluate after"):
            measure(session, config.data, evaluate_on, folder=folder, silent=silent)
    return session


# --- parts of a run --------------------------------------------------------------------------------------------------


def _wanted(graph: TaskGraph, tasks: list[str] | None, folder: RunFolder) -> list[str]:
    """The tasks to train, in declared order; hints at the graph that knows an unknown one."""
    try:
        chosen = set(graph.names if tasks is None else [t for t in tasks if graph.task(t)])
    except ConfigError as e:
        inner = folder.adapter / "graph.yaml"
        if tasks and inner.is_file() and set(tasks) <= set(TaskGraph.load(inner).names):
            text = f"{e.message} {inner} has it: pass --set graph={inner.resolve()}"
            raise ConfigError(e.code, text, where=e.where) from None
        raise
    if not chosen:
        raise ConfigError("E104", f"no task named; there are: {', '.join(graph.names)}", where="--tasks")
    return [t for t in graph.names if t in chosen]


def _writable(config: RunConfig) -> None:
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunError("E523", f"cannot be written: {e.strerror}", where=config.out) from None


def align_base(config: RunConfig, graph: TaskGraph, folder: RunFolder, *, again: bool, silent: bool, say: Say) -> None:
    """The projector's own stage, before the tasks; its result is a base model of this run's own."""
    if config.align.epochs is None or (is_model(folder.base) and not again):
        return
    say(f"aligning the projector of {config.model}")
    model, processor = load_model(config.model, dtype=config.dtype, device=config.device)
    a = config.align
    examples = training_examples(config.data, graph, config.train)
    how: dict[str, Any] = {"epochs": a.epochs, "batch_size": a.batch_size, "lr": a.lr, "seed": config.train.seed}
    with counting(silent) as count:
        align(model, processor, examples, **how, progress=count)
    part = folder.path / ".base.part"
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        model.save_pretrained(part)
        processor.save_pretrained(part)
    shutil.rmtree(folder.base, ignore_errors=True)
    part.rename(folder.base)


def _say_what_is_untrained(session: Session, wanted: Sequence[str], say: Say) -> None:
    trained = set(session.adapter.blocks) if session.adapter else set()
    for task in wanted:
        lost = [p for p in session.graph.prerequisites(task) if p not in trained and p not in wanted]
        if lost:
            say(f"'{task}' trains on prerequisites that are not trained yet: {', '.join(lost)}")


def _sizes(session: Session) -> dict[str, Any]:
    layers = gated_layers(session.model)
    blocks = sum(m.numel() for layer in layers.values() for m in (layer.A, layer.B))
    total = sum(p.numel() for p in session.model.parameters() if not p.requires_grad)
    device = str(next(session.model.parameters()).device)
    return {
        "parameters": total,
        "block_parameters": blocks,
        "layers": len(layers),
        "device": device,
        "threads": torch.get_num_threads(),
    }

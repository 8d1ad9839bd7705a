"""`contextlora init`, `check`, `train`, `eval` and `ask`: one project on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contextlora.cli.app import app
from contextlora.cli.options import (
    AdapterFolder,
    Base,
    Chain,
    Config,
    Context,
    Device,
    How,
    Json,
    Method,
    Part,
    Set,
    Tasks,
)
from contextlora.cli.shared import (
    emit,
    is_config,
    load_run,
    say,
    show_accuracy,
    show_table,
    task_names,
    tell_stale,
    warn,
)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to make the project.")],
    scene: Annotated[str | None, typer.Option(help="Draw a benchmark: iov, factory, city, ...")] = None,
    yolo: Annotated[Path | None, typer.Option(help="Import pictures with YOLO boxes (with --recipe).")] = None,
    recipe: Annotated[str | None, typer.Option(help="How answers follow from boxes: smartcity-rad, or a file.")] = None,
    llava: Annotated[Path | None, typer.Option(help="Import LLaVA conversations (JSON).")] = None,
    instructions: Annotated[list[Path] | None, typer.Option(help="Import instruction JSON. Repeatable.")] = None,
    spell_out: Annotated[bool, typer.Option(help="With --instructions: options as texts, not labels.")] = False,
    train: Annotated[int, typer.Option(help="With --scene: pictures to train on.")] = 1200,
    valid: Annotated[int, typer.Option(help="With --scene: pictures to validate on.")] = 200,
    test: Annotated[int, typer.Option(help="With --scene: pictures to test on.")] = 400,
    seed: Annotated[int, typer.Option(help="With --scene: of the pictures.")] = 0,
    as_json: Json = False,
) -> None:
    """Start a project: config.yaml and a data folder.

    From a small example, a drawn scene, or files of yours. Nothing is ever overwritten.
    """
    from contextlora.data.starter import start_project
    from contextlora.training.track import counting

    sizes = {"train": train, "valid": valid, "test": test, "seed": seed}
    with counting(as_json) as count:
        made = start_project(
            folder,
            scene=scene,
            yolo=yolo,
            recipe=recipe,
            llava=llava,
            instructions=instructions,
            spell_out=spell_out,
            sizes=sizes,
            progress=lambda done, total: count("drawing", done, total),
        )
    emit(as_json, {"config": str(made)}, f"made {made}\nnext: contextlora check {made}")


@app.command()
def check(config: Config, overrides: Set = None, tasks: Tasks = None, as_json: Json = False) -> None:
    """Validate all, estimate memory and time, try an export.

    Before anything long starts: two real updates are timed, and nothing is written.
    """
    from contextlora.training.check import check_run

    found = check_run(load_run(config, overrides), task_names(tasks), say=say)
    if as_json:
        emit(True, found.as_dict(), "")
        return
    for title, rows in found.tables().items():
        show_table(title, rows)
    for warning in found.warnings:
        warn(warning)
    typer.echo("ready to train; times and memory are estimates")


@app.command()
def train(
    config: Config,
    overrides: Set = None,
    tasks: Tasks = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, bit-exactly.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Throw away what `out` holds of these tasks.")] = False,
    evaluate_on: Annotated[
        Part | None, typer.Option("--eval", help="Measure accuracy on this split afterwards.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train along the graph, or only some tasks of it.

    With --tasks all other blocks stay byte-identical. Ctrl-C leaves a run that --resume continues.
    """
    from contextlora.training.runs import RunFolder
    from contextlora.training.whole import run_training

    settings = load_run(config, overrides)
    session = run_training(
        settings,
        task_names(tasks),
        resume=resume,
        force=force,
        evaluate_on=evaluate_on.value if evaluate_on else None,
        silent=as_json,
        say=say,
    )
    assert session.adapter is not None
    stale = tell_stale(session.adapter)
    folder = Path(settings.out) / "adapter"
    facts = {"adapter": str(folder), "sha256": session.adapter.digest(), "tasks": list(session.adapter.blocks)}
    emit(as_json, {**facts, "stale": stale}, f"saved {folder} ({', '.join(facts['tasks'])})")
    if evaluate_on and not as_json:
        show_accuracy(evaluate_on.value, RunFolder(settings.out).evaluation()["after"]["tasks"])


@app.command("eval")
def evaluate(
    source: Annotated[Path, typer.Argument(help="Run configuration, run's folder or adapter folder.")],
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: the configuration's.")] = None,
    split: Annotated[Part, typer.Option(help="Which split.")] = Part.test,
    method: Method = How.likelihood,
    context: Annotated[
        Context | None, typer.Option(help="Prerequisites' answers in the prompt. Default: as each task was trained.")
    ] = None,
    tasks: Tasks = None,
    overrides: Set = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy per task, with 95 % intervals."""
    from contextlora.training.session import measure, open_for_eval, ways_of

    session, folder, place = open_for_eval(
        load_run(source, overrides) if is_config(source) else source, data, base=base, device=device
    )
    names, way = task_names(tasks), context.value if context else None
    result = measure(
        session,
        place,
        split.value,
        tasks=None if names is None else [t for t in names if session.graph.task(t)],
        method=method.value,
        context=way,
        folder=folder,
        silent=as_json,
    )
    scores = {t: vars(a) for t, a in result.accuracy.items()}
    if as_json:
        asked = {t: ways_of(session, way)[t] for t in scores}
        emit(True, {"split": split.value, "method": method.value, "context": asked, "tasks": scores}, "")
    else:
        show_accuracy(split.value, scores)


@app.command()
def ask(
    adapter: AdapterFolder,
    image: Annotated[Path | None, typer.Option(help="The picture.")] = None,
    task: Annotated[str | None, typer.Option(help='Which task answers; "all" for each of them, in order.')] = None,
    question: Annotated[str | None, typer.Option(help="The question in your words.")] = None,
    method: Method = How.likelihood,
    context: Annotated[
        Chain | None,
        typer.Option(help="Prerequisites' own answers in the prompt. Default: as each task was trained."),
    ] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask about one picture.

    Works with only some tasks present, and says what is missing.
    """
    from contextlora.evaluation.ask import ALL, ask, asked_tasks
    from contextlora.lora.adapter import Adapter
    from contextlora.training.session import find_adapter, open_session

    folder = find_adapter(adapter)
    whole = Adapter.load(folder)
    wanted = asked_tasks(whole, task, question)  # a wrong name is told before the model loads
    if image is not None:
        from contextlora.data.images import check_image

        check_image(image)
    chained = "predicted" in [context.value if context else whole.context(t) for t in wanted]
    session = open_session(folder, tasks=None if chained else wanted, base=base, device=device)
    found = ask(
        session.reader,
        whole,
        image=image,
        task=wanted[0] if task != ALL else task,
        question=question,
        method=method.value,
        context=context.value if context else None,
    )
    for warning in found.warnings:
        warn(warning)
    lines = [f"{t}: {', '.join(a) or '(no valid answer)'}" for t, a in found.answers.items()]
    emit(as_json, {"answers": found.answers, "warnings": found.warnings}, "\n".join(lines))

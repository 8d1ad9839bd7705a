"""The command line: parse, load, call one function. Everything slow is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from contextlora.cli_federate import federate
from contextlora.errors import ConfigError, ContextLoRAError
from contextlora.options import Json, Part, Set

if TYPE_CHECKING:
    from contextlora.config import RunConfig

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130


class _Commands(TyperGroup):
    """Turns every failure into one line on stderr and an exit code; CONTEXTLORA_DEBUG=1 shows the traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone = kwargs.get("standalone_mode", True)
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:  # `contextlora eval --json | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = BUG
        except Exception as e:
            if os.environ.get("CONTEXTLORA_DEBUG"):
                raise
            code = _report(e)
        if code == INTERRUPTED:
            typer.echo("stopped", err=True)
        if standalone:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _report(error: Exception) -> int:
    """Prints an error and returns the exit code that belongs to it."""
    if isinstance(error, ContextLoRAError):
        typer.echo(f"error {error}", err=True)
        return INTERRUPTED if error.code == "E514" else USER_ERROR
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if (usage := getattr(error, "format_message", None)) is not None:  # the parser's own errors
        words = " ".join(usage().split())
        typer.echo(
            f"error E107 {words} See contextlora --help" if words else "error E107 see contextlora --help", err=True
        )
        return USER_ERROR
    if isinstance(error, OSError):
        typer.echo(f"error E523 {error.filename or 'the system'}: {error.strerror or error}", err=True)
        return USER_ERROR
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        typer.echo("error E531 out of memory; try a smaller train.batch_size, or train.layers='top 1/3'", err=True)
        return USER_ERROR
    what = (str(error).splitlines() or [""])[0][:300]
    typer.echo(
        f"error E599 unexpected {type(error).__name__}: {what} (a bug; CONTEXTLORA_DEBUG=1 shows where)", err=True
    )
    return BUG


app = typer.Typer(
    cls=_Commands, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=False
)


class How(StrEnum):
    """How an answer is found."""

    likelihood = "likelihood"
    generate = "generate"


class Context(StrEnum):
    """What the prompt says of the prerequisites."""

    none = "none"
    gold = "gold"
    predicted = "predicted"


class Chain(StrEnum):
    """As Context, where there are no labels."""

    none = "none"
    predicted = "predicted"


Config = Annotated[Path, typer.Argument(help="Run configuration (YAML), or a run's folder.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Tasks, separated by commas. Default: all.")]
Base = Annotated[str | None, typer.Option(help="Base model, where it is not the one that the adapter names.")]
Device = Annotated[str | None, typer.Option(help='Where to run, e.g. "cpu" or "cuda".')]
Method = Annotated[How, typer.Option(help="Pick the likeliest option set, or write an answer and check its format.")]
AdapterFolder = Annotated[Path, typer.Argument(help="An adapter folder, or a run's folder.")]


@app.callback(invoke_without_command=True)
def _top(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """Fine-tune one small multimodal LLM for a whole workflow of dependent tasks."""
    if version:
        import contextlora

        typer.echo(contextlora.__version__)
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to make the project.")],
    scene: Annotated[str | None, typer.Option(help="Draw a benchmark: iov, factory, city, ...")] = None,
    yolo: Annotated[Path | None, typer.Option(help="Import pictures with YOLO boxes (with --recipe).")] = None,
    recipe: Annotated[str | None, typer.Option(help="How answers follow from boxes: smartcity-rad, or a file.")] = None,
    llava: Annotated[Path | None, typer.Option(help="Import LLaVA conversations (JSON).")] = None,
    instructions: Annotated[list[Path] | None, typer.Option(help="Import instruction JSON. Repeatable.")] = None,
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
            sizes=sizes,
            progress=lambda done, total: count("drawing", done, total),
        )
    _out(as_json, {"config": str(made)}, f"made {made}\nnext: contextlora check {made}")


@app.command()
def check(config: Config, overrides: Set = None, tasks: Tasks = None, as_json: Json = False) -> None:
    """Validate all, estimate memory and time, try an export.

    Before anything long starts: two real updates are timed, and nothing is written.
    """
    from contextlora.training.check import check_run

    found = check_run(_load(config, overrides), _names(tasks), say=_say)
    if as_json:
        _out(True, found.as_dict(), "")
        return
    for title, rows in found.tables().items():
        _table(title, rows)
    for warning in found.warnings:
        _say(f"warning: {warning}")
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

    settings = _load(config, overrides)
    session = run_training(
        settings,
        _names(tasks),
        resume=resume,
        force=force,
        evaluate_on=evaluate_on.value if evaluate_on else None,
        silent=as_json,
        say=_say,
    )
    assert session.adapter is not None
    stale = session.adapter.stale()
    for task, why in stale.items():
        _say(f"warning: '{task}' should be trained (again): {why}")
    folder = Path(settings.out) / "adapter"
    facts = {"adapter": str(folder), "sha256": session.adapter.digest(), "tasks": list(session.adapter.blocks)}
    _out(as_json, {**facts, "stale": stale}, f"saved {folder} ({', '.join(facts['tasks'])})")
    if evaluate_on and not as_json:
        _accuracy(evaluate_on.value, RunFolder(settings.out).evaluation()["after"]["tasks"])


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
        _load(source, overrides) if _is_config(source) else source, data, base=base, device=device
    )
    names, way = _names(tasks), context.value if context else None
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
        _out(True, {"split": split.value, "method": method.value, "context": asked, "tasks": scores}, "")
    else:
        _accuracy(split.value, scores)


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
        _say(f"warning: {warning}")
    lines = [f"{t}: {', '.join(a) or '(no valid answer)'}" for t, a in found.answers.items()]
    _out(as_json, {"answers": found.answers, "warnings": found.warnings}, "\n".join(lines))


@app.command()
def export(
    adapter: AdapterFolder,
    task: Annotated[str, typer.Option(help="One task: a plain PEFT LoRA. Several, by commas: an adapter folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The base model with this task merged in.")] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a task for use without contextlora.

    One task with its prerequisites becomes a plain PEFT LoRA, or with --merged a whole model.
    """
    from contextlora.lora.adapter import Adapter
    from contextlora.training.session import export_merged, find_adapter

    folder, names = find_adapter(adapter), _names(task) or []
    loaded = Adapter.load(folder)
    for name in names:
        loaded.graph.task(name)
    if merged:
        if len(names) != 1:
            raise ConfigError("E108", "one task at a time can be merged", where="--task")
        written = export_merged(folder, names[0], out, base=base)
    else:
        written = loaded.export(names[0] if len(names) == 1 else names, out)
    kind = "model" if merged else "peft" if len(names) == 1 else "adapter"
    _out(as_json, {"out": str(written), "kind": kind, "tasks": names}, f"wrote {written}")


@app.command()
def plug(
    folder: AdapterFolder,
    source: Annotated[Path, typer.Argument(help="The adapter folder to take from, or one of its tasks/ folders.")],
    task: Annotated[str | None, typer.Option(help="Which task. Default: the only new one.")] = None,
    as_json: Json = False,
) -> None:
    """Add a task of another adapter to this one."""
    from contextlora.lora.plug import plug
    from contextlora.training.session import find_adapter

    home = find_adapter(folder)
    other = source if source.parent.name == "tasks" else find_adapter(source)
    _changed(as_json, home, plug(home, other, task))


@app.command()
def drop(
    folder: AdapterFolder, task: Annotated[str, typer.Argument(help="The task to remove.")], as_json: Json = False
) -> None:
    """Remove a task from an adapter; the rest still answers."""
    from contextlora.lora.plug import drop
    from contextlora.training.session import find_adapter

    home = find_adapter(folder)
    _changed(as_json, home, drop(home, task))


@app.command()
def plan(
    config: Config,
    fleet: Annotated[str | None, typer.Option(help="A fleet's YAML, or a shipped one's name.")] = None,
    costs: Annotated[str | None, typer.Option(help="A profile's JSON, or a shipped one's name.")] = None,
    planner: Annotated[str, typer.Option(help="exact, or the paper's algorithm2.")] = "exact",
    sizes: Annotated[str, typer.Option(help="Micro-batch sizes to consider.")] = "1,2,4,8",
    samples: Annotated[int | None, typer.Option(min=1, help="Of each task, instead of counting the data's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes (JSON).")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="A folder for its timeline and each stage's step (SVG).")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Do not plan: measure the model on this machine, and write this profile.")
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Plan the training on several devices, or measure its costs.

    First --profile costs.json on every kind of device, then --fleet fleet.yaml --costs costs.json on any one of them.
    """
    run = _load(config, overrides)
    if profile is not None:
        from contextlora.gear.measure import measure_run

        measured = measure_run(run, _numbers(sizes, "--sizes"), say=lambda what: None if as_json else _say(what))
        measured.save(profile)
        each = sum(u.forward[0] + u.input_grad[0] + u.weight_grad[0] for u in measured.units)
        _out(as_json, measured.model_dump(mode="json"), f"wrote {profile}: {each:.3g} s a sample, all layers")
        return
    if fleet is None or costs is None:
        raise ConfigError("E108", "planning wants --fleet and --costs; measuring wants --profile", where="plan")
    from contextlora.gear.planning import load_fleet, load_profile, make_plan, problem_of, rows
    from contextlora.gear.simulate import simulated_seconds

    problem = problem_of(run, load_fleet(fleet), load_profile(costs), samples)
    made = make_plan(problem, planner, _numbers(sizes, "--sizes"))
    if out is not None:
        made.save(out)
    if pictures is not None:
        from contextlora.gear.picture import draw

        draw(problem, made, pictures)
    if as_json:
        _out(True, made.model_dump(mode="json"), "")
        return
    _table(f"{made.fleet}, {made.model}, by {made.planner}", rows(problem, made))
    note = " (synthetic: speeds are estimates)" if made.synthetic else ""
    simulated = simulated_seconds(problem, made)
    typer.echo(f"{made.seconds:.4g} s in all, predicted; {simulated:.4g} s simulated, operation by operation{note}")


@app.command()
def launch(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (JSON), made by contextlora plan.")],
    config: Config,
    device: Annotated[str | None, typer.Option(help="Which of the plan's devices this is; else by rank.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the devices have kept, within a stage too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Throw away what `out` holds, its adapter too.")] = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train by a plan: start this on every device, through torchrun.

    torchrun --nnodes 3 --node-rank 0 --rdzv-endpoint HOST:29400 --rdzv-backend c10d -m contextlora launch plan.json
    config.yaml. It has no authentication: use it in a trusted LAN or VPN only.
    """
    from contextlora.gear.launch import launch as run_plan
    from contextlora.gear.plan import Plan

    run, made = _load(config, overrides), Plan.load(plan_file)
    folder = run_plan(run, made, device=device, resume=resume, force=force, silent=as_json)
    _out(as_json, {"adapter": str(folder)}, f"trained; the first device of the plan has {folder}")


@app.command()
def report(
    what: Annotated[str, typer.Argument(help="A run's folder, a recipe's name (accuracy, ...), or a recipe's YAML.")],
    preset: Annotated[str, typer.Option(help="Of a recipe: smoke (seconds), laptop or gpu.")] = "laptop",
    out: Annotated[
        Path | None, typer.Option(help="Of a run: the file. Of a recipe: the folder, reports/RECIPE-PRESET by default.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Of a recipe: how many to work with.", min=1, max=256)] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Of a recipe: work on this scenario. Repeatable.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Show a run as a page, or make a published comparison.

    A run's folder gets report.html. A recipe is trained and measured, arm by arm and seed by seed; Ctrl-C, then the
    same command again goes on, also on several machines or terminals that share the folder.
    """
    from contextlora.reports.recipe import recipes

    folder = Path(what)
    if folder.is_dir() and ((folder / "config.yaml").is_file() or what not in recipes()):
        from contextlora.reports.federation import is_federation, write_federation_report
        from contextlora.reports.page import write_report

        path = (write_federation_report if is_federation(folder) else write_report)(what, out)
        _out(as_json, {"report": str(path)}, f"wrote {path}")
        return
    from contextlora.reports.grids import as_json as grid_data
    from contextlora.reports.grids import as_text
    from contextlora.reports.reproduce import reproduce
    from contextlora.reports.tables import as_data
    from contextlora.reports.views import sections

    made = reproduce(
        what, preset, overrides=overrides or (), only=only or (), out=out, processes=processes, silent=as_json
    )
    found = made.findings
    grids = [g for section in sections(found) for g in section.grids]
    if as_json:
        _out(True, {"report": str(made.page), **as_data(found), "tables": [grid_data(g) for g in grids]}, "")
        return
    for grid in (g for g in grids if g.rows):
        _table(grid.title, as_text(grid))
    typer.echo(f"{found.done} of {found.total} jobs done\nwrote {made.page}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    scene: Annotated[str, typer.Option(help="Which drawn scene: iov, factory, city, ...")] = "iov",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that everything works.")] = False,
    model: Annotated[str, typer.Option(help="The base model.")] = "smol",
    as_json: Json = False,
) -> None:
    """See everything at work in about ten minutes.

    Draws pictures, trains, evaluates, exports, answers and reports. Ctrl-C, then run it again to go on.
    """
    from contextlora.reports.demo import demo

    made = demo(out, scene=scene, quick=quick, model=model, silent=as_json, say=_say if as_json else typer.echo)
    if as_json:
        _out(True, {k: str(v) if isinstance(v, Path) else v for k, v in vars(made).items()}, "")
        return
    scores = [{"task": t, "before": f"{made.before[t]:.3f}", "after": f"{a:.3f}"} for t, a in made.after.items()]
    _table("accuracy on pictures it has never seen", scores)
    _table("time", [{"phase": p, "seconds": f"{s:.1f}"} for p, s in made.phases.items()])
    typer.echo(f"peak memory {made.peak_memory_mb:,} MB\ndeployable node: {made.node}\nreport: {made.report}")


# --- what the commands share -----------------------------------------------------------------------------------------


def _load(path: Path, overrides: Sequence[str] | None) -> RunConfig:
    from contextlora.config import load

    path = path / "config.yaml" if path.is_dir() else path
    if path.is_file() and not path.read_bytes().strip():
        raise ConfigError("E102", "is empty; `contextlora init` writes one to start from", where=path)
    return load(path, overrides or ())


def _is_config(path: Path) -> bool:
    """Whether `path` means a run rather than an adapter folder."""
    return not path.is_dir() or ((path / "config.yaml").is_file() and not (path / "manifest.json").is_file())


def _names(tasks: str | None) -> list[str] | None:
    """Task names between commas. Raises ConfigError E105 for one that cannot be a name."""
    if tasks is None:
        return None
    names = [t.strip() for t in tasks.split(",")]
    for name in names:
        if not name or any(c.isspace() for c in name):
            raise ConfigError("E105", f"'{name}' is no task name; separate names by commas: a,b", where="tasks")
    return names


def _numbers(text: str, where: str) -> list[int]:
    """Whole numbers between commas. Raises ConfigError E108."""
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError("E108", f"'{text}' should be whole numbers between commas, e.g. 1,2,4", where=where)
    return sorted(set(found))


def _changed(as_json: bool, folder: Path, adapter: Any) -> None:
    """Tells what an adapter folder holds after a change, and what of it should be trained again."""
    stale = adapter.stale()
    for task, why in stale.items():
        _say(f"warning: '{task}' should be trained (again): {why}")
    tasks = list(adapter.blocks)
    _out(as_json, {"adapter": str(folder), "tasks": tasks, "stale": stale}, f"{folder} now holds {', '.join(tasks)}")


def _out(as_json: bool, data: Mapping[str, Any], text: str) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False) if as_json else text)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _accuracy(split: str, tasks: Mapping[str, Mapping[str, float]]) -> None:
    rows = [
        {
            "task": t,
            "accuracy": f"{a['mean']:.3f}",
            "95 %": f"{a['low']:.3f} to {a['high']:.3f}",
            "questions": a["count"],
        }
        for t, a in tasks.items()
    ]
    _table(f"accuracy on split {split}", rows)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(str(v)) for v in row.values()))
    console = Console()
    console.print(Text(title, style="bold"))
    console.print(table)


app.add_typer(federate, name="federate")
main: Callable[[], Any] = app

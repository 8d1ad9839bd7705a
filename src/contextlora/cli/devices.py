"""`contextlora plan` and `launch`: a training on several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contextlora.cli.app import app
from contextlora.cli.options import Config, Json, Set
from contextlora.cli.shared import emit, load_run, say, show_table, whole_numbers
from contextlora.errors import ConfigError


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
    run = load_run(config, overrides)
    if profile is not None:
        from contextlora.gear.measure import measure_run

        measured = measure_run(run, whole_numbers(sizes, "--sizes"), say=lambda what: None if as_json else say(what))
        measured.save(profile)
        each = sum(u.forward[0] + u.input_grad[0] + u.weight_grad[0] for u in measured.units)
        emit(as_json, measured.model_dump(mode="json"), f"wrote {profile}: {each:.3g} s a sample, all layers")
        return
    if fleet is None or costs is None:
        raise ConfigError("E108", "planning wants --fleet and --costs; measuring wants --profile", where="plan")
    from contextlora.gear.planning import load_fleet, load_profile, make_plan, problem_of, rows
    from contextlora.gear.simulate import simulated_seconds

    problem = problem_of(run, load_fleet(fleet), load_profile(costs), samples)
    made = make_plan(problem, planner, whole_numbers(sizes, "--sizes"))
    if out is not None:
        made.save(out)
    if pictures is not None:
        from contextlora.gear.picture import draw

        draw(problem, made, pictures)
    if as_json:
        emit(True, made.model_dump(mode="json"), "")
        return
    show_table(f"{made.fleet}, {made.model}, by {made.planner}", rows(problem, made))
    note = " (synthetic: speeds are estimates)" if made.synthetic else ""
    simulated = simulated_seconds(problem, made)
    typer.echo(f"{made.seconds:.4g} s in all, predicted; {simulated:.4g} s simulated, operation by operation{note}")


@app.command()
def launch(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (JSON), made by contextlora plan.")],
    config: Config,
    device: Annotated[str | None, typer.Option(help="Which of the plan's devices this is; else by rank.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the devices have kept.")] = False,
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

    run, made = load_run(config, overrides), Plan.load(plan_file)
    folder = run_plan(run, made, device=device, resume=resume, force=force, silent=as_json)
    emit(as_json, {"adapter": str(folder)}, f"trained; the first device of the plan has {folder}")

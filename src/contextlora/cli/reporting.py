"""`contextlora report` and `demo`: pages and published comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contextlora.cli.app import app
from contextlora.cli.options import Json, Set
from contextlora.cli.shared import emit, say, show_table


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
        emit(as_json, {"report": str(path)}, f"wrote {path}")
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
        emit(True, {"report": str(made.page), **as_data(found), "tables": [grid_data(g) for g in grids]}, "")
        return
    for grid in (g for g in grids if g.rows):
        show_table(grid.title, as_text(grid))
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

    made = demo(out, scene=scene, quick=quick, model=model, silent=as_json, say=say if as_json else typer.echo)
    if as_json:
        emit(True, {k: str(v) if isinstance(v, Path) else v for k, v in vars(made).items()}, "")
        return
    scores = [{"task": t, "before": f"{made.before[t]:.3f}", "after": f"{a:.3f}"} for t, a in made.after.items()]
    show_table("accuracy on pictures it has never seen", scores)
    show_table("time", [{"phase": p, "seconds": f"{s:.1f}"} for p, s in made.phases.items()])
    typer.echo(f"peak memory {made.peak_memory_mb:,} MB\ndeployable node: {made.node}\nreport: {made.report}")

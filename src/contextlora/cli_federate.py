"""`contextlora federate`: a whole federation simulated here, or one real device of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _ConfigOrCommand(TyperGroup):
    """`federate CONFIG` simulates; what is no command is taken for a configuration."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["simulate", *args])


federate = typer.Typer(
    cls=_ConfigOrCommand, rich_markup_mode=None, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND ..."
)


@federate.callback()
def _about() -> None:
    """Fine-tune between wireless peers, without a server.

    `contextlora federate CONFIG` simulates all its devices here.
    """


@federate.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="The federation's YAML.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. rounds=4. Repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round that all have kept.")] = False,
    split: Annotated[str | None, typer.Option("--eval", help="At the end ask one device about this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task that --eval asks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Simulate a federation: the rounds, messages and clusters of real devices over a modelled channel."""
    from contextlora.federated.federation import load_federation
    from contextlora.federated.measure import measure
    from contextlora.federated.simulate import simulate as run_rounds

    settings = load_federation(config, tuple(overrides or ()))
    peers = run_rounds(settings, resume=resume, silent=as_json)
    found: dict[str, Any] = {"out": settings.out, "devices": sorted(peers)}
    if split is not None:
        asked = peers[min(peers)]
        measured = measure(asked, split, limit=limit)
        found["measured"] = {"device": asked.name, "split": split, **measured.data()}
        path = Path(settings.out) / "evaluation.json"
        path.write_text(json.dumps(found["measured"], indent=1))
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{len(peers)} devices, {settings.rounds} rounds; adapters in {settings.out}/adapters")
    if split is not None:
        for task, score in measured.accuracy.items():
            typer.echo(f"{task:24} {score.mean:.3f} ({score.low:.3f} to {score.high:.3f}) of {score.count}")
        routed, right = measured.routes[:-1].sum(), measured.routes.trace() - measured.routes[-1, -1]
        typer.echo(f"asked {asked.name} by {measured.choice}; the gate sent {right} of {routed} prompts to their task")

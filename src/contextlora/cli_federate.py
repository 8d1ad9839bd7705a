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
    cls=_ConfigOrCommand, rich_markup_mode=None, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND"
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
    split: Annotated[str | None, typer.Option("--eval", help="Then ask every device about this split.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Simulate a federation: the same rounds, messages and clusters as real devices, over a modelled channel."""
    from contextlora.federated.federation import load_federation
    from contextlora.federated.simulate import run_simulation

    made = run_simulation(load_federation(config, tuple(overrides or ())), resume=resume, split=split, silent=as_json)
    if as_json:
        typer.echo(json.dumps(made.data()))
        return
    for line in made.lines():
        typer.echo(line)

"""`contextlora federate`: a whole federation simulated here, or one real device of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from contextlora.cli.options import Json, Part, Set
from contextlora.cli.shared import emit, warn

Force = Annotated[bool, typer.Option("--force", help="Throw away what an earlier run has left in `out`.")]


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
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round, bit-exactly.")] = False,
    force: Force = False,
    split: Annotated[Part | None, typer.Option("--eval", help="At the end ask one device about this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task that --eval asks.")] = None,
    as_json: Json = False,
) -> None:
    """Simulate a federation: the rounds, messages and clusters of real devices over a modelled channel."""
    from contextlora.federated.federation import load_federation
    from contextlora.federated.measure import measure, questions
    from contextlora.federated.setup import graph_of_devices
    from contextlora.federated.simulate import simulate as run_rounds

    settings = load_federation(config, tuple(overrides or ()))
    if split is not None:
        questions(settings, graph_of_devices(settings), split.value)  # what cannot be asked is told before the rounds
    peers = run_rounds(settings, resume=resume, force=force, silent=as_json, say=warn)
    found: dict[str, Any] = {"out": settings.out, "devices": sorted(peers)}
    if split is not None:
        asked = peers[min(peers)]
        measured = measure(asked, split.value, limit=limit)
        found["measured"] = {"device": asked.name, "split": split.value, **measured.data()}
        path = Path(settings.out) / "evaluation.json"
        path.write_text(json.dumps(found["measured"], indent=1))
    emit(as_json, found, f"{len(peers)} devices, {settings.rounds} rounds; adapters in {settings.out}/adapters")
    if split is not None and not as_json:
        for task, score in measured.accuracy.items():
            typer.echo(f"{task:24} {score.mean:.3f} ({score.low:.3f} to {score.high:.3f}) of {score.count}")
        routed, right = measured.routes[:-1].sum(), measured.routes.trace() - measured.routes[-1, -1]
        typer.echo(f"asked {asked.name} by {measured.choice}; the gate sent {right} of {routed} prompts to their task")


@federate.command()
def peer(
    config: Annotated[Path, typer.Argument(help="The federation's YAML, the same on every device.")],
    identity: Annotated[Path, typer.Option(help="This device's keys and certificate, made by `enroll`.")],
    peers: Annotated[Path, typer.Option(help="The list of peers (peers.yaml).")],
    listen: Annotated[str | None, typer.Option(help="host:port to listen on, if not as in the list.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where it keeps itself; OUT/NAME by default.")] = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Rejoin with what was kept.")] = False,
    force: Force = False,
) -> None:
    """Be one real device: train, and exchange slices with the others over mTLS."""
    from contextlora.federated.device import open_device, run_device
    from contextlora.federated.fabric.zenoh import ZenohFabric
    from contextlora.federated.federation import load_federation
    from contextlora.federated.identity import load_identity, load_peers
    from contextlora.federated.keep import refuse_a_second_run

    settings, me, known = load_federation(config, tuple(overrides or ())), load_identity(identity), load_peers(peers)
    home = out or Path(settings.out) / me.name
    refuse_a_second_run(home, again=resume or force)  # before the model is opened, which takes its time
    device = open_device(settings, me, known, warn)
    mine = {n: known[n] for n in settings.devices}
    with ZenohFabric(me, mine, settings.name, listen=listen) as fabric:
        run_device(device, fabric, home, resume=resume, force=force, say=warn)
    typer.echo(f"{me.name}: {settings.rounds} rounds; its adapter is in {home / 'adapter'}")


@federate.command()
def enroll(
    folder: Annotated[Path, typer.Argument(help="Where the authority or the device's keys are, or are to be made.")],
    authority: Annotated[bool, typer.Option("--authority", help="Make an authority, on one machine.")] = False,
    name: Annotated[str | None, typer.Option(help="Make a device's keys and its request for a certificate.")] = None,
    sign: Annotated[Path | None, typer.Option(help="As the authority in FOLDER: sign this request.")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Write FOLDER/peers.yaml: CERTIFICATE or CERTIFICATE@HOST:PORT, one for each device."),
    ] = None,
) -> None:
    """Make keys and certificates. Private keys never leave the device that made them."""
    from contextlora.errors import ConfigError
    from contextlora.federated.identity import create_authority, create_identity, read_peer, save_peers, sign_request

    if (authority, name is not None, sign is not None, bool(add)).count(True) != 1:
        raise ConfigError("E108", "say one of --authority, --name, --sign and --add", where="enroll")
    if authority:
        typer.echo(f"wrote {create_authority(folder)}; keep ca.key beside it to this machine")
    elif name is not None:
        typer.echo(
            f"wrote {create_identity(folder, name)}; take it to the authority, and its answer back as certificate.pem"
        )
    elif sign is not None:
        typer.echo(
            f"wrote {sign_request(folder, sign)}; take it back to the device, as certificate.pem beside its keys"
        )
    else:
        parts = (entry.partition("@") for entry in add or ())
        save_peers(folder / "peers.yaml", [read_peer(file, endpoint or None) for file, _, endpoint in parts])
        typer.echo(f"wrote {folder / 'peers.yaml'}; every device needs it")

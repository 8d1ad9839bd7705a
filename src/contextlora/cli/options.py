"""Options that several commands have, said once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Part(StrEnum):
    """A split of the data."""

    train = "train"
    valid = "valid"
    test = "test"


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


Set = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. train.lr=1e-3. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]
Config = Annotated[Path, typer.Argument(help="Run configuration (YAML), or a run's folder.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Tasks, separated by commas. Default: all.")]
Base = Annotated[str | None, typer.Option(help="Base model, where it is not the one that the adapter names.")]
Device = Annotated[str | None, typer.Option(help='Where to run, e.g. "cpu" or "cuda".')]
Method = Annotated[How, typer.Option(help="Pick the likeliest option set, or write an answer and check its format.")]
AdapterFolder = Annotated[Path, typer.Argument(help="An adapter folder, or a run's folder.")]

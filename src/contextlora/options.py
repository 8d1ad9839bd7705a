"""Options that several commands have, said once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Part(StrEnum):
    """A split of the data."""

    train = "train"
    valid = "valid"
    test = "test"


Set = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. train.lr=1e-3. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]

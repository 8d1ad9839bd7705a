"""The command line: parse, load, call one function. Everything slow is imported inside the command that needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from contextlora.cli.app import app

# each adds its commands, in the order of --help
from contextlora.cli import training, adapters, devices, reporting  # noqa: F401  # isort: skip
from contextlora.cli.federate import federate

app.add_typer(federate, name="federate")
main: Callable[[], Any] = app

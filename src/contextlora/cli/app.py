"""The program: every failure becomes one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from contextlora.errors import ContextLoRAError

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

"""One exception tree. Every error a user can meet has a stable code and says what was wrong, where, and what is right.

E1xx configuration and graphs · E2xx data · E3xx adapters · E4xx plans · E5xx runs · E6xx peers · E7xx serving.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ContextLoRAError(Exception):
    """Base of all errors raised on purpose by contextlora.

    Args:
        code: stable code, e.g. ``"E104"``.
        message: what was wrong and what would be right, in one or two sentences.
        where: the file, line or key at fault.
    """

    family = "E"

    def __init__(self, code: str, message: str, *, where: object = ""):
        if not code.startswith(self.family):
            raise AssertionError(f"{type(self).__name__} takes codes {self.family}xx, got {code}")
        self.code, self.message, self.where = code, message, str(where)
        super().__init__(code, message, self.where)

    def __str__(self) -> str:
        return f"{self.code} {self.where}: {self.message}" if self.where else f"{self.code} {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling by `args` alone would lose the keyword `where` when the error crosses a process boundary.
        return _rebuild, (type(self), self.code, self.message, self.where)


def _rebuild(cls: type[ContextLoRAError], code: str, message: str, where: str) -> ContextLoRAError:
    return cls(code, message, where=where)


class ConfigError(ContextLoRAError):
    """A graph, configuration or option that cannot be used (E1xx)."""

    family = "E1"


class DataError(ContextLoRAError):
    """A record, image or data folder that cannot be used (E2xx)."""

    family = "E2"


class AdapterError(ContextLoRAError):
    """An adapter folder, checkpoint or model that does not fit (E3xx)."""

    family = "E3"


class PlanError(ContextLoRAError):
    """A fleet, profile or plan that cannot be used, or a fleet on which nothing fits (E4xx)."""

    family = "E4"


class RunError(ContextLoRAError):
    """A run that cannot start, go on or resume (E5xx)."""

    family = "E5"


class PeerError(ContextLoRAError):
    """A peer, message, table or measurement of the federation that cannot be used (E6xx)."""

    family = "E6"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""

"""Work that all devices of one process would do alike, done by the first of them. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Sharing(Protocol):
    """What `make` makes, or what was made under this key before. Nobody may change it."""

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T: ...


class Once:
    """The devices of a simulation get the same message, so that one check, one decoding and one copy do for all.

    Whoever still holds something keeps it alive; this lets go of it at the end of each round.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()  # where it raises, everyone tries
        made: T = self._made[key]
        return made

    def forget(self) -> None:
        """At the end of a round."""
        self._made.clear()


def alone(key: Hashable, make: Callable[[], T]) -> T:
    """As `Once`, for a device that shares with nobody."""
    return make()

"""Time for simulations: forty lines instead of a dependency on SimPy, whose processes are generators just the same."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator


class Flag:
    """Goes up once; processes wait for it."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.up = clock, False
        self.waiting = list[Callable[[], None]]()

    def rise(self) -> None:
        """Wakes who waits, in the order in which they came."""
        self.up = True
        for wake in self.waiting:
            self.clock.at(self.clock.now, wake)


Process = Iterator[float | Flag]  # yields what it waits for: a time, or a flag


class Clock:
    """Runs processes in the order of their times; first come, first served among equals."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Does it then."""
        heapq.heappush(self._due, (when, next(self._count), do))

    def begin(self, process: Process) -> None:
        """Runs a process until it waits."""

        def on() -> None:
            for wanted in process:
                if isinstance(wanted, float):
                    self.at(wanted, on)
                    return
                if not wanted.up:
                    wanted.waiting.append(on)
                    return

        on()

    def play(self) -> None:
        """Until nothing is due."""
        while self._due:
            self.now, _, do = heapq.heappop(self._due)
            do()

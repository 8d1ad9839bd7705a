"""Measured rates in the place of the model: from a trace file, or as a real run measures them. No torch here.

trace.csv, with this header; blank lines are skipped:

    round,from,to,rate_bit_s
    0,car,bus,48e6
    0,bus,car,51.5e6
    7,car,bus,0

A rate holds from its round until the pair's next row. It is what the link carries when the sender gives it all of its
band and power (a goodput measured while n transfers share the sender's air counts n times); 0 means no link. Round 0
needs a row for every ordered pair.
"""

from __future__ import annotations

import csv
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.channel import Floats, Transmission, at_full_power, slowest, unknown_device
from contextlora.federated.settings import Cast, Limits

HEADER = ["round", "from", "to", "rate_bit_s"]
_ROUND = re.compile(r"[0-9]{1,9}")
_RATE = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")


class MeasuredChannel:
    """The `Channel` of measured rates. Devices send at p_max: nobody controls the power of a link only measured.

    Args:
        devices: their names; the order does not matter.
        limits: p_max, by which energy is counted, and the deadline.
        cast: "unicast" (receivers share the rate) or "broadcast" (one transmission at the worst one's rate).
    """

    def __init__(self, devices: Sequence[str], limits: Limits, cast: Cast = "unicast"):
        self.devices, self.limits, self.cast = tuple(devices), limits, cast
        self._rates: dict[tuple[str, str], tuple[list[int], list[float]]] = {
            pair: ([], []) for pair in permutations(self.devices, 2)
        }

    @classmethod
    def load(cls, path: str | Path, devices: Sequence[str], limits: Limits, cast: Cast = "unicast") -> MeasuredChannel:
        """Reads a trace file. Raises PeerError E640 naming the first line at fault, or a pair without a first rate."""
        channel, path, seen = cls(devices, limits, cast), Path(path), set[tuple[int, str, str]]()
        for line, row in _rows(path):
            where = f"{path}:{line}"
            round_, sender, receiver, rate = _parsed(row, where)
            if (round_, sender, receiver) in seen:
                raise PeerError("E640", f"a second rate from '{sender}' to '{receiver}' in round {round_}", where=where)
            seen.add((round_, sender, receiver))
            try:
                channel.record(round_, sender, receiver, rate)
            except PeerError as e:
                raise PeerError("E640", e.message, where=where) from None
        for sender, receiver in channel._rates:
            if (0, sender, receiver) not in seen:
                text = f"no rate from '{sender}' to '{receiver}' in round 0; give 0 if they cannot hear each other"
                raise PeerError("E640", text, where=path)
        return channel

    def save(self, path: str | Path) -> None:
        """Writes all rates as a trace file, exactly."""
        rows = [
            [round_, a, b, rate]
            for (a, b), (rounds, rates) in self._rates.items()
            for round_, rate in zip(rounds, rates, strict=True)
        ]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *sorted(rows)])

    def record(self, round_: int, sender: str, receiver: str, rate: float) -> None:
        """Notes a measured rate, bit/s, in force from `round_` on. Raises PeerError E640, E641 for what cannot be."""
        if not (math.isfinite(rate) and rate >= 0):
            raise PeerError("E640", f"a rate is a finite number of bit/s, 0 or more, got {rate}")
        if sender == receiver:
            raise PeerError("E640", f"a rate from '{sender}' to itself")
        rounds, rates = self._of(sender, receiver)
        at, rate = bisect_right(rounds, round_), float(rate)
        if at and rounds[at - 1] == round_:  # measured again
            rates[at - 1] = rate
        else:
            rounds.insert(at, round_)
            rates.insert(at, rate)

    def rate(self, round_: int, a: str, b: str) -> float:
        """Bit/s from a to b in force in this round; 0 while nothing is measured."""
        rounds, rates = self._of(a, b)
        at = bisect_right(rounds, round_)
        return rates[at - 1] if at else 0.0

    def expected_rate(self, round_: int, a: str, b: str) -> float:
        """See `Channel`: the one in force."""
        return self.rate(round_, a, b)

    def demands(self, round_: int, group: Sequence[str], bits: Sequence[int]) -> tuple[Floats, Floats]:
        """See `Channel`. Power is p_max: here it is time that decides."""
        rates = np.array([[0.0 if a == b else self.rate(round_, a, b) for b in group] for a in group])
        return np.full(len(group), self.limits.power), slowest(rates, np.array(bits, float), self.cast)

    def transmit(self, round_: int, sender: str, receivers: Sequence[str], bits: int) -> Transmission:
        """See `Channel`."""
        rates = np.array([self.rate(round_, sender, r) for r in receivers])
        return at_full_power(rates, tuple(receivers), bits, self.limits, self.cast)

    def _of(self, sender: str, receiver: str) -> tuple[list[int], list[float]]:
        if (sender, receiver) not in self._rates:
            raise unknown_device(sender if sender not in self.devices else receiver, self.devices)
        return self._rates[sender, receiver]


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows after the header, with their line numbers from 1. Raises PeerError E640."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            if (head := next(reader, [])) != HEADER:
                text = f"the header should be {','.join(HEADER)}, got {','.join(head)[:80]!r}"
                raise PeerError("E640", text, where=f"{path}:1")
            for row in reader:
                if row:
                    yield reader.line_num, row
    except csv.Error as e:
        raise PeerError("E640", f"not CSV: {e}", where=f"{path}:{reader.line_num}") from None
    except UnicodeDecodeError:
        raise PeerError("E640", "is not UTF-8 text", where=path) from None
    except OSError as e:
        raise PeerError("E640", f"cannot be read: {e.strerror}", where=path) from None


def _parsed(row: list[str], where: str) -> tuple[int, str, str, float]:
    """One row's fields. Raises PeerError E640."""
    if len(row) != len(HEADER):
        raise PeerError("E640", f"{len(row)} fields, should be {len(HEADER)}: {','.join(HEADER)}", where=where)
    round_, sender, receiver, rate = row
    if not _ROUND.fullmatch(round_):
        raise PeerError("E640", f"round should be a whole number from 0, got '{round_[:40]}'", where=where)
    if not _RATE.fullmatch(rate):
        raise PeerError("E640", f"rate_bit_s should be a number of bit/s such as 48e6, got '{rate[:40]}'", where=where)
    return int(round_), sender, receiver, float(rate)

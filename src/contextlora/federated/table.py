"""Rows of the table that all devices of a federation share: where a device stands, and what its prompts look like."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.cluster import MAX_BITS, Member
from contextlora.federated.codec import Codec, decode, encode
from contextlora.federated.mailbox import Row
from contextlora.federated.taskgate import TaskMean

_DIGITS = 8  # a count as hexadecimal: a row has few fields and little room


@dataclass(frozen=True)
class Standing:
    """Where a device stands at the start of a round.

    Attributes:
        task: that it trains.
        active: entries of its slice in each layer.
        bits: length of its next message, as far as it knows.
        samples: that it trains on.
        have: by device, the version of its values that this one holds; 0 is the mask alone.
        rates: bit/s to others as it has measured them; none where planning does not ask for them.
    """

    task: str
    active: tuple[int, ...]
    bits: int
    samples: int
    have: Mapping[str, int]
    rates: Mapping[str, int] = field(default_factory=dict)

    def row(self) -> Row:
        """As it travels."""
        row: Row = {
            "active": "".join(f"{n:0{_DIGITS}x}" for n in self.active),
            "bits": self.bits,
            "samples": self.samples,
            "have": _written(self.have),
        }
        return row | {"rates": _written(self.rates)} if self.rates else row

    @classmethod
    def read(cls, task: str, row: Row, sizes: Sequence[int], where: str) -> Standing:
        """Takes a row of `where`. Raises PeerError E603 for one that no device with these layers writes."""
        try:
            text, bits, samples = str(row["active"]), row["bits"], row["samples"]
            active = tuple(int(text[i : i + _DIGITS], 16) for i in range(0, len(text), _DIGITS))
            have, rates = _read(row["have"]), _read(row.get("rates", ""))
            fits = len(active) == len(sizes) and all(0 <= n <= s for n, s in zip(active, sizes, strict=True))
            fits = fits and all(0 <= r <= MAX_BITS for r in rates.values()) and where not in rates
            if fits and isinstance(bits, int) and isinstance(samples, int) and bits > 0 and samples > 0:
                return cls(task, active, bits, samples, have, rates)
        except (KeyError, ValueError):
            pass
        raise PeerError("E603", "not a row of this federation's table; is it of other layers?", where=where)

    def member(self, name: str, sizes: Sequence[int], mask: bytes = b"") -> Member:
        """As clustering takes it; `mask` is packed, where all know it."""
        sparsity = tuple(n / size for n, size in zip(self.active, sizes, strict=True))
        return Member(name, sparsity, self.bits, mask, tuple(sorted(self.rates.items())))


def _written(numbers: Mapping[str, int]) -> str:
    return " ".join(f"{name}={number}" for name, number in sorted(numbers.items()))


def _read(text: object) -> dict[str, int]:
    """Raises ValueError for what `_written` does not write."""
    return {name: int(number) for name, number in (part.split("=") for part in str(text).split())}


def mean_row(mean: TaskMean) -> Row:
    """What a device's prompts look like to the base model, as it travels: two vectors in bf16."""
    both = np.concatenate([mean.mean, mean.squares]).astype(np.float32)
    return {"prompts": mean.count, "mean": b64encode(encode(both, [len(both)], Codec.BF16)).decode()}


def read_mean(row: Row, width: int, where: str) -> TaskMean:
    """Takes back what `mean_row` gave, up to bf16. Raises PeerError E603 for anything else than vectors of `width`."""
    try:
        count, data = row["prompts"], b64decode(str(row["mean"]), validate=True)
        both = decode(data, [2 * width], Codec.BF16).astype(np.float64)
        if isinstance(count, int) and 0 < count < 1 << 53 and (both[width:] >= 0).all():
            return TaskMean(count, both[:width], both[width:])
    except (KeyError, binascii.Error, PeerError):
        pass
    raise PeerError("E603", "not a task's mean as this federation's devices send it", where=where)

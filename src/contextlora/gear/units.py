"""Quantities as people write them: "6 GB", "100 Mbit/s", "2 ms". Decimal prefixes; GiB and its like are binary."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)\s*"


def _parser(units: dict[str, float], example: str) -> Any:
    """Turns "NUMBER UNIT" into a float of the base unit; a plain number is taken as it is."""
    pattern = re.compile(_NUMBER + "(" + "|".join(map(re.escape, sorted(units, key=len, reverse=True))) + ")")

    def parse(value: Any) -> Any:
        if isinstance(value, str):
            found = pattern.fullmatch(value.strip())
            if found is None:
                raise ValueError(f"should be a quantity such as {example}, got '{value}'")
            return float(found[1]) * units[found[2]]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    return BeforeValidator(parse)


_BYTES = {f"{p}B": float(n) for p, n in (_PREFIX | _BINARY).items()}
_RATES = {f"{p}bit/s": float(n) for p, n in _PREFIX.items()} | {f"{p}B/s": 8.0 * n for p, n in _PREFIX.items()}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_FREQUENCIES = {f"{p}Hz": float(_PREFIX[p]) for p in ("", "k", "M", "G")}

Bytes = Annotated[float, _parser(_BYTES, "6 GB"), Field(gt=0)]
BytesOrNone = Annotated[float, _parser(_BYTES, "300 MB"), Field(ge=0)]
BitRate = Annotated[float, _parser(_RATES, "100 Mbit/s"), Field(gt=0)]
Seconds = Annotated[float, _parser(_TIMES, "2 ms"), Field(ge=0)]
Hertz = Annotated[float, _parser(_FREQUENCIES, "20 MHz"), Field(gt=0)]
Watts = Annotated[float, _parser({"W": 1.0, "mW": 1e-3}, "200 mW"), Field(gt=0)]
Metres = Annotated[float, _parser({"m": 1.0, "km": 1e3}, "200 m"), Field(ge=0)]


def show_bytes(n: float) -> str:
    """1234567 as "1.23 MB"."""
    for prefix in ("T", "G", "M", "k"):
        if abs(n) >= _PREFIX[prefix]:
            return f"{n / _PREFIX[prefix]:.3g} {prefix}B"
    return f"{n:.0f} B"

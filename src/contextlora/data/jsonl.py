"""Strict JSON lines: each line validated by itself, and all faults of the file raised as one error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from contextlora.errors import ConfigError, DataError
from contextlora.strict import validate

MAX_LINE = 1 << 20
MAX_FAULTS = 20
Model = TypeVar("Model", bound=BaseModel)


class Faults:
    """Collects the faults of one file, to raise them as one DataError whose code is that of the first line at fault."""

    def __init__(self, file: Path):
        self.file, self.count, self.kept = file, 0, list[tuple[int, str, str]]()

    def add(self, line: int, code: str, text: str) -> None:
        self.count += 1
        if self.count <= MAX_FAULTS:
            self.kept.append((line, code, text))

    def raise_any(self) -> None:
        if not self.count:
            return
        self.kept.sort(key=lambda fault: fault[0])
        line, code, text = self.kept[0]
        if self.count == 1:
            raise DataError(code, text, where=f"{self.file}:{line}")
        listed = "".join(f"\n  - line {line}: {text}" for line, _, text in self.kept)
        more = f", {MAX_FAULTS} of them" if self.count > MAX_FAULTS else ""
        raise DataError(code, f"{self.count} faults{more}:{listed}", where=self.file)


def read_lines(path: Path, model: type[Model], faults: Faults) -> Iterator[tuple[int, Model]]:
    """Yields line numbers (from 1) and validated objects; blank lines are skipped, faulty ones added to `faults`.

    Raises DataError E201 if the file is missing, unreadable or blank.
    """
    blank = True
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if not raw.strip():
                    continue
                blank = False
                if len(raw) > MAX_LINE:
                    faults.add(number, "E202", f"longer than {MAX_LINE >> 20} MiB; give each record a line of its own")
                    return
                if (item := _parse(raw, model, number, faults)) is not None:
                    yield number, item
    except FileNotFoundError:
        raise DataError("E201", "no such file", where=path) from None
    except (OSError, ValueError) as e:
        raise DataError("E201", f"cannot be read: {getattr(e, 'strerror', None) or e}", where=path) from None
    if blank:
        raise DataError("E201", "holds no records", where=path)


def parse_json(raw: bytes) -> Any:
    """Parses strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no half of a surrogate pair.

    Raises ValueError with a sentence about the fault.
    """
    try:
        data = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_not_a_number, parse_float=_finite)
        if b"\\u" in raw:
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise ValueError("is not valid JSON: half of a surrogate pair") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"is not valid JSON: {e.msg} (line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"is not valid JSON: {str(e).splitlines()[0]}") from None


def _parse(raw: bytes, model: type[Model], number: int, faults: Faults) -> Model | None:
    try:
        return validate(model, parse_json(raw))
    except ConfigError as e:
        faults.add(number, "E203", e.message)
    except ValueError as e:
        faults.add(number, "E202", str(e).replace("(line 1, column", "(column"))
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"key '{twice[:60]}' appears twice")
    return found


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is not a JSON number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _not_a_number(text)

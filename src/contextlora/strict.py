"""Strict reading of YAML into validated models: every fault at once, each named by its path in the file."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from contextlora.errors import ConfigError, did_you_mean

MAX_BYTES = 4 << 20


class Strict(BaseModel):
    """A model that refuses unknown keys, silent conversions and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, tags and duplicate keys, where only `true` and `false` are booleans (YAML 1.2)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):  # an alias bomb is small on disk and huge once walked
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        if getattr(event, "tag", None):  # `!!int ""` crashes the constructor
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="keys must be plain words", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# `options: [yes, no]` must stay two words, 2024-01-01 a string, and `<<` and `=` have no meaning of their own.
_DROPPED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "timestamp", "merge", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _DROPPED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), ["t", "f"])


def parse_yaml(text: str, where: object = "") -> Any:
    """Parses one YAML document. Raises ConfigError E101 with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = f" (line {e.problem_mark.line + 1}, column {e.problem_mark.column + 1})" if e.problem_mark else ""
        raise ConfigError("E101", f"not valid YAML: {e.problem}{mark}", where=where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise ConfigError("E101", f"not valid YAML: {str(e).splitlines()[0]}", where=where) from None


def read_yaml(path: str | Path) -> Any:
    """Reads a YAML file of at most 4 MiB. Raises ConfigError E101 or E102."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # a pipe or device has no size to ask for
        if len(raw) > MAX_BYTES:
            raise ConfigError("E102", f"larger than {MAX_BYTES >> 20} MiB; is this the right file?", where=path)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("E102", "no such file", where=path) from None
    except OSError as e:
        raise ConfigError("E102", f"cannot be read: {e.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise ConfigError("E102", "is not UTF-8 text", where=path) from None
    return parse_yaml(text, path)


def validate(model: type[Model], data: Any, where: object = "") -> Model:
    """Validates `data`, listing every fault with its path. Raises ConfigError E103."""
    if not isinstance(data, dict):
        got = "nothing" if data is None else _show(data)  # None is an empty file
        raise ConfigError("E103", f"expected keys and values, got {got}", where=where)
    try:
        return model.model_validate(data)
    except ValidationError as e:
        faults = [_fault(model, f) for f in e.errors(include_url=False)]
        text = faults[0] if len(faults) == 1 else f"{len(faults)} faults:" + "".join(f"\n  - {f}" for f in faults)
        raise ConfigError("E103", text, where=where) from None


def _fault(model: type[BaseModel], fault: Any) -> str:
    path = ".".join(str(p) for p in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        hint = did_you_mean(fault["loc"][-1], known) or (f" Known: {', '.join(known)}." if known else "")
        return f"{path}: unknown key.{hint}"
    if fault["type"] == "missing":
        return f"{path}: is missing"
    if fault["type"] == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    message = re.sub(r"^\w+ should |( or instance of \w+)| after validation, not \d+", "", fault["msg"])
    return f"{path}: should {message}, got {_show(fault['input'])}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The field names of the (sub)model that the path `loc` leads to."""
    steps = iter(loc)
    for step in steps:
        field = model.model_fields.get(str(step))
        inner = [] if field is None else [field.annotation, *_args(field.annotation)]
        models = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
        if field is None or not models:
            return []
        model = models[0]
        if get_origin(field.annotation) in (dict, list, tuple):
            next(steps, None)  # a mapping's key or a list's index, which may well be called like a field
    return list(model.model_fields)


def _args(annotation: Any) -> list[Any]:
    """All type arguments of an annotation, at any depth."""
    found: list[Any] = []
    for a in get_args(annotation):
        found += [a, *_args(a)]
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Errors carry a stable code, the place, and what would be right; also from one process to another."""

import ast
import copy
import pickle
import re
from pathlib import Path

import pytest

from contextlora.errors import AdapterError, ConfigError, ContextLoRAError, DataError, PeerError, RunError, did_you_mean

FAMILIES = [(ConfigError, "E101"), (DataError, "E201"), (AdapterError, "E301"), (RunError, "E501"), (PeerError, "E640")]


@pytest.mark.parametrize(("kind", "code"), FAMILIES)
def test_names_code_place_and_fault(kind, code):
    error = kind(code, "is wrong", where="graph.yaml")
    assert isinstance(error, ContextLoRAError)
    assert str(error) == f"{code} graph.yaml: is wrong"
    assert str(kind(code, "is wrong")) == f"{code} is wrong"


@pytest.mark.parametrize(("kind", "code"), FAMILIES)
@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_survives_a_process_boundary(kind, code, again):
    error = kind(code, "is wrong", where="here")
    other = again(error)
    assert type(other) is kind
    assert (other.code, other.message, other.where, str(other)) == (code, "is wrong", "here", str(error))


def test_a_code_of_another_family_is_a_bug():
    with pytest.raises(AssertionError, match="ConfigError takes codes E1xx, got E201"):
        ConfigError("E201", "")


def test_did_you_mean():
    assert did_you_mean("wether", ["weather", "road"]) == " Did you mean 'weather'?"
    assert did_you_mean("zzz", ["weather"]) == ""
    assert did_you_mean(3, []) == ""


def test_every_code_in_the_source_is_documented_and_no_other():
    root = Path(__file__).parents[1]
    raised = {
        node.args[0].value
        for path in (root / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")
        if node.args and isinstance(node.args[0], ast.Constant) and re.fullmatch(r"E\d{3}", str(node.args[0].value))
    }
    rows = [line.split("|")[1] for line in (root / "docs" / "errors.md").read_text().splitlines() if "|" in line]
    assert raised == set(re.findall(r"E\d{3}", " ".join(rows)))
    assert len(raised) > 50

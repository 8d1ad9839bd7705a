"""Errors carry a stable code, the place, and what would be right; also from one process to another."""

import copy
import pickle

import pytest

from contextlora.errors import AdapterError, ConfigError, ContextLoRAError, DataError, RunError, did_you_mean

FAMILIES = [(ConfigError, "E101"), (DataError, "E201"), (AdapterError, "E301"), (RunError, "E501")]


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

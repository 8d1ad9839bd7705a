"""Strict YAML: bad files give one clear E1xx error with the place, never a traceback and never a silent guess."""

import contextlib
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from contextlora.errors import ConfigError
from contextlora.strict import MAX_BYTES, Strict, parse_yaml, read_yaml, validate


class Inner(Strict):
    size: int = Field(default=1, ge=1)
    inner: float = 0.0


class Outer(Strict):
    name: str
    one: Inner | None = None
    many: dict[str, Inner] = Field(default={}, min_length=1)
    row: list[Inner] = Field(default=[])


def refused(code, text):
    with pytest.raises(ConfigError) as e:
        parse_yaml(text, "f.yaml")
    assert e.value.code == code
    assert "\n" not in e.value.message
    return str(e.value)


def test_words_stay_words():
    assert parse_yaml("[yes, no, on, off, Y, n, True, FALSE, 2024-01-01, '1']") == [
        *("yes", "no", "on", "off", "Y", "n", "True", "FALSE", "2024-01-01", "1")
    ]
    assert parse_yaml("[true, false, null, 1, 1.5]") == [True, False, None, 1, 1.5]
    assert parse_yaml("[<<, =]") == ["<<", "="]


def test_the_plain_loader_is_untouched():
    assert yaml.safe_load("[yes, no]") == [True, False]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a' (line 3, column 1)"),
        ("x: {a: 1, a: 2}", "duplicate key 'a'"),
        ("{'1': a, 1: b}", "duplicate key '1'"),
        ("a: &x [1]\nb: *x", "aliases are not allowed (line 2, column 4)"),
        ("[a]: 1", "keys must be plain words"),
        ("? {a: 1}\n: 2", "keys must be plain words"),
        ("a: !!python/object/apply:os.system [ls]", "tags are not allowed"),
        ('a: !!int ""', "tags are not allowed"),
        ("a: !!timestamp x", "tags are not allowed"),
        ("!!binary x: 1", "tags are not allowed"),
        ("a: [1, 2", "not valid YAML"),
        ("a: 1\n--- \nb: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("\tb: 1", "not valid YAML"),
        ("n: 0b_", "not valid YAML"),
        ("n: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_refused_with_its_place(text, says):
    assert says in refused("E101", text)


def test_merge_keys_are_ordinary_unknown_keys():
    assert parse_yaml("<<: {a: 1}\nb: 2") == {"<<": {"a": 1}, "b": 2}


def test_an_alias_bomb_costs_nothing():
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    began = time.monotonic()
    assert "aliases" in refused("E101", bomb)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("nest", ["[" * 50_000, "{a: " * 50_000, "- " * 50_000, "[" * 5000 + "]" * 5000])
def test_deep_nesting(nest):
    refused("E101", nest)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="[]{}:,-?!&*|>'\"#%@` \n\tab01.~<=_x", max_size=40))
def test_any_text_gives_a_value_or_one_error(text):
    with contextlib.suppress(ConfigError):
        parse_yaml(text)


class TestReading:
    def test_limits_and_missing_files(self, tmp_path):
        big, binary, fine = tmp_path / "big.yaml", tmp_path / "binary.yaml", tmp_path / "fine.yaml"
        big.write_bytes(b"# " + b"x" * MAX_BYTES)
        binary.write_bytes(b"a: \xff\xfe")
        fine.write_bytes("\ufeffa: ü".encode())
        assert read_yaml(fine) == {"a": "ü"}
        for path, says in [
            (big, "larger than 4 MiB"),
            (binary, "not UTF-8"),
            (tmp_path / "none.yaml", "no such file"),
            (tmp_path, "cannot be read"),
        ]:
            with pytest.raises(ConfigError, match=f"E102 .*{path.name}.*{says}"):
                read_yaml(path)

    def test_an_endless_device_ends(self):
        with pytest.raises(ConfigError, match="larger than"):
            read_yaml("/dev/zero")


class TestValidation:
    def says(self, data):
        with pytest.raises(ConfigError) as e:
            validate(Outer, data, "f.yaml")
        assert e.value.code == "E103"
        assert str(e.value).startswith("E103 f.yaml: ")
        return e.value.message

    def test_every_fault_at_once_with_its_path(self):
        message = self.says({"nam": 1, "many": {"x": {"size": 0}}, "row": [{"size": "3"}]})
        assert message.splitlines() == [
            "4 faults:",
            "  - name: is missing",
            "  - many.x.size: should be greater than or equal to 1, got 0",
            "  - row.0.size: should be a valid integer, got '3'",
            "  - nam: unknown key. Did you mean 'name'?",
        ]

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({"name": "n", "one": {"sise": 1}}, "one.sise: unknown key. Did you mean 'size'?"),
            ({"name": "n", "many": {"x": {"sise": 1}}}, "many.x.sise: unknown key. Did you mean 'size'?"),
            ({"name": "n", "many": {"inner": {"sise": 1}}}, "many.inner.sise: unknown key. Did you mean 'size'?"),
            ({"name": "n", "row": [{"zzzz": 1}]}, "row.0.zzzz: unknown key. Known: size, inner."),
            ({"name": "n", "one": 3}, "one: should be a valid dictionary, got 3"),
            ({"name": "n", "many": {}}, "many: should have at least 1 item, got {}"),
            ({"name": None}, "name: should be a valid string, got None"),
            ({"name": "n", "one": {"inner": float("nan")}}, "one.inner: should be a finite number, got nan"),
            ({"name": "n", "one": {"inner": True}}, "one.inner: should be a valid number, got True"),
            ({"name": "n", "one": {"inner": "0.5"}}, "one.inner: should be a valid number, got '0.5'"),
            ([1], "expected keys and values, got [1]"),
            ("text " * 99, "expected keys and values, got 'text text"),
            (None, "expected keys and values, got nothing"),
        ],
    )
    def test_one_fault(self, data, says):
        assert self.says(data).startswith(says)

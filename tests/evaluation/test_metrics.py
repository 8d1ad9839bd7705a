"""The metric's table, reading of written answers, and Wilson's interval by its defining equation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.data.collate import answer_text
from contextlora.evaluation.metrics import Accuracy, parse_answer, score


@pytest.mark.parametrize(
    ("chosen", "key", "expected"),
    [
        ("a", "a", 1.0),
        ("ab", "ba", 1.0),
        ("a", "ab", 0.5),
        ("ab", "abc", 0.5),
        ("", "a", 0.0),
        ("b", "a", 0.0),
        ("ab", "a", 0.0),
        ("ac", "ab", 0.0),
        ("abc", "ab", 0.0),
        ("", "", 1.0),
    ],
)
def test_score(chosen, key, expected):
    assert score(tuple(chosen), tuple(key)) == expected
    assert score(list(chosen), set(key)) == expected


printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=8)
option = printable.filter(lambda o: o == o.strip() and len(o.splitlines()) == 1)


@given(st.lists(option, min_size=2, max_size=6, unique=True), st.data())
def test_one_option_written_is_read_again(options, data):
    picked = data.draw(st.sampled_from(options))
    assert parse_answer(answer_text([picked]), options) == (picked,)


@given(st.lists(option.filter(lambda o: ", " not in o), min_size=2, max_size=6, unique=True), st.data())
def test_several_options_written_are_read_again(options, data):
    picked = data.draw(st.lists(st.sampled_from(options), min_size=1, unique=True))
    in_order = tuple(o for o in options if o in picked)
    # "x," and "y" of which "x,, y" is also made: two sets are written alike, one of them is read
    text = answer_text(in_order)
    found = parse_answer(text, options)
    assert found == in_order or answer_text(found) == text
    assert parse_answer(answer_text(picked), options) in (in_order, found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rain", ("rain",)),
        ("  Rain \n", ("rain",)),
        ("heavy   SNOW", ("heavy snow",)),
        ("heavy snow, rain", ("rain", "heavy snow")),
        ("rain, rain", ()),
        ("rain,heavy snow", ()),
        ("rain.", ()),
        ("it is rain", ()),
        ("rain, hail", ()),
        ("", ()),
        (", ", ()),
        ("a, b", ("a, b",)),
        ("us", ("us",)),
        ("US", ("US",)),
        ("Us", ("US",)),
    ],
)
def test_reading(text, expected):
    assert parse_answer(text, ["rain", "heavy snow", "a, b", "US", "us"]) == expected


def test_free_answers():
    assert parse_answer("  Anything, at all. ", None) == ("Anything, at all.",)
    assert parse_answer(" \n", None) == ()


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
def test_wilson_bounds_solve_their_equation(scores):
    """The bounds b are the roots of |p - b| = z sqrt(b (1 - b) / n), z the normal's 97.5 % point."""
    found, n, z = Accuracy.of(scores), len(scores), 1.959963984540054
    assert found.count == n
    assert found.mean == pytest.approx(sum(scores) / n)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    for bound in (found.low, found.high):
        assert abs(found.mean - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-6)
    if 0 < found.mean < 1:
        assert found.low < found.mean < found.high


def test_wilson_of_nothing_and_a_known_value():
    assert math.isnan(Accuracy.of([]).mean)
    found = Accuracy.of([1.0] * 8 + [0.0] * 2)  # Agresti and Coull, 1998
    assert (round(found.low, 3), round(found.high, 3)) == (0.490, 0.943)

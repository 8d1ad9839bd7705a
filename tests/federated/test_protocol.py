"""Bundles and rows: what is read back, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.protocol import SLOTS, bundle, place, unbundle
from contextlora.federated.table import Standing

NAMES = st.text("abcXYZ09_-", min_size=1, max_size=8)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SLOTS), st.lists(st.binary(max_size=40), max_size=6))
def test_a_bundle_is_its_messages(round_, slot, messages):
    data = bundle(round_, slot, messages)
    assert place(data) == (round_, slot)
    assert unbundle(data) == messages


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_a_bundle_that_is_cut_off_is_refused_or_ends_at_a_message(messages, data):
    whole = bundle(3, "rows", messages)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    ends = [len(bundle(3, "rows", messages[:n])) for n in range(len(messages))]
    if len(cut) in ends:
        assert unbundle(cut) == messages[: ends.index(len(cut))]
    else:
        with pytest.raises(PeerError, match=r"E62[02]"):
            unbundle(cut)


@given(st.binary(max_size=60))
def test_rubbish_is_refused(data):
    with pytest.raises(PeerError, match="E620"):
        unbundle(data)


@st.composite
def standings(draw):
    sizes = draw(st.lists(st.integers(1, 2**31), min_size=1, max_size=5))
    active = tuple(draw(st.integers(0, s)) for s in sizes)
    have = draw(st.dictionaries(NAMES, st.integers(0, 2**31), max_size=4))
    rates = draw(st.dictionaries(NAMES, st.integers(0, 2**50), max_size=4))
    return sizes, Standing("a", active, draw(st.integers(1, 2**40)), draw(st.integers(1, 10**6)), have, rates)


@given(standings())
def test_a_row_is_where_its_device_stands(made):
    sizes, standing = made
    assert Standing.read("a", standing.row(), sizes, "x") == standing
    member = standing.member("x", sizes)
    assert member.sparsity == tuple(n / s for n, s in zip(standing.active, sizes, strict=True))


GOOD = {"active": "0000000200000001", "bits": 80, "samples": 3, "have": "b=1 c=0", "rates": "b=48000000"}


@pytest.mark.parametrize(
    "change",
    [
        {"active": "00000002"},
        {"active": "0000000b00000001"},
        {"active": "zzzzzzzz00000001"},
        {"bits": 0},
        {"bits": "80"},
        {"samples": -1},
        {"samples": None},
        {"have": "b"},
        {"have": "b=x"},
        {"rates": "b=-1"},
        {"rates": "b=1e6"},
        {"rates": "x=5"},
    ],
)
def test_rows_that_no_device_writes_are_refused(change):
    assert Standing.read("a", GOOD, [10, 10], "x").active == (2, 1)
    with pytest.raises(PeerError, match="E603 x: not a row"):
        Standing.read("a", GOOD | change, [10, 10], "x")


@pytest.mark.parametrize("lacking", ["active", "bits", "samples", "have"])
def test_a_row_has_all_its_fields(lacking):
    with pytest.raises(PeerError, match="E603"):
        Standing.read("a", {k: v for k, v in GOOD.items() if k != lacking}, [10, 10], "x")
    assert Standing.read("a", {k: v for k, v in GOOD.items() if k != "rates"}, [10, 10], "x").rates == {}

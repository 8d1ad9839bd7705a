"""Measured rates in the place of the model: equal to it when they are the model's, and strictly read."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.channel import RadioChannel, shannon_rate
from contextlora.federated.cluster import Member, cluster
from contextlora.federated.settings import Limits, Radio
from contextlora.federated.trace import MeasuredChannel

NAMES = ["ant", "bee", "cat", "dog"]
GOOD = "round,from,to,rate_bit_s\n0,ant,bee,1e6\n0,bee,ant,2e6\n"


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace.csv"


@pytest.mark.parametrize("cast", ["unicast", "broadcast"])
def test_a_trace_of_the_models_rates_sends_exactly_as_the_model(cast, trace):
    limits, radio = Limits(deadline=0.4), Radio(radius=400.0, step=30.0, cast=cast, control="full")
    model, measured = RadioChannel(NAMES, radio, limits, "run"), MeasuredChannel(NAMES, limits, cast)
    for t in reversed(range(20)):  # in any order
        for a, b in permutations(NAMES, 2):
            measured.record(t, a, b, model.rate(t, a, b))
    measured.save(trace)
    for air in (measured, MeasuredChannel.load(trace, NAMES[::-1], limits, cast)):
        asked = [(t, a, [n for n in NAMES if n != a], 8_000_000) for t in range(20) for a in NAMES]
        sent = [(air.transmit(*ask), model.transmit(*ask)) for ask in asked]
        for here, there in sent:
            assert here.receivers == there.receivers
            assert here.seconds == pytest.approx(there.seconds, rel=1e-12)
            assert (here.power, here.energy) == pytest.approx((there.power, there.energy), rel=1e-12)
        reached = sum(len(here.reached) for here, _ in sent)
        assert 0 < reached < 3 * len(sent)  # some in outage, some not: the comparison means something


def test_a_trace_of_the_rates_that_the_model_plans_with_clusters_alike():
    ids, limits = [f"d{i}" for i in range(12)], Limits(collision=0.2, deadline=0.6)
    model = RadioChannel(ids, Radio(radius=500.0, control="full"), limits, 5)
    measured = MeasuredChannel(ids, limits)
    gains = model.path_gains(0) * model.radio.faded
    for (i, a), (j, b) in permutations(enumerate(ids), 2):
        measured.record(0, a, b, float(shannon_rate(20e6, 0.2, gains[i, j], model.radio.noise_density)))
    table = [Member(i, (0.1,), 2_000_000) for i in ids]
    here, there = cluster(table, measured, limits), cluster(table, model, limits)
    assert here.groups == there.groups
    assert 1 < len(here.groups) < 12
    assert {r.limit for r in here.refusals.values()} >= {"delay"}


@given(st.dictionaries(st.integers(0, 30), st.floats(0, 1e10), min_size=1))
def test_a_rate_holds_until_the_next_one(rates):
    air, rows = MeasuredChannel(["ant", "bee"], Limits()), list(rates.items())
    for round_, rate in rows:
        air.record(round_, "ant", "bee", rate)
    for t in range(32):
        past = [row for row in rows if row[0] <= t]
        assert air.rate(t, "ant", "bee") == (max(past)[1] if past else 0)
    air.record(rows[0][0], "ant", "bee", 5.0)  # measured again
    assert air.rate(rows[0][0], "ant", "bee") == 5.0
    assert air.rate(99, "bee", "ant") == 0


def test_a_link_that_is_not_there_reaches_nobody():
    air = MeasuredChannel(["ant", "bee", "cat"], Limits())
    air.record(0, "ant", "bee", 80e6)
    sent = air.transmit(0, "ant", ["bee", "cat"], 40_000_000)
    assert (sent.reached, sent.seconds) == (("bee",), (1.0, math.inf))
    assert (sent.power, sent.energy) == pytest.approx((0.1, 0.1))
    power, seconds = air.demands(0, ["ant", "bee"], [40_000_000] * 2)
    assert (power.tolist(), seconds.tolist()) == ([0.2, 0.2], [0.5, math.inf])
    with pytest.raises(PeerError, match="E641 no device 'bat'"):
        air.rate(0, "bat", "ant")
    with pytest.raises(PeerError, match="E641 no device 'bat'"):
        air.record(0, "ant", "bat", 1.0)


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("", ":1", "the header should be round,from,to,rate_bit_s, got ''"),
        ("round,from,to\n", ":1", "the header should be"),
        (GOOD + "1,ant,bee\n", ":4", "3 fields, should be 4"),
        (GOOD + "1,ant,bee,1,\n", ":4", "5 fields, should be 4"),
        (GOOD + "\n-1,ant,bee,1\n", ":5", "round should be a whole number from 0, got '-1'"),
        (GOOD + "1.0,ant,bee,1\n", ":4", "round should be a whole number"),
        (GOOD + "9999999999,ant,bee,1\n", ":4", "round should be a whole number"),
        (GOOD + "1,ant,bee,-3\n", ":4", "rate_bit_s should be a number of bit/s such as 48e6, got '-3'"),
        (GOOD + "1,ant,bee,nan\n", ":4", "rate_bit_s should be a number"),
        (GOOD + "1,ant,bee,48 Mbit/s\n", ":4", "rate_bit_s should be a number"),
        (GOOD + "1,ant,bee,1_000\n", ":4", "rate_bit_s should be a number"),
        (GOOD + "1,ant,bee,1e999\n", ":4", "a rate is a finite number of bit/s"),
        (GOOD + "1,ant,ant,1\n", ":4", "a rate from 'ant' to itself"),
        (GOOD + "1,ant,bea,1\n", ":4", "no device 'bea' in this channel. Did you mean 'bee'"),
        (GOOD + "0,ant,bee,3\n", ":4", "a second rate from 'ant' to 'bee' in round 0"),
        (GOOD + '1,"ant,bee,1\n', ":4", "not CSV: unexpected end of data"),
        (GOOD.replace("0,bee", "1,bee"), "", "no rate from 'bee' to 'ant' in round 0; give 0 if they cannot hear"),
        (b"\xff\xfe", "", "is not UTF-8 text"),
    ],
)
def test_a_trace_at_fault_is_refused_with_its_line(text, where, said, trace):
    trace.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PeerError) as e:
        MeasuredChannel.load(trace, ["ant", "bee"], Limits())
    assert str(e.value).startswith(f"E640 {trace}{where}: {said}")


def test_what_people_write_is_read(trace):
    trace.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n12,bee,ant,0.5\r\n")
    air = MeasuredChannel.load(trace, ["ant", "bee"], Limits())
    assert [air.rate(t, "bee", "ant") for t in (0, 11, 12)] == [2e6, 2e6, 0.5]
    for path in (trace.parent, trace.parent / "none.csv"):
        with pytest.raises(PeerError, match=r"E640 .*cannot be read"):
            MeasuredChannel.load(path, ["ant", "bee"], Limits())


def test_saved_rates_come_back_to_the_last_bit(trace):
    rates = np.random.default_rng(0).uniform(0, 1e9, 6)
    air = MeasuredChannel(["ant", "bee"], Limits())
    for t, rate in enumerate(rates):
        air.record(t, "ant", "bee", rate)
    air.record(0, "bee", "ant", 5e-324)
    air.save(trace)
    back = MeasuredChannel.load(trace, ["ant", "bee"], Limits())
    assert [back.rate(t, "ant", "bee") for t in range(6)] == rates.tolist()
    assert back.rate(0, "bee", "ant") == 5e-324
    assert trace.read_bytes().count(b"\n") == 8

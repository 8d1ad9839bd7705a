"""The modelled channel against closed forms, and the same numbers for everyone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import exp1
from scipy.stats import kstest

from contextlora.errors import ConfigError, PeerError
from contextlora.federated.channel import (
    RadioChannel,
    delay,
    least_power,
    outage,
    shannon_rate,
    uniform,
)
from contextlora.federated.settings import Limits, Radio
from contextlora.strict import validate

N0 = Radio().noise_density
NAMES = ["ant", "bee", "cat", "dog", "eel"]
MB = 8_000_000  # bits


def channel(radio: dict | None = None, limits: dict | None = None, names=NAMES, run: object = 7) -> RadioChannel:
    return RadioChannel(names, Radio(**(radio or {})), Limits(**(limits or {})), run)


# --- settings


def test_settings_are_read_with_units():
    radio = validate(Radio, {"bandwidth": "10 MHz", "radius": "1.5 km", "noise": -170, "noise_figure": 0})
    assert (radio.bandwidth, radio.radius) == (10e6, 1500.0)
    assert radio.noise_density == pytest.approx(1e-20, rel=1e-12)  # -170 dBm/Hz = 1e-17 mW/Hz
    assert validate(Limits, {"power": "200 mW", "deadline": "500 ms"}) == Limits(power=0.2, deadline=0.5)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (Radio, {"bandwith": 1.0}, "bandwith: unknown key. Did you mean 'bandwidth'"),
        (Radio, {"bandwidth": "20 MB"}, "bandwidth: should be a quantity such as 20 MHz"),
        (Radio, {"bandwidth": 0}, "bandwidth: should be greater than 0"),
        (Radio, {"outage": 0}, "outage: should be greater than 0"),
        (Radio, {"cast": "anycast"}, "cast: should be 'unicast' or 'broadcast', got 'anycast'"),
        (Radio, {"step": "300 m"}, "step: 300 m a round is more than the radius of the disc, 200 m"),
        (Radio, {"nearest": 400}, "nearest: 400 m is as far as two devices"),
        (Limits, {"power": "23 dBm"}, "power: should be a quantity such as 200 mW, got '23 dBm'"),
        (Limits, {"deadline": 0}, "deadline: should be greater than 0"),
        (Limits, {"collision": 1.5}, "collision: should be less than or equal to 1"),
        (Limits, {"power": float("inf")}, "power: should be a finite number"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, data, said):
    with pytest.raises(ConfigError, match=f"E103 fed.yaml: {said}"):
        validate(kind, data, "fed.yaml")


# --- closed forms


positive = st.floats(-6, 0).map(lambda e: 10**e)


@given(bits=st.integers(1, 10**9), share=st.floats(1e5, 1e8), seconds=st.floats(0.05, 20), gain=positive)
def test_the_least_power_inverted_back_gives_exactly_the_deadline(bits, share, seconds, gain):
    power = least_power(bits, share, seconds, gain, N0)
    if bits / (share * seconds) < 900:  # else the power is beyond what a double holds
        assert delay(bits, share, power, gain, N0) == pytest.approx(seconds, rel=1e-12)
        # and it is eq. 25 as printed
        with np.errstate(over="ignore"):
            literal = N0 * share / gain * (np.float64(2) ** (bits / (share * seconds)) - 1)
        assert power == pytest.approx(literal, rel=1e-6) or bits / (share * seconds) < 1e-9
    else:
        assert power > 1e200


def test_the_rate_in_numbers():
    assert shannon_rate(1e6, 3 * N0 * 1e6, 1.0, N0) == pytest.approx(2e6)  # snr 3: log2(4) = 2 bit/s/Hz
    assert delay(5e6, 1e6, 3 * N0 * 1e6, 1.0, N0) == pytest.approx(2.5)
    assert delay(1, 1e6, 1.0, 0.0, N0) == math.inf


@pytest.mark.parametrize("snr_db", [0, 10, 20])
def test_ergodic_rate_and_outage_of_a_link(snr_db):
    """E log2(1 + g x) = e^(1/g) E1(1/g) / ln 2 and P(rate < R) = 1 - exp(-(2^R - 1) / g) for x ~ Exp(1)."""
    air = channel({"control": "full"})
    gain = air.path_gains(0)[0, 1]
    power = 10 ** (snr_db / 10) * N0 * air.radio.bandwidth / gain
    air = channel({"control": "full"}, {"power": float(power)})
    rates = np.array([air.rate(t, "ant", "bee") for t in range(20_000)]) / air.radio.bandwidth
    snr = 10 ** (snr_db / 10)
    ergodic = math.exp(1 / snr) * exp1(1 / snr) / math.log(2)
    assert abs(rates.mean() - ergodic) < 4 * rates.std() / math.sqrt(len(rates))
    for bits_per_hz in (0.5, 2.0, 4.0):
        p = 1 - math.exp(-(2**bits_per_hz - 1) / snr)
        assert outage(power, bits_per_hz * 20e6 * 2.0, 20e6, 2.0, gain, N0) == pytest.approx(p)
        assert abs((rates < bits_per_hz).mean() - p) < 4 * math.sqrt(p * (1 - p) / len(rates)) + 1e-4


@pytest.mark.parametrize("cast", ["unicast", "broadcast"])
def test_outage_is_met_by_truncated_inversion(cast):
    """With p_max just what the plan asks for, a receiver misses a message only when its own link fades."""
    radio = {"cast": cast, "outage": 0.3}
    power, _ = channel(radio).demands(0, NAMES[:4], [3 * MB] * 4)
    air = channel(radio, {"power": float(power[0])})
    sent = [air.transmit(t, "ant", NAMES[1:4], 3 * MB) for t in range(6000)]
    missed = 1 - np.array([[r in s.reached for r in NAMES[1:4]] for s in sent]).mean(axis=0)
    assert np.all(missed < 0.3 + 4 * math.sqrt(0.3 * 0.7 / len(sent)))
    for t, s in enumerate(sent):
        assert set(s.reached) >= {r for r in NAMES[1:4] if air.fading(t, "ant", r) >= air.radio.faded}
    assert all(s.power <= power[0] * (1 + 1e-9) and s.energy == s.power * 2.0 for s in sent)
    if cast == "broadcast":  # one threshold of power for all: the worst link's outage is exactly the planned one
        gains = air.path_gains(0)[0, 1:4]
        exact = outage(power[0], 3 * MB, 20e6, 2.0, gains, N0)
        assert exact.max() == pytest.approx(0.3)
        assert np.all(np.abs(missed - exact) < 4 * np.sqrt(exact * (1 - exact) / len(sent)) + 1e-3)


def test_a_single_link_is_in_outage_as_often_as_planned():
    power, seconds = channel({"outage": 0.2}).demands(0, ["ant", "bee"], [3 * MB, MB])
    assert seconds.tolist() == [2.0, 2.0]
    air = channel({"outage": 0.2}, {"power": float(power[0])})
    missed = np.mean([not air.transmit(t, "ant", ["bee"], 3 * MB).reached for t in range(8000)])
    assert abs(missed - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 8000)


# --- what is sent


@pytest.mark.parametrize("control", ["inversion", "full"])
@given(run=st.integers(0, 10**6), size=st.integers(2, 5), bits=st.integers(10**5, 4 * 10**7))
def test_what_is_sent_keeps_every_limit(control, run, size, bits):
    for cast in ("unicast", "broadcast"):
        air = channel({"cast": cast, "control": control}, run=run)
        sent = air.transmit(3, "ant", NAMES[1:size], bits)
        assert sent.power <= 0.2 * (1 + 1e-9)
        assert all(s <= 2.0 * (1 + 1e-9) or s == math.inf for s in sent.seconds)
        assert sent.energy <= 0.2 * 2.0 * (1 + 1e-9)
        assert sent.receivers_per_joule == (len(sent.reached) / sent.energy if sent.reached else 0)
        for r in NAMES[1:size]:  # eq. 8 with all of the band and power: who is out of reach even so is not reached
            alone = bits / air.rate(3, "ant", r)
            assert r not in sent.reached or alone <= 2.0 * (1 + 1e-9)
            assert r in sent.reached or cast == "unicast" or alone > 2.0


@given(run=st.integers(0, 10**6), size=st.integers(3, 5), bits=st.integers(10**5, 10**7))
def test_a_broadcast_asks_less_than_the_worst_unicast(run, size, bits):
    """Of power by inversion, of time at full power; and whom unicast reaches, a broadcast reaches too."""
    group, sizes = NAMES[:size], [bits] * size
    one, many = channel({"cast": "broadcast"}, run=run), channel({}, run=run)
    share = many.radio.bandwidth / (size - 1)
    gains = many.path_gains(0)[:size, :size] * many.radio.faded
    worst_link = least_power(bits, share, 2.0, gains, N0).max(axis=1)
    assert np.all(one.demands(0, group, sizes)[0] <= worst_link)
    assert np.all(worst_link <= many.demands(0, group, sizes)[0])
    fast, slow = ({"cast": c, "control": "full"} for c in ("broadcast", "unicast"))
    assert channel(fast, run=run).demands(0, group, sizes)[1] == pytest.approx(
        channel(slow, run=run).demands(0, group, sizes)[1] / (size - 1)
    )
    sent, each = one.transmit(0, "ant", group[1:], bits), many.transmit(0, "ant", group[1:], bits)
    assert set(each.reached) <= set(sent.reached)
    if each.reached == sent.reached:
        assert sent.energy <= each.energy * (1 + 1e-9)
        assert sent.receivers_per_joule >= each.receivers_per_joule * (1 - 1e-9)


def test_full_power_by_unicast_is_equation_8_with_shares_of_band_and_power():
    air = channel({"control": "full"})
    sent = air.transmit(5, "ant", ["bee", "cat", "dog"], MB)
    for name, seconds in zip(sent.receivers, sent.seconds, strict=True):
        gain = air.path_gains(5)[0, NAMES.index(name)] * air.fading(5, "ant", name)
        assert seconds == pytest.approx(delay(MB, 20e6 / 3, 0.2 / 3, gain, N0))
    assert sent.reached == ("bee", "cat", "dog")
    assert sent.energy == pytest.approx(0.2 / 3 * sum(sent.seconds))


def test_a_broadcast_goes_at_the_worst_members_rate():
    air = channel({"control": "full", "cast": "broadcast"})
    rates = [air.rate(5, "ant", name) for name in NAMES[1:]]
    sent = air.transmit(5, "ant", NAMES[1:], MB)
    assert sent.seconds == pytest.approx([MB / min(rates)] * 4)
    assert (sent.power, sent.energy) == pytest.approx((0.2, 0.2 * MB / min(rates)))
    late = channel(
        {"control": "full", "cast": "broadcast"}, {"deadline": MB / sorted(rates)[1]}
    )  # the worst is too late
    reached = [s for s in late.transmit(5, "ant", NAMES[1:], MB).seconds if s < math.inf]
    assert reached == pytest.approx([MB / sorted(rates)[1]] * 3)


def test_demands_are_equation_25_at_the_gain_that_outage_leaves():
    bits = [MB, 2 * MB, 3 * MB]
    for cast, n, total in (("unicast", 2, sum), ("broadcast", 1, max)):
        air = channel({"cast": cast, "outage": 0.1})
        share, gains = 20e6 / n, air.path_gains(0) * -math.log(0.9)
        for i, power in enumerate(air.demands(0, NAMES[:3], bits)[0]):
            links = [N0 * share / gains[i, j] * (2 ** (bits[i] / (share * 2.0)) - 1) for j in {0, 1, 2} - {i}]
            assert power == pytest.approx(total(links), rel=1e-9)


def test_demands_never_fall_when_a_group_grows():
    for radio in ({}, {"cast": "broadcast"}, {"control": "full"}, {"cast": "broadcast", "control": "full"}):
        for run in range(20):
            air, before = channel(radio, run=run), (np.zeros(1), np.zeros(1))
            for size in range(2, 6):
                now = air.demands(0, NAMES[:size], [MB] * size)
                for new, old in zip(now, before, strict=True):
                    assert np.all(new[: size - 1] >= old[: size - 1] * (1 - 1e-12))
                before = now


def test_nobody_to_send_to_costs_nothing():
    for radio in ({}, {"cast": "broadcast"}, {"control": "full"}, {"cast": "broadcast", "control": "full"}):
        sent = channel(radio).transmit(0, "ant", [], MB)
        assert (sent.reached, sent.power, sent.energy, sent.receivers_per_joule) == ((), 0, 0, 0)


def test_an_unknown_device_is_named():
    air = channel()
    for ask in (
        lambda: air.transmit(0, "ant", ["bea"], MB),
        lambda: air.transmit(0, "bea", ["ant"], MB),
        lambda: air.demands(0, ["ant", "bea"], [MB, MB]),
        lambda: air.rate(0, "ant", "bea"),
    ):
        with pytest.raises(PeerError, match=r"E641 no device 'bea' in this channel\. Did you mean 'bee'"):
            ask()


# --- where devices are, and how links fade


def test_gains_follow_the_law_of_loss_and_are_reciprocal():
    air = channel({"radius": 500.0})
    at, gains = air.positions(2), air.path_gains(2)
    for i in range(5):
        for j in set(range(5)) - {i}:
            km = max(math.dist(at[i], at[j]), 10) / 1e3
            assert -10 * math.log10(gains[i, j]) == pytest.approx(128.1 + 37.6 * math.log10(km))
            assert gains[i, j] == gains[j, i]
            a, b = NAMES[i], NAMES[j]
            assert air.fading(2, a, b) == air.fading(2, b, a)
            assert air.rate(2, a, b) == air.rate(2, b, a)
    assert channel({"radius": 6.0, "nearest": 11.0}).path_gains(0)[0, 1] == pytest.approx(10 ** (-12.81) * 0.011**-3.76)


def test_fading_is_exponential_and_independent_over_rounds_and_pairs():
    air = channel()
    ab, ac = (np.array([air.fading(t, "ant", other) for t in range(4000)]) for other in ("bee", "cat"))
    assert kstest(ab, "expon").pvalue > 1e-3
    for x, y in ((ab, ac), (ab[:-1], ab[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("step", [0.0, 5.0, 80.0])
def test_positions_are_uniform_in_the_disc_in_every_round(step):
    names = [f"d{i}" for i in range(1500)]
    air = channel({"step": step}, names=names)
    for t in (0, 9):
        x, y = air.positions(t).T
        assert kstest((x**2 + y**2) / 200.0**2, "uniform").pvalue > 1e-3  # area within the radius
        assert kstest(np.arctan2(y, x) / (2 * np.pi) % 1, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("step", "error"), [(0.5, 0.01), (10.0, 0.01), (100.0, 0.05), (200.0, 0.06)])
def test_a_step_is_as_long_as_it_says(step, error):
    names = [f"d{i}" for i in range(2500)]
    air = channel({"step": step}, names=names)
    ways = np.concatenate([np.hypot(*(air.positions(t + 1) - air.positions(t)).T) ** 2 for t in range(4)])
    mean = math.sqrt(ways.mean())
    assert abs(mean / step - 1) < error + 4 * ways.std() / math.sqrt(len(ways)) / (2 * ways.mean())


def test_devices_that_do_not_move_stay():
    air = channel()
    assert np.array_equal(air.positions(0), air.positions(50))


def test_every_device_computes_the_same_in_any_order_with_any_others():
    one = channel({"step": 7.0}, names=NAMES)
    other = channel({"step": 7.0}, names=["zoo", *reversed(NAMES)])
    late, early = one.positions(6), one.positions(2)
    assert np.array_equal(other.positions(2)[1:][::-1], early)
    assert np.array_equal(other.positions(6)[1:][::-1], late)
    ask = (4, "bee", ["eel", "ant", "dog"], 3 * MB)
    assert one.transmit(*ask) == other.transmit(*ask)
    for x, y in zip(one.demands(4, NAMES[1:], [MB] * 4), other.demands(4, NAMES[1:], [MB] * 4), strict=True):
        assert np.array_equal(x, y)
    assert channel(run=8).fading(0, "ant", "bee") != channel(run=7).fading(0, "ant", "bee")
    assert not np.array_equal(channel(run=8).positions(0), channel(run=7).positions(0))


def test_another_process_computes_the_same():
    code = """
import json
from contextlora.federated.channel import RadioChannel
from contextlora.federated.settings import Limits, Radio
air = RadioChannel(["cat", "bee", "ant"], Radio(step=7.0), Limits(), 7)
sent = air.transmit(11, "ant", ["cat", "bee"], 24_000_000)
print(json.dumps([air.positions(11).tolist()[::-1], air.fading(3, "bee", "cat"), sent.power, sent.seconds]))
"""
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    air = channel({"step": 7.0}, names=["ant", "bee", "cat"])
    sent = air.transmit(11, "ant", ["cat", "bee"], 3 * MB)
    expected = [air.positions(11).tolist(), air.fading(3, "cat", "bee"), sent.power, list(sent.seconds)]
    assert json.loads(printed) == expected


def test_the_hash_of_a_key_does_not_change():
    """Peers of different versions must draw alike: these numbers are part of the protocol."""
    assert uniform("fading", 7, 0, "ant", "bee") == 0.32368571270545343
    assert channel().fading(0, "bee", "ant") == pytest.approx(-math.log(0.32368571270545343), rel=1e-15)
    radius, angle = (uniform("walk", 7, 0, "ant", what) for what in ("radius", "angle"))
    there = [200 * math.sqrt(1 - radius) * turn(2 * math.pi * angle) for turn in (math.cos, math.sin)]
    assert channel().positions(0)[0] == pytest.approx(there, rel=1e-12)

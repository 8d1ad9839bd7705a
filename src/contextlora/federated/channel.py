"""The channel: where devices are, how their links fade, and what sending a message costs. No torch here.

Symbols of SO-LoRA, section III-B: W bandwidth (Hz), N0 density of noise (W/Hz), h power gain of a link, p power (W),
Gamma deadline (s). n receivers by unicast take a share W / n each, with noise scaled to the share; a broadcast takes
all of W. Bits are those of the encoded message.

Nothing is drawn from a generator's state: every random number is a hash of what it is for (run, round, device or pair),
so that each device computes the same ones by itself, in any order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError, did_you_mean
from contextlora.federated.settings import Cast, Limits, Radio

Floats = NDArray[np.float64]
SLACK = 1e-9  # relative: a power made to meet a limit exactly must not miss it by a rounding


@dataclass(frozen=True)
class Transmission:
    """What became of one device's message in one round.

    Attributes:
        receivers: whom it was for.
        seconds: until each has all of it; infinite for those in outage.
        power: W, of all transmissions at once.
        energy: J.
    """

    receivers: tuple[str, ...]
    seconds: tuple[float, ...]
    power: float
    energy: float

    @property
    def reached(self) -> tuple[str, ...]:
        """The receivers that have the message by the deadline."""
        return tuple(r for r, s in zip(self.receivers, self.seconds, strict=True) if math.isfinite(s))

    @property
    def receivers_per_joule(self) -> float:
        """1/J; 0 where nobody was reached."""
        return len(self.reached) / self.energy if self.energy else 0.0


class Channel(Protocol):
    """What clustering and a round need to know of the air, be it modelled (`RadioChannel`) or measured."""

    def demands(self, round_: int, group: Sequence[str], bits: Sequence[int]) -> tuple[Floats, Floats]:
        """What it takes each member of `group`, with `bits` to send, to reach all others within the deadline.

        Returns: power (W) and seconds of its slowest receiver, shape (len(group),) each, not cut off at any limit.
        Neither may fall when the group grows. Raises PeerError E641 for an unknown device.
        """

    def transmit(self, round_: int, sender: str, receivers: Sequence[str], bits: int) -> Transmission:
        """One message in one round, within p_max and the deadline; who cannot be reached within them is not.

        Raises PeerError E641 for an unknown device.
        """

    def expected_rate(self, round_: int, a: str, b: str) -> float:
        """Bit/s from a to b, with all of the band and p_max, that planning may count on. Raises as above."""


# --- closed forms; every argument may be an array ------------------------------------------------------------------


def shannon_rate(share: Any, power: Any, gain: Any, noise_density: float) -> Any:
    """Bit/s over a `share` (Hz) of the band at `power` (W): the denominator of SO-LoRA eq. 8, log to base 2."""
    return share * np.log1p(power * gain / (noise_density * share)) / math.log(2)


def delay(bits: Any, share: Any, power: Any, gain: Any, noise_density: float) -> Any:
    """Seconds for `bits` over a `share` (Hz) of the band at `power` (W) (SO-LoRA eq. 8)."""
    with np.errstate(divide="ignore"):
        return np.divide(bits, shannon_rate(share, power, gain, noise_density))


def least_power(bits: Any, share: Any, deadline: float, gain: Any, noise_density: float) -> Any:
    """p*, W: the least power by which `bits` take no longer than `deadline` (s) over `share` (Hz) (SO-LoRA eq. 25)."""
    with np.errstate(over="ignore", divide="ignore"):
        return noise_density * share / gain * np.expm1(np.divide(bits, share * deadline) * math.log(2))


def outage(power: Any, bits: Any, share: Any, deadline: float, mean_gain: Any, noise_density: float) -> Any:
    """The probability that `power` (W) does not carry `bits` by the deadline over a link whose gain is Exp(mean_gain).

    1 - exp(-(2^R - 1) / snr), R being bits / (share deadline) in bit/s/Hz.
    """
    return -np.expm1(-least_power(bits, share, deadline, mean_gain, noise_density) / power)


# --- numbers that everyone draws alike -----------------------------------------------------------------------------


def uniform(*key: object) -> float:
    """A number in (0, 1), uniform over keys: the same on every machine, in any order, for any version of numpy."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) * 2.0**-52


def _normal_pair(*key: object) -> complex:
    """Two independent standard normal numbers as one complex (Box-Muller)."""
    angle = 2 * math.pi * uniform(*key, "angle")
    return math.sqrt(-2 * math.log(uniform(*key, "radius"))) * complex(math.cos(angle), math.sin(angle))


# --- the model -----------------------------------------------------------------------------------------------------


class RadioChannel:
    """Devices in a disc; path loss by distance; block Rayleigh fading, the same both ways.

    Args:
        devices: their names; the order does not matter.
        radio: the model's settings.
        limits: p_max and the deadline.
        run: names the run: all randomness follows from it.
    """

    def __init__(self, devices: Sequence[str], radio: Radio, limits: Limits, run: object = 0):
        self.devices, self.radio, self.limits, self.run = tuple(devices), radio, limits, run
        self._at = {name: i for i, name in enumerate(self.devices)}
        self._walk: list[NDArray[np.complex128]] = []
        self.path_gains = lru_cache(maxsize=4)(self._path_gains)

    def positions(self, round_: int) -> Floats:
        """Shape (M, 2), m: uniform in the disc in every round, `radio.step` m apart from round to round (rms).

        A Gauss-Markov walk z' = a z + sqrt(1 - a^2) w of a standard normal point, whose radius is then mapped to that
        of a uniform one: |z|^2 / 2 is Exp(1), hence 1 - exp(-|z|^2 / 2) uniform. A small step moves the mapped point
        by E|dx|^2 = (1 - a) (ln 2 + pi^2 / 6 - 5 / 4) radius^2, which gives a.
        """
        keep = 1 - (self.radio.step / self.radio.radius) ** 2 / (math.log(2) + math.pi**2 / 6 - 1.25)
        while len(self._walk) <= (round_ if self.radio.step else 0):
            new = np.array([_normal_pair("walk", self.run, len(self._walk), name) for name in self.devices], complex)
            self._walk.append(keep * self._walk[-1] + math.sqrt(1 - keep**2) * new if self._walk else new)
        z = self._walk[round_ if self.radio.step else 0]
        mapped = self.radio.radius * np.sqrt(-np.expm1(-(np.abs(z) ** 2) / 2)) * np.exp(1j * np.angle(z))
        return np.stack([mapped.real, mapped.imag], axis=1)

    def _path_gains(self, round_: int) -> Floats:
        """Shape (M, M): mean power gain d^-alpha between devices; the diagonal means nothing."""
        at = self.positions(round_)
        metres = np.maximum(np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)), self.radio.nearest)
        return np.asarray(10 ** (-self.radio.loss_at_1_km / 10) * (metres / 1e3) ** -self.radio.exponent)

    def fading(self, round_: int, a: str, b: str) -> float:
        """rho, the power gain of Rayleigh fading between two devices in a round: Exp(1), the same both ways."""
        return -math.log(uniform("fading", self.run, round_, *sorted((a, b))))

    def rate(self, round_: int, a: str, b: str) -> float:
        """Bit/s from a to b in this round, with all of the band and p_max; what a trace of this channel would say."""
        (i,), (j,) = self._indices([a]), self._indices([b])
        return float(self._full_rates(self.path_gains(round_)[i, j] * self.fading(round_, a, b)))

    def expected_rate(self, round_: int, a: str, b: str) -> float:
        """See `Channel`: what `radio.outage` leaves."""
        (i,), (j,) = self._indices([a]), self._indices([b])
        return float(self._full_rates(self.path_gains(round_)[i, j] * self.radio.faded))

    def demands(self, round_: int, group: Sequence[str], bits: Sequence[int]) -> tuple[Floats, Floats]:
        """See `Channel`. Fading is not known yet: it is taken to be what `radio.outage` leaves."""
        at = self._indices(group)
        gains, size = self.path_gains(round_)[np.ix_(at, at)] * self.radio.faded, np.array(bits, float)
        if self.radio.control == "full":
            return np.full(len(at), self.limits.power), slowest(self._full_rates(gains), size, self.radio.cast)
        power = self._inverted(size[:, None], len(at) - 1, gains)
        np.fill_diagonal(power, 0.0)
        total = power.max(axis=1) if self.radio.cast == "broadcast" else power.sum(axis=1)
        return total, np.full(len(at), self.limits.deadline)

    def transmit(self, round_: int, sender: str, receivers: Sequence[str], bits: int) -> Transmission:
        """See `Channel`. Truncated inversion: a receiver whose link would take too much power is left out.

        By unicast the links that planning counted on come first and the cheapest of the others after them, so that each
        receiver of a planned cluster is in outage with probability at most `radio.outage`.
        """
        (i,), at = self._indices([sender]), self._indices(receivers)
        fading = np.array([self.fading(round_, sender, r) for r in receivers])
        gains = self.path_gains(round_)[i, at] * fading
        if self.radio.control == "full":
            return at_full_power(self._full_rates(gains), tuple(receivers), bits, self.limits, self.radio.cast)
        power = self._inverted(bits, len(at), gains)
        if self.radio.cast == "broadcast":
            reached = within(power, self.limits.power)
            total = float(power[reached].max(initial=0.0))
        else:
            order = np.lexsort((power, fading < self.radio.faded))
            reached = np.zeros(len(at), bool)
            reached[order] = within(np.cumsum(power[order]), self.limits.power)
            total = float(power[reached].sum())
        seconds = tuple(self.limits.deadline if r else math.inf for r in reached)
        return Transmission(tuple(receivers), seconds, total, total * self.limits.deadline)

    def _inverted(self, bits: Any, receivers: int, gains: Floats) -> Floats:
        """p*, W, of each link when a device sends to so many."""
        share = self.radio.bandwidth / _turns(receivers, self.radio.cast)
        return np.asarray(least_power(bits, share, self.limits.deadline, gains, self.radio.noise_density))

    def _full_rates(self, gains: Any) -> Any:
        return shannon_rate(self.radio.bandwidth, self.limits.power, gains, self.radio.noise_density)

    def _indices(self, names: Sequence[str]) -> list[int]:
        try:
            return [self._at[n] for n in names]
        except KeyError as e:
            raise unknown_device(e.args[0], self.devices) from None


# --- what every channel shares -------------------------------------------------------------------------------------


def slowest(rates: Floats, bits: Floats, cast: Cast) -> Floats:
    """Seconds until the last of its receivers has each sender's message, at full power; shape (m,).

    Args:
        rates: (m, m) bit/s with all of the band; the diagonal is not read. n unicast receivers share band *and* power,
            W / n and p_max / n each, which keeps the signal-to-noise ratio: each has 1 / n of the rate.
        bits: (m,).
    """
    worst = np.where(np.eye(len(bits), dtype=bool), np.inf, rates).min(axis=1)
    with np.errstate(divide="ignore"):
        return np.asarray(_turns(len(bits) - 1, cast) * bits / worst)


def at_full_power(rates: Floats, receivers: tuple[str, ...], bits: int, limits: Limits, cast: Cast) -> Transmission:
    """One message at p_max, given each receiver's rate with all of the band, shape (n,), bit/s.

    Receivers that could not have it by the deadline are left out; a broadcast goes at the worst rate of the others.
    """
    turns = _turns(len(receivers), cast)
    with np.errstate(divide="ignore"):
        seconds = turns * bits / np.asarray(rates, float)
    reached = within(seconds, limits.deadline)
    if cast == "broadcast":
        seconds[reached] = air = float(seconds[reached].max(initial=0.0))
        power = limits.power * bool(reached.any())
        energy = limits.power * air
    else:
        power = limits.power / turns * int(reached.sum())
        energy = limits.power / turns * float(seconds[reached].sum())
    seconds[~reached] = math.inf
    return Transmission(receivers, tuple(seconds.tolist()), power, energy)


def _turns(receivers: int, cast: Cast) -> int:
    """How many transmissions share a sender's air."""
    return 1 if cast == "broadcast" else max(receivers, 1)


def within(value: Any, limit: float) -> Any:
    """Whether `value` keeps to `limit`, but for rounding."""
    return value <= limit * (1 + SLACK)


def unknown_device(name: object, known: Sequence[str]) -> PeerError:
    """PeerError E641, to be raised for a device that a channel does not have."""
    return PeerError("E641", f"no device '{name}' in this channel.{did_you_mean(name, known)}")

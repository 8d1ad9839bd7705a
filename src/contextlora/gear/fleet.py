"""The fleet: devices, and the network between them. No torch here.

fleet.yaml (strict; unknown keys are errors with a suggestion):

    name: two boards and a workstation
    devices:
      desk: {memory: 16 GB}                             # as fast as the profile was measured
      nano: {memory: 4 GB, speed: 0.3}                  # times are divided by `speed`
      orin: {memory: 8 GB, profile: orin.json}          # or measured on the device itself
    medium: {rate: 100 Mbit/s, delay: 2 ms, relay: true}   # one air for all; by way of an AP bytes cross it twice

or, instead of `medium`, dedicated full-duplex links:

    links:
      - {between: [desk, nano], rate: 1 Gbit/s, delay: 0.2 ms}
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from contextlora.errors import PlanError, did_you_mean
from contextlora.gear.units import BitRate, Bytes, BytesOrNone, Seconds
from contextlora.strict import Strict, read_yaml, validate

Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Device(Strict):
    """One device.

    Attributes:
        memory: bytes that a process may use.
        speed: relative to the machine that was profiled: all times of the profile are divided by it.
        profile: a profile measured on this very device, a file beside fleet.yaml; excludes `speed`.
        reserved: bytes of `memory` that the process takes before it holds any weight (interpreter, libraries).
    """

    memory: Bytes
    speed: Positive | None = None
    profile: str | None = None
    reserved: BytesOrNone = 0.0


class Medium(Strict):
    """One half-duplex medium that all devices share, such as Wi-Fi.

    Attributes:
        rate: bit/s.
        delay: seconds, one way.
        relay: every transfer goes by way of an access point, so each byte takes the medium twice.
    """

    rate: BitRate
    delay: Seconds = 0.0
    relay: bool = False


class Link(Strict):
    """A dedicated full-duplex link.

    Attributes:
        between: two device names.
        rate: bit/s each way.
        delay: seconds, one way.
    """

    between: Annotated[tuple[Name, ...], Field(strict=False, min_length=2, max_length=2)]
    rate: BitRate
    delay: Seconds = 0.0


class _FleetFile(Strict):
    """fleet.yaml as written."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "fleet"
    synthetic: bool = False
    devices: Annotated[dict[Name, Device], Field(min_length=1, max_length=64)]
    medium: Medium | None = None
    links: Annotated[tuple[Link, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class Fleet:
    """Devices and the network between them.

    Attributes:
        devices: by name, in declared order.
        medium: shared by all, or None.
        links: by pair of names, both ways round.
        synthetic: speeds were estimated, not measured.
        home: the folder that names of profiles count from.
    """

    name: str
    devices: dict[str, Device]
    medium: Medium | None
    links: dict[tuple[str, str], Link]
    synthetic: bool = False
    home: Path = Path()

    @classmethod
    def load(cls, path: str | Path) -> Fleet:
        """Reads fleet.yaml. Raises ConfigError E101 to E103, PlanError E401, E402."""
        return cls.from_dict(read_yaml(path), path)

    @classmethod
    def from_dict(cls, data: Any, where: str | Path = "") -> Fleet:
        """Builds a fleet from the contents of fleet.yaml."""
        f = validate(_FleetFile, data, where)
        links: dict[tuple[str, str], Link] = {}
        for link in f.links:
            a, b = link.between
            for name in (a, b):
                if name not in f.devices:
                    text = f"no device '{name}'.{did_you_mean(name, f.devices)} There are: {', '.join(f.devices)}"
                    raise PlanError("E401", text, where=f"{where}, links" if where else "links")
            if a == b or (a, b) in links:
                what = f"a link from '{a}' to itself" if a == b else f"two links between '{a}' and '{b}'"
                raise PlanError("E402", f"{what}; name each pair of devices once", where=where)
            links[a, b] = links[b, a] = link
        _check_network(f, links, where)
        for name, device in f.devices.items():
            if device.speed is not None and device.profile is not None:
                text = f"device '{name}' has both a speed and a profile of its own; leave one out"
                raise PlanError("E402", text, where=where)
        return cls(f.name, dict(f.devices), f.medium, links, f.synthetic, Path(where).parent if where else Path())

    @property
    def shared(self) -> bool:
        """Whether all transfers take turns on one medium."""
        return self.medium is not None

    def delay(self, a: str, b: str) -> float:
        """Seconds from a to b before the first byte arrives; 0 on one device."""
        if a == b:
            return 0.0
        return (self.medium or self.links[a, b]).delay

    def airtime(self, a: str, b: str, size: float) -> float:
        """Seconds that `size` bytes from a to b occupy the medium or link; 0 on one device."""
        if a == b:
            return 0.0
        if self.medium is not None:
            return size * 8 / self.medium.rate * (2 if self.medium.relay else 1)
        return size * 8 / self.links[a, b].rate


def _check_network(f: _FleetFile, links: dict[tuple[str, str], Link], where: str | Path) -> None:
    """Raises PlanError E402 unless every pair of devices can talk, in one way."""
    if f.medium is not None and links:
        raise PlanError("E402", "both `medium` and `links`; a fleet has one or the other", where=where)
    if f.medium is None:
        for a, b in combinations(f.devices, 2):
            if (a, b) not in links:
                text = f"no link between '{a}' and '{b}'; add one, or a `medium` that all share"
                raise PlanError("E402", text, where=where)

"""What is compared: fleets, networks, workloads. Speeds are estimates, relative to 10 TFLOP/s as in shipped fleets."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from model import BYTES, Setting
from testbed import Network, network

from contextlora.gear.fleet import Fleet

BOARDS = {"board": (0.5, 64), "small-1": (0.2, 64), "small-2": (0.2, 64)}  # speed, memory in GB: enough for anything
TIGHT = {"board": (0.5, 16), "small-1": (0.2, 8), "small-2": (0.2, 8)}
DESK = {"desk": (2.0, 64), "small-1": (0.4, 64), "small-2": (0.4, 64)}
EQUAL = {f"board-{i}": (0.5, 64) for i in (1, 2, 3)}


@dataclass(frozen=True)
class Configuration:
    """One comparison; the rest is as in Setting.

    Attributes:
        devices: speed and GB of memory by name.
        rate: bit/s of the one medium that all share, or of each link.
        linked: a full-duplex link for each pair instead of the medium.
        delay: seconds one way, of the medium.
        methods: those that are compared, empty for all.
    """

    name: str
    devices: dict[str, tuple[float, float]]
    rate: float
    layers: str = "all"
    tasks: int = 2
    batch: int = 8
    updates: int = 4
    epochs: int = 1
    linked: bool = False
    delay: float = 0.0
    methods: tuple[str, ...] = ()

    def network(self, scale: float) -> AbstractContextManager[Network]:
        """On the scale model's scale."""
        count, rate = len(self.devices), self.rate * scale / BYTES
        links = dict.fromkeys(permutations(range(count), 2), rate) if self.linked else None
        return network(count, rate, delay=self.delay / scale, links=links)

    def setting(self, net: Network, rate: float, scale: float) -> Setting:
        """With the rate that was measured, on links of their own where there is no medium."""
        names = list(self.devices)
        devices = {n: {"speed": s, "memory": f"{gb} GB", "reserved": "1.5 GB"} for n, (s, gb) in self.devices.items()}
        pairs = [{"between": list(pair), "rate": rate} for pair in combinations(names, 2)]
        apart = net.how in ("paced", "links")
        air = {"links": pairs} if apart else {"medium": {"rate": rate, "delay": self.delay}}
        fleet = Fleet.from_dict({"name": self.name, "devices": devices, **air})
        return Setting(fleet, self.tasks, self.batch, self.updates, self.epochs, self.layers, scale)


def _both(name: str, devices: dict[str, tuple[float, float]], **more: object) -> list[Configuration]:
    """At 100 and 300 Mbit/s."""
    slow = Configuration(f"{name}-100", devices, 100e6, **more)  # type: ignore[arg-type]
    return [slow, replace(slow, name=f"{name}-300", rate=300e6)]


_ALL = (
    *_both("boards", BOARDS),  # blocks on all layers, every sample once
    *_both("boards-top", BOARDS, layers="top 1/2", updates=3, epochs=2),  # half of the forward pass is frozen
    *_both("tight", TIGHT),  # no device holds the whole model
    *_both("desk", DESK, layers="top 1/2", updates=3, epochs=2),
    *_both("large-batch", EQUAL, batch=32, updates=3, layers="top 1/4"),  # few slices, many samples: DDP's home
    *_both("equal", EQUAL),
    Configuration("boards-top-wire", BOARDS, 1e9, layers="top 1/2", linked=True),
    Configuration("boards-top-far", BOARDS, 100e6, layers="top 1/2", delay=0.05),
)
CONFIGURATIONS = {c.name: c for c in _ALL}
QUICK = Configuration(
    "quick",
    {"board": (0.5, 64), "small": (0.25, 64)},
    300e6,
    layers="top 1/2",
    batch=4,
    updates=2,
    methods=("exact", "1f1b", "ddp-by-speed"),
)

"""One method at work on emulated devices: gradients compared first, then every update timed and every byte counted."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Protocol

import torch.distributed as dist
from model import BYTES, Setting
from padding import Device
from testbed import Network, together
from torch import Tensor

from contextlora.models.inputs import ImageFeatures

CLOSE = 1e-4  # of the largest gradient, in float32
PORTS = itertools.count(29500)


class Job(Protocol):
    """A method on one device."""

    def check(self, reference: Mapping[str, Tensor]) -> float:
        """How far gradients of the first update are from a single process's, relative to the largest."""

    def updates(self) -> Iterator[float]:
        """Carries out all updates; gives the time after each, as this device knows it."""


Make = Callable[[Setting, ImageFeatures, Device], Job]


@dataclass(frozen=True)
class Measured:
    """What came out, on the real model's scale.

    Attributes:
        steps: seconds of each update, until the last device was done with it.
        sent: bytes by device, over all updates.
        late: the most seconds that a device was behind its profile.
        worst: the largest difference of gradients.
        exchange: seconds to give the trained slices to all devices, where a method has to.
    """

    steps: tuple[float, ...]
    sent: tuple[int, ...]
    late: float
    worst: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of all updates."""
        return sum(self.steps)

    @property
    def step(self) -> float:
        """The median update's seconds."""
        return median(self.steps)


@dataclass(frozen=True)
class _Seen:
    """What one device saw."""

    start: float
    ends: list[float]
    stop: float
    sent: int
    late: float
    worst: float
    exchange: float


def measure(
    net: Network,
    setting: Setting,
    reader: ImageFeatures,
    reference: Mapping[str, Tensor],
    devices: Sequence[str],
    make: Make,
) -> Measured:
    """Runs a method on some of the fleet's devices.

    Raises:
        RuntimeError: from any device; where gradients differ, before anything is timed.
    """
    names = list(setting.fleet.devices)
    port = next(PORTS)
    work = partial(_device, net, setting, reader, reference, devices, make, port)
    seen = together(net, [names.index(d) for d in devices], work, limit=900.0)
    start = max(s.start for s in seen)
    many = max(len(s.ends) for s in seen)
    ends = [max(s.ends[i] for s in seen if len(s.ends) > i) for i in range(many)]
    steps = tuple((b - a) * setting.scale for a, b in itertools.pairwise([start, *ends]))
    late, worst, given = (max(getattr(s, f) for s in seen) for f in ("late", "worst", "exchange"))
    sent = tuple(round(s.sent * BYTES) for s in seen)
    return Measured(steps, sent, late * setting.scale, worst, given * setting.scale)


def _device(
    net: Network,
    setting: Setting,
    reader: ImageFeatures,
    reference: Mapping[str, Tensor],
    devices: Sequence[str],
    make: Make,
    port: int,
    rank: int,
) -> _Seen:
    """In a process of its own, on its device."""
    address = net.address(list(setting.fleet.devices).index(devices[0]))
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = str(len(devices))
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    device = Device(setting.problem, devices[rank], setting.scale)
    job = make(setting, reader, device)
    worst = job.check(reference)
    if not worst <= CLOSE:
        raise RuntimeError(f"gradients are {worst:.2g} away from a single process's")
    gc.collect()
    gc.freeze()
    dist.barrier()
    net.pace()
    device.on = True
    before, start = net.sent(), time.perf_counter()
    ends = list(job.updates())
    dist.barrier()
    stop, sent = time.perf_counter(), net.sent() - before
    given = 0.0
    if (give := getattr(job, "exchange", None)) is not None:
        give()
        dist.barrier()
        given = time.perf_counter() - stop
    return _Seen(start, ends, stop, sent, device.late, worst, given)

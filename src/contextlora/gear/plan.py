"""The plan: who trains which tasks with which layers, as plain data that planners write and every device reads.

For every stage of the task graph, the tasks are divided among *groups* of devices that train independently (their
blocks are disjoint: no gradient traffic between groups). A group is

* trainers: one device ("single"), several with all layers each and the slices' gradients summed ("data"), or several
  with a contiguous part of the layers each ("pipeline"); they hold the layers from `cut` on;
* and, where `cut` > 0, someone for the frozen layers below it, which are forward-only: devices of their own that stream
  ahead ("streamed": each holds all of those layers and takes whole micro-batches), or the first trainer itself
  ("local"). With `cache`, what leaves `cut` is kept by the first trainer, and epochs after the first begin there.

A prefix too large for one device is no prefix of its own: it is the first stages of a pipeline.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from contextlora.errors import PlanError
from contextlora.gear.fleet import Fleet, Name
from contextlora.strict import Strict, validate

FORMAT = 1
Index = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Part(Strict):
    """A device and the units [start, stop) that it holds.

    Attributes:
        seconds: that it computes for one micro-batch, by which micro-batches are dealt.
    """

    device: Name
    start: Index
    stop: Index
    seconds: Amount = 0.0


Parts = Annotated[tuple[Part, ...], Field(strict=False)]


class Group(Strict):
    """Devices that train some tasks of a stage together.

    Attributes:
        tasks: what they train, in mixed batches.
        form: of the trainers.
        trainers: in the order of the layers for a pipeline.
        size: k, samples of a micro-batch.
        ahead: who runs the units below `cut`.
        prefix: those devices, for "streamed".
        cut: the boundary where frozen activations are handed over, at most the first unit with blocks; 0 for "none".
        cache: whether activations at `cut` are kept for later epochs.
    """

    tasks: Names
    form: Literal["single", "data", "pipeline"]
    trainers: Annotated[tuple[Part, ...], Field(strict=False, min_length=1)]
    size: Annotated[int, Field(ge=1)]
    ahead: Literal["none", "local", "streamed"] = "none"
    prefix: Parts = ()
    cut: Index = 0
    cache: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """All of them, the prefix's first."""
        return tuple(p.device for p in (*self.prefix, *self.trainers))


class DeviceUse(Strict):
    """What a device has to do in a stage.

    Attributes:
        memory: bytes, at the worst moment.
        busy: seconds of computing.
        sent: bytes that it sends.
    """

    memory: Amount
    busy: Amount
    sent: Amount


class Predicted(Strict):
    """What a group is expected to take.

    Attributes:
        step: seconds of one full step, prefix running ahead.
        cached_step: of one in a later epoch, where `cache` saves the prefix.
        seconds: of the whole stage.
        air: seconds that its transfers occupy a shared medium.
        devices: by name.
    """

    step: Amount
    cached_step: Amount
    seconds: Amount
    air: Amount
    devices: dict[str, DeviceUse]


class PlannedGroup(Strict):
    """A group and what it should take."""

    group: Group
    predicted: Predicted


class PlannedStage(Strict):
    """The groups that work side by side, and the seconds until the last of them is done and slices are exchanged."""

    groups: Annotated[tuple[PlannedGroup, ...], Field(strict=False, min_length=1)]
    exchange: Amount
    seconds: Amount


class Plan(Strict):
    """A whole training.

    Attributes:
        planner: who made it.
        fleet, model: names, for people.
        units: of the model.
        stages: one after another.
        seconds: of all of it.
        synthetic: fleet or profile were estimated.
    """

    format: int = FORMAT
    planner: str
    fleet: str
    model: str
    units: Annotated[int, Field(ge=3)]
    stages: Annotated[tuple[PlannedStage, ...], Field(strict=False, min_length=1)]
    seconds: Amount
    synthetic: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """All that it uses, in the order in which they first appear: their ranks."""
        return tuple(dict.fromkeys(d for s in self.stages for p in s.groups for d in p.group.devices))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan. Raises PlanError E405 for one that makes no sense or is none, ConfigError E103 for faults."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise PlanError("E405", f"no plan can be read: {e}", where=path) from None
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            text = f"a plan of format {data['format']!r}, and this version reads {FORMAT}; plan again"
            raise PlanError("E405", text, where=path)
        return validate(cls, data, path).checked(path)

    def checked(self, where: object = "", lowest: int | None = None) -> Plan:
        """Itself.

        Args:
            where: for the error.
            lowest: the first unit with blocks, where it is known.

        Raises:
            PlanError: E405 unless every group makes sense, every task trains once, and no device is in two groups of a
                stage.
        """
        lowest, trained = self.units - 1 if lowest is None else lowest, set[str]()
        for i, stage in enumerate(self.stages):
            busy = set[str]()
            for j, group in enumerate(p.group for p in stage.groups):
                wrong = _wrong(group, self.units, lowest)
                if twice := [t for n, t in enumerate(group.tasks) if t in trained or t in group.tasks[:n]]:
                    wrong = wrong or f"task '{twice[0]}' is trained twice"
                if shared := [d for d in group.devices if d in busy]:
                    wrong = wrong or f"device '{shared[0]}' works in two groups at once"
                if wrong:
                    place = f"stages.{i}.groups.{j}.group"
                    raise PlanError("E405", wrong, where=f"{where}, {place}" if where else place)
                trained.update(group.tasks)
                busy.update(group.devices)
        return self

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def check_group(group: Group, units: int, lowest: int, fleet: Fleet) -> None:
    """Raises PlanError E405 unless a group makes sense: every unit run once, on devices that exist, each used once."""
    unknown = [f"the fleet has no device '{d}'" for d in group.devices if d not in fleet.devices]
    if wrong := (unknown or [_wrong(group, units, lowest)])[0]:
        raise PlanError("E405", wrong, where=", ".join(group.tasks))


def _wrong(g: Group, units: int, lowest: int) -> str:
    if len(set(g.devices)) < len(g.devices):
        return "a device is used twice"
    if g.cut > lowest:
        return f"the prefix ends at unit {g.cut}, and blocks begin at {lowest}"
    if (g.ahead == "none") != (g.cut == 0) or (g.ahead == "streamed") != bool(g.prefix):
        return f"ahead: {g.ahead} does not go with cut {g.cut} and {len(g.prefix)} devices for it"
    if (g.form == "single") != (len(g.trainers) == 1):
        return f"form '{g.form}' with {len(g.trainers)} trainers"
    if g.cache and (g.form == "data" or g.ahead == "none"):
        return "a cache needs a prefix and one first trainer"
    if g.ahead == "local" and not g.cache:
        return "a local prefix without a cache is none"
    own = g.cut if g.prefix else 0  # where the trainers begin
    spans = [(p.start, p.stop) for p in g.trainers]
    if g.form == "data":
        if any(s != (own, units) for s in spans):
            return "with `data` every trainer holds all units above the prefix"
    elif not _contiguous(spans, own, units):
        return f"trainers' units {spans} do not run from {own} to {units}"
    if g.ahead == "local" and g.trainers[0].stop < g.cut:
        return "a local prefix ends within the first trainer"
    if any((p.start, p.stop) != (0, g.cut) for p in g.prefix):
        return "a streamed prefix holds units 0 to its cut on every device"
    return ""


def _contiguous(spans: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    ends = [start, *(b for _, b in spans)]
    return [a for a, _ in spans] == ends[:-1] and ends[-1] == stop and all(a < b for a, b in spans)


def deal(count: int, seconds: Sequence[float]) -> list[int]:
    """Deals `count` equal pieces to workers that take `seconds` each, so that the last is done soonest.

    One piece after another to whoever would finish it first, which is optimal for equal pieces; ties go to the earlier
    worker, so that every device deals alike.
    """
    dealt = [0] * len(seconds)
    heap = [(t, i) for i, t in enumerate(seconds)]
    heapq.heapify(heap)
    for _ in range(count):
        _, i = heap[0]
        dealt[i] += 1
        heapq.heapreplace(heap, (seconds[i] * (dealt[i] + 1), i))
    return dealt

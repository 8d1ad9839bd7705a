"""Every method with its best sensible setting, and what came of it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import rivals
from configurations import Configuration
from measure import Make, measure
from model import Setting
from ours import Planned
from testbed import Network
from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from contextlora.gear.cost import Problem, predict
from contextlora.gear.plan import Group, Part, Plan, PlannedGroup, PlannedStage
from contextlora.gear.planning import make_plan, paced
from contextlora.gear.simulate import simulate, simulated_seconds
from contextlora.models.inputs import ImageFeatures

SIZES = (1, 2, 4, 8)
LATE = 0.05  # of a step
Stages = Sequence[tuple[str, int, int]]


@dataclass(frozen=True)
class Method:
    """How a method runs on one configuration.

    Attributes:
        devices: that it uses, by rank.
        make: builds it on a device.
        how: its setting, in words.
        memory: bytes that each device would need.
        plan: where it is one.
    """

    devices: tuple[str, ...]
    make: Make
    how: str
    memory: Mapping[str, float]
    plan: Plan | None = None


@dataclass(frozen=True)
class Row:
    """One method on one configuration, in the real model's seconds and bytes.

    Attributes:
        network, rate: of the testbed; Mbit/s as measured.
        step, least, steps: median and minimum of so many updates.
        seconds: of all updates.
        gigabytes: sent by all devices, an update.
        predicted, simulated: seconds of all updates, by the planner's cost model and by the simulator; 0 for no plan.
        lacks: the device that has too little memory for it, and how much it would need; "" if all have enough.
        exchange: seconds, once, to give trained slices to all devices.
        step_ratio, ratio: to exact's step, and to all its updates; 0 where that was not measured.
        late: the most seconds that an emulated device was behind its profile.
        apart: the largest relative difference of gradients.
        failed: why there is no measurement.
    """

    configuration: str
    network: str
    rate: float
    method: str
    how: str
    step: float = 0.0
    least: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    gigabytes: float = 0.0
    predicted: float = 0.0
    simulated: float = 0.0
    lacks: str = ""
    exchange: float = 0.0
    step_ratio: float = 0.0
    ratio: float = 0.0
    late: float = 0.0
    apart: float = 0.0
    failed: str = ""


def run(
    name: str,
    net: Network,
    setting: Setting,
    reader: ImageFeatures,
    reference: Mapping[str, Tensor],
    configuration: Configuration,
) -> Row:
    """Measures one method."""
    method = METHODS[name](setting)
    rate = (setting.fleet.medium or next(iter(setting.fleet.links.values()))).rate / 1e6
    row = Row(configuration.name, net.how, rate, name, method.how, lacks=_lacks(setting.problem, method.memory))
    try:
        m = measure(net, setting, reader, reference, method.devices, method.make)
    except RuntimeError as e:
        print(e, file=sys.stderr)
        return replace(row, failed=str(e).strip())
    plan = method.plan
    return replace(
        row,
        step=m.step,
        least=min(m.steps),
        steps=len(m.steps),
        seconds=m.seconds,
        gigabytes=sum(m.sent) / len(m.steps) / 1e9,
        predicted=plan.seconds - plan.stages[0].exchange if plan else 0.0,
        simulated=simulated_seconds(setting.problem, plan) - plan.stages[0].exchange if plan else 0.0,
        exchange=m.exchange,
        late=m.late,
        apart=m.worst,
    )


def valid(row: Row) -> bool:
    """Whether emulated devices kept to their profiles: on a busy machine they fall behind, and rows mean nothing."""
    return row.late <= LATE * row.step


def compared(rows: Sequence[Row]) -> list[Row]:
    """Rows with their ratios to exact."""
    exact = next((r for r in rows if r.method == "exact" and not r.failed), None)
    if exact is None:
        return list(rows)
    return [replace(r, step_ratio=r.step / exact.step, ratio=r.seconds / exact.seconds) for r in rows]


def _lacks(problem: Problem, memory: Mapping[str, float]) -> str:
    for name, needed in memory.items():
        if needed > problem.fleet.devices[name].memory:
            return f"{name}: {needed / 1e9:.0f} of {problem.fleet.devices[name].memory / 1e9:.0f} GB"
    return ""


# --- ours ------------------------------------------------------------------------------------------------------------


def by_plan(plan: Plan) -> Method:
    """A plan carried out by the project's runtime."""
    memory = {d: u.memory for p in plan.stages[0].groups for d, u in p.predicted.devices.items()}
    make = lambda setting, reader, device: Planned(setting, reader, plan, device)  # noqa: E731
    return Method(plan.devices, make, "; ".join(_said(p.group) for p in plan.stages[0].groups), memory, plan)


def _said(g: Group) -> str:
    cuts = " ".join(f"{p.device}:{p.start}-{p.stop}" for p in g.trainers)
    ahead = {
        "none": "",
        "local": f", cached from {g.cut}",
        "streamed": f", {'+'.join(p.device for p in g.prefix)} ahead to {g.cut}",
    }
    kept = " (cached)" if g.cache and g.ahead == "streamed" else ""
    return f"{g.form} k={g.size} {cuts}{ahead[g.ahead]}{kept}"


def _planned(problem: Problem, group: Group) -> Plan:
    """A plan of one group, by hand."""
    stage = PlannedStage(
        groups=(PlannedGroup(group=paced(problem, group), predicted=predict(problem, group)),), exchange=0, seconds=0
    )
    seconds = stage.groups[0].predicted.seconds
    stage = stage.model_copy(update={"seconds": seconds})
    return Plan(
        planner="by hand", fleet=problem.fleet.name, model="", units=problem.units, stages=(stage,), seconds=seconds
    )


def _pipeline(problem: Problem, stages: Stages, k: int) -> Group:
    parts = tuple(Part(device=d, start=a, stop=b) for d, a, b in stages)
    return Group(tasks=tuple(problem.loads), form="pipeline", trainers=parts, size=k)


def _equal(setting: Setting) -> Group:
    """Equal cuts in the fleet's order, with the k that the simulator finds best."""
    p = setting.problem
    cuts = rivals.equal_cuts(p.units, list(p.fleet.devices))
    return min((_pipeline(p, cuts, k) for k in _sizes(setting)), key=lambda g: simulate(p, [g], 2).seconds)


def _best(setting: Setting) -> Group:
    """The best pipeline over all devices without a prefix: "our cuts"."""
    p, names = setting.problem, list(setting.fleet.devices)
    inner = itertools.combinations(range(1, p.units), len(names) - 1)
    groups = (
        _pipeline(p, list(zip(order, (0, *cut), (*cut, p.units), strict=True)), k)
        for cut in inner
        for order in itertools.permutations(names)
        for k in _sizes(setting)
    )
    return min(groups, key=lambda g: predict(p, g).seconds)


def _sizes(setting: Setting) -> list[int]:
    return [k for k in SIZES if setting.tasks * setting.batch % k == 0]


def _data(setting: Setting) -> Group:
    p = setting.problem
    everything = tuple(Part(device=d, start=0, stop=p.units) for d in p.fleet.devices)
    groups = (Group(tasks=tuple(p.loads), form="data", trainers=everything, size=k) for k in _sizes(setting))
    return min(groups, key=lambda g: predict(p, g).seconds)


# --- rivals ----------------------------------------------------------------------------------------------------------


def _alone(setting: Setting) -> Method:
    fastest = max(setting.fleet.devices, key=lambda d: setting.fleet.devices[d].speed or 1.0)
    memory = _whole(setting.problem, [fastest])
    return Method((fastest,), rivals.Alone, f"everything on {fastest}", memory)


def _ddp(by_speed: bool, setting: Setting) -> Method:
    counts = [len(s) for s in rivals.shares(setting, [None] * setting.tasks * setting.batch, by_speed)]  # type: ignore[list-item]
    how = f"shares {'/'.join(map(str, counts))}, one pass each, buckets of {rivals.BUCKET:.0f} MB"
    names = tuple(setting.fleet.devices)
    return Method(names, partial(rivals.Data, by_speed=by_speed), how, _whole(setting.problem, names))


def _whole(problem: Problem, devices: Sequence[str]) -> dict[str, float]:
    """Every device holds everything, and could pass its share sample by sample."""
    return {d: problem.memory(Part(device=d, start=0, stop=problem.units), list(problem.loads), 1, 1) for d in devices}


def _stock(
    kind: type[ScheduleGPipe] | type[Schedule1F1B], cuts: Callable[[Setting], Group], setting: Setting
) -> Method:
    g, p = cuts(setting), setting.problem
    stages = [(t.device, t.start, t.stop) for t in g.trainers]
    n, micro = len(stages), setting.tasks * setting.batch // g.size
    flying = [micro if kind is ScheduleGPipe else min(n - i, micro) for i in range(n)]
    memory = {t.device: p.memory(t, g.tasks, g.size, f) for t, f in zip(g.trainers, flying, strict=True)}
    return Method(
        tuple(d for d, *_ in stages), partial(rivals.Pipeline, kind=kind, stages=stages, k=g.size), _said(g), memory
    )


def _zero(stage: int, setting: Setting) -> Method:
    from zero import Zero

    ddp, n, problem = _ddp(True, setting), len(setting.fleet.devices), setting.problem
    frozen = sum(u.weights for u in problem.any_profile.units) * (1 - 1 / n) if stage == 3 else 0.0
    memory = {d: needed - frozen for d, needed in ddp.memory.items()}
    how = ddp.how.split(", buckets")[0] + (
        "; frozen weights on the wire are the thin model's: a lower bound" if stage == 3 else ""
    )
    return Method(ddp.devices, partial(Zero, stage=stage, by_speed=True), how, memory)


def _deepspeed_pipeline(setting: Setting) -> Method:
    from zero import Pipe

    p, names = setting.problem, list(setting.fleet.devices)
    counts = [p.units // len(names) + (i < p.units % len(names)) for i in range(len(names))]  # "uniform"
    ends = list(itertools.accumulate([0, *counts]))
    stages = [(d, a, b) for d, (a, b) in zip(names, itertools.pairwise(ends), strict=True)]
    g = min((_pipeline(p, stages, k) for k in _sizes(setting)), key=lambda g: simulate(p, [g], 2).seconds)
    stock = _stock(Schedule1F1B, lambda _: g, setting)
    return replace(stock, make=partial(Pipe, k=g.size))


def _jora(setting: Setting) -> Method:
    from jora import TensorParallel

    p, names = setting.problem, tuple(setting.fleet.devices)
    reserved = {d: p.fleet.devices[d].reserved for d in names}
    memory = {d: reserved[d] + (m - reserved[d]) / len(names) for d, m in _whole(p, names).items()}
    return Method(names, TensorParallel, "equal shares of every layer, one pass", memory)


METHODS: dict[str, Callable[[Setting], Method]] = {
    "exact": lambda s: by_plan(make_plan(s.problem, "exact")),
    "algorithm2": lambda s: by_plan(make_plan(s.problem, "algorithm2")),
    "our-runtime-equal": lambda s: by_plan(_planned(s.problem, _equal(s))),
    "our-runtime-data": lambda s: by_plan(_planned(s.problem, _data(s))),
    "one-device": _alone,
    "ddp": partial(_ddp, False),
    "ddp-by-speed": partial(_ddp, True),
    "gpipe": partial(_stock, ScheduleGPipe, _equal),
    "1f1b": partial(_stock, Schedule1F1B, _equal),
    "gpipe-our-cuts": partial(_stock, ScheduleGPipe, _best),
    "1f1b-our-cuts": partial(_stock, Schedule1F1B, _best),
    "deepspeed-zero-1": partial(_zero, 1),
    "deepspeed-zero-3": partial(_zero, 3),
    "deepspeed-pipeline": _deepspeed_pipeline,
    "jora": _jora,
}
OURS = ("exact", "algorithm2", "our-runtime-equal", "our-runtime-data")

"""Planners on fleets of 1 to 64 devices: their time, and their plans' seconds in the simulator.

    python benchmarks/gear/scaling.py [--csv FILE] [--figure FILE.svg] [--models NAME ...] [--devices N ...]

Profiles are synthetic, computed from the shapes of LLaVA-1.5-7B and -13B; so are the devices' speeds. Nothing is run
but planners and the simulator. The training is that of the vehicles' graph: three roots, then one task.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from contextlora.config import TrainConfig, select_layers
from contextlora.data.scenes import scenario_graph
from contextlora.errors import PlanError
from contextlora.gear.bound import least_seconds
from contextlora.gear.cost import Problem, exchange, fits, predict
from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import Group, Part, Plan, PlannedGroup, PlannedStage
from contextlora.gear.planning import SIZES, load_profile, make_plan
from contextlora.gear.simulate import simulated_seconds
from contextlora.gear.work import work_of

KINDS = [("agx", 1.6, 64), ("desk", 4.0, 24), *[("nx", 1.0, 16)] * 2, *[("nano", 0.4, 8)] * 4]  # speed, GB; repeated
NETWORKS = {
    "medium 300": {"medium": {"rate": "300 Mbit/s", "delay": "2 ms"}},
    "links 1000": {"rate": "1 Gbit/s", "delay": "0.3 ms"},
}
TRAIN = TrainConfig(epochs=2, batch_size=8, layers="top 1/2")
SAMPLES = 1200
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("llava-7b", "llava-13b")
Make = Callable[[Problem], Plan]


@dataclass(frozen=True)
class Row:
    """One planner on one fleet.

    Attributes:
        cpu: seconds of processor time that planning took, on one thread.
        model_seconds, simulated: of all updates; to hand the trained slices to all devices afterwards takes what it
            takes whatever the plan.
        used: devices of the plan.
        bound: seconds that no plan can take less than, see `gear.bound`.
        ratio: of simulated seconds to exact's.
        failed: why there is no plan.
    """

    model: str
    units: int
    network: str
    devices: int
    planner: str
    cpu: float = 0.0
    model_seconds: float = 0.0
    simulated: float = 0.0
    used: int = 0
    bound: float = 0.0
    ratio: float = 0.0
    failed: str = ""


def problem(model: str, count: int, network: str) -> Problem:
    """The training of `model` on the first `count` devices of an endless row of KINDS."""
    profile, graph = load_profile(model), scenario_graph("iov")
    kinds = itertools.islice(itertools.cycle(KINDS), count)
    devices = {
        f"{name}-{i}": {"memory": f"{gb} GB", "speed": speed, "reserved": "1.5 GB"}
        for i, (name, speed, gb) in enumerate(kinds)
    }
    net = NETWORKS[network]
    if "medium" not in net:
        net = {"links": [{"between": list(pair), **net} for pair in itertools.combinations(devices, 2)]}
    fleet = Fleet.from_dict({"name": f"{count} mixed", "synthetic": True, "devices": devices, **net})
    layers = select_layers(TRAIN.layers, len(profile.units) - 2)
    work = work_of(graph, TRAIN, dict.fromkeys(graph.names, SAMPLES), len(profile.units), layers)
    return Problem(fleet, dict.fromkeys(devices, profile), work)


# --- what people do without a planner --------------------------------------------------------------------------------


def data_parallel(p: Problem) -> Plan:
    """DDP on the slices: every device that holds all layers, shares by speed, and the best micro-batch."""
    every = [Part(device=d, start=0, stop=p.units) for d in p.fleet.devices]

    def group(tasks: tuple[str, ...], k: int) -> Group | None:
        able = [part for part in every if _fits_alone(p, part, tasks, k)]
        form = "data" if len(able) > 1 else "single"
        return Group(tasks=tasks, form=form, trainers=tuple(able), size=k) if able else None

    return _by_hand(p, "DDP by speed", group)


def equal_cuts(p: Problem) -> Plan:
    """GPipe's cuts: as many layers on every device, in the fleet's order, and the best micro-batch; our schedule."""
    names = list(p.fleet.devices)[: p.units]
    ends = [round(i * p.units / len(names)) for i in range(len(names) + 1)]
    parts = tuple(Part(device=d, start=a, stop=b) for d, (a, b) in zip(names, itertools.pairwise(ends), strict=True))
    form = "pipeline" if len(parts) > 1 else "single"
    return _by_hand(p, "equal cuts", lambda tasks, k: Group(tasks=tasks, form=form, trainers=parts, size=k))


def _fits_alone(p: Problem, part: Part, tasks: Sequence[str], k: int) -> bool:
    return p.memory(part, tasks, k, 1) <= p.fleet.devices[part.device].memory


def _by_hand(p: Problem, name: str, group: Callable[[tuple[str, ...], int], Group | None]) -> Plan:
    """A plan of one group for each stage, of all micro-batches' sizes the one that the cost model finds fastest."""
    stages = []
    for tasks in p.work.stages:
        names = tuple(t.name for t in tasks)
        groups = [g for k in SIZES if (g := group(names, k)) is not None]
        found = [(predict(p, g), g) for g in groups]
        able = [(f.seconds, i) for i, (f, _) in enumerate(found) if fits(p, f)]
        if not able:
            raise PlanError("E406", f"{name} does not fit the devices' memory", where=", ".join(names))
        predicted, best = found[min(able)[1]]
        given = exchange(p, names)
        planned = PlannedGroup(group=best, predicted=predicted)
        stages.append(PlannedStage(groups=(planned,), exchange=given, seconds=predicted.seconds + given))
    seconds = sum(s.seconds for s in stages)
    model = p.any_profile.model
    return Plan(planner=name, fleet=p.fleet.name, model=model, units=p.units, stages=stages, seconds=seconds)


PLANNERS: dict[str, Make] = {
    "exact": lambda p: make_plan(p, "exact"),
    "algorithm2": lambda p: make_plan(p, "algorithm2"),
    "DDP by speed": data_parallel,
    "equal cuts": equal_cuts,
}


# --- the table -------------------------------------------------------------------------------------------------------


def measured(model: str, count: int, network: str) -> Iterator[Row]:
    """All planners on one fleet."""
    p = problem(model, count, network)
    bound, exact = least_seconds(p, SIZES), 0.0
    for name, make in PLANNERS.items():
        row = Row(model, p.units, network, count, name, bound=bound)
        began = time.process_time()
        try:
            plan = make(p)
        except PlanError as e:
            yield Row(**{**asdict(row), "failed": f"{e.code}"})
            continue
        cpu, given = time.process_time() - began, sum(s.exchange for s in plan.stages)
        simulated = simulated_seconds(p, plan) - given
        exact = exact or simulated
        found = {"cpu": cpu, "model_seconds": plan.seconds - given, "simulated": simulated, "used": len(plan.devices)}
        yield Row(**{**asdict(row), **found, "ratio": simulated / exact})


def markdown(rows: Sequence[Row]) -> str:
    """The table for docs/results.md: a line for each fleet."""
    lines = [
        "| model, network | devices | exact: planned in CPU s | uses | simulated h | x the bound | algorithm2: CPU s"
        " | x exact | DDP by speed, x exact | equal cuts, x exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, same in itertools.groupby(rows, lambda r: (r.model, r.network, r.devices)):
        found = {r.planner: r for r in same}
        e, other = found["exact"], [found[n] for n in PLANNERS if n != "exact"]
        if e.failed:
            lines.append(f"| {e.model}, {e.network} | {e.devices} | {e.failed} | | | | | | | |")
            continue
        two, *rest = [f"{r.ratio:.2f}" if not r.failed else r.failed for r in other]
        time2 = "" if other[0].failed else f"{other[0].cpu:.1f}"
        first = f"| {e.model}, {e.network} | {e.devices} | {e.cpu:.1f} | {e.used} | {e.simulated / 3600:.2f}"
        lines.append(f"{first} | {e.simulated / e.bound:.2f} | {time2} | {two} | {' | '.join(rest)} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """The plans' hours over the number of devices, a panel for each model and network; dotted: no plan is below."""
    panels = list(dict.fromkeys((r.model, r.network) for r in rows))
    drawn = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [r for r in rows if (r.model, r.network) == panel and not r.failed]
        for (name, marker), colour in zip(zip(PLANNERS, "os^D", strict=True), ("C0", "C1", "C2", "C3"), strict=True):
            points = [(r.devices, r.simulated / 3600) for r in mine if r.planner == name]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=name)
        bound = [(r.devices, r.bound / 3600) for r in mine if r.planner == "exact"]
        axes.plot(*zip(*bound, strict=True), linestyle=":", color="#555", label="bound")
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="simulated hours", title=", ".join(panel))
        axes.set_xticks(sorted({r.devices for r in mine}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    drawn.axes[0].legend(fontsize=8)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Plans, simulates, and prints the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gear/scaling.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--devices", nargs="+", type=int, metavar="N", default=COUNTS, help="up to 64")
    parser.add_argument("--csv", type=Path, help="also write a row for each planner and fleet here")
    parser.add_argument("--figure", type=Path, help="also draw it here")
    asked = parser.parse_args(arguments)
    rows: list[Row] = []
    for model, network, count in itertools.product(asked.models, asked.networks, asked.devices):
        print(f"{model}, {network}, {count} devices ...", file=sys.stderr, flush=True)
        rows += measured(model, count, network)
        if asked.csv:
            with asked.csv.open("w", newline="") as f:
                table = csv.DictWriter(f, list(asdict(rows[0])))
                table.writeheader()
                table.writerows(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows
                )
    print(markdown(rows))
    if asked.figure:
        figure(rows).savefig(asked.figure)


if __name__ == "__main__":
    main()

"""Small problems for tests of the planner: profiles by hand, fleets of a few devices."""

from __future__ import annotations

import random

from contextlora.gear.cost import Problem
from contextlora.gear.fleet import Fleet
from contextlora.gear.profile import Profile
from contextlora.gear.work import TaskLoad, Work


def profile(units=6, *, seed=0, cut=1e6, batches=(1, 2, 4), name="tiny"):
    """Times that grow less than the batch does, weights and saved bytes of a few MB."""
    r = random.Random(seed)
    made = []
    for i in range(units):
        inner = 0 < i < units - 1
        forward = r.uniform(0.5, 1.5)
        f = [round(forward * (k + 0.5), 6) for k in batches]
        made.append(
            {
                "name": "inputs" if i == 0 else "head" if i == units - 1 else f"layer {i - 1}",
                "weights": round(r.uniform(5, 15)) * 1e6,
                "saved": round(r.uniform(1, 3)) * 1e6,
                "width": 1000 if inner else 0,
                "forward": f,
                "input_grad": [round(1.1 * x, 6) for x in f] if i else [0.0 for _ in f],
                "weight_grad": [round(0.2 * x, 6) for x in f] if inner else [0.0 for _ in f],
            }
        )
    return Profile.model_validate(
        {"model": name, "dtype": "float32", "tokens": 16, "cut": cut, "batches": batches, "units": made}
    ).checked()


def fleet(devices=3, *, seed=0, memory=(60, 200), shared=True, rate=(2e6, 40e6)):
    """Devices of different speeds and memories on one medium, or with a link for each pair."""
    r = random.Random(seed)
    names = [f"d{i}" for i in range(devices)]
    data = {
        "name": "small",
        "devices": {
            n: {"memory": round(r.uniform(*memory)) * 1e6, "speed": r.choice([1.0, 0.5, 0.25, 1.0])} for n in names
        },
    }
    if shared:
        data["medium"] = {"rate": r.uniform(*rate), "delay": r.choice([0.0, 0.01]), "relay": r.random() < 0.3}
    else:
        data["links"] = [
            {"between": [a, b], "rate": r.uniform(*rate), "delay": r.choice([0.0, 0.01])}
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        ]
    return Fleet.from_dict(data)


def problem(devices=3, units=6, tasks=2, lowest=2, *, seed=0, shared=True, memory=(60, 200), epochs=2, batch=4):
    """A problem of one stage of `tasks` tasks."""
    r = random.Random(seed)
    loads = tuple(TaskLoad(f"t{i}", r.choice([8, 12, 16]), 4, 4 + 4 * r.randint(0, 2)) for i in range(tasks))
    f = fleet(devices, seed=seed, shared=shared, memory=memory)
    p = profile(units, seed=seed)
    return Problem(f, dict.fromkeys(f.devices, p), Work((loads,), batch, epochs, lowest, units - 2))

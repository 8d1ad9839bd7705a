"""The pipeline that was measured: two gloo processes, computes padded to fixed times, about 96 Mbit/s half-duplex.

Step times in ms of eight micro-batches of 262,144 bytes, the best of four. Three schedules are ours; the fourth is
three micro-batches in flight with PyTorch's own placement of receives: most a computation early, the last ones late.
"""

from __future__ import annotations

import groups

from contextlora.gear.cost import Problem
from contextlora.gear.fleet import Fleet
from contextlora.gear.profile import Profile
from contextlora.gear.schedule import Kind, Op, Schedule
from contextlora.gear.work import TaskLoad, Work

MICRO, BYTES = 8, 262144
OURS = {  # (delay in ms, what): (measured, forward-only first stage, hoist, extra in flight)
    (0, "stock 1F1B"): (1353.3, False, 0, 0),
    (0, "frozen prefix"): (609.6, True, 1, 0),
    (5, "stock 1F1B"): (1462.9, False, 0, 0),
    (5, "three in flight, late receives"): (1377.0, False, 0, 1),
    (5, "frozen prefix"): (625.2, True, 1, 0),
}
THREE_IN_FLIGHT = {0: 1090.6, 5: 1125.9}
GROUP = groups.group("pipeline", ("d0", 0, 2), ("d1", 2, 4), size=1, tasks=("t0",))


def placed_by_torch():
    """`_add_send_recv` of torch 2.13 on 0F0,0F1,0F2,0B0,0F3,... and 1F0,1B0,1F1,1B1,..."""
    first = "F0 SEND_F0 F1 SEND_F1 "
    first += " ".join(f"RECV_B{b} F{b + 2} SEND_F{b + 2} B{b}" for b in range(6))
    first += " RECV_B6 B6 RECV_B7 B7"
    second = "RECV_F0 F0 RECV_F1 B0 SEND_B0 "
    second += " ".join(f"RECV_F{m + 1} F{m} B{m} SEND_B{m}" for m in range(1, 7)) + " F7 B7 SEND_B7"
    lists = {"d0": ("d1", first), "d1": ("d0", second)}
    return Schedule(
        GROUP, (True,) * MICRO, {d: tuple(_op(x, peer) for x in t.split()) for d, (peer, t) in lists.items()}
    )


def _op(text, peer):
    return Op(Kind(text.rstrip("0123456789")), int(text[len(text.rstrip("0123456789")) :]), peer)


def problem(delay_ms, frozen):
    """Two devices, two units on each: 60 + 70 ms and 30 + 35 ms a micro-batch."""
    rate = 95.8e6 if delay_ms == 0 else 96.7e6  # as iperf found it
    medium = {"rate": rate, "delay": delay_ms / 1e3 + 2e-4}
    fleet = Fleet.from_dict({"devices": {"d0": {"memory": 1e9}, "d1": {"memory": 1e9}}, "medium": medium})
    profiles = {"d0": _profile([0.03, 0.03], [0.0, 0.07]), "d1": _profile([0.015, 0.015], [0.0175, 0.0175])}
    return Problem(fleet, profiles, Work(((TaskLoad("t0", MICRO, 1, 1),),), MICRO, 1, 2 if frozen else 1, 2))


def _profile(forward, backward):
    units = [
        {
            "name": name,
            "weights": 1,
            "saved": 1,
            "width": int(0 < i < 3),
            "forward": [forward[i % 2]],
            "input_grad": [backward[i % 2]],
            "weight_grad": [0.0],
        }
        for i, name in enumerate(["inputs", "layer 0", "layer 1", "head"])
    ]
    return Profile.model_validate(
        {"model": "padded", "dtype": "float32", "tokens": 128, "cut": BYTES, "batches": [1], "units": units}
    )

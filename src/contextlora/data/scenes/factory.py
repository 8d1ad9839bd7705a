"""Intelligent factory: helmets and activities, the risk that follows from both, the response to the risk (Fig. 5b)."""

from __future__ import annotations

from typing import Any

from numpy.random import Generator

from contextlora.data.scenes.draw import pick
from contextlora.graph import Task

HELMETS = ("all workers", "some workers", "nobody")
ACTIVITIES = ("welding", "driving a forklift", "climbing a ladder", "lifting a load")

# Risk by activities (rows) and helmets (columns as HELMETS).
RISK: dict[tuple[str, ...], tuple[str, str, str]] = {
    # activities                                       all         some        nobody
    ("welding",): ("low", "low", "moderate"),
    ("driving a forklift",): ("low", "low", "moderate"),
    ("climbing a ladder",): ("low", "moderate", "high"),
    ("lifting a load",): ("moderate", "high", "extreme"),
    ("welding", "driving a forklift"): ("low", "moderate", "moderate"),
    ("welding", "climbing a ladder"): ("moderate", "moderate", "high"),
    ("welding", "lifting a load"): ("moderate", "high", "extreme"),
    ("driving a forklift", "climbing a ladder"): ("moderate", "high", "extreme"),
    ("driving a forklift", "lifting a load"): ("high", "extreme", "extreme"),
    ("climbing a ladder", "lifting a load"): ("high", "extreme", "extreme"),
}
RESPONSE: dict[str, tuple[str, ...]] = {
    "low": ("keep working",),
    "moderate": ("keep working", "warn the crew"),
    "high": ("warn the crew", "call a supervisor"),
    "extreme": ("call a supervisor", "stop the work"),
}
TASKS: dict[str, Task] = {
    "helmets": Task(question="Who is wearing a safety helmet?", options=HELMETS),
    "activities": Task(question="What are the workers doing?", options=ACTIVITIES, choose=2),
    "risk": Task(
        question="How high is the risk of an accident?",
        options=("low", "moderate", "high", "extreme"),
        after=("helmets", "activities"),
    ),
    "response": Task(
        question="What should the shift leader do?",
        options=("keep working", "warn the crew", "call a supervisor", "stop the work"),
        after=("risk",),
        choose=2,
    ),
}


def risk(helmets: str, activities: tuple[str, ...]) -> str:
    """The risk for these facts; activities in the order of ACTIVITIES."""
    return RISK[activities][HELMETS.index(helmets)]


def facts(rng: Generator) -> dict[str, Any]:
    """Draws what is true in one picture."""
    done = rng.permutation(len(ACTIVITIES))[: int(rng.integers(1, 3))]
    return {"helmets": pick(rng, HELMETS, (0.36, 0.34, 0.3)), "activities": [ACTIVITIES[i] for i in sorted(done)]}


def answers(f: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The key to every question."""
    level = risk(f["helmets"], tuple(f["activities"]))
    return {
        "helmets": (f["helmets"],),
        "activities": tuple(f["activities"]),
        "risk": (level,),
        "response": RESPONSE[level],
    }

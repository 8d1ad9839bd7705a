"""Smart city: a watching camera's view of a place, an event and a crowd, and the response to the last two (Fig. 5c)."""

from __future__ import annotations

from typing import Any

from numpy.random import Generator

from contextlora.data.scenes.draw import pick
from contextlora.graph import Task

PLACE = ("street", "crossroads", "park", "square")
EVENT = ("nothing", "fire", "car crash", "flood", "fallen tree")
DENSITY = ("sparse", "busy", "crowded")

# Response by event (rows) and density (columns as DENSITY).
RESPONSE: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # event             sparse                  busy                                      crowded
    "nothing": (("no action",), ("no action",), ("direct traffic",)),
    "fire": (("send firefighters",), ("send firefighters", "clear the area"), ("send firefighters", "clear the area")),
    "car crash": (("send an ambulance",), ("send an ambulance",), ("send an ambulance", "direct traffic")),
    "flood": (("close the road",), ("close the road", "direct traffic"), ("close the road", "clear the area")),
    "fallen tree": (("no action",), ("close the road",), ("close the road", "direct traffic")),
}
TASKS: dict[str, Task] = {
    "place": Task(question="What kind of place is this?", options=PLACE),
    "event": Task(question="What unusual event can be seen?", options=EVENT),
    "density": Task(question="How dense is the flow of people and cars?", options=DENSITY),
    "response": Task(
        question="What should the city's control room do?",
        options=(
            "no action",
            "direct traffic",
            "send firefighters",
            "send an ambulance",
            "close the road",
            "clear the area",
        ),
        after=("event", "density"),
        choose=2,
    ),
}


def response(event: str, density: str) -> tuple[str, ...]:
    """The response to these facts."""
    return RESPONSE[event][DENSITY.index(density)]


def facts(rng: Generator) -> dict[str, Any]:
    """Draws what is true in one picture."""
    return {
        "place": pick(rng, PLACE),
        "event": pick(rng, EVENT, (0.24, 0.19, 0.19, 0.19, 0.19)),
        "density": pick(rng, DENSITY, (0.34, 0.33, 0.33)),
    }


def answers(f: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The key to every question."""
    return {name: (f[name],) for name in ("place", "event", "density")} | {
        "response": response(f["event"], f["density"])
    }

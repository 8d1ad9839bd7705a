"""Internet of Vehicles: what a driver sees, and the strategy that follows (ContextLoRA section V, Fig. 5a).

One picture carries all facts; the variants with six and eight tasks, and with two weakly related roots, ask different
questions about the same pictures.
"""

from __future__ import annotations

from typing import Any

from numpy.random import Generator

from contextlora.data.scenes.draw import pick
from contextlora.graph import Task

VEHICLES = ("no vehicles", "light traffic", "heavy traffic", "stopped truck")
WEATHER = ("clear", "rain", "snow", "fog")
ROAD = ("normal", "wet", "broken", "narrowed")
LIGHT = ("daylight", "dusk", "night")
PEDESTRIANS = ("nobody", "at the roadside", "crossing")
SIGN = ("triangle", "circle", "square")

# Driving strategy by vehicles and weather (rows) and road (columns; a narrowed road outweighs its surface).
STRATEGY: dict[tuple[str, str], tuple[str, str, str, str]] = {
    # vehicles, weather          normal           wet              broken         narrowed
    ("no vehicles", "clear"): ("keep speed", "keep speed", "change lane", "slow down"),
    ("no vehicles", "rain"): ("keep speed", "slow down", "change lane", "slow down"),
    ("no vehicles", "snow"): ("keep speed", "slow down", "slow down", "slow down"),
    ("no vehicles", "fog"): ("slow down", "slow down", "slow down", "stop"),
    ("light traffic", "clear"): ("keep speed", "keep distance", "change lane", "keep distance"),
    ("light traffic", "rain"): ("keep speed", "keep distance", "keep distance", "slow down"),
    ("light traffic", "snow"): ("keep distance", "keep distance", "slow down", "slow down"),
    ("light traffic", "fog"): ("keep distance", "slow down", "slow down", "stop"),
    ("heavy traffic", "clear"): ("keep distance", "keep distance", "keep distance", "slow down"),
    ("heavy traffic", "rain"): ("keep distance", "keep distance", "slow down", "slow down"),
    ("heavy traffic", "snow"): ("keep distance", "slow down", "slow down", "stop"),
    ("heavy traffic", "fog"): ("slow down", "slow down", "stop", "stop"),
    ("stopped truck", "clear"): ("change lane", "change lane", "change lane", "stop"),
    ("stopped truck", "rain"): ("change lane", "change lane", "stop", "stop"),
    ("stopped truck", "snow"): ("change lane", "stop", "stop", "stop"),
    ("stopped truck", "fog"): ("stop", "stop", "stop", "stop"),
}
# Headlights by light (rows) and weather (columns as WEATHER).
HEADLIGHTS: dict[str, tuple[str, str, str, str]] = {
    "daylight": ("off", "low beam", "low beam", "fog lamps"),
    "dusk": ("off", "low beam", "fog lamps", "fog lamps"),
    "night": ("high beam", "low beam", "high beam", "fog lamps"),
}
# Braking by strategy (rows) and pedestrians (columns as PEDESTRIANS).
BRAKE: dict[str, tuple[str, str, str]] = {
    "keep speed": ("no braking", "ready to brake", "brake hard"),
    "keep distance": ("ready to brake", "ready to brake", "brake gently"),
    "change lane": ("no braking", "no braking", "brake hard"),
    "slow down": ("brake gently", "brake gently", "brake hard"),
    "stop": ("brake gently", "brake hard", "brake hard"),
}


def strategy(vehicles: str, weather: str, road: tuple[str, ...]) -> str:
    """The driving strategy for these facts."""
    column = max(ROAD.index(r) for r in road)
    return STRATEGY[vehicles, weather][column]


def headlights(light: str, weather: str) -> str:
    """Which headlights to use."""
    return HEADLIGHTS[light][WEATHER.index(weather)]


def brake(pedestrians: str, plan: str) -> str:
    """How to brake now, given the strategy chosen before."""
    return BRAKE[plan][PEDESTRIANS.index(pedestrians)]


def _strategy_task(*after: str) -> Task:
    question = "Taking all this into account, what should the driver do?"
    return Task(
        question=question, options=("keep speed", "keep distance", "slow down", "change lane", "stop"), after=after
    )


_ROOTS = {
    "vehicles": Task(question="What is the traffic situation on the road?", options=VEHICLES),
    "weather": Task(question="What is the weather like?", options=WEATHER),
    "road": Task(question="What is the condition of the road?", options=ROAD, choose=2),
}
_STRATEGY = {"strategy": _strategy_task("vehicles", "weather", "road")}
_SIX = {
    **_ROOTS,
    "light": Task(question="What time of day is it?", options=LIGHT),
    "headlights": Task(
        question="Which headlights should the driver use?",
        options=("off", "low beam", "high beam", "fog lamps"),
        after=("weather", "light"),
    ),
    **_STRATEGY,
}
_EIGHT = {
    **_SIX,
    "pedestrians": Task(question="Where are the pedestrians?", options=PEDESTRIANS),
    "brake": Task(
        question="How should the driver use the brake now?",
        options=("no braking", "ready to brake", "brake gently", "brake hard"),
        after=("pedestrians", "strategy"),
    ),
}
# Vehicles and weather still decide the strategy, but the graph only offers it two questions that hardly do.
_WEAK = {
    "light": _SIX["light"],
    "sign": Task(question="What shape is the road sign?", options=SIGN),
    "road": _ROOTS["road"],
    "strategy": _strategy_task("light", "sign", "road"),
}
TASKS: dict[str, dict[str, Task]] = {
    "iov": {**_ROOTS, **_STRATEGY},
    "iov-six": _SIX,
    "iov-eight": _EIGHT,
    "iov-weak": _WEAK,
}


def facts(rng: Generator) -> dict[str, Any]:
    """Draws what is true in one picture."""
    surface, narrowed = pick(rng, ("dry", "wet", "broken"), (0.42, 0.3, 0.28)), bool(rng.random() < 0.36)
    road = [*([surface] if surface != "dry" else []), *(["narrowed"] if narrowed else [])] or ["normal"]
    return {
        "vehicles": pick(rng, VEHICLES, (0.27, 0.28, 0.22, 0.23)),
        "weather": pick(rng, WEATHER, (0.3, 0.26, 0.22, 0.22)),
        "road": road,
        "light": pick(rng, LIGHT, (0.42, 0.26, 0.32)),
        "pedestrians": pick(rng, PEDESTRIANS, (0.36, 0.32, 0.32)),
        # a narrowed road is announced a little more often by a triangle: the weak relation of iov-weak
        "sign": pick(rng, SIGN, (0.46, 0.27, 0.27) if narrowed else (0.3, 0.35, 0.35)),
    }


def answers(f: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The key to every question a variant may ask."""
    plan = strategy(f["vehicles"], f["weather"], tuple(f["road"]))
    roots = {name: (f[name],) for name in ("vehicles", "weather", "light", "pedestrians", "sign")}
    return {
        **roots,
        "road": tuple(f["road"]),
        "strategy": (plan,),
        "headlights": (headlights(f["light"], f["weather"]),),
        "brake": (brake(f["pedestrians"], plan),),
    }

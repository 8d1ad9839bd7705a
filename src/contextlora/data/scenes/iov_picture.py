"""What the driver sees: sky, road, house, sign, traffic and pedestrians in one perspective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.random import Generator
from PIL import Image

from contextlora.data.scenes.draw import (
    PAINTS,
    WORLD,
    Canvas,
    Colour,
    Look,
    building,
    mix,
    person,
    photograph,
    pick,
    shade,
    tree,
    vary,
)

_SKY: dict[tuple[str, bool], tuple[Colour, Colour]] = {  # light, clear sky: top and bottom
    ("daylight", True): ((84, 146, 220), (196, 222, 240)),
    ("daylight", False): ((150, 158, 168), (206, 210, 214)),
    ("dusk", True): ((92, 92, 150), (250, 176, 120)),
    ("dusk", False): ((112, 106, 122), (206, 172, 156)),
    ("night", True): ((22, 28, 62), (70, 78, 120)),
    ("night", False): ((44, 48, 60), (84, 88, 100)),
}
_DIM = {"daylight": (1.0, 1.0, 1.0), "dusk": (0.84, 0.74, 0.72), "night": (0.56, 0.58, 0.7)}
_HOUSES: tuple[Colour, ...] = ((178, 52, 44), (62, 104, 182), (232, 192, 72), (238, 236, 230), (120, 130, 110))


_Light = tuple[float, float, float, Colour]  # x, y, radius, colour
_Thing = tuple[float, Callable[[Canvas], None]]  # depth, what draws it


@dataclass(frozen=True)
class _View:
    """The road in perspective: u runs across it (edges at -1 and 1), t from the horizon (0) to the camera (1)."""

    horizon: float
    vanish: float
    foot: float
    half: float
    bend: float

    def at(self, u: float, t: float) -> tuple[float, float]:
        x = self.vanish + t * (self.foot - self.vanish + u * self.half) + self.bend * t * (1 - t)
        return x, self.horizon + t * (WORLD - self.horizon)


def paint(rng: Generator, f: dict[str, Any]) -> Image.Image:
    """Draws the facts as a 224 x 224 picture."""
    c, lights = Canvas(), list[_Light]()
    view = _View(
        rng.uniform(92, 118),
        128 + rng.uniform(-30, 30),
        128 + rng.uniform(-24, 24),
        rng.uniform(96, 116),
        rng.uniform(-36, 36),
    )
    _surroundings(c, rng, f, view)
    _roadway(c, rng, f, view)
    _house(c, rng, view, lights)
    closed = _narrow(c, rng, view, lights) if "narrowed" in f["road"] else 0
    _sign(c, rng, f["sign"], view)
    things = [*_traffic(rng, f["vehicles"], view, closed, lights), *_walkers(rng, f["pedestrians"], view)]
    for _, draw in sorted(things, key=lambda thing: thing[0]):
        draw(c)
    if rng.random() < 0.4:  # the driver's own bonnet
        c.oval(view.foot, WORLD + 14, rng.uniform(90, 130), rng.uniform(26, 44), shade(pick(rng, PAINTS), 0.6))
    c.dim(_DIM[f["light"]])
    if f["light"] != "daylight":
        for x, y, r, colour in lights:
            c.glow(x, y, r, colour, 40 if f["light"] == "night" else 22)
    _air(c, rng, f, view)
    return photograph(rng, c)


def _surroundings(c: Canvas, rng: Generator, f: dict[str, Any], v: _View) -> None:
    clear, snow = f["weather"] == "clear", f["weather"] == "snow"
    top, low = _SKY[f["light"], clear and rng.random() < 0.55]
    c.gradient(vary(rng, top), vary(rng, low), 0, v.horizon)
    white = rng.random() < (0.6 if snow else 0.22)  # snow may lie without falling, and fall without lying
    grass = (226, 230, 236) if white else pick(rng, ((96, 130, 70), (130, 132, 80), (150, 132, 96), (84, 108, 66)))
    c.gradient(vary(rng, shade(grass, 0.9)), vary(rng, grass), v.horizon, WORLD)
    if clear:
        for _ in range(int(rng.integers(0, 4))):
            x, y = rng.uniform(0, WORLD), rng.uniform(20, v.horizon - 20)
            for _ in range(4):
                c.oval(
                    x + rng.uniform(-16, 16),
                    y + rng.uniform(-4, 4),
                    rng.uniform(8, 18),
                    rng.uniform(4, 7),
                    (255, 255, 255, 110),
                )
    for _ in range(int(rng.integers(4, 9))):
        x, w = rng.uniform(-10, WORLD), rng.uniform(14, 40)
        wall = mix(vary(rng, pick(rng, ((150, 140, 130), (120, 124, 134), (172, 156, 140))), 20), low, 0.3)
        building(c, rng, x, v.horizon + 3, w, rng.uniform(14, 62), wall, 0.5 if f["light"] == "night" else 0.05)
    for _ in range(int(rng.integers(3, 9))):
        u, t = pick(rng, (-1, 1)) * rng.uniform(1.6, 4.5), rng.uniform(0.06, 0.3)
        leaves = (
            (206, 214, 222)
            if white and rng.random() < 0.6
            else pick(rng, ((52, 96, 50), (80, 112, 54), (150, 110, 50)))
        )
        tree(c, rng, *v.at(u, t), 20 + 150 * t, leaves)


def _roadway(c: Canvas, rng: Generator, f: dict[str, Any], v: _View) -> None:
    wet, broken = "wet" in f["road"], "broken" in f["road"]
    steps = [i / 12 for i in range(13)]
    asphalt = vary(rng, pick(rng, ((118, 116, 114), (98, 98, 102), (136, 130, 122))), 10)
    if wet:
        asphalt = shade(asphalt, 0.5)
    for width, colour in ((1.34, vary(rng, (168, 160, 150), 12)), (1.0, asphalt)):
        c.poly([v.at(-width, t) for t in steps] + [v.at(width, t) for t in reversed(steps)], colour)
    paint_ = vary(rng, pick(rng, ((232, 232, 226), (232, 232, 226), (226, 196, 90))), 8)
    for edge in (-0.96, 0.96):
        c.poly(
            [v.at(edge - 0.015, t) for t in steps] + [v.at(edge + 0.015, t) for t in reversed(steps)], (*paint_, 190)
        )
    shift = rng.uniform(0, 0.1)
    for lane in (-0.33, 0.33):
        for i in range(1, 9):
            t0 = (i / 9) ** 2 + shift
            t1 = min(1.0, t0 * 1.22)
            c.poly(
                [v.at(lane - 0.018, t0), v.at(lane + 0.018, t0), v.at(lane + 0.018, t1), v.at(lane - 0.018, t1)],
                (*paint_, 210),
            )
    if f["pedestrians"] == "crossing" or rng.random() < 0.25:
        t0 = rng.uniform(0.62, 0.72)
        for i in range(9):
            u = -0.92 + i * 0.21
            c.poly([v.at(u, t0), v.at(u + 0.11, t0), v.at(u + 0.11, t0 + 0.1), v.at(u, t0 + 0.1)], (*paint_, 180))
    for _ in range(int(rng.integers(0, 4))):  # old patches: neither wet nor broken
        u, t = rng.uniform(-0.8, 0.6), rng.uniform(0.25, 0.9)
        c.poly(
            [v.at(u, t), v.at(u + 0.3, t), v.at(u + 0.32, t + 0.1), v.at(u, t + 0.1)],
            (*shade(asphalt, rng.uniform(0.86, 1.12)), 200),
        )
    if wet:
        _wet(c, rng, f, v)
    if broken:
        _broken(c, rng, asphalt, v)


def _wet(c: Canvas, rng: Generator, f: dict[str, Any], v: _View) -> None:
    sky = mix(_SKY[f["light"], f["weather"] == "clear"][1], (255, 255, 255), 0.25)
    for t in (0.2, 0.4, 0.6):  # the sheen
        c.poly([v.at(-1, t), v.at(1, t), v.at(1, 1), v.at(-1, 1)], (*sky, 34))
    for _ in range(int(rng.integers(10, 18))):  # upright reflections
        x, y = v.at(rng.uniform(-0.9, 0.9), rng.uniform(0.1, 0.7))
        c.box(x, y, rng.uniform(3, 11), rng.uniform(20, 76), (*sky, int(rng.integers(50, 100))), 2)
    for _ in range(int(rng.integers(6, 11))):
        t = rng.uniform(0.1, 0.94) ** 0.5  # mostly near
        x, y = v.at(rng.uniform(-0.9, 0.9), t)
        r = rng.uniform(28, 58) * t
        c.oval(x, y, r, 0.32 * r, (*sky, 205))
        c.oval(x + 0.2 * r, y + 0.06 * r, 0.55 * r, 0.14 * r, (255, 255, 255, 70))


def _broken(c: Canvas, rng: Generator, asphalt: Colour, v: _View) -> None:
    for _ in range(int(rng.integers(8, 14))):
        t = rng.uniform(0.1, 0.96) ** 0.5  # mostly near
        x, y = v.at(rng.uniform(-0.85, 0.85), t)
        r = rng.uniform(16, 32) * t
        for _ in range(3):
            c.oval(x + rng.uniform(-0.5, 0.5) * r, y + rng.uniform(-0.16, 0.16) * r, r, 0.42 * r, shade(asphalt, 1.25))
        c.oval(x, y, 0.95 * r, 0.36 * r, shade(asphalt, 0.4))
        c.oval(x, y + 0.08 * r, 0.6 * r, 0.2 * r, (84, 66, 48))
    for _ in range(int(rng.integers(4, 8))):
        t, u = rng.uniform(0.25, 0.9), rng.uniform(-0.8, 0.8)
        crack = [v.at(u, t)]
        for _ in range(5):
            u, t = u + rng.uniform(-0.13, 0.13), min(1.0, t + rng.uniform(0.0, 0.06))
            crack.append(v.at(u, t))
        c.line(crack, shade(asphalt, 0.45), 0.6 + 1.6 * t)


def _house(c: Canvas, rng: Generator, v: _View, lights: list[_Light]) -> None:
    x, y = v.at(-rng.uniform(2.2, 2.7), 0.28)
    x, w, h = max(x - 24, rng.uniform(8, 20)), rng.uniform(60, 72), rng.uniform(46, 58)
    wall = vary(rng, pick(rng, _HOUSES), 14)
    c.box(x, y - h, w, h, wall)
    roof = shade(wall, rng.uniform(0.55, 0.8))
    c.poly([(x - 5, y - h), (x + w + 5, y - h), (x + w * 0.72, y - h * 1.5), (x + w * 0.28, y - h * 1.5)], roof)
    for i in range(3):
        c.box(x + (0.12 + 0.3 * i) * w, y - 0.78 * h, 0.16 * w, 0.26 * h, (74, 86, 100))
        if rng.random() < 0.4:
            lights.append((x + (0.2 + 0.3 * i) * w, y - 0.65 * h, 0.14 * w, (255, 214, 130)))
    c.box(x + 0.44 * w, y - 0.4 * h, 0.14 * w, 0.4 * h, shade(roof, 0.7))


def _sign(c: Canvas, rng: Generator, shape: str, v: _View) -> None:
    x, y = v.at(rng.uniform(1.22, 1.4), rng.uniform(0.4, 0.5))
    x, r, top = min(x, 226), rng.uniform(18, 22), y - rng.uniform(56, 68)
    c.line([(x, y), (x, top)], (122, 124, 128), 2.4)
    rim, face = pick(
        rng, (((196, 34, 36), (240, 238, 232)), ((36, 76, 160), (230, 236, 244)), ((40, 40, 40), (240, 200, 56)))
    )
    for scale, colour in ((1.0, rim), (0.7, face)):
        s = r * scale
        if shape == "triangle":
            c.poly([(x - s, top + 0.72 * s), (x + s, top + 0.72 * s), (x, top - 1.02 * s)], colour)
        elif shape == "circle":
            c.oval(x, top, 0.95 * s, 0.95 * s, colour)
        else:
            c.box(x - 0.86 * s, top - 0.86 * s, 1.72 * s, 1.72 * s, colour)
    c.box(x - 1.4, top - 0.2 * r, 2.8, 0.5 * r, (40, 40, 44))


def _narrow(c: Canvas, rng: Generator, v: _View, lights: list[_Light]) -> int:
    """Barriers that close one outer lane. Returns which: -1 left, 1 right."""
    side = pick(rng, (-1, 1))
    start = rng.uniform(0.2, 0.3)
    for i in range(5):
        t = start + 0.12 * i
        x, y = v.at(side * (0.34 + 0.05 * i), t)
        w, h = 68 * t, 28 * t
        c.box(x - w / 2, y - 1.9 * h, w, h, (240, 238, 234))
        for k in range(4):
            a = x - w / 2 + k * w / 4
            c.poly(
                [(a, y - 0.9 * h), (a + w / 8, y - 0.9 * h), (a + w / 4, y - 1.9 * h), (a + w / 8, y - 1.9 * h)],
                (212, 60, 38),
            )
        for leg in (-0.36, 0.36):
            c.line([(x + leg * w, y - 0.9 * h), (x + leg * w, y)], (110, 110, 112), 2.4 * t)
        lights.append((x, y - 2.2 * h, 14 * t, (255, 170, 40)))
        cx, cy = v.at(side * 0.62, t + 0.05)
        c.poly(
            [(cx - 9 * t, cy), (cx + 9 * t, cy), (cx + 1.5 * t, cy - 30 * t), (cx - 1.5 * t, cy - 30 * t)],
            (232, 100, 36),
        )
        c.box(cx - 5 * t, cy - 17 * t, 10 * t, 5 * t, (244, 240, 236))
    return side


def _traffic(rng: Generator, kind: str, v: _View, closed: int, lights: list[_Light]) -> list[_Thing]:
    """The vehicles on the road; their lamps are added to `lights`."""
    lanes = [u for u in (-0.66, 0.0, 0.66) if u * closed <= 0]
    spots: list[tuple[float, float]] = []
    if kind == "light traffic":  # two cars near, side by side or nearly, at most one farther off
        near = rng.permutation(len(lanes))[:2]
        spots = [(lanes[i], rng.uniform(0.47, 0.65)) for i in near]
        spots += [(pick(rng, lanes), rng.uniform(0.28, 0.4)) for _ in range(int(rng.integers(0, 2)))]
    elif kind == "heavy traffic":
        depths = (0.17, 0.24, 0.34, 0.46, 0.6)  # the nearest stretch of road stays in view
        spots = [(u, t * rng.uniform(0.9, 1.1)) for u in lanes for t in depths if rng.random() < 0.88]
    elif kind == "stopped truck":
        spots = [(pick(rng, lanes), rng.uniform(0.2, 0.3)) for _ in range(int(rng.integers(0, 2)))]
    things: list[_Thing] = []
    for u, t in spots:
        x, y = v.at(u + rng.uniform(-0.06, 0.06), t)
        colour, van, rear = vary(rng, pick(rng, PAINTS)), rng.random() < 0.2, u >= 0 or rng.random() < 0.4
        things.append((t, partial(_car, x=x, y=y, w=66 * t, colour=colour, van=van, rear=rear)))
        glow: Colour = (255, 50, 40) if rear else (255, 244, 214)
        lights += [(x + s * 20 * t, y - 15 * t, (12 if rear else 20) * t, glow) for s in (-1, 1)]
    if kind == "stopped truck":
        t = rng.uniform(0.5, 0.66)
        x, y = v.at(pick(rng, lanes) * 0.9, t)
        colour = vary(rng, pick(rng, PAINTS))
        things.append((t, partial(_truck, x=x, y=y, w=104 * t, colour=colour)))
        lights += [(x + s * 38 * t, y - 16 * t, 24 * t, (255, 150, 30)) for s in (-1, 1)]
    return things


def _car(c: Canvas, x: float, y: float, w: float, colour: Colour, van: bool, rear: bool) -> None:
    h = w * (0.96 if van else 0.72)
    c.oval(x, y, 0.56 * w, 0.1 * w, (0, 0, 0, 110))
    for s in (-1, 1):
        c.box(x + s * 0.36 * w - 0.09 * w, y - 0.2 * w, 0.18 * w, 0.22 * w, (22, 22, 24), 0.04 * w)
    c.poly(
        [(x - 0.44 * w, y - 0.5 * h), (x - 0.33 * w, y - h), (x + 0.33 * w, y - h), (x + 0.44 * w, y - 0.5 * h)],
        shade(colour, 0.86),
    )
    c.poly(
        [
            (x - 0.37 * w, y - 0.54 * h),
            (x - 0.29 * w, y - 0.92 * h),
            (x + 0.29 * w, y - 0.92 * h),
            (x + 0.37 * w, y - 0.54 * h),
        ],
        (52, 64, 76),
    )
    c.box(x - 0.5 * w, y - 0.56 * h, w, 0.42 * h, colour, 0.08 * w)
    c.box(x - 0.13 * w, y - 0.34 * h, 0.26 * w, 0.11 * h, (236, 236, 220))
    for s in (-1, 1):
        c.box(
            x + s * 0.4 * w - 0.08 * w,
            y - 0.5 * h,
            0.16 * w,
            0.13 * h,
            (206, 30, 28) if rear else (252, 246, 220),
            0.02 * w,
        )


def _truck(c: Canvas, x: float, y: float, w: float, colour: Colour) -> None:
    h = 1.3 * w
    c.oval(x, y, 0.58 * w, 0.1 * w, (0, 0, 0, 120))
    for s in (-1, 1):
        c.box(x + s * 0.34 * w - 0.1 * w, y - 0.2 * w, 0.2 * w, 0.22 * w, (20, 20, 22), 0.03 * w)
    c.box(x - 0.5 * w, y - h, w, 0.88 * h, colour)
    c.box(x - 0.46 * w, y - 0.97 * h, 0.45 * w, 0.78 * h, shade(colour, 0.84))
    c.box(x + 0.01 * w, y - 0.97 * h, 0.45 * w, 0.78 * h, shade(colour, 0.9))
    c.box(x - 0.5 * w, y - 0.19 * h, w, 0.08 * h, (50, 50, 54))
    for k in range(6):
        c.box(x - 0.5 * w + k * w / 6, y - 0.27 * h, w / 12, 0.06 * h, (230, 60, 40))
    for s in (-1, 1):
        c.box(x + s * 0.42 * w - 0.07 * w, y - 0.18 * h, 0.14 * w, 0.07 * h, (255, 160, 30))
    tx, ty, r = x + 0.1 * w, y + 0.34 * w, 0.2 * w  # the warning triangle behind it
    c.poly([(tx - r, ty), (tx + r, ty), (tx, ty - 1.7 * r)], (222, 40, 34))
    c.poly([(tx - 0.45 * r, ty - 0.28 * r), (tx + 0.45 * r, ty - 0.28 * r), (tx, ty - 1.05 * r)], (60, 50, 50))


def _walkers(rng: Generator, where: str, v: _View) -> list[_Thing]:
    """The pedestrians."""
    things: list[_Thing] = []
    for _ in range(0 if where == "nobody" else int(rng.integers(*((1, 3) if where == "crossing" else (2, 4))))):
        t = rng.uniform(0.62, 0.8)
        u = pick(rng, (-1, 1)) * (rng.uniform(0.24, 0.84) if where == "crossing" else rng.uniform(1.1, 1.24))
        x, y = v.at(u, t)
        look, stride = Look.of(rng), 0.14 if where == "crossing" else 0.07
        lean = rng.uniform(-0.03, 0.03)
        things.append((t, partial(person, x=x, y=y, h=98 * t, look=look, lean=lean, stride=stride)))
    return things


def _air(c: Canvas, rng: Generator, f: dict[str, Any], v: _View) -> None:
    """Rain, snow or fog between the driver and the scene."""
    bright = {"daylight": 1.0, "dusk": 0.85, "night": 0.62}[f["light"]]
    if f["weather"] == "fog":
        thick, h = rng.uniform(0.45, 0.72), v.horizon / WORLD
        steps = [
            thick * (1.0 if y < h else max(0.12, 1 - 1.5 * (y - h) / (1 - h))) for y in (i / 16 for i in range(17))
        ]
        c.veil(shade(vary(rng, (206, 208, 212), 8), bright), steps)
    elif f["weather"] == "rain":
        c.veil(shade((150, 158, 168), bright), [0.22, 0.2, 0.06])
        slant, drop = rng.uniform(-0.35, 0.35), shade((214, 222, 232), max(0.8, bright))
        for _ in range(int(rng.integers(50, 150))):
            x, y, n = rng.uniform(0, WORLD), rng.uniform(0, WORLD), rng.uniform(7, 18)
            c.line([(x, y), (x + slant * n, y + n)], (*drop, int(rng.integers(60, 150))), rng.uniform(0.3, 0.9))
    elif f["weather"] == "snow":
        c.veil(shade((220, 224, 230), bright), [0.2, 0.18, 0.06])
        for _ in range(int(rng.integers(50, 170))):
            r = rng.uniform(0.5, 1.9)
            c.oval(rng.uniform(0, WORLD), rng.uniform(0, WORLD), r, r, (250, 252, 255, int(rng.integers(150, 250))))

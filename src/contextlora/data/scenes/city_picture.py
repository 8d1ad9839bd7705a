"""The watched place, its people and cars, and what happens there."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    person,
    photograph,
    pick,
    shade,
    tree,
    vary,
)

_Thing = tuple[float, float, Callable[[Canvas], None]]  # depth, place from left to right, what draws it
_TOP = 66.0  # where the ground begins; nearer things are lower and larger


def paint(rng: Generator, f: dict[str, Any]) -> Image.Image:
    """Draws the facts as a 224 x 224 picture."""
    c = Canvas()
    evening = rng.random() < 0.25
    _backdrop(c, rng, f["place"], evening)
    _PLACES[f["place"]](c, rng)
    if f["event"] == "flood":
        _flood(c, rng)
    x, y = rng.uniform(74, 182), rng.uniform(140, 190)
    people, cars = {"sparse": (1, 1), "busy": (10, 4), "crowded": (30, 9)}[f["density"]]
    things = [
        *_people(rng, people),
        *_cars(rng, cars if f["place"] in ("street", "crossroads") else cars // 2, f["place"]),
    ]
    if f["event"] in _EVENTS:
        things = [t for t in things if abs(t[1] - x) > 60 or not -14 < t[0] - y < 56]  # nobody hides the event
        things.append((y, x, partial(_EVENTS[f["event"]], rng=rng, x=x, y=y)))
    for _, _, draw in sorted(things, key=lambda thing: thing[0]):
        draw(c)
    if evening:
        c.dim((rng.uniform(0.6, 0.8), rng.uniform(0.56, 0.7), rng.uniform(0.62, 0.8)))
        if f["event"] == "fire":
            c.glow(x, y - 16, 46, (255, 150, 50), 16)
    return photograph(rng, c, turn=4)


def _size(y: float) -> float:
    """Height of a person whose feet are at y."""
    return 15 + 28 * (y - _TOP) / (WORLD - _TOP)


def _backdrop(c: Canvas, rng: Generator, place: str, evening: bool) -> None:
    sky = pick(rng, ((150, 190, 226), (184, 192, 200), (206, 214, 222)))
    c.gradient(vary(rng, (236, 178, 130) if evening else sky), vary(rng, shade(sky, 1.08)), 0, _TOP)
    if rng.random() < (0.6 if place == "park" else 0.12):
        for k in range(18):
            tree(
                c,
                rng,
                15.0 * k - 6 + rng.uniform(-6, 6),
                _TOP + rng.uniform(0, 8),
                rng.uniform(36, 62),
                pick(rng, ((58, 104, 54), (84, 118, 60))),
            )
        return
    x = -10.0
    while x < WORLD:
        w = rng.uniform(24, 56)
        wall = vary(
            rng, pick(rng, ((176, 150, 126), (150, 150, 156), (198, 186, 166), (156, 108, 92), (120, 130, 142)))
        )
        building(c, rng, x, _TOP + 4, w, rng.uniform(34, 70), wall, 0.4 if evening else 0.05)
        x += w + rng.uniform(0, 6)
    if place == "park" or rng.random() < 0.3:
        for _ in range(int(rng.integers(3, 10))):
            tree(
                c,
                rng,
                rng.uniform(0, WORLD),
                _TOP + rng.uniform(0, 8),
                rng.uniform(28, 52),
                pick(rng, ((58, 104, 54), (140, 116, 58))),
            )


def _ground(rng: Generator) -> Colour:
    """Stone, sand or grass: what lies beside the roads of any place."""
    return vary(rng, pick(rng, ((176, 170, 162), (190, 174, 146), (124, 146, 90), (104, 134, 76), (158, 156, 156))), 10)


def _asphalt(rng: Generator) -> Colour:
    return vary(rng, pick(rng, ((104, 104, 108), (122, 118, 114), (88, 90, 96))), 8)


def _street(c: Canvas, rng: Generator) -> None:
    ground = _ground(rng)
    c.gradient(shade(ground, 0.85), ground, _TOP, WORLD)
    slope = rng.uniform(-50, 50)
    a, w = 128 + rng.uniform(-20, 20), rng.uniform(26, 34)
    foot = a + slope
    c.poly([(a - w, _TOP), (a + w, _TOP), (foot + 4.2 * w, WORLD), (foot - 4.2 * w, WORLD)], _asphalt(rng))
    for i in range(9):
        t0, t1 = (i / 9) ** 1.5, ((i + 0.5) / 9) ** 1.5
        h = WORLD - _TOP
        c.line([(a + slope * t0, _TOP + h * t0), (a + slope * t1, _TOP + h * t1)], (230, 228, 220), 0.8 + 2.6 * t0)
    if rng.random() < 0.4:
        t = rng.uniform(0.3, 0.8)
        for i in range(-4, 4):
            x, n = a + slope * t + i * 0.25 * w * (1 + 3.2 * t), 0.13 * w * (1 + 3.2 * t)
            c.box(x, _TOP + (WORLD - _TOP) * t, n, 5 + 12 * t, (230, 228, 220, 200))
    for side in (-1, 1):
        c.line([(a + side * w, _TOP), (foot + side * 4.2 * w, WORLD)], (206, 204, 198), 2)
        for t in (0.12, 0.4):
            tree(c, rng, a + side * (w + 16 + 150 * t), _TOP + 150 * t, 26 + 40 * t, (70, 112, 62))


def _crossroads(c: Canvas, rng: Generator) -> None:
    ground = _ground(rng)
    c.gradient(shade(ground, 0.85), ground, _TOP, WORLD)
    road, a = _asphalt(rng), 128 + rng.uniform(-24, 24)
    y0, y1 = rng.uniform(108, 122), rng.uniform(176, 196)
    c.poly([(a - 26, _TOP), (a + 26, _TOP), (a + 120, WORLD), (a - 120, WORLD)], road)
    c.box(0, y0, WORLD, y1 - y0, road)
    white = (232, 230, 224, 200)
    sides = rng.random(6) < 0.55
    for i in range(7):  # zebra crossings on some of the four sides
        if sides[0]:
            c.box(a - 40 + i * 12.4, y0 - 11, 7, 9, white)
        if sides[1]:
            c.box(a - 92 + i * 28, y1 + 3, 15, 14, white)
        for x, there in ((a - 104, sides[2]), (a + 82, sides[3])):
            if there:
                c.box(x, y0 + 3 + i * (y1 - y0) / 7, 18, 4.6, white)
    for x, y in [(a + side * 62, y0 - 4) for side, there in ((-1, sides[4]), (1, sides[5])) if there]:  # traffic lights
        c.line([(x, y), (x, y - 40)], (60, 62, 66), 2)
        c.box(x - 4, y - 52, 8, 18, (34, 36, 38), 2)
        for k, lamp in enumerate(((220, 50, 40), (230, 180, 50), (60, 190, 90))):
            c.oval(x, y - 48 + 5 * k, 2, 2, lamp)


def _park(c: Canvas, rng: Generator) -> None:
    grass = vary(rng, pick(rng, ((104, 146, 78), (124, 146, 84), (90, 128, 70), (190, 174, 146))))
    c.gradient(shade(grass, 0.86), grass, _TOP, WORLD)
    path, a, b = (
        pick(rng, (vary(rng, (198, 180, 146)), _asphalt(rng), vary(rng, (176, 120, 96)))),
        rng.uniform(60, 196),
        rng.uniform(30, 226),
    )
    for i in range(24):
        t = i / 23
        x = a + (b - a) * t + 30 * math.sin(4 * t)
        c.oval(x, _TOP + (WORLD - _TOP) * t, 10 + 30 * t, 5 + 7 * t, path)
    if rng.random() < 0.5:
        c.oval(
            rng.uniform(40, 216),
            rng.uniform(110, 150),
            rng.uniform(22, 40),
            rng.uniform(8, 13),
            vary(rng, (116, 158, 186)),
        )
    for _ in range(int(rng.integers(4, 8))):
        y = rng.uniform(84, 200)
        tree(
            c,
            rng,
            pick(rng, (rng.uniform(0, 70), rng.uniform(186, 256))),
            y,
            1.7 * _size(y),
            pick(rng, ((62, 110, 56), (90, 124, 62), (140, 120, 60))),
        )


def _square(c: Canvas, rng: Generator) -> None:
    stone = vary(rng, pick(rng, ((196, 186, 170), (180, 176, 174), (190, 166, 146), (112, 112, 116), (124, 146, 100))))
    c.gradient(shade(stone, 0.9), stone, _TOP, WORLD)
    joint = (*shade(stone, 0.8), 170)
    for k in range(-12, 13):
        c.line([(128 + k * 12, _TOP), (128 + k * 46, WORLD)], joint, 1)
    for k in range(10):
        y = _TOP + (WORLD - _TOP) * (k / 10) ** 1.4
        c.line([(0, y), (WORLD, y)], joint, 1)
    for _ in range(int(rng.integers(0, 4))):  # market stalls
        x, y = rng.uniform(6, 230), rng.uniform(90, 150)
        n, awning = 0.9 * _size(y), vary(rng, pick(rng, PAINTS))
        c.box(x - n, y - 0.6 * n, 2 * n, 0.6 * n, shade(stone, 0.6))
        c.poly(
            [(x - 1.2 * n, y - n), (x + 1.2 * n, y - n), (x + 0.9 * n, y - 1.6 * n), (x - 0.9 * n, y - 1.6 * n)], awning
        )
    if rng.random() < 0.4:
        return
    x, y = rng.uniform(60, 196), rng.uniform(98, 122)  # the fountain
    c.oval(x, y, 34, 12, shade(stone, 0.7))
    c.oval(x, y - 2, 30, 9.6, vary(rng, (120, 172, 204)))
    c.box(x - 4, y - 26, 8, 24, shade(stone, 0.8))
    c.oval(x, y - 26, 14, 4, shade(stone, 0.85))
    for side in (-1, 1):
        c.line([(x, y - 34), (x + side * 8, y - 30), (x + side * 13, y - 8)], (226, 240, 250, 200), 1.6)


_PLACES = {"street": _street, "crossroads": _crossroads, "park": _park, "square": _square}


def _people(rng: Generator, count: int) -> list[_Thing]:
    """People, here and there."""
    things: list[_Thing] = []
    for _ in range(max(1, count + int(rng.integers(-count // 5, count // 5 + 1)))):
        x, y = rng.uniform(16, 240), _TOP + 12 + rng.beta(1.2, 1.2) * 160
        look, stride = Look.of(rng), rng.uniform(0.05, 0.16)
        things.append((y, x, partial(person, x=x, y=y, h=_size(y), look=look, stride=stride)))
    return things


def _cars(rng: Generator, count: int, place: str) -> list[_Thing]:
    """Cars, mostly on the roads; in parks and squares those of the gardeners and the market."""
    things: list[_Thing] = []
    for _ in range(count):
        x, y = rng.uniform(60, 200), _TOP + 20 + rng.beta(1.3, 1.3) * 150
        if place == "crossroads" and rng.random() < 0.5:
            x, y = rng.uniform(10, 246), rng.uniform(128, 182)
        colour, angle = vary(rng, pick(rng, PAINTS)), rng.normal(0, 0.08)
        things.append((y, x, partial(_car, x=x, y=y, w=1.5 * _size(y), colour=colour, angle=angle)))
    return things


def _car(c: Canvas, x: float, y: float, w: float, colour: Colour, angle: float) -> None:
    """A car from the side and above, its wheels on y."""
    h, co, si = 0.36 * w, math.cos(angle), math.sin(angle)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + u * w * co + v * h * si, y + u * w * si - v * h * co

    c.oval(x, y, 0.54 * w, 0.16 * h, (0, 0, 0, 90))
    c.poly([at(-0.5, 0.12), at(-0.5, 0.62), at(0.5, 0.56), at(0.5, 0.12)], colour)
    c.poly([at(-0.34, 0.6), at(-0.2, 1.1), at(0.16, 1.1), at(0.32, 0.58)], shade(colour, 0.9))
    c.poly([at(-0.28, 0.64), at(-0.17, 1.02), at(-0.03, 1.02), at(-0.03, 0.64)], (52, 66, 80))
    c.poly([at(0.01, 0.64), at(0.01, 1.02), at(0.14, 1.02), at(0.25, 0.64)], (52, 66, 80))
    for u in (-0.3, 0.3):
        c.oval(*at(u, 0.12), 0.09 * w, 0.09 * w, (24, 24, 26))


def _fire(c: Canvas, rng: Generator, x: float, y: float) -> None:
    size = 1.3 * _size(y)
    if rng.random() < 0.5:
        _car(c, x, y, 1.6 * size, (50, 46, 44), 0.0)
    for k in range(14):  # smoke
        r = size * (0.2 + 0.05 * k)
        grey = int(rng.integers(40, 90))
        drift = rng.uniform(-0.2, 0.2) + 0.05 * k
        c.oval(x + drift * size, y - size * (0.8 + 0.17 * k), r, r, (grey, grey, grey, 66))
    for colour, scale in (((226, 70, 22), 1.0), ((250, 146, 30), 0.7), ((255, 226, 110), 0.4)):
        for _ in range(7):
            fx, w = x + rng.uniform(-0.5, 0.5) * size * scale, size * 0.26 * scale
            tip = y - size * scale * rng.uniform(0.8, 1.5)
            foot = y - 0.05 * size
            c.poly([(fx - w, foot), (fx + w, foot), (fx + 0.3 * w, (y + tip) / 2), (fx, tip)], (*colour, 225))


def _crash(c: Canvas, rng: Generator, x: float, y: float) -> None:
    size = 1.3 * _size(y)
    side = pick(rng, (-1, 1))
    tilt = side * rng.uniform(0.3, 0.6)
    _car(c, x - 0.62 * size, y, 1.7 * size, vary(rng, pick(rng, PAINTS)), tilt)
    _car(c, x + 0.68 * size, y + 0.12 * size, 1.7 * size, vary(rng, pick(rng, PAINTS)), -tilt * rng.uniform(0.7, 1.4))
    c.poly(
        [(x + a * size, y - b * size) for a, b in ((-0.2, 0.1), (-0.26, 0.5), (0, 0.8), (0.26, 0.46), (0.2, 0.06))],
        (70, 70, 74, 220),
    )
    for _ in range(26):  # broken glass and parts
        dx, dy, r = rng.normal(0, 0.9) * size, rng.uniform(-0.1, 0.45) * size, rng.uniform(0.5, 1.8)
        c.oval(x + dx, y + dy, r, 0.7 * r, pick(rng, ((30, 30, 32), (210, 226, 236), (190, 60, 40), (120, 122, 126))))
    for k in range(4):
        c.oval(x + 0.05 * k * size, y - size * (0.7 + 0.16 * k), 0.2 * size, 0.2 * size, (206, 206, 208, 90))


def _flood(c: Canvas, rng: Generator) -> None:
    """Brown or blue water over the lower ground, under everything that stands in it."""
    water = vary(rng, pick(rng, ((116, 138, 150), (136, 124, 98), (98, 128, 148))))
    level = rng.uniform(98, 126)
    shore = range(0, WORLD + 16, 16)
    edge = [(float(x), level + 7 * math.sin(x / 23) + rng.uniform(-4, 4)) for x in shore]
    c.poly([*edge, (WORLD, WORLD), (0, WORLD)], (*water, 226))
    for _ in range(90):
        x, y = rng.uniform(0, WORLD), rng.uniform(level + 6, WORLD)
        n = rng.uniform(6, 22)
        ripple = shade(water, pick(rng, (0.75, 1.5)))
        c.line([(x, y), (x + n, y + rng.uniform(-1, 1))], (*ripple, 190), rng.uniform(0.8, 2.2))


def _fallen(c: Canvas, rng: Generator, x: float, y: float) -> None:
    size, side = 1.3 * _size(y), pick(rng, (-1, 1))
    bark, leaf = vary(rng, (98, 70, 46)), pick(rng, ((58, 106, 52), (88, 124, 58), (146, 118, 56)))
    root, crown = (x - side * 1.6 * size, y), (x + side * 1.1 * size, y - 0.1 * size)
    c.line([root, crown], bark, 0.2 * size)
    for _ in range(7):  # roots in the air
        c.line(
            [root, (root[0] - side * rng.uniform(0.05, 0.4) * size, y - rng.uniform(-0.35, 0.6) * size)],
            shade(bark, 0.8),
            1.6,
        )
    for _ in range(14):
        r = rng.uniform(0.2, 0.36) * size
        c.oval(
            crown[0] + rng.uniform(-0.6, 0.9) * size * side,
            crown[1] + rng.uniform(-0.4, 0.22) * size,
            r,
            0.8 * r,
            vary(rng, leaf, 18),
        )
    for _ in range(5):
        a = rng.uniform(-0.3, 1.0)
        c.line(
            [(crown[0] - 0.7 * side * size, y), (crown[0] + a * side * size, y - rng.uniform(0.2, 0.7) * size)],
            bark,
            1.4,
        )


_EVENTS = {"fire": _fire, "car crash": _crash, "fallen tree": _fallen}

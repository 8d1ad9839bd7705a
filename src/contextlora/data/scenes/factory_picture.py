"""The factory hall and the four activities in it."""

from __future__ import annotations

import math
from typing import Any

from numpy.random import Generator
from PIL import Image

from contextlora.data.scenes.draw import WORLD, Canvas, Colour, Look, headdress, person, photograph, pick, shade, vary

_HELMET_COLOURS: tuple[Colour, ...] = (
    (255, 210, 20),
    (255, 226, 60),
    (255, 140, 24),
)  # nothing else in the hall is so bright and warm
_OVERALLS: tuple[Colour, ...] = (
    (44, 66, 112),
    (120, 50, 50),
    (60, 100, 76),
    (190, 188, 184),
    (70, 70, 76),
    (96, 74, 116),
    (80, 130, 160),
)
_HAIR: tuple[Colour, ...] = ((30, 25, 22), (66, 44, 28), (90, 58, 34))
_VESTS: tuple[Colour, ...] = ((206, 224, 60), (244, 124, 40))
_STEEL: tuple[Colour, ...] = ((120, 128, 136), (96, 110, 122), (146, 140, 130), (88, 104, 96))


def paint(rng: Generator, f: dict[str, Any]) -> Image.Image:
    """Draws the facts as a 224 x 224 picture."""
    c = Canvas()
    floor = rng.uniform(122, 146)
    _hall(c, rng, floor)
    lots = [0.0, 1.0, 2.0] if len(f["activities"]) == 2 else [*rng.permutation(3).astype(float)]
    lots = [lots[i] for i in rng.permutation(3)]
    spots = [60 + 68 * s + rng.uniform(-7, 7) for s in lots]
    workers = 3 if rng.random() < 0.3 else 2
    crew = _crew(rng, f["helmets"], workers)
    for activity, x in zip(f["activities"], spots, strict=False):
        _WORK[activity](c, rng, x, floor, crew.pop())
    for x, look in zip(spots[len(f["activities"]) :], crew, strict=False):
        y = floor + rng.uniform(66, 88)
        person(c, x, y, rng.uniform(104, 124), look, lean=rng.uniform(-0.05, 0.05), reach=rng.uniform(-0.6, 0.6))
    _foreground(c, rng)
    level = rng.uniform(0.82, 1.06)
    c.dim([level * k for k in pick(rng, ((1, 1, 1), (1, 0.96, 0.86), (0.9, 0.97, 1)))])
    if "welding" in f["activities"]:  # the arc outshines the hall's own light
        _arc(c, rng, spots[f["activities"].index("welding")], floor)
    return photograph(rng, c, zoom=(0.99, 1.1))


def _crew(rng: Generator, helmets: str, count: int) -> list[Look]:
    """`count` workers of whom all, some (at least one, not all) or none wear a helmet."""
    worn = {"all workers": count, "some workers": int(rng.integers(1, count)), "nobody": 0}[helmets]
    crew = []
    for k in rng.permutation(count):
        worn_by = bool(k < worn)
        helmet = vary(rng, pick(rng, _HELMET_COLOURS), 8) if worn_by else None
        # who cares for a helmet mostly wears a vest as well, but not always, and now and then it is the other way round
        vest = pick(rng, _VESTS) if rng.random() < (0.85 if worn_by else 0.1) else None
        hair = vary(rng, pick(rng, _HAIR), 8)
        crew.append(Look.of(rng, tops=_OVERALLS, helmet=helmet, vest=vest, head=0.14, hair=hair))
    return crew


def _hall(c: Canvas, rng: Generator, floor: float) -> None:
    wall = vary(rng, pick(rng, ((168, 172, 174), (150, 160, 168), (186, 178, 160), (140, 148, 140))))
    ground = vary(rng, pick(rng, ((150, 146, 140), (122, 126, 130), (164, 150, 130), (108, 120, 112))))
    c.gradient(shade(wall, 0.75), wall, 0, floor)
    c.gradient(shade(ground, 0.8), ground, floor, WORLD)
    for i in range(int(rng.integers(3, 6))):  # windows and lamps: bright, but no welding
        x = 14 + i * 62 + rng.uniform(-8, 8)
        if rng.random() < 0.6:
            c.box(x, rng.uniform(22, 34), 38, rng.uniform(18, 30), vary(rng, (206, 222, 232)))
        if rng.random() < 0.5:
            c.glow(x + 18, 14, 16, (255, 250, 226), 36)
            c.box(x + 6, 11, 24, 5, (252, 250, 236))
    for _ in range(int(rng.integers(1, 4))):
        x = rng.uniform(0, WORLD)
        c.box(x, 0, rng.uniform(6, 11), floor + 4, shade(wall, rng.uniform(0.55, 0.75)))
    pipe = rng.uniform(50, 90)
    c.line([(0, pipe), (WORLD, pipe + rng.uniform(-6, 6))], vary(rng, pick(rng, _STEEL)), rng.uniform(2, 5))
    for _ in range(int(rng.integers(3, 7))):
        _machine(c, rng, rng.uniform(-10, WORLD - 20), floor + rng.uniform(2, 14))
    vanish = WORLD / 2 + rng.uniform(-50, 50)
    stripe = pick(rng, ((170, 60, 50), (214, 214, 206), (90, 120, 160)))
    for foot in (-120, 60, 220, 400):
        c.line([(vanish + (foot - vanish) * 0.3, floor + 14), (foot, WORLD)], (*stripe, 130), 2.2)


def _machine(c: Canvas, rng: Generator, x: float, y: float) -> None:
    w, h, body = rng.uniform(22, 46), rng.uniform(22, 54), vary(rng, pick(rng, _STEEL))
    kind = rng.integers(0, 3)
    if kind == 0:
        c.box(x, y - h, w, h, body, 2)
        c.box(x + 0.15 * w, y - 0.85 * h, 0.4 * w, 0.3 * h, shade(body, 0.6))
        c.oval(x + 0.75 * w, y - 0.7 * h, 2.4, 2.4, pick(rng, ((200, 50, 40), (60, 170, 80))))
    elif kind == 1:  # a shelf
        for k in range(3):
            c.box(x, y - h * (k + 1) / 3, w, 2, shade(body, 0.6))
            for j in range(3):
                if rng.random() < 0.7:
                    c.box(x + 2 + j * w / 3, y - h * k / 3 - 0.24 * h, w / 4, 0.24 * h, vary(rng, (170, 132, 88), 22))
        c.box(x, y - h, 2, h, shade(body, 0.6))
        c.box(x + w - 2, y - h, 2, h, shade(body, 0.6))
    else:  # barrels
        for k in range(2):
            paint_ = vary(rng, pick(rng, ((52, 92, 150), (150, 60, 44), (96, 100, 104))))
            c.box(x + k * 0.5 * w, y - 0.55 * h, 0.45 * w, 0.55 * h, paint_, 3)
            c.line([(x + k * 0.5 * w, y - 0.3 * h), (x + k * 0.5 * w + 0.45 * w, y - 0.3 * h)], shade(paint_, 0.7), 1.4)


def _weld(c: Canvas, rng: Generator, x: float, floor: float, look: Look) -> None:
    y = floor + 68
    c.box(x - 4, y - 32, 44, 5, (110, 112, 116))
    for leg in (0, 34):
        c.line([(x + leg, y - 28), (x + leg, y)], (84, 86, 90), 3)
    c.box(x + 12, y - 40, 22, 8, (136, 120, 104))
    person(c, x - 16, y + 4, 96, look, lean=0.08, reach=0.9)


def _arc(c: Canvas, rng: Generator, x: float, floor: float) -> None:
    """The light of the arc and its sparks."""
    x, y = x + 16 + rng.uniform(-3, 3), floor + 26
    for _ in range(int(rng.integers(24, 46))):
        a, n = rng.uniform(-0.3, math.pi + 0.3), rng.uniform(8, 34)
        dx, dy = n * math.cos(a), n * math.sin(a) * rng.uniform(0.2, 1)
        c.line([(x + dx / 2, y + dy / 2), (x + dx, y + dy)], (255, int(rng.integers(150, 230)), 70, 230), 0.8)
    c.glow(x, y, rng.uniform(18, 28), (170, 205, 255), 42)
    c.glow(x, y, 8, (255, 255, 255), 120)


def _forklift(c: Canvas, rng: Generator, x: float, floor: float, look: Look) -> None:
    y, s = floor + rng.uniform(56, 70), 1 if x < 128 else -1
    body = vary(rng, pick(rng, ((60, 110, 170), (160, 50, 46), (70, 130, 80), (120, 90, 150))))

    def box(left: float, bottom: float, w: float, h: float, colour: Colour) -> None:
        c.box(x + left if s > 0 else x - left - w, y - bottom - h, w, h, colour, 1.5)

    c.oval(x, y, 44, 6, (0, 0, 0, 90))
    for mast in (24, 30):
        box(mast, 4, 2.6, 90, (60, 62, 66))
    load = rng.uniform(4, 30)
    box(30, load, 26, 3, (50, 50, 54))
    if rng.random() < 0.6:
        box(34, load + 3, 20, rng.uniform(12, 22), vary(rng, (166, 126, 82), 20))
    headdress(c, x - 6 * s, y - 65, 12, look)
    box(-14, 30, 15, 24, look.vest or look.top)
    box(-32, 8, 54, 26, body)
    box(-32, 30, 16, 12, shade(body, 0.8))
    for post in (-28, 14):
        box(post, 32, 2.4, 60, (52, 54, 58))
    box(-30, 92, 48, 3.4, shade(body, 0.7))
    for wheel in (-20, 12):
        c.oval(x + wheel * s, y - 7, 9, 9, (26, 26, 28))
        c.oval(x + wheel * s, y - 7, 3.6, 3.6, (150, 150, 150))


def _ladder(c: Canvas, rng: Generator, x: float, floor: float, look: Look) -> None:
    y, top = floor + rng.uniform(40, 56), floor - rng.uniform(58, 70)
    metal = vary(rng, pick(rng, ((206, 208, 210), (150, 110, 80), (120, 160, 190))))
    lean = rng.uniform(-14, 14)
    for side in (-10, 10):
        c.line([(x + side * 1.3, y), (x + side + lean, top)], metal, 3)
    steps = 10
    for k in range(1, steps):
        a = k / steps
        mx, my = x + lean * a, y + (top - y) * a
        c.line([(mx - 12, my), (mx + 12, my)], shade(metal, 0.85), 2)
    a = rng.uniform(0.3, 0.44)
    person(c, x + lean * a, y + (top - y) * a, rng.uniform(88, 98), look, reach=rng.uniform(-0.5, 0.5), stride=0.06)


def _lift(c: Canvas, rng: Generator, x: float, floor: float, look: Look) -> None:
    low = floor + rng.uniform(-62, -44)
    hook = low - rng.uniform(24, 32)
    rail = vary(rng, pick(rng, ((150, 60, 50), (90, 110, 140), (110, 120, 130))))
    c.box(0, 30, WORLD, 8, rail)
    c.box(x - 14, 34, 28, 9, shade(rail, 0.75))
    c.line([(x, 42), (x, hook)], (40, 42, 46), 2)
    c.oval(x, hook, 4, 4, (210, 60, 40))
    w, h = rng.uniform(46, 66), rng.uniform(22, 34)
    for side in (-0.45, 0.45):
        c.line([(x, hook), (x + side * w, low)], (50, 52, 56), 1.4)
    cargo = vary(rng, pick(rng, ((150, 112, 70), (120, 74, 60), (90, 112, 140), (130, 132, 136))))
    c.box(x - w / 2, low, w, h, cargo)
    for k in range(1, 4):
        c.line([(x - w / 2 + k * w / 4, low), (x - w / 2 + k * w / 4, low + h)], shade(cargo, 0.75), 1.2)
    c.oval(x, floor + 62, 0.5 * w, 6, (0, 0, 0, 80))
    x, y = x + pick(rng, (-1, 1)) * rng.uniform(14, 22), floor + rng.uniform(82, 92)
    person(c, x, y, rng.uniform(92, 102), look, reach=pick(rng, (-0.8, 0.8)))


_WORK = {"welding": _weld, "driving a forklift": _forklift, "climbing a ladder": _ladder, "lifting a load": _lift}


def _foreground(c: Canvas, rng: Generator) -> None:
    """Clutter near the camera, low enough not to hide a head."""
    for _ in range(int(rng.integers(0, 4))):
        x, w, h = rng.uniform(0, WORLD), rng.uniform(20, 44), rng.uniform(12, 26)
        wood = vary(rng, pick(rng, ((160, 122, 78), (96, 104, 112), (70, 96, 132))), 18)
        c.box(x, 240 - h, w, h, wood)
        c.line([(x, 240 - h / 2), (x + w, 240 - h / 2)], shade(wood, 0.75), 1.6)

"""Drawing helpers the scenes share: an antialiased canvas, small figures, and a camera with its faults.

Scenes draw in units of a 256 x 256 world; the camera sees a jittered window of it and returns 224 x 224 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

T = TypeVar("T")

SIZE = 224  # pixels of a finished picture, what EfficientNet-Lite0 reads
WORLD = 256  # units a scene draws in, so that the camera may look away from the middle
SCALE = 2  # pixels per unit while drawing; halved at the end, which smooths every edge

Colour = tuple[int, ...]  # (red, green, blue) or with opacity, 0 to 255
Point = tuple[float, float]

SKIN: tuple[Colour, ...] = ((244, 208, 177), (224, 172, 130), (176, 118, 80), (112, 74, 50))
HAIR: tuple[Colour, ...] = ((30, 25, 22), (66, 44, 28), (112, 74, 40), (150, 120, 84), (120, 118, 116))
CLOTHES: tuple[Colour, ...] = (
    *((44, 66, 112), (150, 46, 44), (60, 110, 76), (206, 200, 190)),
    *((70, 70, 76), (196, 142, 60), (112, 70, 120), (80, 140, 170)),
)
TROUSERS: tuple[Colour, ...] = ((40, 46, 70), (60, 56, 52), (92, 84, 70), (36, 36, 40))
PAINTS: tuple[Colour, ...] = (
    *((186, 40, 38), (40, 74, 150), (232, 232, 230), (40, 42, 46)),
    *((140, 146, 152), (222, 176, 50), (58, 110, 78), (150, 90, 50)),
)


def pick(rng: Generator, options: Sequence[T], p: Sequence[float] | None = None) -> T:
    """One of `options`, with probabilities `p` or evenly. (`Generator.choice` would turn tuples into arrays.)"""
    return options[int(rng.choice(len(options), p=p))]


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made lighter (factor > 1) or darker, opacity kept."""
    return (*(min(255, max(0, round(v * factor))) for v in colour[:3]), *colour[3:])


def vary(rng: Generator, colour: Colour, by: int = 14) -> Colour:
    """A colour near `colour`."""
    return (*(min(255, max(0, v + int(rng.integers(-by, by + 1)))) for v in colour[:3]), *colour[3:])


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of b in a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a[:3], b[:3], strict=True))


@dataclass
class Canvas:
    """A picture under way, in world units. Colours with a fourth value blend."""

    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (WORLD * SCALE, WORLD * SCALE)))

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def poly(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A filled ellipse around (x, y)."""
        rx, ry = abs(rx), abs(ry)
        self.pen.ellipse([(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE], fill=fill)

    def pie(self, x: float, y: float, rx: float, ry: float, angles: tuple[float, float], fill: Colour) -> None:
        """A filled sector of an ellipse; angles in degrees, clockwise from the right."""
        box = [(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE]
        self.pen.pieslice(box, *angles, fill=fill)

    def box(self, x: float, y: float, w: float, h: float, fill: Colour, radius: float = 0) -> None:
        """A filled rectangle with its top left corner at (x, y)."""
        if w <= 0 or h <= 0:
            return
        area = [x * SCALE, y * SCALE, (x + w) * SCALE, (y + h) * SCALE]
        if radius:
            self.pen.rounded_rectangle(area, radius=min(radius, w / 2, h / 2) * SCALE, fill=fill)
        else:
            self.pen.rectangle(area, fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float = 1) -> None:
        """A line through the points."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(flat, fill=fill, width=max(1, round(width * SCALE)), joint="curve" if width > 2 else None)

    def turned(self, x: float, y: float, w: float, h: float, angle: float, fill: Colour) -> None:
        """A rectangle around (x, y), turned by `angle` radians."""
        c, s = math.cos(angle) / 2, math.sin(angle) / 2
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        self.poly([(x + i * w * c - j * h * s, y + i * w * s + j * h * c) for i, j in corners], fill)

    def glow(self, x: float, y: float, r: float, colour: Colour, strength: int = 46) -> None:
        """A soft light."""
        for k in range(6):
            self.oval(x, y, r * (1 - k / 6), r * (1 - k / 6), (*colour[:3], strength))

    def gradient(self, top: Colour, bottom: Colour, y0: float = 0, y1: float = WORLD) -> None:
        """A vertical gradient over the full width, from y0 to y1."""
        rows = max(1, round((y1 - y0) * SCALE))
        ramp = np.linspace(top[:3], bottom[:3], rows).round().astype(np.uint8)[:, None]
        strip = np.repeat(ramp, WORLD * SCALE, axis=1)
        self.image.paste(Image.fromarray(strip), (0, round(y0 * SCALE)))

    def dim(self, factors: Sequence[float]) -> None:
        """Multiplies red, green and blue: night and coloured light."""
        table = [min(255, round(v * f)) for f in factors for v in range(256)]
        self.image.paste(self.image.point(table))

    def veil(self, colour: Colour, opacity: Sequence[float]) -> None:
        """Covers the picture with a colour whose opacity (0 to 1) runs through the given values from top to bottom."""
        rows = np.interp(np.linspace(0, len(opacity) - 1, WORLD * SCALE), np.arange(len(opacity)), opacity)
        mask = np.repeat((rows * 255).astype(np.uint8)[:, None], WORLD * SCALE, axis=1)
        self.image.paste(colour[:3], (0, 0), Image.fromarray(mask))


def photograph(
    rng: Generator, canvas: Canvas, *, turn: float = 3.0, zoom: tuple[float, float] = (0.95, 1.09)
) -> Image.Image:
    """What a cheap camera sees of the canvas: moved, turned, mirrored, blurred, miscoloured and noisy.

    Args:
        rng: the picture's own generator.
        canvas: the finished drawing.
        turn: largest roll, degrees.
        zoom: smallest and largest part of the usual 224 units that is seen; at most 1.1.

    Returns:
        An RGB image of 224 x 224 pixels.
    """
    a, z = math.radians(rng.uniform(-turn, turn)), rng.uniform(*zoom)
    c, s = math.cos(a) * z, math.sin(a) * z
    half, middle = SIZE / 2, WORLD / 2
    slack = max(0.0, middle - half * (c + abs(s)))
    mx, my = middle + rng.uniform(-slack, slack), middle + rng.uniform(-slack, slack)
    flip = -1 if rng.random() < 0.5 else 1
    matrix = (c * flip, -s, mx - c * flip * half + s * half, s * flip, c, my - s * flip * half - c * half)
    small = canvas.image.reduce(SCALE)
    seen = small.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    if (blur := rng.uniform(-0.4, 0.75)) > 0.2:
        seen = seen.filter(ImageFilter.GaussianBlur(blur))
    return _develop(rng, seen)


def _develop(rng: Generator, seen: Image.Image) -> Image.Image:
    """Uneven light, contrast, colour cast, vignette and noise."""
    field_ = rng.uniform(0.88, 1.12, (5, 5)).astype(np.float32)
    uneven = np.asarray(Image.fromarray(field_).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    d = np.linspace(-1, 1, SIZE, dtype=np.float32) ** 2
    light = uneven * (1 - rng.uniform(0, 0.22) * (d[:, None] + d[None, :]) / 2)
    pixels = np.array(seen, dtype=np.float32)
    pixels -= 118
    pixels *= np.float32(rng.uniform(0.84, 1.14))
    pixels += np.float32(118 + rng.uniform(-14, 12))
    pixels *= light[..., None].astype(np.float32)
    pixels *= rng.uniform(0.94, 1.06, 3).astype(np.float32)
    pixels += rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32) * np.float32(rng.uniform(1, 5.5))
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


# --- figures shared by the scenes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How one person looks."""

    skin: Colour
    hair: Colour
    top: Colour
    legs: Colour
    helmet: Colour | None = None
    vest: Colour | None = None
    head: float = 0.085  # radius in heights

    @classmethod
    def of(cls, rng: Generator, *, tops: Sequence[Colour] = CLOTHES, **more: Any) -> Look:
        """A random person; `more` are fields that are not left to chance."""
        top, legs = vary(rng, pick(rng, tops)), vary(rng, pick(rng, TROUSERS))
        return cls(**{"skin": pick(rng, SKIN), "hair": pick(rng, HAIR), "top": top, "legs": legs} | more)


def person(
    c: Canvas, x: float, y: float, h: float, look: Look, *, lean: float = 0.0, reach: float = 0.0, stride: float = 0.1
) -> None:
    """A standing or walking person.

    Args:
        c: the canvas.
        x: middle, in units.
        y: the ground under the feet.
        h: height.
        look: colours.
        lean: how far the head is ahead of the feet, in heights.
        reach: where the arms go: 0 hang, 1 stretched to the side the person leans to, -1 to the other.
        stride: half the distance of the feet, in heights.
    """
    hip, neck, head = y - 0.47 * h, y - 0.82 * h, y - (0.82 + look.head) * h
    top = x + lean * h
    c.oval(x, y, 0.2 * h, 0.035 * h, (0, 0, 0, 70))
    for side in (-1, 1):
        c.line([(x + side * 0.05 * h, hip), (x + side * stride * h, y)], look.legs, 0.095 * h)
    shirt = [
        (top - 0.13 * h, neck),
        (top + 0.13 * h, neck),
        (x + 0.1 * h, hip + 0.03 * h),
        (x - 0.1 * h, hip + 0.03 * h),
    ]
    c.poly(shirt, look.top)
    if look.vest:
        c.poly([(px + (x - px) * 0.25, py) for px, py in shirt], look.vest)
        c.line([(x - 0.08 * h, hip - 0.1 * h), (x + 0.08 * h, hip - 0.1 * h)], (236, 236, 226), 0.03 * h)
    for side in (-1, 1):
        hand = (top + side * 0.17 * h + reach * 0.22 * h, hip - abs(reach) * 0.2 * h)
        c.line([(top + side * 0.12 * h, neck + 0.03 * h), hand], shade(look.top, 0.85), 0.065 * h)
        c.oval(*hand, 0.035 * h, 0.035 * h, look.skin)
    headdress(c, top + 0.1 * lean * h, head, look.head * h, look)


def headdress(c: Canvas, x: float, y: float, r: float, look: Look) -> None:
    """A head of radius r with hair or a safety helmet."""
    c.oval(x, y, r, 1.15 * r, look.skin)
    if look.helmet is None:
        c.pie(x, y - 0.15 * r, 1.1 * r, 1.2 * r, (170, 370), look.hair)
        return
    c.pie(x, y - 0.1 * r, 1.4 * r, 1.65 * r, (180, 360), look.helmet)
    c.box(x - 1.75 * r, y - 0.25 * r, 3.5 * r, 0.36 * r, shade(look.helmet, 0.82), 0.15 * r)
    c.box(x - 0.22 * r, y - 1.75 * r, 0.44 * r, 1.4 * r, shade(look.helmet, 1.15))


def tree(c: Canvas, rng: Generator, x: float, y: float, h: float, leaves: Colour) -> None:
    """A tree on the ground at (x, y)."""
    c.line([(x, y), (x, y - 0.55 * h)], vary(rng, (86, 64, 46)), max(0.8, 0.08 * h))
    for _ in range(5):
        dx, dy, r = rng.uniform(-0.18, 0.18) * h, rng.uniform(0.5, 0.82) * h, rng.uniform(0.16, 0.26) * h
        c.oval(x + dx, y - dy, r, 0.9 * r, vary(rng, leaves, 16))


def building(c: Canvas, rng: Generator, x: float, y: float, w: float, h: float, wall: Colour, lit: float = 0.1) -> None:
    """A block of flats whose foot is the line from (x, y) to (x + w, y); `lit` is the share of lit windows."""
    c.box(x, y - h, w, h, wall)
    c.box(x + 0.86 * w, y - h, 0.14 * w, h, shade(wall, 0.8))
    columns, rows = max(1, int(w / 9)), max(1, int(h / 12))
    for i in range(columns):
        for j in range(rows):
            pane = (250, 222, 140) if rng.random() < lit else shade(wall, 0.55)
            c.box(x + (i + 0.25) * w / columns, y - h + (j + 0.25) * h / rows, 0.5 * w / columns, 0.5 * h / rows, pane)

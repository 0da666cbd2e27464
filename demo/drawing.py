"""Paint what the sprite world is made of: outlines, patterns and backgrounds.

Canvases are Pillow images `SUPERSAMPLING` times as large as the picture; lengths are canvas pixels.
"""

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

COLOURS: dict[str, RGB] = {
    "red": (222, 38, 38),
    "orange": (250, 136, 20),
    "yellow": (250, 212, 10),
    "green": (24, 146, 58),
    "blue": (40, 82, 214),
    "purple": (128, 48, 176),
    "pink": (250, 100, 178),
    "brown": (118, 72, 36),
}
PLAIN_BACKGROUNDS: dict[str, RGB] = {
    "white": (246, 246, 244),
    "grey": (150, 152, 156),
    "blue": (158, 204, 242),
    "green": (172, 222, 160),
    "yellow": (248, 238, 172),
    "pink": (252, 206, 214),
}
INK, PUPIL = (250, 250, 240), (30, 28, 40)
SUPERSAMPLING = 3

# ---------------------------------------------------------------------------------------- outlines


def _regular(corners: int, radius: float = 1.0, phase: float = -math.pi / 2) -> Points:
    angles = [phase + 2 * math.pi * i / corners for i in range(corners)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _arc(x: float, radius: float, start: float, stop: float) -> Points:
    """Return 32 points of the circle around (x, 0), angles in degrees."""
    angles = np.radians(np.linspace(start, stop, 32))
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> Points:
    tips, notches = _regular(5, 1.08), _regular(5, 0.46, -math.pi / 2 + math.pi / 5)
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip((1.02 * np.sin(t) ** 3).tolist(), (-y / 16 - 0.05).tolist(), strict=True))


def _box(half_width: float, half_height: float) -> Points:
    x, y = half_width, half_height
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def _cross(arm: float = 0.36) -> Points:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [lambda x, y: (x, y), lambda x, y: (-y, x), lambda x, y: (-x, -y), lambda x, y: (y, -x)]
    return [turn(x, y) for turn in turns for x, y in quarter]


OUTLINES: dict[str, tuple[Points, ...]] = {  # unit radius, y down; a second outline is a hole
    "circle": (_regular(48, 0.96),),
    "square": (_box(0.84, 0.84),),
    "triangle": ([(x, y + 0.22) for x, y in _regular(3, 1.18)],),
    "star": (_star(),),
    "heart": (_heart(),),
    "ring": (_regular(48), _regular(48, 0.48)),
    "cross": (_cross(),),
    "moon": (_arc(0.2, 1.0, 52.4, 307.6) + _arc(0.7, 0.8, 277.9, 82.1),),
    "oval": ([(0.72 * x, y) for x, y in _regular(48)],),
    "block": (_box(0.7, 0.98),),
    "hexagon": (_regular(6, 1.0, 0.0),),
}


# ----------------------------------------------------------------------------------------- drawing


class Frame:
    """A place, scale and turn on the canvas (lengths in canvas pixels, angle in radians)."""

    def __init__(
        self, x: float, y: float, scale: float, angle: float = 0.0, mirror: int = 1
    ) -> None:
        self.x, self.y, self.scale, self.angle, self.mirror = x, y, scale, angle, mirror
        self.cos, self.sin = scale * math.cos(angle), scale * math.sin(angle)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place a point given in units of `scale`."""
        x *= self.mirror
        return self.x + self.cos * x - self.sin * y, self.y + self.sin * x + self.cos * y

    def inner(self, x: float, y: float, scale: float, turn: float = 0.0) -> "Frame":
        """Place a frame inside this one."""
        angle = self.angle + turn * self.mirror
        return Frame(*self.at(x, y), self.scale * scale, angle, self.mirror)


@cache
def _grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(n, dtype=np.float32)
    return axis[None, :], axis[:, None]


def _pattern_mask(n: int, pattern: str, frame: Frame, period: float, turn: float) -> np.ndarray:
    """Return where a pattern shows ink: (n, n) bool; the period is in canvas pixels."""
    x, y = _grid(n)
    c, s = math.cos(frame.angle + turn) / period, math.sin(frame.angle + turn) / period
    u = ((x - frame.x) * c + (y - frame.y) * s) % 1
    if pattern == "striped":
        return u < 0.5
    v = ((y - frame.y) * c - (x - frame.x) * s) % 1
    if pattern == "checkered":
        return (u < 0.5) ^ (v < 0.5)
    return (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.085  # dotted


def draw_shape(
    image: Image.Image,
    shape: str,
    frame: Frame,
    colour: RGB,
    pattern: str = "plain",
    period: float = 1.0,
    turn: float = 0.0,
) -> None:
    """Draw one filled shape with a darker rim."""
    outlines = [[frame.at(x, y) for x, y in outline] for outline in OUTLINES[shape]]
    mask = Image.new("1", image.size)
    for outline, fill in zip(outlines, (1, 0), strict=False):
        ImageDraw.Draw(mask).polygon(outline, fill=fill)
    image.paste(colour, (0, 0), mask)
    if pattern != "plain":
        inked = np.asarray(mask) & _pattern_mask(image.width, pattern, frame, period, turn)
        image.paste(INK, (0, 0), Image.fromarray(inked))
    rim, width = tuple(int(0.6 * c) for c in colour), max(1, round(image.width * 0.012))
    for outline in outlines:
        ImageDraw.Draw(image).line([*outline, *outline[:2]], fill=rim, width=width, joint="curve")


def jittered(colour: RGB, rng: random.Random, amount: int) -> RGB:
    red, green, blue = (max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)
    return red, green, blue


def draw_background(n: int, background: str, rng: random.Random) -> Image.Image:
    if background in PLAIN_BACKGROUNDS:
        return Image.new("RGB", (n, n), jittered(PLAIN_BACKGROUNDS[background], rng, 5))
    if background == "meadow":
        image = Image.new("RGB", (n, n), (150, 210, 250))
        left, right = (n * (rng.uniform(0.58, 0.78) + rng.uniform(-0.05, 0.05)) for _ in range(2))
        ImageDraw.Draw(image).polygon([(0, left), (n, right), (n, n), (0, n)], fill=(96, 178, 70))
        return image
    night = background == "night"
    top, bottom = ((18, 22, 60), (52, 58, 120)) if night else ((250, 120, 70), (255, 214, 130))
    rows = np.linspace(top, bottom, n).astype(np.uint8)  # (n, 3)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows[:, None], (n, n, 3))))
    for _ in range(rng.randint(6, 12) if night else 0):
        x, y, r = rng.random() * n, rng.random() * n, n * 0.014
        ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], fill=(250, 245, 190))
    return image


def finished(image: Image.Image) -> np.ndarray:
    return np.array(image.reduce(SUPERSAMPLING))

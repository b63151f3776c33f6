"""The eight places of a scene, and the pen they are drawn with. `render.py` puts the rest of a scene around them.

All coordinates are relative to the picture, x to the right and y down; a place is drawn as if the load stood on the
left, and `View` mirrors it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
Color = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 2
INK: Color = (28, 26, 34)


def mix(a: Color, b: Color, share_of_b: float) -> Color:
    """`a` with `share_of_b` in [0, 1] of `b` mixed in."""
    return tuple(round(x + (y - x) * share_of_b) for x, y in zip(a, b))  # type: ignore[return-value]


def shade(color: Color, factor: float) -> Color:
    return tuple(min(255, round(channel * factor)) for channel in color)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class View:
    """Where the viewer stands: maps the coordinates a scene is drawn in to those of the picture."""

    mirrored: bool
    zoom: float
    """Enlargement around the middle of the picture, from 1."""
    tilt: float
    """Rise of the picture's right side against its left, as a share of the height."""

    def at(self, x: float, y: float) -> Point:
        x = 0.5 + (x - 0.5) * self.zoom
        y = 0.5 + (y - 0.5) * self.zoom - self.tilt * (x - 0.5)
        return (1 - x if self.mirrored else x), y


class Pen:
    """Draws shapes in relative coordinates on a supersampled canvas, and measures what it draws."""

    def __init__(self, size: int, view: View, outlined: bool) -> None:
        self.size = size * SUPERSAMPLING
        self.view = view
        self.outlined = outlined
        self.light: tuple[float, float, float] = (1.0, 1.0, 1.0)
        """Factor on every color drawn, per channel; what the time of day does to the place."""
        self.image = Image.new("RGB", (self.size, self.size))
        self._draw = ImageDraw.Draw(self.image)
        self._xs: list[float] = []
        self._ys: list[float] = []

    def measure(self) -> None:
        """Forget what was drawn so far; `box` then covers what is drawn from here on."""
        self._xs, self._ys = [], []

    @property
    def box(self) -> Box:
        """Bounding box, in the picture, of what was drawn since `measure`."""
        sides = min(self._xs), min(self._ys), max(self._xs), max(self._ys)
        return tuple(min(1.0, max(0.0, side / self.size)) for side in sides)  # type: ignore[return-value]

    def poly(self, points: Sequence[Point], color: Color, outline: bool = True) -> None:
        pixels = self._pixels(points)
        edge = INK if outline and self.outlined else None
        self._draw.polygon(pixels, fill=self._lit(color), outline=edge, width=self._width(0.006) if edge else 1)

    def rect(self, left: float, top: float, right: float, bottom: float, color: Color, outline: bool = True) -> None:
        self.poly([(left, top), (right, top), (right, bottom), (left, bottom)], color, outline)

    def disc(self, x: float, y: float, rx: float, ry: float, color: Color, outline: bool = True) -> None:
        cx, cy = self.view.at(x, y)
        rx, ry = rx * self.view.zoom, ry * self.view.zoom
        corners = [(cx - rx) * self.size, (cy - ry) * self.size, (cx + rx) * self.size, (cy + ry) * self.size]
        self._xs += corners[::2]
        self._ys += corners[1::2]
        edge = INK if outline and self.outlined else None
        self._draw.ellipse(corners, fill=self._lit(color), outline=edge, width=self._width(0.005) if edge else 1)

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        self._draw.line(self._pixels(points), fill=self._lit(color), width=self._width(width), joint="curve")

    def veil(self, box: Box, color: Color, alpha_top: float, alpha_bottom: float) -> None:
        """Mix `color` over `box`, with a share that goes from `alpha_top` to `alpha_bottom` in [0, 1]."""
        corners = [self.view.at(x, y) for x in box[::2] for y in box[1::2]]
        left, right = (round(f(x for x, _ in corners) * self.size) for f in (min, max))
        top, bottom = (round(f(y for _, y in corners) * self.size) for f in (min, max))
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, self.size), min(bottom, self.size)
        rows = bottom - top
        ramp = bytes(round(255 * (alpha_top + (alpha_bottom - alpha_top) * row / rows)) for row in range(rows))
        mask = Image.frombytes("L", (1, rows), ramp).resize((right - left, rows), Image.Resampling.NEAREST)
        self.image.paste(color, (left, top, right, bottom), mask)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        at, size = self.view.at, self.size
        pixels = [(x * size, y * size) for x, y in [at(*point) for point in points]]
        self._xs += [x for x, _ in pixels]
        self._ys += [y for _, y in pixels]
        return pixels

    def _width(self, width: float) -> int:
        return max(1, round(width * self.size))

    def _lit(self, color: Color) -> Color:
        (red, green, blue), (r, g, b) = color, self.light
        return min(255, int(red * r)), min(255, int(green * g)), min(255, int(blue * b))


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a place is drawn with and where."""

    pen: Pen
    rng: random.Random
    opening: Box
    """The part through which the sky is seen; its bottom is the horizon."""
    reflection: Color
    """Color of the sky, for water to mirror."""
    windy: bool

    @property
    def horizon(self) -> float:
        return self.opening[3]

    def depth(self, near: float) -> float:
        """The height at which the ground lies, from the horizon (`near` 0) to the bottom of the picture (1)."""
        return self.horizon + (1 - self.horizon) * near

    def floor(self, color: Color) -> None:
        self.pen.rect(-0.1, self.horizon, 1.1, 1.1, color, outline=False)


def draw_warehouse(ground: Ground) -> None:
    pen, rng, (left, top, right, bottom) = ground.pen, ground.rng, ground.opening
    wall, steel = rng.choice([((196, 190, 176), (236, 120, 30)), ((176, 188, 196), (230, 150, 30))])
    ground.floor((150, 148, 144))
    for x in (-0.5, -0.1, 0.3, 0.7, 1.1, 1.5):
        pen.line([(0.5 + (x - 0.5) * 0.4, bottom), (x, 1.1)], (118, 116, 114), 0.006)
    for x in (0.42, 0.58):
        pen.line([(x, bottom), (0.5 + (x - 0.5) * 3.4, 1.1)], (240, 200, 40), 0.016)
    for box in ((-0.1, -0.1, left, bottom), (right, -0.1, 1.1, bottom), (left, -0.1, right, top)):
        pen.rect(*box, wall, outline=False)
    frame = [(left, bottom), (left, top), (right, top), (right, bottom)]
    pen.line(frame, (70, 72, 80), 0.022)
    for x in (left + (right - left) * share for share in (0.34, 0.67)):
        pen.line([(x, top), (x, bottom)], (70, 72, 80), 0.008)
    for edge, outer in ((left - 0.02, -0.06), (right + 0.02, 1.06)):
        draw_rack(ground, edge, outer, steel)


def draw_rack(ground: Ground, edge: float, outer: float, steel: Color) -> None:
    """A rack along a side wall: shelves that open towards the viewer, with boxes on each."""
    pen, rng, end = ground.pen, ground.rng, ground.horizon + 0.03
    width = outer - edge
    pen.poly([(edge, end - 0.36), (outer, -0.06), (outer, end + 0.3), (edge, end)], (92, 90, 96), outline=False)
    for shelf in range(3):
        low_edge, low_outer = end - 0.01 - shelf * 0.12, end + 0.27 - shelf * 0.22
        for slot in range(3):
            a, b = 0.04 + slot * 0.32, 0.04 + slot * 0.32 + 0.25
            height = rng.uniform(0.55, 0.85)
            xs = edge + width * a, edge + width * b
            lows = [low_edge + (low_outer - low_edge) * share for share in (a, b)]
            tops = [low - height * (0.11 + 0.1 * share) for low, share in zip(lows, (a, b))]
            color = rng.choice([(206, 170, 118), (178, 138, 92), (150, 120, 96), (126, 140, 128)])
            pen.poly([(xs[0], lows[0]), (xs[0], tops[0]), (xs[1], tops[1]), (xs[1], lows[1])], color)
        pen.line([(edge, low_edge), (outer, low_outer)], steel, 0.014)
    for share in (0.0, 0.5):
        x = edge + width * share
        pen.line([(x, end - 0.36 - 0.2 * share), (x, end + 0.3 * share)], steel, 0.014)


def draw_stairs(ground: Ground) -> None:
    pen, rng, steps = ground.pen, ground.rng, ground.rng.choice((7, 8))
    tread, wall = rng.choice([((222, 212, 194), (116, 128, 84)), ((208, 208, 212), (128, 112, 92))])
    top, bottom = ground.horizon - 0.02, 0.86
    ground.floor(shade(tread, 0.82))
    pen.rect(-0.1, ground.horizon - 0.02, 1.1, bottom, wall, outline=False)
    edges = [(top + (bottom - top) * (i / steps) ** 1.15, 0.26 + 0.24 * i / steps) for i in range(steps + 1)]
    for (upper, _), (lower, half) in zip(edges, edges[1:]):
        middle = upper + (lower - upper) * 0.46
        pen.rect(0.5 - half, upper, 0.5 + half, middle, tread, outline=False)
        pen.rect(0.5 - half, middle, 0.5 + half, lower, shade(tread, 0.5), outline=False)
    for side in (-1, 1):
        rail = [(0.5 + side * half, y) for y, half in (edges[0], edges[-1])]
        pen.poly([*rail, *((x + side * 0.05, y - 0.01) for x, y in reversed(rail))], shade(tread, 0.72))
        post = rail[0][0] + side * 0.025
        pen.rect(post - 0.025, top - 0.06, post + 0.025, top + 0.02, tread)


def draw_tunnel(ground: Ground) -> None:
    pen, rng, (left, top, right, bottom) = ground.pen, ground.rng, ground.opening
    brick = rng.choice([(126, 92, 76), (112, 104, 100), (120, 100, 84)])
    water = mix((44, 92, 100), ground.reflection, 0.1)
    ground.floor(water)
    middle, half = (left + right) / 2, (right - left) / 2
    pen.poly(
        [(left, bottom), (right, bottom), (right + 0.08, 1.1), (left - 0.08, 1.1)],
        mix(water, ground.reflection, 0.3),
        outline=False,
    )
    spring = top + (bottom - top) * 0.5

    def arch(grow: float) -> list[Point]:
        turns = [math.pi * step / 14 for step in range(15)]
        radii = half + grow, spring - top + grow
        curve = [(middle - radii[0] * math.cos(turn), spring - radii[1] * math.sin(turn)) for turn in turns]
        return [(left - grow, bottom + grow * 0.3), *curve, (right + grow, bottom + grow * 0.3)]

    feet = bottom + 0.16
    inner = arch(0)
    pen.poly([(-0.1, feet), (-0.1, -0.1), (1.1, -0.1), (1.1, feet), *reversed(inner)], brick, outline=False)
    for grow, factor in ((0.05, 1.25), (0.15, 0.62), (0.26, 0.62), (0.38, 0.62)):
        pen.line(arch(grow)[1:-1], shade(brick, factor), 0.014 if grow > 0.05 else 0.03)
    for turn in (0.25, 0.75, 1.25, 1.75, 2.3, 2.85):
        ray = (-math.cos(turn), -math.sin(turn))
        pen.line(
            [(middle + ray[0] * (half + grow), spring + ray[1] * (half * 0.7 + grow)) for grow in (0.08, 0.5)],
            shade(brick, 0.62),
            0.008,
        )
    for side, edge in ((-0.1, left), (1.1, right)):
        pen.line([(side, feet), (edge, bottom)], shade(brick, 0.45), 0.02)
    draw_waves(ground, shade(water, 1.5), count=16)
    pen.poly([(-0.1, 0.86), (0.36, 0.86), (0.4, 0.9), (0.4, 1.1), (-0.1, 1.1)], (164, 158, 148))
    pen.poly([(-0.1, 0.95), (0.4, 0.95), (0.4, 1.1), (-0.1, 1.1)], (112, 106, 98), outline=False)


def draw_waves(ground: Ground, color: Color, count: int) -> None:
    """Wave crests, longer and bolder towards the viewer."""
    for index in range(count):
        near = 0.06 + 0.9 * (index + 0.5 * ground.rng.random()) / count
        x, y, length = ground.rng.uniform(-0.05, 0.95), ground.depth(near), 0.06 + 0.12 * near
        rise = 0.006 + 0.022 * near
        shape = ((0, 0), (0.3, 1), (0.5, 0.2), (0.8, 1), (1, 0))
        crest = [(x + length * share, y - rise * lift) for share, lift in shape]
        ground.pen.line(crest, color, 0.006 + 0.008 * near)


def draw_rubble(ground: Ground) -> None:
    rng = ground.rng
    dust, concrete = rng.choice([((150, 132, 112), (176, 172, 166)), ((132, 126, 122), (190, 182, 170))])
    ground.floor(dust)
    for x, width, height in ((-0.05, 0.24, 0.2), (0.36, 0.16, 0.08), (0.74, 0.32, 0.17)):
        draw_ruin(ground, x, width, height * rng.uniform(0.85, 1.15), mix(concrete, (150, 110, 90), 0.35))
    for index in range(17):
        near = (index + rng.random()) / 17
        size = 0.05 + 0.08 * near
        x, y = rng.uniform(-0.02, 1.02), ground.depth(0.08 + 0.95 * near)
        draw_block(ground, x, y, size * rng.uniform(0.8, 1.3), shade(concrete, rng.uniform(0.8, 1.12)))


def draw_ruin(ground: Ground, x: float, width: float, height: float, color: Color) -> None:
    """What is left of a wall: a jagged top edge and empty windows."""
    base, teeth = ground.horizon + 0.06, 6
    crest = [(x + width * i / teeth, ground.horizon - height * ground.rng.uniform(0.35, 1)) for i in range(teeth + 1)]
    ground.pen.poly([(x, base), *crest, (x + width, base)], color)
    for share in (0.2, 0.6):
        left = x + width * share
        top, bottom = ground.horizon - height * 0.25, ground.horizon + 0.02
        ground.pen.rect(left, top, left + width * 0.2, bottom, shade(color, 0.3))


def draw_block(ground: Ground, x: float, y: float, size: float, color: Color) -> None:
    """A broken slab with a light top, a dark side, and rusty bars that stick out of it."""
    pen, turn = ground.pen, ground.rng.uniform(-0.35, 0.35)
    rise = size * turn
    if ground.rng.random() < 0.4:
        for share in (0.1, 0.35):
            foot = (x + size * share, y - size * 0.5)
            bend = (foot[0] + size * 0.3, foot[1] - size * 0.75)
            pen.line([foot, (foot[0] + size * 0.05, foot[1] - size * 0.5), bend], (134, 62, 30), 0.009)
    a, b = (x - size, y - size * 0.35 + rise), (x + size * 0.7, y - size * 0.55 - rise)
    c, d = (x + size, y - size * 0.2 - rise), (x - size * 0.75, y + rise)
    drop = size * 0.5
    pen.poly([d, c, (c[0] - size * 0.1, c[1] + drop), (d[0] + size * 0.15, d[1] + drop)], shade(color, 0.5))
    pen.poly([a, d, (d[0] + size * 0.15, d[1] + drop), (a[0], a[1] + drop)], shade(color, 0.36))
    pen.poly([a, b, c, d], color)


def draw_cliff(ground: Ground) -> None:
    pen, rng, horizon = ground.pen, ground.rng, ground.horizon
    rock = rng.choice([(158, 112, 82), (140, 124, 112), (172, 132, 96)])
    ground.floor(mix((40, 104, 140), ground.reflection, 0.2))
    draw_waves(ground, (196, 222, 228), count=9)
    pen.poly(
        [(0.3, 0.46), (0.56, horizon + 0.03), (0.66, horizon + 0.05), (0.74, 0.64), (0.98, 0.9), (0.3, 0.9)],
        (232, 208, 150),
    )
    top, brow, foot = horizon - 0.15, rng.uniform(0.44, 0.5), 0.54
    face = [(-0.1, top - 0.03), (0.2, top), (brow, top + 0.02)]
    edge = [(brow - 0.02, top + 0.16), (brow + 0.04, top + 0.26), (brow + 0.02, top + 0.4), (foot, 0.82)]
    pen.poly([*face, *edge, (-0.1, 0.9)], rock)
    dark_side = [(brow - 0.12, top + 0.01), (brow, top + 0.02), *edge, (foot - 0.12, 0.84)]
    pen.poly(dark_side, shade(rock, 0.66), outline=False)
    for index in range(6):
        x = -0.02 + index * 0.075
        crack = [(x + rng.uniform(-0.02, 0.02), top + 0.05 + step * 0.15) for step in range(4)]
        pen.line(crack, shade(rock, 0.48), 0.012)
        pen.line([(a + 0.015, b) for a, b in crack[:3]], shade(rock, 1.25), 0.008)
    for y in (0.12, 0.28):
        pen.line([(-0.1, top + y), (0.2, top + y + 0.02), (brow - 0.03, top + y)], shade(rock, 0.7), 0.012)
    pen.poly([*face, (brow, top + 0.055), (0.2, top + 0.04), (-0.1, top + 0.02)], (96, 146, 62))
    ledge = [(-0.1, 0.84), (0.2, 0.82), (0.42, 0.85), (0.6, 0.83), (0.82, 0.86), (1.1, 0.84)]
    pen.poly([*ledge, (1.1, 1.1), (-0.1, 1.1)], shade(rock, 1.15))
    pen.poly([*ledge, *((x, y + 0.03) for x, y in reversed(ledge))], shade(rock, 0.4), outline=False)


def draw_water(ground: Ground) -> None:
    pen, rng = ground.pen, ground.rng
    water = mix(rng.choice([(26, 100, 150), (30, 120, 140), (36, 84, 140)]), ground.reflection, 0.18)
    ground.floor(water)
    pen.rect(-0.1, ground.horizon, 1.1, ground.depth(0.16), mix(water, ground.reflection, 0.3), outline=False)
    draw_waves(ground, mix(water, (255, 255, 255), 0.6), count=26)
    plank = (170, 124, 78)
    for x in (0.04, 0.37):
        pen.rect(x, 0.8, x + 0.035, 1.1, shade(plank, 0.55))
    for row in range(5):
        pen.rect(-0.1, 0.85 + row * 0.05, 0.42, 0.89 + row * 0.05, shade(plank, 1.1 - 0.12 * (row % 2)))


def draw_field(ground: Ground) -> None:
    pen, rng = ground.pen, ground.rng
    grass, crop = rng.choice(
        [((108, 168, 58), (198, 190, 74)), ((140, 176, 70), (214, 196, 90)), ((84, 152, 64), (178, 186, 70))]
    )
    stripe = mix(grass, crop, 0.7)
    ground.floor(grass)
    for band in range(5):
        upper, lower = ground.depth((band / 5) ** 1.5), ground.depth(((band + 0.5) / 5) ** 1.5)
        pen.poly([(-0.1, upper), (1.1, upper + 0.02), (1.1, lower + 0.02), (-0.1, lower)], stripe, outline=False)
    for x in (0.03, 0.13, 0.24, 0.86, 0.96):
        draw_tree(ground, x + rng.uniform(-0.02, 0.02), ground.horizon + 0.02, rng.uniform(0.12, 0.17))
    fence = ground.depth(0.12)
    for x in (i * 0.115 - 0.04 for i in range(11)):
        pen.rect(x, fence - 0.07, x + 0.02, fence + 0.02, (240, 234, 220), outline=False)
    for y in (fence - 0.05, fence - 0.015):
        pen.line([(-0.1, y), (1.1, y)], (240, 234, 220), 0.012)
    for _ in range(34):
        near = rng.uniform(0.3, 1)
        x, y, tall, lean = rng.random(), ground.depth(near), 0.02 + 0.035 * near, 0.04 if ground.windy else 0.0
        tuft = [(x - 0.012, y - tall), (x, y), (x + 0.004, y - tall * 1.2), (x, y), (x + 0.016, y - tall)]
        pen.line([(a + lean * (y - b) / tall, b) for a, b in tuft], shade(grass, 0.62), 0.006)


def draw_tree(ground: Ground, x: float, foot: float, height: float) -> None:
    """A tree; wind bends its crown over."""
    bend = height * 0.45 if ground.windy else 0.0
    trunk = [(x, foot), (x + bend * 0.3, foot - height * 0.5), (x + bend, foot - height * 0.8)]
    ground.pen.line(trunk, (96, 66, 40), 0.016)
    for dx, dy, size in ((-0.2, 0.6, 0.26), (0.25, 0.65, 0.28), (0, 0.9, 0.3)):
        ground.pen.disc(x + bend * dy + dx * height, foot - height * dy, height * size, height * size, (44, 104, 48))


CLOTHES: tuple[Color, ...] = (
    (214, 60, 52),
    (52, 96, 190),
    (240, 190, 50),
    (60, 150, 90),
    (240, 240, 236),
    (60, 60, 72),
    (130, 80, 160),
    (70, 180, 190),
)
SKINS: tuple[Color, ...] = ((242, 206, 176), (198, 148, 108), (122, 82, 58))


def draw_crowd(ground: Ground) -> None:
    pen, rng = ground.pen, ground.rng
    stone = rng.choice([(206, 194, 178), (190, 186, 188), (214, 196, 164)])
    ground.floor(stone)
    for x in (-1.6, -0.9, -0.3, 0.2, 0.5, 0.8, 1.3, 1.9, 2.6):
        pen.line([(0.5 + (x - 0.5) * 0.3, ground.horizon), (x, 1.1)], shade(stone, 0.8), 0.006)
    for near in (0.08, 0.2, 0.38, 0.62, 0.9):
        pen.line([(-0.1, ground.depth(near)), (1.1, ground.depth(near))], shade(stone, 0.8), 0.006)
    for row in range(5):
        near = 0.1 + 0.13 * row
        spacing = 0.062 + 0.02 * row
        for index in range(int(1.1 / spacing)):
            x = (index + rng.uniform(0.1, 0.9)) * spacing - 0.05
            draw_person(ground, x, ground.depth(near + rng.uniform(-0.03, 0.03)), 0.11 + 0.035 * row)


def draw_person(ground: Ground, x: float, foot: float, height: float) -> None:
    pen, rng = ground.pen, ground.rng
    coat = rng.choice(CLOTHES)
    half, hip, shoulder = height * 0.17, foot - height * 0.38, foot - height * 0.78
    pen.rect(x - half * 0.7, foot - height * 0.42, x + half * 0.7, foot, (56, 58, 78), outline=False)
    pen.poly([(x - half, hip), (x - half * 0.9, shoulder), (x + half * 0.9, shoulder), (x + half, hip)], coat)
    pen.disc(x, foot - height * 0.88, height * 0.11, height * 0.12, rng.choice(SKINS))


@dataclass(frozen=True, kw_only=True)
class Place:
    """How one place is drawn, and where in it things stand."""

    draw: Callable[[Ground], None]
    opening: Box | None = None
    """Where the sky is seen; None: everywhere above the horizon."""
    flag_feet: Mapping[str, Point]
    """Flag distance -> foot of its pole: x, and depth from the horizon (0) to the bottom of the picture (1)."""
    sun_x: float = 0.3
    """Where the sun or moon stands in the opening; nothing of the place may hide it."""
    afloat: bool = False
    """Whether the flag stands on a buoy."""
    clutter: tuple[str, ...] = ("cone", "barrel", "plant", "sign", "pallet", "bird")
    height_m: tuple[float, float] = (0.0, 0.0)
    """Range of the drop or climb."""
    depth_m: tuple[float, float] = (0.0, 0.0)
    """Range of the depth of water."""


FEET = {"near": (0.67, 0.87), "middle": (0.64, 0.5), "far": (0.58, 0.12)}

PLACES: dict[str, Place] = {
    "warehouse": Place(draw=draw_warehouse, opening=(0.22, 0.06, 0.78, 0.46), flag_feet=FEET),
    "stairs": Place(draw=draw_stairs, flag_feet={**FEET, "middle": (0.62, 0.42), "far": (0.58, 0.02)}, height_m=(3, 9)),
    "flooded tunnel": Place(
        draw=draw_tunnel,
        opening=(0.19, 0.05, 0.81, 0.47),
        flag_feet=FEET,
        afloat=True,
        clutter=("barrel", "bird"),
        depth_m=(0.5, 2),
    ),
    "rubble": Place(draw=draw_rubble, flag_feet=FEET, height_m=(1, 4)),
    "cliff": Place(
        draw=draw_cliff,
        flag_feet={**FEET, "middle": (0.66, 0.5), "far": (0.6, 0.12)},
        sun_x=0.78,
        clutter=("bird", "plant", "plant"),
        height_m=(12, 60),
    ),
    "open water": Place(
        draw=draw_water, flag_feet=FEET, afloat=True, clutter=("barrel", "bird", "bird"), depth_m=(4, 30)
    ),
    "field": Place(draw=draw_field, flag_feet=FEET),
    "crowd": Place(draw=draw_crowd, flag_feet={**FEET, "far": (0.58, 0.06)}),
}

"""A picture of a scene with ground truth: `render_scene(facts, seed)`.

Back to front: sky, weather, place (which leaves an opening to the sky), clutter, goal flag, load. Every fact is drawn
boldly enough to survive a reduction to 72 x 72 pixels, and none depends on another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from embervlm.robots.facts import SceneFacts, SceneObject
from embervlm.robots.places import INK, PLACES, SUPERSAMPLING, Box, Color, Ground, Pen, Place, View, shade
from embervlm.robots.sky import SKIES, WHITE, draw_sky, draw_weather, draw_weather_in_front, visible

STYLES = ("flat", "outlined", "textured")


@dataclass(frozen=True)
class RenderedScene:
    image: Image.Image
    """RGB, `size` x `size`."""
    objects: tuple[SceneObject, ...]
    """One object for each fact, then the clutter."""
    details: dict[str, float]
    """`weight_kg`, `distance_m`, `height_m` (drop or climb, else 0), `depth_m` (of water, else 0)."""


WEIGHTS_KG = {"light": (1, 3), "medium": (8, 15), "heavy": (30, 60)}
DISTANCES_M = {"near": (10, 60), "middle": (400, 900), "far": (2000, 5000)}
POLE_HEIGHTS = {"near": 0.45, "middle": 0.26, "far": 0.145}
FLAG_COLOR: Color = (236, 0, 140)


def render_scene(facts: SceneFacts, seed: int, size: int = 224) -> RenderedScene:
    """Draw `facts` in the way that `seed` picks; equal arguments give equal pixels.

    Of two scenes that differ in one fact only, the same seed keeps viewpoint, style and numbers.
    """
    rng = random.Random(seed)
    place = PLACES[facts.place]
    sky = replace(SKIES[facts.sky], disc_x=place.sun_x)
    view = View(mirrored=rng.random() < 0.5, zoom=rng.uniform(1.0, 1.06), tilt=rng.uniform(-0.02, 0.02))
    style = rng.choice(STYLES)
    hue = tuple(rng.uniform(0.94, 1.06) for _ in range(3))
    opening = opening_of(place, rng)
    details = draw_details(facts, place, rng)

    pen = Pen(size, view, outlined=style == "outlined")
    draw_sky(pen, sky, opening, rng)
    draw_weather(pen, facts.weather, sky, opening, rng)
    inside = place.opening is not None
    # Lamps: a room is lit better at night than a street.
    day = tuple(1 - (1 - gain) * 0.7 for gain in sky.light) if inside else sky.light
    pen.light = tuple(a * b for a, b in zip(day, hue))  # type: ignore[assignment]
    ground = Ground(pen=pen, rng=rng, opening=opening, reflection=sky.bands[-1], windy=facts.weather == "wind")
    pen.measure()
    place.draw(ground)
    place_box = pen.box
    pen.light = (1.0, 1.0, 1.0)
    draw_weather_in_front(pen, facts.weather, sky, opening, inside, rng)

    pen.light = tuple(1 - (1 - gain) * 0.35 for gain in sky.light)  # type: ignore[assignment]
    flag_box = draw_flag(pen, facts.flag, ground, place, rng)
    load_box = draw_load(pen, facts.load, rng)
    clutter = draw_clutter(pen, ground, place, (flag_box, load_box), rng)
    seen = box_in_view(view, opening)
    boxes = {"place": place_box, "weather": seen, "sky": seen, "load": load_box, "flag": flag_box}
    objects = [SceneObject(kind=name, label=label, box=boxes[name]) for name, label in facts.as_dict().items()]
    image = pen.image.reduce(SUPERSAMPLING)
    return RenderedScene(add_grain(image, seed) if style == "textured" else image, (*objects, *clutter), details)


def opening_of(place: Place, rng: random.Random) -> Box:
    """Where the sky is seen; it goes beyond the picture, so that no viewpoint shows its edge."""
    shift, horizon = rng.uniform(-0.02, 0.02), rng.uniform(0.36, 0.43)
    if place.opening is None:
        return -0.1, -0.1, 1.1, horizon
    left, top, right, bottom = place.opening
    return left + shift, top, right + shift, bottom


def box_in_view(view: View, box: Box) -> Box:
    points = [view.at(x, y) for x in box[::2] for y in box[1::2]]
    xs, ys = ([min(1.0, max(0.0, value)) for value in values] for values in zip(*points))
    return min(xs), min(ys), max(xs), max(ys)


def draw_details(facts: SceneFacts, place: Place, rng: random.Random) -> dict[str, float]:
    ranges = {
        "weight_kg": WEIGHTS_KG[facts.load],
        "distance_m": DISTANCES_M[facts.flag],
        "height_m": place.height_m,
        "depth_m": place.depth_m,
    }
    return {name: round(rng.uniform(*bounds), 1) for name, bounds in ranges.items()}


def add_grain(image: Image.Image, seed: int) -> Image.Image:
    """`image` with blotches and fine grain, as on rough paper."""
    noise = np.random.default_rng(seed % 2**63)
    blotches = Image.fromarray(noise.integers(0, 29, (40, 40), dtype=np.uint8)).resize(image.size)
    grain = noise.integers(-12, 13, image.size[::-1], dtype=np.int16) + np.asarray(blotches, dtype=np.int16) - 14
    return Image.fromarray((np.asarray(image, dtype=np.int16) + grain[:, :, None]).clip(0, 255).astype(np.uint8))


# Sky and weather


# Flag, load, clutter


def draw_flag(pen: Pen, distance: str, ground: Ground, place: Place, rng: random.Random) -> Box:
    """The goal flag on its pole."""
    x, near = place.flag_feet[distance]
    x, foot = x + rng.uniform(-0.02, 0.02), ground.depth(near)
    height = POLE_HEIGHTS[distance] * rng.uniform(0.96, 1.04)
    if place.afloat:
        pen.disc(x, foot + height * 0.02, height * 0.17, height * 0.08, (250, 214, 40))
        pen.disc(x, foot + height * 0.02, height * 0.17, height * 0.03, (60, 60, 66))
    pen.measure()
    top, pole = foot - height, 0.012 + 0.022 * height
    pen.rect(x - pole, top - pole / 2, x + pole, foot, INK, outline=False)
    pen.rect(x - pole * 0.45, top, x + pole * 0.45, foot, WHITE, outline=False)
    length, tall, wave = height * 0.56, height * 0.42, height * (0.07 if ground.windy else 0.03)
    halo = 0.007 + 0.01 * height

    def cloth(upper: float, lower: float, grow: float) -> list[tuple[float, float]]:
        shares = [step / 6 for step in range(7)]
        lift = [wave * math.sin(share * 6.0) for share in shares]
        xs = [x - grow + (length + 2 * grow) * share for share in shares]
        over = [(a, top + tall * upper - grow + b) for a, b in zip(xs, lift)]
        return over + [(a, top + tall * lower + grow + b) for a, b in zip(reversed(xs), reversed(lift))]

    pen.poly(cloth(0, 1, halo * 1.6), INK, outline=False)
    pen.poly(cloth(0, 1, halo * 0.8), WHITE, outline=False)
    pen.poly(cloth(0, 1, 0), FLAG_COLOR, outline=False)
    pen.poly(cloth(0.38, 0.62, 0), WHITE, outline=False)
    return pen.box


def draw_load(pen: Pen, load: str, rng: random.Random) -> Box:
    """The load beside the start: one parcel, two crates, or a strapped stack of four."""
    x, foot, scale = rng.uniform(0.07, 0.09), rng.uniform(0.93, 0.95), rng.uniform(0.95, 1.05)
    halo = 0.008
    cells, size, tall = {
        "light": (((0.5, 0),), 0.13 * scale, 0.10 * scale),
        "medium": (((0, 0), (1.04, 0)), 0.125 * scale, 0.125 * scale),
        "heavy": (((0, 0), (1, 0), (0, 1), (1, 1)), 0.142 * scale, 0.142 * scale),
    }[load]
    pen.disc(x + size, foot, size * 1.3, 0.02, shade(INK, 1.4), outline=False)
    pen.measure()
    for column, row in cells:
        left, low = x + column * size, foot - row * tall
        pen.rect(left - halo, low - tall - halo, left + size + halo, low + halo, INK, outline=False)
    for column, row in cells:
        DRAW_BOX[load](pen, x + column * size, foot - row * tall, size, tall)
    return pen.box


def draw_parcel(pen: Pen, left: float, low: float, size: float, tall: float) -> None:
    pen.rect(left, low - tall, left + size, low, (236, 188, 112), outline=False)
    pen.rect(left + size * 0.4, low - tall, left + size * 0.6, low, (255, 240, 205), outline=False)


def draw_crate(pen: Pen, left: float, low: float, size: float, tall: float) -> None:
    pen.rect(left, low - tall, left + size, low, (150, 84, 30), outline=False)
    right, top, edge = left + size, low - tall, size * 0.1
    pen.rect(left + edge, top + edge, right - edge, low - edge, (224, 146, 62), outline=False)
    pen.line([(left + edge, low - edge), (right - edge, top + edge)], (150, 84, 30), 0.014)


def draw_steel_crate(pen: Pen, left: float, low: float, size: float, tall: float) -> None:
    pen.rect(left + 0.003, low - tall + 0.003, left + size - 0.003, low - 0.003, (70, 142, 206), outline=False)
    pen.rect(left + 0.003, low - tall + 0.003, left + size - 0.003, low - tall * 0.82, (150, 202, 240), outline=False)
    for share in (0.2, 0.68):
        pen.rect(left + size * share, low - tall, left + size * (share + 0.12), low, (16, 24, 44), outline=False)


DRAW_BOX: dict[str, Callable[[Pen, float, float, float, float], None]] = {
    "light": draw_parcel,
    "medium": draw_crate,
    "heavy": draw_steel_crate,
}


def draw_clutter(
    pen: Pen, ground: Ground, place: Place, taken: tuple[Box, ...], rng: random.Random
) -> list[SceneObject]:
    """Up to five things that mean nothing, none of them on a box of `taken` or on another."""
    boxes, objects = list(taken), []
    for _ in range(rng.randint(0, 5)):
        kind = rng.choice(place.clutter)
        for _ in range(4):
            if kind == "bird":
                left, top, right, bottom = visible(ground.opening)
                x, y, size = rng.uniform(left + 0.08, right - 0.08), rng.uniform(top + 0.05, bottom - 0.1), 0.05
            else:
                near = rng.uniform(0.3, 0.95)
                x, y, size = rng.uniform(0.08, 0.92), ground.depth(near), 0.05 + 0.07 * near
            around = box_in_view(pen.view, (x - size * 0.7, y - size * 1.3, x + size * 0.7, y + size * 0.2))
            if not any(overlap(around, box) for box in boxes):
                pen.measure()
                DRAW_CLUTTER[kind](pen, x, y, size)
                boxes.append(pen.box)
                objects.append(SceneObject(kind="clutter", label=kind, box=pen.box))
                break
    return objects


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_cone(pen: Pen, x: float, y: float, size: float) -> None:
    pen.rect(x - size * 0.45, y - size * 0.12, x + size * 0.45, y, (200, 70, 10))
    pen.poly([(x - size * 0.3, y - size * 0.12), (x, y - size), (x + size * 0.3, y - size * 0.12)], (246, 100, 20))
    pen.poly(
        [
            (x - size * 0.21, y - size * 0.4),
            (x - size * 0.12, y - size * 0.66),
            (x + size * 0.12, y - size * 0.66),
            (x + size * 0.21, y - size * 0.4),
        ],
        WHITE,
        outline=False,
    )


def draw_barrel(pen: Pen, x: float, y: float, size: float) -> None:
    pen.rect(x - size * 0.3, y - size * 0.9, x + size * 0.3, y, (58, 120, 78))
    for low in (y - size * 0.3, y - size * 0.62):
        pen.rect(x - size * 0.33, low - size * 0.06, x + size * 0.33, low, (36, 80, 50), outline=False)
    pen.disc(x, y - size * 0.9, size * 0.3, size * 0.09, (96, 160, 112))


def draw_plant(pen: Pen, x: float, y: float, size: float) -> None:
    for lean in (-0.4, -0.15, 0.15, 0.4):
        blade = [(x - size * 0.07, y), (x + size * lean, y - size), (x + size * 0.07, y)]
        pen.poly(blade, (40, 118, 52), outline=False)


def draw_sign(pen: Pen, x: float, y: float, size: float) -> None:
    pen.rect(x - size * 0.06, y - size, x + size * 0.06, y, (200, 200, 204))
    board = [(x, y - size * 1.25), (x + size * 0.34, y - size * 0.65), (x - size * 0.34, y - size * 0.65)]
    pen.poly(board, (250, 210, 40))


def draw_pallet(pen: Pen, x: float, y: float, size: float) -> None:
    pen.rect(x - size * 0.56, y - size * 0.42, x + size * 0.56, y, (70, 48, 30), outline=False)
    for row in range(3):
        low = y - size * row * 0.16
        pen.rect(x - size * 0.6, low - size * 0.1, x + size * 0.6, low, (206, 170, 120), outline=False)


def draw_bird(pen: Pen, x: float, y: float, size: float) -> None:
    shape = ((-0.6, -0.25), (-0.25, -0.35), (0, 0), (0.25, -0.35), (0.6, -0.25))
    wings = [(x + size * dx, y + size * dy) for dx, dy in shape]
    pen.line(wings, (245, 245, 245), 0.014)
    pen.line(wings, (40, 40, 50), 0.008)


DRAW_CLUTTER: dict[str, Callable[[Pen, float, float, float], None]] = {
    "cone": draw_cone,
    "barrel": draw_barrel,
    "plant": draw_plant,
    "sign": draw_sign,
    "pallet": draw_pallet,
    "bird": draw_bird,
}

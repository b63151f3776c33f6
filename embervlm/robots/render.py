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
from embervlm.robots.places import INK, PLACES, SUPERSAMPLING, Box, Color, Ground, Pen, Place, View, mix, shade

STYLES = ("flat", "outlined", "textured")


@dataclass(frozen=True)
class RenderedScene:
    image: Image.Image
    """RGB, `size` x `size`."""
    objects: tuple[SceneObject, ...]
    """One object for each fact, then the clutter."""
    details: dict[str, float]
    """`weight_kg`, `distance_m`, `height_m` (drop or climb, else 0), `depth_m` (of water, else 0)."""


@dataclass(frozen=True, kw_only=True)
class Sky:
    """How a time of day looks."""

    bands: tuple[Color, ...]
    """Colors from the top of the sky down to the horizon."""
    disc: Color
    disc_y: float
    """Height of sun or moon in the opening, from its top (0) to the horizon (1)."""
    disc_x: float = 0.3
    """Its place from the opening's left (0) to its right (1)."""
    disc_radius: float
    """Relative to the height of the opening."""
    cloud: Color
    streak: Color
    """Rain; stands out from the sky."""
    fog: Color
    light: tuple[float, float, float]
    """Factor on the colors of the place."""
    starry: bool = False
    """Whether there are stars, and a moon in place of the sun."""


SKIES: dict[str, Sky] = {
    "dawn": Sky(
        bands=((172, 150, 222), (240, 170, 204), (255, 214, 196), (255, 244, 190)),
        disc=(255, 252, 214),
        disc_y=0.76,
        disc_radius=0.16,
        cloud=(104, 96, 122),
        streak=(66, 66, 112),
        fog=(238, 222, 228),
        light=(1.0, 0.93, 0.96),
    ),
    "noon": Sky(
        bands=((20, 118, 240), (64, 158, 250), (140, 206, 255)),
        disc=(255, 240, 90),
        disc_y=0.24,
        disc_radius=0.16,
        cloud=(92, 98, 108),
        streak=(20, 46, 104),
        fog=(216, 228, 238),
        light=(1.05, 1.05, 1.05),
    ),
    "dusk": Sky(
        bands=((92, 28, 66), (190, 40, 36), (244, 92, 16), (255, 150, 20)),
        disc=(255, 214, 60),
        disc_y=1.0,
        disc_radius=0.26,
        cloud=(66, 54, 64),
        streak=(222, 226, 240),
        fog=(222, 168, 140),
        light=(0.92, 0.78, 0.70),
    ),
    "night": Sky(
        bands=((6, 8, 34), (10, 16, 58), (18, 30, 84)),
        disc=(246, 244, 214),
        disc_y=0.26,
        disc_radius=0.14,
        cloud=(84, 88, 104),
        streak=(170, 190, 230),
        fog=(116, 126, 152),
        light=(0.62, 0.66, 0.80),
        starry=True,
    ),
}

WEIGHTS_KG = {"light": (1, 3), "medium": (8, 15), "heavy": (30, 60)}
DISTANCES_M = {"near": (10, 60), "middle": (400, 900), "far": (2000, 5000)}
POLE_HEIGHTS = {"near": 0.45, "middle": 0.26, "far": 0.145}
FLAG_COLOR: Color = (236, 0, 140)
WHITE: Color = (255, 255, 255)


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


def visible(opening: Box) -> Box:
    """The part of `opening` inside the picture."""
    return tuple(min(1.0, max(0.0, value)) for value in opening)  # type: ignore[return-value]


def draw_sky(pen: Pen, sky: Sky, opening: Box, rng: random.Random) -> None:
    left, top, right, bottom = visible(opening)
    height = bottom - top
    rows = np.linspace(0, len(sky.bands) - 1, 64)
    column = np.stack([np.interp(rows, range(len(sky.bands)), channel) for channel in zip(*sky.bands)], axis=-1)
    gradient = Image.fromarray(column.astype(np.uint8)[:, None, :])
    first, last = round((top - 0.03) * pen.size), round((bottom + 0.04) * pen.size)
    tall = gradient.resize((1, last - first), Image.Resampling.BILINEAR)
    pen.image.paste(tall.resize((pen.size, last - first), Image.Resampling.NEAREST), (0, first))
    if sky.starry:
        for _ in range(round(60 * (right - left))):
            x, y, radius = rng.uniform(left, right), top + rng.random() * height, rng.choice((0.003, 0.005, 0.008))
            pen.disc(x, y, radius, radius, (255, 255, 235), outline=False)
    x, y, radius = disc_of(sky, opening)
    if not sky.starry:
        glow = mix(sky.bands[1 if sky.disc_y < 0.5 else -1], sky.disc, 0.3)
        pen.disc(x, y, radius * 1.4, radius * 1.4, glow, outline=False)
    draw_sun_or_moon(pen, sky, opening, sky.disc, sky.bands[0])


def draw_sun_or_moon(pen: Pen, sky: Sky, opening: Box, color: Color, behind: Color) -> None:
    x, y, radius = disc_of(sky, opening)
    pen.disc(x, y, radius, radius, color, outline=False)
    if sky.starry:
        pen.disc(x + radius * 0.55, y - radius * 0.25, radius * 0.8, radius * 0.8, behind, outline=False)


def disc_of(sky: Sky, opening: Box) -> tuple[float, float, float]:
    left, top, right, bottom = visible(opening)
    height = bottom - top
    return left + sky.disc_x * (right - left), top + sky.disc_y * height, sky.disc_radius * height


def draw_weather(pen: Pen, weather: str, sky: Sky, opening: Box, rng: random.Random) -> None:
    """The weather in the sky, behind the place."""
    if weather == "rain":
        draw_rain(pen, sky, opening, rng)
    elif weather == "wind":
        draw_wind(pen, opening, rng)
    elif weather == "fog":
        draw_fog(pen, sky, opening, rng)


def draw_rain(pen: Pen, sky: Sky, opening: Box, rng: random.Random) -> None:
    left, top, right, bottom = visible(opening)
    width, height = right - left, bottom - top
    sun_x, sun_y, radius = disc_of(sky, opening)
    for index in range(26):
        row, column = divmod(index, 13)
        x, y = left + width * (column + rng.random()) / 13, top + height * (0.02 + 0.2 * row + rng.uniform(0, 0.08))
        size = height * rng.uniform(0.13, 0.19)
        if math.hypot(x - sun_x, y - sun_y) > radius + size * 0.75:
            pen.disc(x, y, size * 1.25, size, shade(sky.cloud, rng.uniform(0.85, 1.15)), outline=False)
    for index in range(round(44 * width)):
        x = left - 0.05 + (index + rng.random()) / 44
        y, length = top + height * rng.uniform(0.3, 0.85), height * rng.uniform(0.25, 0.38)
        pen.line([(x + length * 0.4, y - length * 0.3), (x, y + length * 0.7)], sky.streak, 0.011)


def draw_wind(pen: Pen, opening: Box, rng: random.Random) -> None:
    left, top, right, bottom = visible(opening)
    width, height = right - left, bottom - top
    for share_x, share_y in ((0.05, 0.52), (0.24, 0.86), (0.72, 0.62)):
        draw_swirl(pen, left + width * share_x, top + height * (share_y + rng.uniform(-0.04, 0.04)), height * 0.13)
    mast, wind_y, length, half = left + width * 0.5, top + height * 0.22, 0.2, 0.042
    pen.line([(mast, wind_y - 0.06), (mast, bottom + 0.02)], (240, 240, 240), 0.022)
    pen.line([(mast, wind_y - 0.06), (mast, bottom + 0.02)], (60, 60, 70), 0.012)
    back, tip, wide, slim = mast - 0.01, mast + length + 0.01, half + 0.01, half * 0.45 + 0.01
    rim = [(back, wind_y - wide), (tip, wind_y - slim), (tip, wind_y + slim), (back, wind_y + wide)]
    pen.poly(rim, INK, outline=False)
    for band in range(5):
        a, b = (mast + length * share / 5 for share in (band, band + 1))
        tall_a, tall_b = (half * (1 - 0.11 * share) for share in (band, band + 1))
        pen.poly(
            [(a, wind_y - tall_a), (b, wind_y - tall_b), (b, wind_y + tall_b), (a, wind_y + tall_a)],
            (255, 110, 0) if band % 2 == 0 else WHITE,
            outline=False,
        )
    for _ in range(9):
        x, y = rng.uniform(left, right), rng.uniform(top, bottom)
        pen.poly([(x, y), (x + 0.016, y - 0.01), (x + 0.034, y), (x + 0.016, y + 0.01)], (150, 110, 30))


def draw_swirl(pen: Pen, x: float, y: float, size: float) -> None:
    """A stroke that ends in a curl, as wind is drawn."""
    curl = [
        (x + size * 2 + math.sin(turn) * size * (1 - turn / 9), y - size + math.cos(turn) * size * (1 - turn / 9))
        for turn in (0.6 * step for step in range(9))
    ]
    pen.line([(x, y), *curl], (70, 84, 120), 0.018)
    pen.line([(x, y), *curl], WHITE, 0.011)


def draw_fog(pen: Pen, sky: Sky, opening: Box, rng: random.Random) -> None:
    left, top, right, bottom = opening
    pen.veil((left - 0.02, top, right + 0.02, bottom + 0.03), sky.fog, 0.42, 0.55)
    height = bottom - max(top, 0.0)
    draw_sun_or_moon(pen, sky, opening, mix(sky.disc, sky.fog, 0.25), mix(sky.bands[0], sky.fog, 0.5))
    for share in (0.08, 0.46, 0.62, 0.94):
        y, x = bottom - height * (1 - share), rng.uniform(left, left + 0.3 * (right - left))
        end = x + (right - left) * rng.uniform(0.5, 0.7)
        pen.line([(x, y), (end, y)], mix(sky.fog, WHITE, 0.25), height * 0.075)
        for edge in (x, end):
            pen.disc(edge, y, height * 0.036, height * 0.036, mix(sky.fog, WHITE, 0.25), outline=False)


def draw_weather_in_front(pen: Pen, weather: str, sky: Sky, opening: Box, inside: bool, rng: random.Random) -> None:
    """The weather over the place: veiled distance, drops."""
    horizon = opening[3]
    if weather == "fog" and inside:
        pen.veil((opening[0], horizon, opening[2], horizon + 0.14), sky.fog, 0.7, 0.0)
    elif weather == "fog":
        pen.veil((-0.1, horizon - 0.17, 1.1, horizon), sky.fog, 0.1, 0.75)
        pen.veil((-0.1, horizon, 1.1, horizon + 0.34), sky.fog, 0.75, 0.0)
    elif weather == "rain" and not inside:
        for _ in range(24):
            x, y = rng.uniform(0, 1), rng.uniform(horizon, 1)
            pen.line([(x + 0.02, y - 0.05), (x, y)], mix(sky.streak, (200, 214, 235), 0.6), 0.006)


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

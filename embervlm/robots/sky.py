"""Sky and weather of a scene, behind and in front of the place."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from embervlm.robots.places import INK, Box, Color, Pen, mix, shade

WHITE: Color = (255, 255, 255)


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

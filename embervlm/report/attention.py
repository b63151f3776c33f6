"""Figures of one sample: where in the picture each step looked, and on which known things.

They place their panels themselves: the automatic layout takes a second for each.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from embervlm.report.drawing import BLUE, DARK, LIGHT, NoData, heatmap, label
from embervlm.report.pictures import VEIL, VEIL_GREY, relative_attention
from embervlm.report.recorded import Attention, Sample
from embervlm.report.things import UNKNOWN, Looks, looks_of, things_in

ATTENTION_KEY = "Clear: where the model looked most. Faded: where it did not look."


class _Sheet:
    """A figure with the question on top and the key below; places are in inches from the lower left."""

    def __init__(
        self, width: float, height: float, sample: Sample, *, characters: int, top: float, left: float
    ) -> None:
        title = textwrap.wrap(label(sample.instruction, 150), characters)
        self.width, self.height = width, height + top + 0.2 * len(title)
        self.figure = Figure(figsize=(self.width, self.height))
        self.figure.set_layout_engine("none")
        bold: Any = {"fontsize": 10, "fontweight": "bold"}
        self.figure.text(left / width, 1 - 0.1 / self.height, "\n".join(title), va="top", **bold)
        self.figure.text(left / width, 0.08 / self.height, ATTENTION_KEY, fontsize=8)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        scale = 1 / self.height
        return self.figure.add_axes((left / self.width, bottom * scale, width / self.width, height * scale))


def reasoning_attention(sample: Sample, picture: Image.Image | None) -> Figure:
    """The picture once per step, faded where that step did not look."""
    attention = _attention_of(sample)
    columns = min(5, len(attention.steps))
    rows = math.ceil(len(attention.steps) / columns)
    looks = looks_of(sample, len(attention.steps))
    row_height = 3.35 if looks.names else 2.95
    height = row_height * rows + 0.3
    sheet = _Sheet(2.1 * columns + 0.3, height, sample, characters=27 * columns, top=0.3, left=0.15)
    for place, shares in enumerate(attention.steps):
        row, column = divmod(place, columns)
        axes = sheet.axes(0.15 + 2.1 * column, height - row_height * row - 2.05, 1.95, 1.95)
        _show_picture(axes, picture, shares, attention.grid)
        axes.set_title(f"Step {place + 1}", fontsize=9, pad=3)
        lines = textwrap.wrap(label(sample.steps[place] if place < len(sample.steps) else "", 130), 27)[:5]
        axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7.2)
        told = textwrap.wrap(label(looks.in_words(place), 75), 31)[:3]
        axes.text(0, -0.38, "\n".join(told), transform=axes.transAxes, va="top", fontsize=6.8, color=BLUE)
    return sheet.figure


def multimodal_grounding(sample: Sample, picture: Image.Image | None) -> Figure:
    """Known things in the picture, and which share of each step's attention falls on each of them."""
    attention, things = _attention_of(sample), things_in(sample)
    if not things:
        raise NoData(UNKNOWN)
    height = max(4.0, 1.0 + 0.34 * len(attention.steps))
    sheet = _Sheet(9.0, height, sample, characters=100, top=0.5, left=0.2)
    axes = sheet.axes(0.2, height - 3.7, 3.7, 3.7)
    _show_picture(axes, picture, np.mean(attention.steps, axis=0).tolist(), attention.grid)
    axes.set_title("Mean attention of all steps")
    for thing in things:
        _outline(axes, thing.name, thing.areas)
    axes = sheet.axes(4.7, 0.75, 3.3, height - 0.75)
    image = _attention_on_things(axes, looks_of(sample, len(attention.steps)))
    beside = sheet.axes(8.1, 0.75, 0.14, height - 0.75)
    sheet.figure.colorbar(image, cax=beside, label="attention (share, 0 to 1)")
    return sheet.figure


def _attention_of(sample: Sample) -> Attention:
    if sample.attention is None or not sample.attention.steps:
        raise NoData("No attention was recorded; evaluate with --save_reasoning_samples.")
    return sample.attention


def _outline(axes: Axes, kind: str, areas: Sequence[Sequence[float]]) -> None:
    """A frame around each area, dark dashes on light, and the name of the thing in the first."""
    for left, top, right, bottom in areas:
        for look in ({"edgecolor": LIGHT, "linewidth": 2.4}, {"edgecolor": DARK, "linewidth": 1.0, "linestyle": "--"}):
            options: Any = {"fill": False, "transform": axes.transAxes, **look}
            axes.add_patch(Rectangle((left, 1 - bottom), right - left, bottom - top, **options))
    left, top, _, _ = areas[0]
    ground = {"facecolor": LIGHT, "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
    place = (left + 0.015, 1 - top - 0.015)
    axes.text(*place, label(kind, 18), transform=axes.transAxes, va="top", fontsize=8, color=DARK, bbox=ground)


def _attention_on_things(axes: Axes, looks: Looks) -> Any:
    image = heatmap(axes, np.array(looks.shares), fontsize=8)
    names = [f"{label(name, 14)}\n({area:.0%})" for name, area in zip(looks.names, looks.covered)]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(looks.shares)), [f"step {place + 1}" for place in range(len(looks.shares))])
    axes.set_xlabel("thing (share of the picture it covers)")
    axes.set_title("Attention on each thing")
    return image


def _show_picture(axes: Axes, picture: Image.Image | None, shares: Sequence[float], grid: tuple[int, int]) -> None:
    """`picture` in a square, faded where `shares` are small; grey where there is none."""
    axes.axis("off")
    shown = picture or Image.new("RGB", (8, 8), (200, 200, 200))
    shown = shown.resize((240, 240), Image.Resampling.BILINEAR)
    relative = Image.fromarray(np.float32(relative_attention(shares, grid) ** 0.7))
    clear = np.asarray(relative.resize(shown.size, Image.Resampling.BILINEAR))[..., None]
    kept = 1 - VEIL * (1 - clear)
    axes.imshow(np.uint8(np.asarray(shown) * kept + VEIL_GREY * (1 - kept)), extent=(0, 1, 0, 1))
    if picture is None:
        ground = {"facecolor": LIGHT, "edgecolor": "none"}
        axes.text(0.5, 0.5, "picture not found", ha="center", va="center", fontsize=8, color=DARK, bbox=ground)

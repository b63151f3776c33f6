"""The style of our figures: colours, fonts, and shapes that several of them use.

Colours are Okabe and Ito's, which the colour-blind tell apart; line styles, markers and hatches say the same in grey.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
)
INK, DIM, EDGE = "#1d2331", "#8a92a3", "#14181f"
"""Text, axes and the edges of bars; a page replaces `INK` by its own text colour."""
SERIES = [
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (SKY, (0, (8, 2)), "P"),
    (DIM, (0, (1, 1)), "X"),
    (BLUE, "--", "*"),
    (VERMILLION, ":", "<"),
    (GREEN, "-", ">"),
    (PURPLE, "--", "p"),
    (ORANGE, "-", "h"),
    (SKY, ":", "d"),
    (DIM, "-", "8"),
]
"""Colour, line style and marker of the first, second, ... line; they begin again where there are more."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DIM,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": DIM,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.8,
    "figure.dpi": 110.0,
    "savefig.dpi": 110.0,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": False,
}
DARK, LIGHT = "#111111", "#fefefe"
"""Text on a light and on a dark ground, whatever the page."""
BAR: Any = {"edgecolor": EDGE, "linewidth": 0.6}


NARROW_INCHES = 3.6
"""Width of a figure for a phone, whose page shows it about 330 pixels wide: text of 9 points has 11 pixels there."""


class NoData(ValueError):
    """There is nothing to draw; the message says what is missing and how to get it."""


@contextmanager
def style() -> Iterator[None]:
    """Our settings for whatever is drawn and saved inside; a font without a sign draws a box and says nothing."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def label(name: str, most: int = 28) -> str:
    """`name` on one line, without what a font cannot draw, and not too long."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in name.replace("_", " ")).split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def panels(
    width: float, height: float, count: int = 1, *, columns: int | None = None, narrow: bool = False, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches with `count` panels side by side, or in rows of `columns`.

    A `narrow` one has them below each other, and leaves out `width_ratios`.
    """
    rows = math.ceil(count / (columns or count))
    if narrow:
        options.pop("width_ratios", None)
        width, height, rows = NARROW_INCHES, 0.3 + count * min(max(height / rows, 2.4), 3.4), count
    figure = Figure(figsize=(width, height))
    return figure, list(figure.subplots(rows, math.ceil(count / rows), squeeze=False, **options).flat)[:count]


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """A legend under the panels, in as many columns as fit. `handles`: by what they are called."""
    if handles:
        column = 0.65 + 0.08 * max(map(len, handles))  # inches
        num_columns = max(1, min(len(handles), int(figure.get_figwidth() / column)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=num_columns)


def heatmap(axes: Axes, shares: np.ndarray, *, fontsize: float) -> AxesImage:
    """Shares in [0, 1] as coloured squares with their percentage; "-" for NaN."""
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        shown = "-" if np.isnan(share) else f"{share:.0%}"
        color = DIM if np.isnan(share) else LIGHT if share < 0.55 else DARK
        axes.text(column, row, shown, ha="center", va="center", fontsize=fontsize, color=color)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def rows_of_bars(axes: Axes, names: Sequence[str]) -> None:
    """Name the horizontal bars at 0, 1, ..., the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share measured `count` times (Wilson 1927)."""
    if count <= 0:
        return share, share
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(max(share * (1 - share), 0) / count + z * z / (4 * count * count))
    return max(0.0, min(center - spread, share)), min(1.0, max(center + spread, share))

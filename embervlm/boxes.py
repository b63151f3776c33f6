"""How a picture's visual tokens stand, and which of them a box covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """How the visual tokens of a picture stand; they are counted row by row."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def covered(boxes: Sequence[Sequence[float]], grid: Grid) -> np.ndarray:
    """Visual tokens that any of `boxes` (left, top, right, bottom in [0, 1]) covers, `[rows * columns]` bool."""
    mask = np.zeros(grid, bool)
    for left, top, right, bottom in boxes:
        mask[_touched(top, bottom, grid.rows), _touched(left, right, grid.columns)] = True
    return mask.ravel()


def _touched(first: float, last: float, count: int) -> slice:
    """Which of `count` equal parts of [0, 1] lie between `first` and `last`: at least one."""
    return slice(int(first * count), max(int(first * count) + 1, int(np.ceil(last * count))))

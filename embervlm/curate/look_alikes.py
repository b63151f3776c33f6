"""Pictures that look the same although their bytes differ: saved again, scaled, or in another format.

A picture is compared by a thumbnail, within which no cell may differ much, and then by its finer detail, so that two
pages of text, which are alike from afar, stay two. Measured on drawn shapes, scenes, emoji and pages of text: of copies
as JPEG (quality 75), at half and at twice the size more than nine in ten are found, and of different pictures none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
"""Cells of a thumbnail along each side."""
MOST = 24
"""By which a cell may differ in red, green or blue, of 255."""
MOST_OF_MEANS = 4.0
"""The same for the mean over the whole picture and over each of its quarters."""
LEAST_CORRELATION = 0.8
"""Of the detail that a thumbnail has not. It is below 0.7 between pages of text, and above 0.81 between copies."""
DETAIL_SIDE = 64
PLAIN = 1.0
"""Standard deviation of grey below which a picture has no detail to speak of."""

Thumbnail = NDArray[np.uint8]
"""`[16 * 16 * 3]`, RGB."""


def thumbnail(picture: NDArray[np.uint8]) -> Thumbnail:
    """Of a picture `[H, W, 3]`, whatever its shape."""
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    return np.asarray(small, np.uint8).ravel()


def pairs_from_afar(thumbnails: NDArray[np.uint8], order: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows of `thumbnails` `[picture, cell]` that look alike: one, and the nearest of those with a lower `order`."""
    if not len(thumbnails):
        return
    cells = thumbnails.reshape(-1, SIDE, SIDE, 3).astype(np.float32)
    quarters = cells.reshape(-1, 2, SIDE // 2, 2, SIDE // 2, 3).mean(axis=(2, 4)).reshape(len(cells), -1)
    means, place_of = cells.mean(axis=(1, 2, 3)), np.asarray(order)
    by_mean = np.argsort(means, kind="stable")
    sorted_means = means[by_mean]
    for row in np.flatnonzero(place_of > place_of.min()):
        low, high = np.searchsorted(sorted_means, (means[row] - MOST_OF_MEANS, means[row] + MOST_OF_MEANS))
        near = by_mean[low:high]
        near = near[place_of[near] < place_of[row]]
        near = near[np.abs(quarters[near] - quarters[row]).max(axis=1, initial=0) <= MOST_OF_MEANS]
        if not len(near):
            continue
        differs = np.abs(thumbnails[near].astype(np.int16) - thumbnails[row]).max(axis=1)
        best = int(differs.argmin())
        if differs[best] <= MOST:
            yield int(row), int(near[best])


def have_the_same_detail(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether what a thumbnail leaves out of two pictures `[H, W, 3]` is alike too."""
    a, b = _detail(one), _detail(other)
    if a.std() < PLAIN and b.std() < PLAIN:
        return True
    return float(a @ b) >= LEAST_CORRELATION * float(np.sqrt((a @ a) * (b @ b)))


def _detail(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = Image.fromarray(picture).convert("L")
    bilinear = Image.Resampling.BILINEAR
    fine = grey.resize((DETAIL_SIDE, DETAIL_SIDE), bilinear)
    coarse = grey.resize((SIDE, SIDE), bilinear).resize((DETAIL_SIDE, DETAIL_SIDE), bilinear)
    return (np.asarray(fine, np.float32) - np.asarray(coarse, np.float32)).ravel()

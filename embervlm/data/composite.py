"""Several pictures as one: in rows, from left to right, in their order.

A record's visual tokens are those of one picture, so several of them share it. Their number decides the layout, so that
the second of three is always in one place.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

MAX_SIDE = 336
"""Pixels, at most, of a cell's sides: few models read more than what two of these make."""
GAP = 4
"""White pixels around each picture."""
JPEG_QUALITY = 95


def layout(num_pictures: int) -> tuple[int, int]:
    """Rows and columns: 1 x 2 for two, 2 x 2 for three and four, 2 x 3 for five and six, ..."""
    columns = math.ceil(math.sqrt(num_pictures))
    return math.ceil(num_pictures / columns), columns


def composite(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures on white, each in a cell as large as the largest of them, centred, with its aspect ratio kept."""
    rows, columns = layout(len(pictures))
    width, height = (min(MAX_SIDE, max(picture.size[side] for picture in pictures)) for side in (0, 1))
    out = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), (255, 255, 255))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        factor = min(width / picture.width, height / picture.height)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        left, top = GAP + column * (width + GAP), GAP + row * (height + GAP)
        fitted = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        out.paste(fitted, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))
    return out


def composite_file(pictures: Sequence[np.ndarray]) -> bytes:
    """The composite of pictures `[H, W, 3]` as a JPEG file."""
    content = io.BytesIO()
    composite([Image.fromarray(picture) for picture in pictures]).save(
        content, "JPEG", quality=JPEG_QUALITY, subsampling=0
    )
    return content.getvalue()

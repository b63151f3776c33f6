"""Pictures and attention maps as small images that a page carries in itself."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 200_000_000
"""Larger pictures are not decoded."""
SIDES = (288, 224, 176, 144, 112, 80)
"""Longer side in pixels, the first that keeps all pictures of a page within its budget."""
MAX_GRID = 16
"""Attention on finer grids is averaged down to this many rows and columns."""
VEIL, VEIL_GREY = 0.86, 246
"""How much of the picture is faded where a step did not look, and to which grey: a dark veil hides night scenes."""


def open_picture(path: str | None, roots: Sequence[Path] = (), *, longest: int = SIDES[0]) -> Image.Image | None:
    """The picture in RGB, upright, at most `longest` pixels long; None where it has gone or cannot be read.

    A relative path is looked for from here and from each of `roots`.
    """
    if not path or "\0" in path:
        return None
    for root in (Path(), *roots):
        with suppress(OSError):
            if (file := root / path).is_file():
                return _decoded(file, longest)
    return None


def _decoded(file: Path, longest: int) -> Image.Image | None:
    # decoders raise what they like, and the report goes on without the picture
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (2 * longest, 2 * longest))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((longest, longest))
            return small
    return None


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture_uris(paths: Iterable[str], roots: Sequence[Path] = (), *, max_bytes: int) -> dict[str, str]:
    """Path -> JPEG as a `data:` URI for every picture that can be read, all together within `max_bytes`."""
    found = {path: image for path in dict.fromkeys(paths) if (image := open_picture(path, roots)) is not None}
    uris: dict[str, str] = {}
    for side in SIDES:
        uris = {path: data_uri(_jpeg(image, side), "jpeg") for path, image in found.items()}
        if sum(map(len, uris.values())) <= max_bytes:
            break
    return uris


def _jpeg(image: Image.Image, side: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=78)
    return out.getvalue()


def relative_attention(shares: Sequence[float], grid: tuple[int, int]) -> np.ndarray:
    """`[rows, columns]`, 1 where a step looked most and 0 where it did not look; at most `MAX_GRID` each way."""
    values = np.asarray(shares, dtype=np.float64).reshape(grid)
    for axis in (0, 1):
        if (size := values.shape[axis]) > MAX_GRID:
            edges = np.linspace(0, size, MAX_GRID + 1).astype(int)[:-1]
            counts = np.diff([*edges, size])
            values = np.add.reduceat(values, edges, axis=axis) / counts.reshape((-1, 1) if axis == 0 else (1, -1))
    return values / values.max() if values.max() > 0 else values


def overlay_png(shares: Sequence[float], grid: tuple[int, int]) -> str:
    """A PNG of one pixel per visual token, in base64: a veil that is clear where a step looked.

    A page stretches it over the picture, which fades elsewhere; that reads in grey too.
    """
    faded = np.uint8(np.round(255 * VEIL * (1 - relative_attention(shares, grid) ** 0.7)))
    veil = np.stack([np.full_like(faded, VEIL_GREY), faded], axis=-1)
    out = io.BytesIO()
    Image.fromarray(veil, "LA").save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


def file_name(place: int, name: str) -> str:
    """A file name that shows `name`, whatever is in it."""
    kept = "".join(character if character.isascii() and character.isalnum() else "-" for character in name)
    return f"{place:03d}_{'-'.join(filter(None, kept.split('-')))[:60] or 'sample'}"


def picture_roots(folder: Path, data_file: object) -> list[Path]:
    """Where the relative paths of a run's pictures may start: beside its data file, or in its own folder."""
    roots = [folder, folder / "data"]
    if isinstance(data_file, (str, os.PathLike)) and data_file:
        roots.insert(0, Path(data_file).parent)
    return roots

"""Pictures of any kind -> RGB arrays, and a cache that decodes a data set's pictures once."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
from PIL import Image, UnidentifiedImageError

from embervlm.data.composite import composite
from embervlm.data.errors import DataError
from embervlm.data.record_fields import MAX_PICTURES
from embervlm.run_dir import naming_unwritten

MAX_PIXELS = 200_000_000
"""Larger pictures are refused before they are decoded."""
ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Sequence[Any]

_TRANSPOSE = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_quiet_lock = threading.Lock()


NUM_MEASURED = 200
NOTED_SHRINKING = 2.5
"""By how much the longer side of a picture shrinks before a run says so."""


class ImageError(DataError):
    """A picture that cannot be used; the message names it and says what to do."""


Colour = Sequence[int]
"""Red, green and blue, 0 to 255."""


def load_image(
    source: ImageSource, *, size: int | None = None, fill: Colour | None = None, name: str | None = None
) -> np.ndarray:
    """The picture as uint8 RGB `[H, W, 3]`, upright; `[size, size, 3]` if `size` is given.

    To that size it is scaled whatever its shape, or, with `fill`, in its aspect ratio to the middle of a square of that
    colour.

    Transparency is laid on white; of an animation the first frame counts; 16-bit grey is scaled to 8 bits.
    Args:
        source: a path, an encoded file as bytes, a Pillow image, or an array `[H, W]` or `[H, W, 1, 3 or 4]`, uint8
            or float in [0, 1]; or a list of these, which are laid out as in training (see `composite`).
        name: what errors call the picture; its path by default.
    Raises:
        ImageError: nothing usable there, or more than `MAX_PIXELS` pixels (found before decoding).
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size={size!r} is not a positive number of pixels; give an int of at least 1, or None")
    if isinstance(source, (list, tuple)):
        if not 0 < len(source) <= MAX_PICTURES:
            raise ImageError(f"{name or 'list'}: {len(source)} pictures; give 1 to {MAX_PICTURES}")
        together = composite([Image.fromarray(load_image(one)) for one in source])
        return _finish(together, size, fill, name or f"{len(source)} pictures", own=False)
    if isinstance(source, np.ndarray):
        name = name or f"array of shape {list(source.shape)}"
        return _finish(_from_array(source, name), size, fill, name, own=False)
    if isinstance(source, Image.Image):
        return _finish(source, size, fill, name or getattr(source, "filename", "") or "Pillow image", own=False)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or f"{len(source)} bytes"
        if not source:
            raise ImageError(f"{name}: no data; give the content of a picture file")
        return _decode(io.BytesIO(source), size, fill, name)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ImageError(f"{name or kind}: {kind} is not a picture; give a path, bytes, a Pillow image or an array")
    path = os.fspath(source)
    name = name or path
    if path.lower().startswith(("http://", "https://", "ftp://", "data:")):
        raise ImageError(f"{name[:200]}: URLs are not downloaded; download the picture and give its path")
    if os.path.isdir(path):
        raise ImageError(f"{name}: is a folder; give the path of one picture")
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name}: {reason}; correct the path") from error
    with file:
        if not os.fstat(file.fileno()).st_size:
            raise ImageError(f"{name}: the file is empty; copy it again")
        return _decode(file, size, fill, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Reading a header warns of big or odd files and refuses what is above Pillow's own limit; ours replaces that.

    Both settings are global to the process, hence the lock; only headers are read under it, so threads still decode
    in parallel.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode(file: Any, size: int | None, fill: Colour | None, name: str) -> np.ndarray:
    try:
        with _quiet():
            image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads; convert it to PNG or JPEG") from error
    except Exception as error:  # a plugin that stumbles over garbage raises what it likes (struct.error, SyntaxError)
        raise _unreadable(name, error) from error
    with image:
        return _finish(image, size, fill, name, own=True)


def _finish(image: Image.Image, size: int | None, fill: Colour | None, name: str, *, own: bool) -> np.ndarray:
    """`own`: the image was opened here, so it may be changed in place."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} pixels, so it is empty; replace it")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first")
    try:
        if own and size is not None:
            image.draft(
                None, (2 * size, 2 * size)
            )  # a JPEG is then decoded at a fraction of its size; others ignore it
        image.load()
        orientation = _orientation(image)
        if size is not None:
            scaled = (size, size) if fill is None else scaled_sides(width, height, size)
            image = _to_rgb(_reduced(image, size), name).resize(scaled, Image.Resampling.BILINEAR)
            if fill is not None:
                square = Image.new("RGB", (size, size), tuple(fill))
                square.paste(image, ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
                image = square
        else:
            image = _to_rgb(image, name)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        return np.array(image, dtype=np.uint8)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # as above: decoders raise what they like
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: not readable as a picture ({error}); copy it again")


def _orientation(image: Image.Image) -> int:
    with _quiet():
        return _exif_orientation(image)


def _exif_orientation(image: Image.Image) -> int:
    # Only the orientation is lost with broken EXIF data; the picture itself is still good.
    with suppress(Exception):
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    return 1


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Shrunk by whole factors to no less than twice `size`, before a conversion copies a picture of 100 megapixels."""
    factors = tuple(max(1, side // (2 * size)) for side in image.size)
    if max(factors) == 1 or image.mode not in ("L", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        return image
    return image.reduce((factors[0], factors[1]))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    transparent = "transparency" in image.info or (
        image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"
    )
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode.startswith("I"):  # Pillow scales every such file to 16 bits
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.float32) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image), name).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"{name}: shape {list(array.shape)} is not [H, W] or [H, W, 1, 3 or 4]; move the channels last"
        )
    if array.size == 0:
        raise ImageError(f"{name}: it is empty; give at least one pixel")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ImageError(f"{name}: float values from {low} to {high}; scale them to [0, 1], or convert to uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: values of type {array.dtype}; convert them to uint8, or to float in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def files_digest(paths: Iterable[str]) -> str:
    """Changes with the path, time or length of any of `paths`."""
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        try:
            found = os.stat(path)
            key = (os.path.abspath(path), found.st_mtime_ns, found.st_size)
        except (OSError, ValueError):
            key = (path, 0, 0)  # decoding will say what is wrong with it
        digest.update(repr(key).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def scaled_sides(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height in the same ratio, the longer of them `size`."""
    longest = max(width, height)
    return max(1, round(width * size / longest)), max(1, round(height * size / longest))


def picture_sides(file: str | IO[bytes]) -> tuple[int, int]:
    """Width and height of the picture of this file as it is shown; ImageError if it cannot be read."""
    try:
        with _quiet(), Image.open(file) as image:
            width, height = image.size
            turned = _exif_orientation(image) >= 5
    except OSError as error:
        raise _unreadable(file if isinstance(file, str) else "picture", error) from error
    return (height, width) if turned else (width, height)


def told_shrinking(paths: Sequence[str], size: int) -> str:
    """What is lost of pictures that a model reads at `size` pixels, a sentence; '' where little is.

    Judged by `NUM_MEASURED` of them, evenly spread.
    """
    if not paths:
        return ""
    found = sorted((picture_sides(path) for path in paths[:: 1 + len(paths) // NUM_MEASURED]), key=max)
    width, height = found[len(found) // 2]
    factor = max(width, height) / size
    if factor < NOTED_SHRINKING:
        return ""
    return (
        f"pictures: half of them have {width} x {height} pixels or more, and the model reads {size} x {size}: what is "
        f"smaller than about {2 * factor:.0f} pixels there, such as print, is lost. Where the answer depends on it, "
        "raise image_size in the model preset, or cut the pictures to what matters"
    )


Area = tuple[float, float, float, float]
"""Left, top, right and bottom, in [0, 1] of a square."""


@lru_cache(maxsize=65536)
def padded_area(path: str, size: int) -> Area:
    """Where in its padded square of `size` pixels the picture of this file is; ImageError if it cannot be read."""
    return area_in_square(*picture_sides(path), size)


def area_in_square(width: int, height: int, size: int) -> Area:
    """Where in a padded square of `size` pixels a picture of these sides is."""
    wide, high = scaled_sides(width, height, size)
    left, top = (size - wide) // 2, (size - high) // 2
    return left / size, top / size, (left + wide) / size, (top + high) / size


class PictureCache:
    """All distinct pictures of `paths`, decoded once into one uint8 array `[N, size, size, 3]`: `cache[path]`.

    With `cache_dir` the array is a memory-mapped file there, which later runs and other processes reuse. Its name
    holds a hash over path, time and length of every picture: a changed picture gives a new file. Several processes
    may build it at once; each writes a file of its own and the last rename wins, with equal content.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        size: int,
        cache_dir: str | os.PathLike[str] | None = None,
        fill: Colour | None = None,
    ) -> None:
        """`fill`: as for `load_image`."""
        self.size, self.fill = size, fill
        self._rows = {path: row for row, path in enumerate(dict.fromkeys(os.fspath(path) for path in paths))}
        self.shape = (len(self), size, size, 3)
        if cache_dir is None or not len(self):
            self.array = np.empty(self.shape, dtype=np.uint8)
            self._decode_into(self.array)
            return
        padded = "" if fill is None else f"-on-{bytes(fill).hex()}"
        file = Path(cache_dir) / f"pictures-{size}{padded}-{files_digest(self._rows)}.npy"
        array = self._open(file)
        if array is None:
            self._build(file)
            array = self._open(file)
        if array is None:
            raise ImageError(
                f"{file}: differs from what was just written there; check the disk, or choose another cache folder"
            )
        self.array = array

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, path: str | os.PathLike[str]) -> np.ndarray:
        """The picture, uint8 `[size, size, 3]`; a view, not a copy."""
        picture: np.ndarray = self.array[self.index(path)]
        return picture

    def index(self, path: str | os.PathLike[str]) -> int:
        """Row of the picture in `array`."""
        row = self._rows.get(os.fspath(path))
        if row is None:
            raise KeyError(f"{os.fspath(path)}: not among the {len(self)} cached pictures")
        return row

    def area(self, path: str | os.PathLike[str]) -> Area | None:
        """Where in its square the picture is, if pictures are padded."""
        return None if self.fill is None else padded_area(os.fspath(path), self.size)

    def _open(self, file: Path) -> np.ndarray | None:
        try:
            array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # absent, or cut off by a full disk: built again
        return array if array.shape == self.shape and array.dtype == np.uint8 else None

    def _build(self, file: Path) -> None:
        partial = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
        with naming_unwritten(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with naming_unwritten(file):
                array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=self.shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash once pages are touched
                    with open(partial, "r+b") as whole:
                        os.posix_fallocate(whole.fileno(), 0, os.fstat(whole.fileno()).st_size)
            self._decode_into(array)
            array.flush()
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def _decode_into(self, array: np.ndarray) -> None:
        def decode(item: tuple[str, int]) -> tuple[str, ...]:
            path, i = item
            try:
                array[i] = load_image(path, size=self.size, fill=self.fill)
            except ImageError as error:
                return error.problems
            return ()

        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            problems = [problem for found in pool.map(decode, self._rows.items()) for problem in found]
        if problems:
            raise ImageError.of(problems)

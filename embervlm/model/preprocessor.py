"""How a vision encoder's own folder says its pictures are prepared: `preprocessor_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.errors import UNREADABLE
from embervlm.model.backbone import hugging_face_config
from embervlm.paths import names_a_path

_FILES = ("processor_config.json", "preprocessor_config.json")
"""In transformers' order; the first counts where it describes an image processor, as newer ones do."""
_UNKNOWN = (
    "so values of pictures are scaled to [-1, 1]; set image_mean and image_std if the encoder was trained with others"
)
NO_PREPROCESSOR = f"no {_FILES[1]} in {{}}, {_UNKNOWN}"
_NOT_NORMALISED = "MobileViT"
"""The image processors that do not normalise where their file says nothing of it."""


@dataclass(kw_only=True)
class Preprocessor:
    """What such a file says, as settings of our model, and what of it is not followed."""

    file: str
    settings: dict[str, Any]
    """`image_size`, `image_mean` and `image_std`, as far as the file says them."""
    notes: list[str] = field(default_factory=list)


def preprocessor_of(name: str | Path) -> Preprocessor | None:
    """The preprocessor of a folder or hub id; None where there is none.

    Raises:
        ConfigError: a value that cannot be read.
    """
    for file_name in _FILES:
        of_hub = not Path(name).is_dir() and not names_a_path(name)
        file = _from_hub(str(name), file_name) if of_hub else Path(name) / file_name
        if file is None or not file.is_file():
            continue
        given = run_dir.read_object(file)
        inner = given.get("image_processor")
        if isinstance(inner, dict) or file_name == _FILES[1]:
            return _read(inner if isinstance(inner, dict) else given, f"{name}/{file_name}")
    return None


@lru_cache
def _from_hub(name: str, file_name: str) -> Path | None:
    """The file in the hub's cache, or downloaded; None where it is not there. Asked once: without network it takes
    half a minute."""
    try:
        found = cached_file(name, file_name, _raise_exceptions_for_missing_entries=False)
    except UNREADABLE:
        return None
    return Path(found) if found else None


def with_preprocessor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` of a preset with what the vision encoder's own folder says and the preset does not."""
    if (name := _name_of_vision(settings)) is None:
        return dict(settings)
    config = hugging_face_config("vision", settings["vision"], pretrained=False)
    found = preprocessor_of(name)
    out = {**(found.settings if found else {}), **settings}
    if "image_size" not in out:
        size = getattr(getattr(config, "vision_config", None) or config, "image_size", None)
        out |= {"image_size": size} if isinstance(size, int) else {}
    return out


def preprocessor_notes(settings: Mapping[str, Any]) -> list[str]:
    """Where a preset contradicts the vision encoder's own folder, and what of that is not followed; a line each."""
    if (name := _name_of_vision(settings)) is None:
        return []
    found = preprocessor_of(name)
    if found is None:
        return [] if "image_mean" in settings else [NO_PREPROCESSOR.format(name)]
    lines = [
        f"{name}: the preset says {_shown(settings[name])}, {found.file} says {_shown(value)}; the preset's is used"
        for name, value in found.settings.items()
        if name in settings and not _alike(settings[name], value)
    ]
    return [*lines, *found.notes]


def _name_of_vision(settings: Mapping[str, Any]) -> str | None:
    """Folder or hub id; None of a checkpoint, whose own configuration has everything, and of what is built anew."""
    vision = settings.get("vision") or {}
    return vision.get("name_or_path") if "built" not in vision else None


def _read(given: Mapping[str, Any], file: str) -> Preprocessor:
    out = Preprocessor(file=file, settings={})
    crops = given.get("do_center_crop") and given.get("crop_size")
    size, crop = _sides(given.get("size"), file), _sides(given.get("crop_size") if crops else None, file)
    if read := crop or size:
        out.settings["image_size"] = max(read)
        if read[0] != read[-1]:
            out.notes.append(f"{file} has pictures of {read[0]} x {read[-1]}; they are scaled to a square here")
    if crop:
        kept = math.prod(min(1.0, c / s) for c, s in zip(crop, size or crop))
        out.notes.append(
            f"{file} cuts the middle out of a picture ({kept:.0%} of a square one); that is not followed: pictures are "
            "read whole"
        )
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    scale = factor * 255 if abs(factor * 255 - 1) > 1e-3 else 1.0  # of values that are in [0, 1] here
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    normalises = given.get("do_normalize")
    normalises = not kind.startswith(_NOT_NORMALISED) if normalises is None else normalises
    if normalises and given.get("image_mean") is None and given.get("image_std") is None:
        out.notes.append(f"{file} does not say image_mean and image_std, {_UNKNOWN}")
    else:
        mean = _three(given.get("image_mean"), "image_mean", file) if normalises else (0.0,) * 3
        std = _three(given.get("image_std"), "image_std", file) if normalises else (1.0,) * 3
        if given.get("rescale_offset"):
            mean = tuple(part + 1 for part in mean)
        if normalises and kind.startswith("EfficientNet") and given.get("include_top") is not False:
            std = tuple(part**2 for part in std)  # it divides twice
        out.settings["image_mean"] = tuple(part / scale for part in mean)
        out.settings["image_std"] = tuple(part / scale for part in std)
    if given.get("do_flip_channel_order"):
        out.notes.append(f"{file} swaps red and blue; that is not followed, so the encoder has to adapt to it")
    return out


def _sides(size: Any, file: str) -> tuple[int, ...]:
    """Height and width; () where they are not given."""
    if isinstance(size, Mapping):
        names = ("height", "width") if "height" in size else ("shortest_edge",) * 2
        size = [size.get(name, size.get("longest_edge")) for name in names]
    elif isinstance(size, int):
        size = [size, size]
    if size is None:
        return ()
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ConfigError(f"{file}: size {size!r} is not height and width in pixels")
    return tuple(size)


def _three(values: Any, name: str, file: str) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise ConfigError(f"{file}: {name} is {values!r}, not three numbers")
    return tuple(map(float, values))


def _alike(a: Any, b: Any) -> bool:
    first, second = (tuple(value) if isinstance(value, (list, tuple)) else (value,) for value in (a, b))
    return len(first) == len(second) and all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(first, second))


def _shown(value: Any) -> str:
    return str([round(part, 4) for part in value]) if isinstance(value, (list, tuple)) else str(value)

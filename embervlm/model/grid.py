"""The rows and columns in which a vision encoder's features stand."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.samples import Grid


def grid_of(config: Any, num_features: int, image_size: int) -> Grid:
    """Rows and columns of the last of `num_features` of an encoder that gives them as a sequence.

    Its configuration says how large a patch is and which tokens stand before the patches: class tokens (one, two with a
    distillation token, or `n_cls_tokens`) and `num_register_tokens`.

    Raises:
        ConfigError: the configuration and the number of features do not fit together.
    """
    stages = getattr(config, "depths", None)
    stages = stages if isinstance(stages, Sequence) else ()  # each halves the sides; mostly the first begins at a 4th
    patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None) or (4 if stages else None)
    registers = getattr(config, "num_register_tokens", None) or 0
    in_front = {registers + classes for classes in (0, 1, 2, getattr(config, "n_cls_tokens", 0))}
    if patch:
        height, width = (patch if isinstance(patch, Sequence) else (patch, patch))[-2:]
        rows, columns = image_size // height, image_size // width
        for _ in stages or (1,):
            if num_features - rows * columns in in_front:
                return Grid(rows, columns)
            rows, columns = -(-rows // 2), -(-columns // 2)
    raise ConfigError(
        f"vision: {config.model_type} gives {num_features} features of a picture of {image_size} x {image_size}, and "
        f"its configuration does not tell in which rows and columns they stand (patch_size {patch}, register tokens "
        f"{registers}); use an encoder such as ViT, DINOv2, SigLIP or ConvNeXt"
    )


def pooled_grid(num_visual_tokens: int | Sequence[int] | None) -> Grid | None:
    """Rows and columns that `num_visual_tokens` asks for: both, or the number in a square."""
    if num_visual_tokens is None:
        return None
    if isinstance(num_visual_tokens, int):
        side = isqrt(max(0, num_visual_tokens))
        num_visual_tokens, asked = (side, side), num_visual_tokens
        if side < 1 or side * side != asked:
            raise ConfigError(
                f"num_visual_tokens: {asked} is not a square number; for other shapes give [rows, columns]"
            )
    if len(num_visual_tokens) != 2 or not all(isinstance(side, int) and side > 0 for side in num_visual_tokens):
        raise ConfigError(f"num_visual_tokens: {list(num_visual_tokens)} is not [rows, columns], two numbers above 0")
    return Grid(*num_visual_tokens)

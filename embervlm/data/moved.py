"""Pictures of training, a little shifted and scaled anew at each step, so that a model learns what they show by heart
less easily (Krizhevsky et al. 2012, section 4.1; Shorten and Khoshgoftaar 2019).

No mirroring and no colors: left and right, and the color of things, are what questions ask for.
"""

from __future__ import annotations

import random

import numpy as np


def moved(picture: np.ndarray, share: float, rng: random.Random) -> np.ndarray:
    """`picture` `[side, side, 3]`, shifted and scaled by up to `share` of its side, its edges continued; same shape."""
    scale = rng.uniform(1 - share, 1 + share)
    return picture[_places(len(picture), scale, share, rng)][:, _places(picture.shape[1], scale, share, rng)]


def _places(side: int, scale: float, share: float, rng: random.Random) -> np.ndarray:
    """Which row (or column) stands in each place."""
    middle, shift = (side - 1) / 2, rng.uniform(-share, share) * side
    places = middle + (np.arange(side) - middle) / scale + shift
    return places.round().clip(0, side - 1).astype(np.int64)  # type: ignore[no-any-return]

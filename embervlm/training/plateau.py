"""When a phase has learned what it can: its loss on the val split no longer falls."""

from __future__ import annotations

import math
from collections.abc import Sequence

PATIENCE = 3
"""Measurements without progress that make a plateau."""
DECAY_RATIO = 0.25
"""Steps of the decay for each step before it."""
FEWEST_MEASUREMENTS = 12
"""In a phase as long as `epochs` allow, so that few records can make a plateau."""
MOST_IN_EPOCH = 50
"""Measurements, so that no plateau is seen in the first percent of many records."""
LATEST_START = 1 / (1 + DECAY_RATIO)
"""Share of a phase behind which the decay begins where no plateau was found before."""


def is_plateau(losses: Sequence[float], improvement: float) -> bool:
    """Whether the last `PATIENCE` of the measured losses brought less than this share of the best one before."""
    if len(losses) <= PATIENCE:
        return False
    return min(losses[-PATIENCE:]) > (1 - improvement) * min(losses[:-PATIENCE])


def measured_every(wanted: int, most: int, epoch_steps: int) -> int:
    """Steps between two measurements of a phase of at most `most`: those `wanted`, within the two limits above."""
    return max(1, min(max(wanted, epoch_steps // MOST_IN_EPOCH), most // FEWEST_MEASUREMENTS))


def total_steps(decay_from: int | None, most: int) -> int:
    """Steps of a phase whose decay began at `decay_from`, or has not begun, and that has at most `most`."""
    return most if decay_from is None else min(most, decay_from + _decay_steps(decay_from))


def latest_start(most: int) -> int:
    """Step at which the decay of a phase of `most` steps begins where no plateau was found before."""
    return math.floor(most * LATEST_START)


def rate_factor(step: int, decay_from: int | None, most: int, warmup_steps: float, final_ratio: float) -> float:
    """Factor on the peak rate: linear warmup, the peak, and a cosine down to `final_ratio` (warmup, stable, decay).

    Without a plateau the decay begins where it ends at `most`. Source: MiniCPM (Hu et al. 2024), section 4.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    start = latest_start(most) if decay_from is None else decay_from
    done = min(1.0, max(0.0, (step - start) / _decay_steps(start)))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _decay_steps(start: int) -> int:
    return max(1, math.ceil(DECAY_RATIO * start))

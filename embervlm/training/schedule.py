"""Learning rate and teacher forcing as functions of the step; the trainer owns them, not the engine."""

from __future__ import annotations

import math

from embervlm.config import ScheduledSamplingConfig

LONGEST_WARMUP = 0.25
"""Share of the run, in steps or in time."""


def learning_rate_factor(progress_steps: float, total_steps: float, warmup_steps: float, final_ratio: float) -> float:
    """Factor on the peak rate: linear warmup from 1/warmup, then a cosine down to `final_ratio` at `total_steps`.

    Args:
        progress_steps: Optimizer steps done so far; 0 is the first step.
        warmup_steps: At most `LONGEST_WARMUP` of the run warms up.
    """
    warmup_steps = shortened_warmup(warmup_steps, total_steps)
    if progress_steps < warmup_steps:
        return (progress_steps + 1) / (warmup_steps + 1)
    done = min(1.0, (progress_steps - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def timed_learning_rate_factor(steps: int, warmup_steps: int, spent_ratio: float, final_ratio: float) -> float:
    """Like `learning_rate_factor` for a run that ends by time: warmup by steps, cosine by elapsed time.

    A warmup whose steps would take longer than `LONGEST_WARMUP` of the time ends there.
    """
    warm = max((steps + 1) / (warmup_steps + 1), spent_ratio / LONGEST_WARMUP)
    return min(warm, learning_rate_factor(spent_ratio, 1.0, 0, final_ratio))


def shortened_warmup(warmup_steps: float, total_steps: float) -> float:
    """`warmup_steps`, or `LONGEST_WARMUP` of the run where they would take more of it.

    The guide's 500 would leave a run of 510 steps ten at its rate.
    """
    return min(warmup_steps, LONGEST_WARMUP * total_steps)


def teacher_forcing_ratio(epoch: int, num_epochs: int, config: ScheduledSamplingConfig) -> float:
    """Share of gold inputs in `epoch` (from 0) of a phase of `num_epochs`.

    Linear from the first epoch's value to the last's. The guide's formula cannot give its own words (1.0 in epoch 1,
    0.5 in epoch 5), so the words are what is implemented.
    """
    if not config.enabled or num_epochs < 2:
        return config.initial_teacher_forcing if config.enabled else 1.0
    share = min(1.0, epoch / (num_epochs - 1))
    return config.initial_teacher_forcing + share * (config.final_teacher_forcing - config.initial_teacher_forcing)

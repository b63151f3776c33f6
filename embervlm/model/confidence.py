"""How sure an answer is: of the answer head's probabilities, or of how likely it was to be written, both calibrated."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from embervlm.errors import UserError
from embervlm.run_dir import calibration_path, read_object

SUREST = 1e-6
"""How near a probability may come to 0 and 1."""
Scale = tuple[float, float]
"""Slope and offset of the logit of an answer in free words (Platt 1999)."""


def read_calibration(checkpoint: str | Path) -> tuple[float, Scale | None]:
    """The temperature of a checkpoint's answer head and the scale of its answers in free words, as its last evaluation
    fitted them; 1 and None where there was none."""
    path = calibration_path(checkpoint)
    if not path.exists():
        return 1.0, None
    kept = read_object(path, "temperature")
    temperature, written = kept["temperature"], kept.get("written")
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise UserError(f"{path}: damaged: its temperature is not a number above 0; delete it and evaluate again")
    if written is None:
        return float(temperature), None
    try:
        return float(temperature), (float(written["slope"]), float(written["offset"]))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged: `written` has no slope and offset; delete it and evaluate again") from error


def written_confidence(probability: float, scale: Scale | None) -> float:
    """How sure an answer in free words is right, of the probability with which it was written.

    Behind its chain a model writes nearly every answer with certainty, so that says little until it is scaled.

    Args:
        scale: slope and offset of the logit (Platt 1999); None: not fitted.
    """
    if scale is None or not probability:
        return probability
    p = min(max(probability, SUREST), 1 - SUREST)
    slope, offset = scale
    return 1 / (1 + math.exp(-slope * (math.log(p) - math.log1p(-p)) - offset))


def set_confidence(probabilities: Mapping[str, float], answer: Collection[str], temperature: float = 1.0) -> float:
    """How sure the answer head is of exactly the set `answer`: of each candidate in it, and of no other.

    Args:
        temperature: divides the head's logits; above 1 it is less sure than it said.
    """
    log_confidence = 0.0
    for name, probability in probabilities.items():
        p = min(max(probability, 1e-15), 1 - 1e-15)
        logit = (math.log(p) - math.log1p(-p)) / temperature
        log_confidence -= math.log1p(math.exp(-logit if name in answer else logit))
    return math.exp(log_confidence)

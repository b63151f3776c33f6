"""Is an answer right as often as its `confidence` says? Expected calibration error, and a temperature to correct it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from embervlm.model.voting import set_confidence

NUM_BINS = 10
MIN_SAMPLES = 20
"""With fewer answers a fitted temperature would be noise."""
TEMPERATURES = (0.05, 20.0)


def calibration(
    fitted_on: Sequence[Mapping[str, Any]],
    fitted_correct: Sequence[bool],
    results: Sequence[Mapping[str, Any]],
    correct: Sequence[bool],
    *,
    split: str = "val",
) -> dict[str, Any] | None:
    """The evaluation's block: temperature of `fitted_on`, and the error of `results` with it and without."""
    temperature = fit_temperature(fitted_on, fitted_correct)
    if temperature is None or not results:
        return None
    sure = confidences(results, temperature)
    return {
        "split_fitted": split,
        "num_fitted": len(fitted_on),
        "temperature": temperature,
        "ece": expected_calibration_error(sure, correct),
        "ece_uncalibrated": expected_calibration_error(confidences(results, 1.0), correct),
        "bins": reliability_bins(sure, correct),
    }


def fit_temperature(results: Sequence[Mapping[str, Any]], correct: Sequence[bool]) -> float | None:
    """The temperature that gives `correct` the highest likelihood (Guo et al. 2017); None with too few answers.

    A set of answers is one event here: it is right or wrong as a whole.
    """
    kept = [(r, c) for r, c in zip(results, correct, strict=True) if r.get("head_probabilities") and r["answer_set"]]
    if len(kept) < MIN_SAMPLES:
        return None
    rows, right = [result for result, _ in kept], np.array([bool(c) for _, c in kept])

    def surprise(log_temperature: float) -> float:
        sure = np.clip(confidences(rows, float(np.exp(log_temperature))), 1e-12, 1 - 1e-12)
        return float(-np.where(right, np.log(sure), np.log1p(-sure)).mean())

    bounds = tuple(np.log(TEMPERATURES))
    return float(np.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x))


def confidences(results: Sequence[Mapping[str, Any]], temperature: float) -> list[float]:
    """Each result's confidence at `temperature`; what the answer head did not see keeps its own."""
    return [
        set_confidence(result["head_probabilities"], result["answer_set"], temperature)
        if result.get("head_probabilities") and result["answer_set"]
        else float(result["confidence"])
        for result in results
    ]


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Mean over the answers of |accuracy - confidence| of their bin (Naeini et al. 2015)."""
    bins = [found for found in reliability_bins(confidence, correct) if found["num"]]
    total = sum(found["num"] or 0 for found in bins)
    if not total:
        raise ValueError("expected_calibration_error: no answers")
    gaps = ((found["num"] or 0) * abs((found["accuracy"] or 0) - (found["confidence"] or 0)) for found in bins)
    return float(sum(gaps) / total)


def reliability_bins(confidence: Sequence[float], correct: Sequence[bool]) -> list[dict[str, float | int | None]]:
    """`NUM_BINS` bins of equal width: mean confidence, accuracy and number of the answers in each."""
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    place = np.clip(np.ceil(sure * NUM_BINS) - 1, 0, NUM_BINS - 1)  # (low, high], and 0 in the first
    out: list[dict[str, float | int | None]] = []
    for number in range(NUM_BINS):
        own = place == number
        out.append(
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "num": int(own.sum()),
                "confidence": float(sure[own].mean()) if own.any() else None,
                "accuracy": float(right[own].mean()) if own.any() else None,
            }
        )
    return out

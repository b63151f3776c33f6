"""Is an answer right as often as its `confidence` says? Expected calibration error, and what corrects it: a temperature
of the answer head, and for answers in free words, which it does not see, a scale of their probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from embervlm.model.confidence import SUREST, set_confidence, written_confidence

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
    temperature, scale = fit_temperature(fitted_on, fitted_correct), fit_written(fitted_on, fitted_correct)
    if (temperature is None and scale is None) or not results:
        return None
    temperature = 1.0 if temperature is None else temperature
    sure = confidences(results, temperature, scale)
    return {
        "split_fitted": split,
        "num_fitted": len(fitted_on),
        "temperature": temperature,
        "written": None if scale is None else {"slope": scale[0], "offset": scale[1]},
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


def fit_written(results: Sequence[Mapping[str, Any]], correct: Sequence[bool]) -> tuple[float, float] | None:
    """Slope and offset that give `correct` the highest likelihood from the logits of the written answers (Platt 1999,
    with his targets, by which no finite sample makes an answer certain); None with too few answers in free words."""
    kept = [(result, right) for result, right in zip(results, correct, strict=True) if is_written(result)]
    if len(kept) < MIN_SAMPLES:
        return None
    p = np.clip([result["written_probability"] for result, _ in kept], SUREST, 1 - SUREST)
    logit, right = np.log(p) - np.log1p(-p), np.array([bool(right) for _, right in kept])
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def surprise(found: np.ndarray) -> float:
        scaled = np.exp(found[0]) * logit + found[1]
        return float((target * np.logaddexp(0, -scaled) + (1 - target) * np.logaddexp(0, scaled)).mean())

    log_slope, offset = minimize(surprise, np.zeros(2), bounds=[(-5, 5), (-50, 50)]).x
    return float(np.exp(log_slope)), float(offset)


def is_written(result: Mapping[str, Any]) -> bool:
    """Whether a result is an answer in free words, which the answer head does not see."""
    return not result.get("head_probabilities") and bool(result["answer_set"]) and "written_probability" in result


def confidences(
    results: Sequence[Mapping[str, Any]], temperature: float, scale: tuple[float, float] | None = None
) -> list[float]:
    """Each result's confidence at `temperature`, or with `scale` for answers in free words."""

    def of(result: Mapping[str, Any]) -> float:
        if is_written(result):
            return written_confidence(result["written_probability"], scale)
        if result.get("head_probabilities") and result["answer_set"]:
            return set_confidence(result["head_probabilities"], result["answer_set"], temperature)
        return float(result["confidence"])

    return [of(result) for result in results]


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

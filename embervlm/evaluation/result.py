"""The result of an evaluation: a sample for each record, and the metrics with their comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embervlm import run_dir
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import known_boxes
from embervlm.evaluation.asked import Pass
from embervlm.evaluation.batches import cut_off_reasons, known_of, mean
from embervlm.evaluation.calibration import calibration, confidences
from embervlm.evaluation.eval_data import EvalData, Evaluation
from embervlm.evaluation.explain import attention_by_thing, looked_at
from embervlm.evaluation.validator import validator_accuracy
from embervlm.judge.metrics import (
    bootstrap_interval,
    compare_with_targets,
    final_answer_accuracy,
    is_right,
    per_candidate_precision_recall,
)
from embervlm.model.config import STAGE3
from embervlm.model.embervlm import EmberVLM
from embervlm.ranking import CHAIN_METRICS, RANKABLE
from embervlm.version import __version__

COMPARISONS = {
    "direct": "stage4_direct_accuracy",
    "swapped": "swapped_image_accuracy",
    "blind": "blind_accuracy",
    "same_samples": "no_reasoning_accuracy",
    "same_time": "no_reasoning_same_time_accuracy",
}
"""What else is asked, and the name of its accuracy."""
_DIRECT = (COMPARISONS["direct"], COMPARISONS["same_samples"], COMPARISONS["same_time"])
METRICS = (*RANKABLE, *COMPARISONS.values())
NUM_GOLD_CHAINS = 100
"""Gold chains that are scored, to know what the judge makes of chains of this kind."""


def _scores(record: ReasoningRecord, steps: Sequence[str], answer: Sequence[str], data: EvalData) -> dict[str, Any]:
    types = record.metadata.get("step_types") or ()
    assert data.scorer is not None
    return data.scorer.score(steps, dataclasses.replace(known_of(record, data.domains, answer), step_types=types))


def _gold_scores(data: EvalData) -> dict[str, float | None]:
    """What a perfect chain would get: the mean of each chain metric over gold chains; None of no chain."""
    records = [record for record in data.records if record.steps][:NUM_GOLD_CHAINS]
    found = [_scores(record, record.steps, record.answer, data) for record in records]
    return {name: mean([_finite(scores[name]) for scores in found]) for name in CHAIN_METRICS}


def scored(record: ReasoningRecord, result: Mapping[str, Any], data: EvalData) -> dict[str, Any]:
    types = record.metadata.get("step_types") or ()
    scores = _scores(record, result["reasoning_steps"], result["answer_set"], data)
    scores["reasons"] = [*cut_off_reasons(result), *scores["reasons"]]
    boxes = known_boxes(record.metadata)
    return {
        "id": record.record_id,
        "image": record.image,
        "instruction": record.instruction,
        "complexity": record.metadata.get("complexity"),
        "question_kind": record.metadata.get("question_kind"),
        "wording": record.metadata.get("wording"),
        "gold_steps": list(record.steps),
        "gold_answer": list(record.answer),
        **result,
        "is_open": not record.candidates,
        "correct": is_right(result["answer_set"], record),
        "step_types": list(types) or None,
        "completeness_by_type": scores.pop("completeness_by_type"),
        "scores": scores,
        "boxes": [dict(box) for box in boxes] or None,
        "without_reasoning": None,
        "validator_scores": None,
        "attention": None,
        "looked_at": None,
    }


def complete(
    samples: list[dict[str, Any]], data: EvalData, passes: Mapping[str, Pass], details: Sequence[Mapping[str, Any]]
) -> None:
    """Add the baseline's answer to each sample, and the attention of the chain to the first ones."""
    if (baseline := passes.get("same_samples")) is not None:
        for sample, direct, right in zip(samples, baseline.results, baseline.right):
            sample["without_reasoning"] = {"answer_set": direct["answer_set"], "correct": right}
    for sample, record, detail in zip(samples, data.records, details):
        sample |= detail
        sample["looked_at"] = looked_at(sample, record.metadata.get("seen") or ())


def result_of(
    job: Evaluation,
    model: EmberVLM,
    data: EvalData,
    samples: list[dict[str, Any]],
    passes: Mapping[str, Pass],
    answers: Mapping[tuple[str, int], Any],
) -> dict[str, Any]:
    values = _values(samples, passes)
    if model.config.stage == STAGE3:  # it writes no chains, so 0 would say nothing of it
        values = {name: found if name in _DIRECT else [] for name, found in values.items()}
    metrics = {name: mean(found) for name, found in values.items()}
    about = run_dir.read_state(job.checkpoint)
    calibrated = _calibrate(job, samples, passes)
    closed = [sample for sample in samples if not sample["is_open"]]
    return {
        "format": run_dir.EVAL_FORMAT,
        "embervlm_version": __version__,
        "checkpoint": str(job.checkpoint),
        "step": about.get("step"),
        "phase": about.get("settings", {}).get("phase"),
        "split": job.split,
        "num_samples": len(samples),
        "decoding": dataclasses.asdict(job.decoding.for_model(model.config)),
        "backend": data.scorer.backends.record if data.scorer else None,
        "metrics": metrics,
        "intervals": {name: list(bootstrap_interval(found)) for name, found in values.items() if found},
        "gains": gains(values),
        "targets": compare_with_targets(metrics),
        "gold_chains": _gold_scores(data) if data.scorer else None,
        "accuracy_by_complexity": {name: row["reasoning"] for name, row in by(samples, "complexity").items()},
        "impact_by_complexity": by(samples, "complexity"),
        "accuracy_by_question_kind": by(samples, "question_kind"),
        "accuracy_by_wording": by(samples, "wording"),
        "per_candidate": per_candidate_precision_recall(
            [s["answer_set"] for s in closed], [s["gold_answer"] for s in closed]
        ),
        "cut_off": {name: mean([bool(found["cut_off"]) for found in asked.results]) for name, asked in passes.items()},
        "calibration": calibrated,
        "faithfulness": None,
        "validator": validator_accuracy(answers),
        "own_steps": None,
        "attention": attention_by_thing([sample["looked_at"] for sample in samples]),
    }


def _values(samples: Sequence[Mapping[str, Any]], passes: Mapping[str, Pass]) -> dict[str, list[float]]:
    """Each metric's value for every record; [] where it was not measured."""
    values: dict[str, list[float]] = {name: [_finite(s["scores"][name]) for s in samples] for name in CHAIN_METRICS}
    values["final_answer_accuracy"] = [float(s["correct"]) for s in samples]
    found = [s["scores"]["parts"].get("conclusion_agrees") for s in samples]
    values["conclusion_agreement"] = [agrees for agrees in found if agrees is not None]
    for name, other in (("head_accuracy", "gold_answer"), ("head_agreement", "answer_set")):
        values[name] = [final_answer_accuracy(s.get("head_answer", ()), s[other]) for s in samples if not s["is_open"]]
    values["unparseable_share"] = [float(not s["reasoning_steps"] or not s["answer_set"]) for s in samples]
    values["cut_off_share"] = [float(bool(s["cut_off"])) for s in samples]
    for name, metric in COMPARISONS.items():
        values[metric] = [float(right) for right in passes[name].right] if name in passes else []
    return values


def _finite(value: float) -> float:
    """A score that is not a number counts as 0: it is a fault of the chain or of the scorer, and is never skipped."""
    return float(value) if np.isfinite(value) else 0.0


def gains(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """How much more often the chains' answer is right than each comparison's, record by record."""
    final = values["final_answer_accuracy"]
    out = {}
    for metric in COMPARISONS.values():
        other = values[metric]
        if other and len(other) == len(final):
            difference = [a - b for a, b in zip(final, other)]
            out[metric] = {"gain": mean(difference), "interval": list(bootstrap_interval(difference))}
    return out


def _calibrate(job: Evaluation, samples: list[dict[str, Any]], passes: Mapping[str, Pass]) -> dict[str, Any] | None:
    """Fit on val, and set the samples' `confidence`."""
    chains = passes["chains"]
    fitted = chains if job.split == "val" else passes.get("calibration")
    if fitted is None:
        return None
    found = calibration(fitted.results, fitted.right, chains.results, chains.right)
    if found is not None:
        written = found["written"]
        scale = None if written is None else (written["slope"], written["offset"])
        for sample, sure in zip(samples, confidences(chains.results, found["temperature"], scale)):
            sample["confidence"] = sure
    return found


def by(samples: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """For each value of `key`: number of records, and accuracy with reasoning and without (None: not measured)."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(str(sample[key]), []).append(sample)
    return {
        name: {
            "num": len(group),
            "reasoning": mean([float(s["correct"]) for s in group]),
            "no_reasoning": mean([float(s["without_reasoning"]["correct"]) for s in group if s["without_reasoning"]]),
        }
        for name, group in sorted(groups.items())
    }

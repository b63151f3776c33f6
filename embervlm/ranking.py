"""Checkpoints ranked by their evaluations: first the best reasoning among those that answer well."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.errors import UserError
from embervlm.run_dir import COMPLETE, Checkpoint, eval_path, list_checkpoints, read_eval

ACCURACY = "final_answer_accuracy"


CHAIN_METRICS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "adjacent_similarity")


RANKABLE = (
    *CHAIN_METRICS,
    ACCURACY,
    *("conclusion_agreement", "head_accuracy", "head_agreement", "unparseable_share", "cut_off_share"),
)
"""Metrics that every evaluation of a checkpoint has."""


PHASE_2 = "outputs/stage4/phase2"
"""The folder where the guide's commands write the checkpoints to choose from."""


MAX_ACCURACY_LOSS = 0.01
"""A checkpoint further than this below the best accuracy is not eligible, however well it reasons."""


Evaluate = Callable[[Path, str], "dict[str, Any]"]


_log = logging.getLogger(__name__)


class NoCheckpointError(UserError):
    """There is no checkpoint to choose, or none that can be compared. The message names the expected files."""


@dataclass(frozen=True)
class Ranked:
    """A checkpoint in the ranking."""

    checkpoint: str
    step: int
    metrics: dict[str, float | None]
    eligible: bool
    reason: str | None
    """Why it is not eligible."""


def carried_evaluations(checkpoints_dir: str | Path, split: str) -> dict[Checkpoint, dict[str, Any] | None]:
    """Every complete checkpoint, one per step, with its evaluation, or None if it has none.

    Raises:
        NoCheckpointError: there is no complete checkpoint.
    """
    found = list_checkpoints(checkpoints_dir)
    if not found:
        raise NoCheckpointError(_nothing_in(Path(checkpoints_dir)))
    same_weights: dict[int, list[Checkpoint]] = {}
    for checkpoint in reversed(found):  # of two at one step the final comes first
        same_weights.setdefault(checkpoint.step, []).append(checkpoint)
    return {group[0]: _carried(group, split) for group in same_weights.values()}


def rank_checkpoints(
    checkpoints_dir: str | Path,
    metric: str = "reasoning_consistency",
    higher_is_better: bool = True,
    evaluate: Evaluate | None = None,
    *,
    split: str = "val",
) -> list[Ranked]:
    """All complete checkpoints, the best first and those not eligible last; see `select_best_checkpoint`.

    A checkpoint without an evaluation is not eligible unless `evaluate` makes one.
    `checkpoint-final` replaces the numbered checkpoint of the same step, which has the same weights.
    """
    carried = carried_evaluations(checkpoints_dir, split)
    # before minutes of evaluating what carries nothing yet
    _check_metric(metric, [{"metrics": dict.fromkeys(RANKABLE)}, *carried.values()], checkpoints_dir)
    evaluations = _evaluations(carried, split, evaluate)
    _check_metric(metric, evaluations.values(), checkpoints_dir)
    made = [evaluation for evaluation in evaluations.values() if evaluation["metrics"]]
    if len(sizes := {evaluation.get("num_samples") for evaluation in made}) > 1:
        _log.warning("the evaluations differ in num_samples: %s", ", ".join(sorted(map(str, sizes))))
    if len(backends := {json.dumps(evaluation.get("backend")) for evaluation in made}) > 1:
        _log.warning("the chains were judged by different backends: %s", "; ".join(sorted(backends)))

    accuracies = [_number(evaluation["metrics"].get(ACCURACY)) for evaluation in evaluations.values()]
    best_accuracy = max((value for value in accuracies if value is not None), default=None)
    ranking = []
    for checkpoint, evaluation in evaluations.items():
        metrics = {name: _number(value) for name, value in evaluation["metrics"].items()}
        reason = _why_not_eligible(metrics, metric, best_accuracy)
        ranking.append(Ranked(str(checkpoint.path), checkpoint.step, metrics, reason is None, reason))
    sign = 1 if higher_is_better else -1

    def worth(ranked: Ranked) -> tuple[bool, float, float, int]:
        value, accuracy = ranked.metrics.get(metric), ranked.metrics.get(ACCURACY)
        return (
            ranked.eligible,
            -math.inf if value is None else sign * value,
            -math.inf if accuracy is None else accuracy,
            ranked.step,
        )

    return sorted(ranking, key=worth, reverse=True)


def checkpoint_to_use(output: str | Path = "outputs") -> Path:
    """The checkpoint to work with where none is named: that of the newest run in or below `output`.

    Of the run it is the last stage that has one: phase 3, phase 2, phase 1, Stage 3. Of the stage it is the best by its
    evaluations on the val split, as `select_best_checkpoint` ranks them; the last where none was evaluated.
    Raises:
        NoCheckpointError: there is no complete checkpoint.
    """
    output = Path(output)
    stages = ("stage4/phase3", "stage4/phase2", "stage4/phase1", "stage3")
    found: list[tuple[float, int, Path]] = []
    for depth in ("", "*/", "*/*/"):
        for place, stage in enumerate(stages):
            for marker in output.glob(f"{depth}{stage}/checkpoint-*/{COMPLETE}"):
                found.append((marker.stat().st_mtime, -place, marker.parents[len(stage.split("/")) + 1]))
    if not found:
        raise NoCheckpointError(
            f"{output}: no complete checkpoint in it; name one with --checkpoint, or make one: `make quickstart`"
        )
    _, _, run = max(found)
    stage = next(stage for stage in stages if list_checkpoints(run / stage))
    best = best_checkpoints(run / stage, 1)
    return best[0] if best else list_checkpoints(run / stage)[-1].path


def best_checkpoints(folder: Path, count: int) -> list[Path]:
    """The `count` best checkpoints by the val evaluations in `folder`; [] if none was evaluated."""
    if not count or not any(eval_path(f.path, "val").exists() for f in list_checkpoints(folder)):
        return []
    ranked = rank_checkpoints(folder)
    return [Path(entry.checkpoint) for entry in ranked if entry.eligible][:count]


def _nothing_in(checkpoints_dir: Path) -> str:
    """Says which folders were expected, and which nearby folders have checkpoints."""
    text = (
        f"{checkpoints_dir}: no complete checkpoint; found no folder checkpoint-<step> or checkpoint-final "
        f"with the file {COMPLETE}"
    )
    parents = [path for path in (checkpoints_dir, *checkpoints_dir.parents) if path.is_dir() and path.name]
    depths = ("", "*/", "*/*/", "*/*/*/")
    markers = [marker for depth in depths if parents for marker in parents[0].glob(f"{depth}checkpoint-*/{COMPLETE}")]
    if folders := sorted({str(marker.parent.parent) for marker in markers}):
        return f"{text}. There are checkpoints in {', '.join(folders[:5])}; choose one with --checkpoints_dir"
    return (
        f"{text}. Train first (`python launch/train.py --stages 3 4`), or give a phase's folder with --checkpoints_dir"
    )


def _carried(same_weights: Sequence[Checkpoint], split: str) -> dict[str, Any] | None:
    """The evaluation for `split` that one of `same_weights` has."""
    files = [eval_path(checkpoint.path, split) for checkpoint in same_weights]
    source = next((file for file in files if file.exists()), None)
    return None if source is None else read_eval(source)


def _check_metric(metric: str, evaluations: Iterable[dict[str, Any] | None], checkpoints_dir: str | Path) -> None:
    known = sorted({name for evaluation in evaluations if evaluation for name in evaluation["metrics"]})
    if metric not in known:
        raise UserError(
            f"metric {metric!r} is in no evaluation of {checkpoints_dir}; the known metrics are {', '.join(known)}"
        )


def _evaluations(
    carried: dict[Checkpoint, dict[str, Any] | None], split: str, evaluate: Evaluate | None
) -> dict[Checkpoint, dict[str, Any]]:
    """The evaluations that exist and, for the others, what `evaluate` returns; without it they have no metrics."""
    out: dict[Checkpoint, dict[str, Any]] = {}
    for checkpoint, found in carried.items():
        if found is None:
            found = evaluate(checkpoint.path, split) if evaluate is not None else {"metrics": {}}
            if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
                raise ValueError(f"{checkpoint.path}: the new evaluation has no 'metrics'")
        out[checkpoint] = found
    return out


def _why_not_eligible(metrics: dict[str, float | None], metric: str, best_accuracy: float | None) -> str | None:
    if metrics.get(metric) is None:
        return f"{metric} is missing or not a number"
    accuracy = metrics.get(ACCURACY)
    if accuracy is None or best_accuracy is None:
        return f"{ACCURACY} is missing or not a number"
    if best_accuracy - accuracy > MAX_ACCURACY_LOSS + 1e-9:
        return f"{ACCURACY} {accuracy:.4f} is more than {MAX_ACCURACY_LOSS} below the best, {best_accuracy:.4f}"
    return None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)

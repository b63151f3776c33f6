"""The best complete checkpoint of a phase, by the evaluations its checkpoints carry.

    python -m embervlm.select_best --checkpoints_dir outputs/stage4/phase2 --metric reasoning_consistency

Runs on a login node: torch is only imported when a checkpoint has no evaluation yet.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embervlm.errors import OneLineParser, UserError, told_in_one_line
from embervlm.run_dir import COMPLETE, Checkpoint, eval_path, list_checkpoints, read_eval, trained_with

ACCURACY = "final_answer_accuracy"
CHAIN_METRICS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "adjacent_similarity")
RANKABLE = (*CHAIN_METRICS, ACCURACY, "head_accuracy", "head_agreement", "unparseable_share", "cut_off_share")
"""Metrics that every evaluation of a checkpoint has, whatever it is compared with."""
PHASE_2 = "outputs/stage4/phase2"
"""Where the guide's commands leave the checkpoints to choose from."""
MAX_ACCURACY_LOSS = 0.01
"""A checkpoint more than this far below the best accuracy is out, however well it reasons."""

Evaluate = Callable[[Path, str], "dict[str, Any]"]
_log = logging.getLogger(__name__)


class NoCheckpointError(UserError):
    """There is no checkpoint to choose, or none that can be compared. The message says what was looked for."""


@dataclass(frozen=True)
class Ranked:
    """A checkpoint in the ranking."""

    checkpoint: str
    step: int
    metrics: dict[str, float | None]
    eligible: bool
    reason: str | None
    """Why it is not eligible."""


def select_best_checkpoint(
    checkpoints_dir: str | Path = PHASE_2,
    metric: str = "reasoning_consistency",
    higher_is_better: bool = True,
    evaluate: Evaluate | None = None,
    *,
    split: str = "val",
) -> Path:
    """Folder of the best complete checkpoint in `checkpoints_dir`.

    Among checkpoints within one point of the best answer accuracy the one with the best `metric` wins, then the more
    accurate, then the later one: consistency alone can be had by never committing to an answer.
    Args:
        evaluate: called as `evaluate(path, split)` for a checkpoint without `evals/<split>.json`; returns what such a
            file holds. Default: `embervlm.evaluation.evaluate.evaluate_checkpoint`, which also writes it.
    Raises:
        NoCheckpointError: no complete checkpoint, or none eligible.
        UserError: `metric` is in no evaluation, or a file is damaged.
    """
    ranking = rank_checkpoints(checkpoints_dir, metric, higher_is_better, evaluate, split=split)
    return Path(_winner(ranking, metric).checkpoint)


def rank_checkpoints(
    checkpoints_dir: str | Path,
    metric: str = "reasoning_consistency",
    higher_is_better: bool = True,
    evaluate: Evaluate | None = None,
    *,
    split: str = "val",
) -> list[Ranked]:
    """All complete checkpoints, the best first and those not eligible last; see `select_best_checkpoint`.

    `checkpoint-final` stands for the numbered checkpoint of its step as well, which holds the same weights.
    """
    found = list_checkpoints(checkpoints_dir)
    if not found:
        raise NoCheckpointError(_nothing_in(Path(checkpoints_dir)))
    same_weights: dict[int, list[Checkpoint]] = {}
    for checkpoint in reversed(found):  # of two at one step the final comes first
        same_weights.setdefault(checkpoint.step, []).append(checkpoint)
    carried = {group[0]: _carried(group, split) for group in same_weights.values()}
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m embervlm.select_best", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoints_dir", type="path", default=PHASE_2, help=f"folder of a phase; default: {PHASE_2}"
    )
    parser.add_argument("--metric", default="reasoning_consistency", help="name in the evaluation JSON's metrics")
    parser.add_argument("--split", default="val", help="evaluation to compare; keep test for the final report")
    parser.add_argument("--lower_is_better", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the whole ranking instead of the best path")
    args = parser.parse_args(argv)
    with told_in_one_line():
        ranking = rank_checkpoints(args.checkpoints_dir, args.metric, not args.lower_is_better, split=args.split)
        if args.json:
            print(json.dumps([asdict(ranked) for ranked in ranking], indent=2))
        best = _winner(ranking, args.metric)
    if not args.json:
        print(f"Best checkpoint: {best.checkpoint}")
    return 0


def _winner(ranking: Sequence[Ranked], metric: str) -> Ranked:
    if not ranking[0].eligible:
        reasons = "; ".join(f"{ranked.checkpoint}: {ranked.reason}" for ranked in ranking)
        raise NoCheckpointError(f"no checkpoint can be chosen by {metric}: {reasons}")
    return ranking[0]


def _nothing_in(checkpoints_dir: Path) -> str:
    """What was looked for, and where near by there is some."""
    text = (
        f"{checkpoints_dir}: no complete checkpoint; looked for folders checkpoint-<step> and checkpoint-final "
        f"that hold the file {COMPLETE}"
    )
    parents = [path for path in (checkpoints_dir, *checkpoints_dir.parents) if path.is_dir() and path.name]
    depths = ("", "*/", "*/*/", "*/*/*/")
    markers = [marker for depth in depths if parents for marker in parents[0].glob(f"{depth}checkpoint-*/{COMPLETE}")]
    if folders := sorted({str(marker.parent.parent) for marker in markers}):
        return f"{text}. There are some in {', '.join(folders[:5])}; choose with --checkpoints_dir"
    return (
        f"{text}. Train first (`python launch/train.py --stages 3 4`), or name a phase's folder with --checkpoints_dir"
    )


def _carried(same_weights: Sequence[Checkpoint], split: str) -> dict[str, Any] | None:
    """The evaluation that one of `same_weights` carries for `split`."""
    files = [eval_path(checkpoint.path, split) for checkpoint in same_weights]
    source = next((file for file in files if file.exists()), None)
    return None if source is None else read_eval(source)


def _check_metric(metric: str, evaluations: Iterable[dict[str, Any] | None], checkpoints_dir: str | Path) -> None:
    known = sorted({name for evaluation in evaluations if evaluation for name in evaluation["metrics"]})
    if metric not in known:
        raise UserError(f"metric {metric!r} is in no evaluation of {checkpoints_dir}; there are {', '.join(known)}")


def _evaluations(
    carried: dict[Checkpoint, dict[str, Any] | None], split: str, evaluate: Evaluate | None
) -> dict[Checkpoint, dict[str, Any]]:
    """What is carried, and for the others new evaluations, on as many records as the carried ones."""
    sizes = {found.get("num_samples") for found in carried.values() if found}
    num_samples = sizes.pop() if len(sizes) == 1 else None
    missing = [checkpoint for checkpoint, found in carried.items() if found is None]
    if missing and evaluate is None:
        print(
            f"{len(missing)} of {len(carried)} checkpoints have no evaluation on {split} yet; it is made now "
            "(--eval_steps makes it while training)", file=sys.stderr,
        )  # fmt: skip
    out: dict[Checkpoint, dict[str, Any]] = {}
    began = time.monotonic()
    for checkpoint, found in carried.items():
        if found is None:
            found = (evaluate or _with_model(num_samples))(checkpoint.path, split)
            if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
                raise ValueError(f"{checkpoint.path}: the evaluation that was made now has no 'metrics'")
            if checkpoint == missing[0] and evaluate is None and len(missing) > 1:
                seconds = time.monotonic() - began
                print(f"{seconds:.0f} s; the others: about {seconds * (len(missing) - 1):.0f} s", file=sys.stderr)
        out[checkpoint] = found
    return out


def _with_model(num_samples: int | None) -> Evaluate:
    def evaluate(path: Path, split: str) -> dict[str, Any]:
        from embervlm.evaluation.evaluate import evaluate_checkpoint  # imports torch

        samples = num_samples or trained_with(path).get("eval_samples")
        evaluation: dict[str, Any] = evaluate_checkpoint(path, split=split, num_samples=samples)
        return evaluation

    return evaluate


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


if __name__ == "__main__":
    sys.exit(main())

"""The best complete checkpoint of a phase, by the evaluations of its checkpoints.

    python -m embervlm.select_best --checkpoints_dir outputs/stage4/phase2 --metric reasoning_consistency

Runs on a login node: torch is only imported when a checkpoint has no evaluation yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embervlm.errors import OneLineParser, told_in_one_line
from embervlm.ranking import PHASE_2, Evaluate, NoCheckpointError, Ranked, carried_evaluations, rank_checkpoints
from embervlm.run_dir import trained_with


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
    accurate, then the later one: a model that never commits to an answer can also be consistent.
    Args:
        evaluate: called as `evaluate(path, split)` for a checkpoint without `evals/<split>.json`; returns what such a
            file holds. Default: `embervlm.evaluation.evaluate.evaluate_checkpoint`, which also writes it.
    Raises:
        NoCheckpointError: no complete checkpoint, or none eligible.
        UserError: `metric` is in no evaluation, or a file is damaged.
    """
    evaluate = evaluate or _WithModel(checkpoints_dir, split)
    ranking = rank_checkpoints(checkpoints_dir, metric, higher_is_better, evaluate, split=split)
    return Path(_winner(ranking, metric).checkpoint)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m embervlm.select_best",
        description=(__doc__ or "").split("\n")[0],
        example="python -m embervlm.select_best --checkpoints_dir outputs/stage4/phase2",
    )
    parser.add_argument(
        "--checkpoints_dir", type="path", default=PHASE_2, help=f"folder of a phase; default: {PHASE_2}"
    )
    parser.add_argument("--metric", default="reasoning_consistency", help="name in the evaluation JSON's metrics")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="val",
        help="evaluation to compare; keep test for the final report",
    )
    parser.add_argument("--lower_is_better", action="store_true", help="of --metric")
    parser.add_argument("--json", action="store_true", help="print the whole ranking instead of the best path")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    with told_in_one_line():
        args = build_parser().parse_args(argv)
        evaluate = _WithModel(args.checkpoints_dir, args.split)
        ranking = rank_checkpoints(
            args.checkpoints_dir, args.metric, not args.lower_is_better, evaluate, split=args.split
        )
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


class _WithModel:
    """Evaluates checkpoints that have no evaluation yet, on as many records as the others."""

    def __init__(self, checkpoints_dir: str | Path, split: str) -> None:
        self._folder, self._split = checkpoints_dir, split
        self._began: float | None = None

    def __call__(self, path: Path, split: str) -> dict[str, Any]:
        from embervlm.evaluation.evaluate import evaluate_checkpoint  # imports torch

        if first := self._began is None:
            self._began = time.monotonic()
            carried = carried_evaluations(self._folder, self._split)
            self._left = sum(found is None for found in carried.values())
            sizes = {found.get("num_samples") for found in carried.values() if found}
            self._num_samples = sizes.pop() if len(sizes) == 1 else None
            print(
                f"{self._left} of {len(carried)} checkpoints have no evaluation on {split} yet; making it now "
                "(--eval_steps makes it while training)",
                file=sys.stderr,
            )
        samples = self._num_samples or trained_with(path).get("eval_samples")
        evaluation: dict[str, Any] = evaluate_checkpoint(path, split=split, num_samples=samples)
        if first and self._left > 1:
            seconds = time.monotonic() - (self._began or 0)
            print(f"{seconds:.0f} s; the others: about {seconds * (self._left - 1):.0f} s", file=sys.stderr)
        return evaluation


if __name__ == "__main__":
    sys.exit(main())

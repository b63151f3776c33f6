"""Is the answer of several chains better than that of one, and what does it cost?

    python benchmarks/voting.py --checkpoint outputs/quickstart/stage4/phase2/checkpoint-final --num_samples 100

Prints for the likeliest chain, and for k chains that vote (Wang et al. 2023): accuracy with its 95% interval (Wilson),
mean confidence, tokens written and seconds for each question. `weighted`: votes count by the step validator's belief.
It stops beginning new rows after --minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_run import REPOSITORY  # noqa: F401

from embervlm.evaluation.asked import load_model
from embervlm.evaluation.batches import BATCH_SIZE, answer
from embervlm.evaluation.eval_data import EvalData, Evaluation, load_eval_data
from embervlm.judge.metrics import is_right
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import Decoding


@dataclass(frozen=True)
class Row:
    name: str
    right: int
    asked: int
    confidence: float
    tokens: float
    seconds: float

    def __str__(self) -> str:
        low, high = wilson(self.right, self.asked)
        return (
            f"{self.name:<22} {self.right / self.asked:.3f} ({low:.3f} to {high:.3f}) {self.confidence:>10.3f} "
            f"{self.tokens:>9.0f} {self.seconds:>9.2f}"
        )


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    z, share = 1.96, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return middle - half, middle + half


def ask_all(name: str, model: EmberVLM, data: EvalData, decoding: Decoding) -> Row:
    began, results = time.monotonic(), list[dict[str, Any]]()
    for start in range(0, len(data.records), BATCH_SIZE):
        results += answer(model, data.pictures, data.records[start : start + BATCH_SIZE], decoding)
    asked = len(results)
    return Row(
        name,
        sum(is_right(result["answer_set"], record) for result, record in zip(results, data.records)),
        asked,
        sum(result["confidence"] for result in results) / asked,
        sum(result["num_tokens"] for result in results) / asked,
        (time.monotonic() - began) / asked,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--reasoning_data", help="default: the data that the checkpoint was trained with")
    parser.add_argument("--num_samples", type=int, default=100)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    model = load_model(args.checkpoint)
    job = Evaluation(
        checkpoint=args.checkpoint,
        split=args.split,
        num_samples=args.num_samples,
        compare=False,
        reasoning_data=args.reasoning_data,
    )
    data = load_eval_data(job, model.config.image_size, tuple(model.config.candidates), model.config.fill)
    wanted = {"likeliest chain": Decoding()}
    for weigh in (False, True):  # weighing takes longer than writing, so it comes last
        for count in args.chains if not weigh else [count for count in args.chains if count > 1]:
            name = f"{count} drawn{', weighted' if weigh else ''}"
            wanted[name] = Decoding(num_chains=count, temperature=args.temperature, weigh_votes=weigh)
    print(f"{len(data.records)} questions of the {args.split} split, temperature {args.temperature}")
    print(f"{'chains':<22} {'accuracy (95%)':<22} {'confidence':>10} {'tokens':>9} {'seconds':>9}")
    began = time.monotonic()
    for name, decoding in wanted.items():
        if time.monotonic() - began > 60 * args.minutes:
            print(f"{name}: left out, {args.minutes:g} minutes are over")
        else:
            print(ask_all(name, model, data, decoding), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

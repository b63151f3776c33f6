"""`embervlm score-chains`: metrics of chains from any model, with reasons."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from embervlm.judge.backends import EMBEDDED
from embervlm.judge.chain_file import score_file


def score_chains_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE.jsonl", help="{steps, answer, gold_answer?, instruction?, image?, facts?}"
    )
    parser.add_argument("--output_file", type=Path, help="JSONL: the same lines with their scores")
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print the lines with their scores, and nothing else"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="training chains (same lines, or a data set) from which to fit "
        "word rarity, usual order and values of facts; default: nothing is fitted",
    )
    judge_options(parser)


def judge_options(parser: argparse.ArgumentParser) -> None:
    backend = "judge of the chains: embedded, or a Hugging Face id or local folder of"
    for name, model in (("similarity", "a sentence-transformers model"), ("entailment", "an NLI cross-encoder")):
        parser.add_argument(f"--{name}", type="path", default=EMBEDDED, help=f"{backend} {model}")


def score_chains(file: Path, **options: Any) -> None:
    score_file(file, **options)

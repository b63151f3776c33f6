"""How far may a question be from those of training? The limit of `embervlm.model.known` on the words of data sets.

    python benchmarks/known_words.py outputs/quickstart/data/reasoning_data.json data/easy_vqa/records.jsonl ...

For each data set: which share of general questions ("What is 2+2?"), and of the other data sets' questions, is within
the limit and would be answered, for several quantiles of how far the wordings of training are from each other. Two
data sets or more; no checkpoint is needed, and pictures are not read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from known_or_off import GENERAL

from embervlm.data.records import read_records
from embervlm.data.splits import split_records
from embervlm.evaluation.known import NUM_QUESTIONS, NUM_VAL
from embervlm.model import known
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

QUANTILES = (0.5, 0.8, 0.9, 0.98)
FROM_EACH = 30
"""Questions of each other data set that are asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    paths = parser.parse_args().data
    questions = {path: wordings(path) for path in paths}
    no_pictures = torch.zeros(0, 1, 1)
    print(f"{'quantile':>8} {'limit':>6} {'general':>8} {'others':>7}   answered")
    for path, (train, val) in questions.items():
        others = [text for other, (texts, _) in questions.items() if other != path for text in texts[:FROM_EACH]]
        print(f"{path}: {len(train)} wordings")
        for quantile in QUANTILES:
            known.UNUSUAL = quantile  # what is fitted next goes by it
            fitted = known.Known.fit(no_pictures, no_pictures, train[:: -(-len(train) // NUM_QUESTIONS)], val, 1.0)
            limit = float(fitted.scales[1, 1])
            shares = [np.mean(np.array(fitted.question_distances(texts)) <= limit) for texts in (GENERAL, others)]
            print(f"{quantile:8} {limit:6.3f} {shares[0]:8.3f} {shares[1]:7.3f}")


def wordings(path: Path) -> tuple[list[str], list[str]]:
    """The distinct questions of the training split, and some of the val split."""
    splits = split_records(read_records(path, candidates=ROBOTS if path.suffix == ".json" else ()))
    train = list(dict.fromkeys(record.instruction for record in splits["train"]))
    return train, [record.instruction for record in splits["val"]][:NUM_VAL]


if __name__ == "__main__":
    main()

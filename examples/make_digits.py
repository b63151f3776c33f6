"""Real scans with chains: two handwritten digits side by side, out of scikit-learn's 1,797 (Alpaydin, Kaynak 1998).

    pip install scikit-learn
    python examples/make_digits.py data/digits
    deepspeed --num_gpus 2 launch/train.py --config configs/own_data.yaml --stages 3 4 \
        --reasoning_data data/digits/records.jsonl --output_dir outputs/digits
    embervlm evaluate --checkpoint outputs/digits/stage4/phase2/checkpoint-final --split test \
        --output_file outputs/digits/test.json

Nothing of the recipe was chosen on these data. No scan is in two splits. docs/results.md has what came out.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PICTURES = {"train": 1500, "val": 150, "test": 300}
SIDE = 48
"""Pixels of a digit in a picture; the scans have 8 x 8."""


def questions(left: int, right: int) -> Iterator[tuple[str, list[str], str]]:
    """Question, steps and answer, of every kind."""
    seen = [f"The left digit is {left}.", f"The right digit is {right}."]
    yield "Which digit is on the left?", seen, str(left)
    yield "Which digit is on the right?", seen, str(right)
    larger = "left" if left > right else "right" if right > left else "neither"
    told = {"left": f"{left} is more than {right}.", "right": f"{right} is more than {left}."}
    yield "Which digit is larger, left or right?", [*seen, told.get(larger, "They are equal.")], larger
    yield "What is the sum of the digits?", [*seen, f"{left} + {right} = {left + right}."], str(left + right)


def records(folder: Path) -> Iterator[dict[str, Any]]:
    from sklearn.datasets import load_digits

    scans = load_digits()
    rng, places = random.Random(0), list(range(len(scans.target)))
    rng.shuffle(places)
    shares = {"train": places[:1300], "val": places[1300:1400], "test": places[1400:]}
    number = 0
    for split, count in PICTURES.items():
        for _ in range(count):
            pair = rng.sample(shares[split], 2)
            pixels = np.concatenate([scans.images[place] for place in pair], axis=1) * (255 / 16)
            picture = folder / "images" / f"{number:05}.png"
            Image.fromarray(pixels.astype(np.uint8)).resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC).save(picture)
            left, right = (int(scans.target[place]) for place in pair)
            for text, steps, answer in rng.sample(list(questions(left, right)), 2):
                chain = [f"Step {i}: {step}" for i, step in enumerate(steps, 1)]
                yield {
                    "image": f"images/{picture.name}",
                    "instruction": text,
                    "reasoning": "\n".join([*chain, f"Conclusion: {answer}."]),
                    "answer": answer,
                    "metadata": {"split": split},
                }
            number += 1


def main(folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records(folder)]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder / 'records.jsonl'}: {len(lines):,} records")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

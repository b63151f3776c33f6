"""easy-VQA as records with chains: 5,000 drawn pictures, 48,248 questions, 13 answers, by Victor Zhou (2019).

    pip install --no-deps easy-vqa
    python examples/make_easy_vqa.py data/easy_vqa
    deepspeed --num_gpus 2 launch/train.py --config configs/own_data.yaml --stages 3 4 \
        --reasoning_data data/easy_vqa/records.jsonl --output_dir outputs/easy_vqa
    embervlm evaluate --checkpoint outputs/easy_vqa/stage4/phase2/checkpoint-final --split test \
        --output_file outputs/easy_vqa/test.json

The package has questions and answers, and no chains. A chain is made by rule from what the questions of its own
picture tell about it: each picture has one shape of one colour. The published test set is the test split; of the
training pictures one in twenty is the val split. docs/results.md has what came out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
VAL_EVERY = 20
"""One training picture in this many is for validation."""


def what_is_shown(questions: list[tuple[str, str]]) -> tuple[str, str]:
    """Colour and shape of a picture, from the answers to its own questions; "" for what they leave open."""
    colors, shapes = set(COLORS), set(SHAPES)
    for text, answer in questions:
        for name in (named_in(text), answer):
            options = shapes if name in SHAPES else colors
            if name in (*SHAPES, *COLORS):
                is_there = answer not in ("yes", "no") or (answer == "yes") != negated(text)
                options &= {name} if is_there else options - {name}
    return "".join(colors) if len(colors) == 1 else "", "".join(shapes) if len(shapes) == 1 else ""


def negated(question: str) -> bool:
    return bool(re.search(r"\b(not|no)\b", question))


def named_in(question: str) -> str:
    """The shape or colour that a question names, "" if it names none."""
    words = re.findall(r"\w+", question)
    return next((name for name in (*SHAPES, *COLORS) if name in words), "")


def chain(question: str, answer: str, color: str, shape: str) -> str:
    """Steps from the picture to the answer."""
    seen = " ".join(["The picture shows a", *([color] if color else []), f"{shape or 'shape'}."])
    if answer in SHAPES:
        steps = [seen, "The question asks for the shape.", f"The shape is a {shape}."]
    elif answer not in ("yes", "no"):
        steps = [seen, "The question asks for the color.", f"The color is {color}."]
    else:
        named, asked_absent = named_in(question), negated(question)
        thing = f"a {named}" if named in SHAPES else f"a {named} shape"
        there = (answer == "yes") != asked_absent
        steps = [
            seen,
            f"The question asks whether {thing} is {'absent' if asked_absent else 'there'}.",
            f"{thing[0].upper()}{thing[1:]} is {'there' if there else 'absent'}, so the answer is {answer}.",
        ]
    return "\n".join([*(f"Step {n}: {step}" for n, step in enumerate(steps[:-1], 1)), f"Conclusion: {steps[-1]}"])


def records(split: str, texts: list[str], answers: list[str], pictures: list[int]) -> Iterator[dict[str, Any]]:
    """The records of one of the package's two splits."""
    asked = defaultdict(list)
    for text, answer, picture in zip(texts, answers, pictures, strict=True):
        asked[picture].append((text, answer))
    for picture, questions in asked.items():
        color, shape = what_is_shown(questions)
        is_val = split == "train" and picture % VAL_EVERY == 0
        for number, (question, answer) in enumerate(questions):
            yield {
                "id": f"{split}-{picture}-{number}",
                "image": f"images/{split}/{picture}.png",
                "instruction": question,
                "reasoning": chain(question, answer, color, shape),
                "answer": answer,
                "metadata": {"split": "val" if is_val else split},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder for records.jsonl and images/")
    output = parser.parse_args().output_dir
    try:
        import easy_vqa
    except ImportError:
        sys.exit("easy-vqa is not installed: pip install --no-deps easy-vqa")
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "records.jsonl", "w", encoding="utf-8") as file:
        for split, questions, paths in (
            ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
            ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
        ):
            folder = output / "images" / split
            folder.mkdir(parents=True, exist_ok=True)
            for number, path in paths.items():
                shutil.copyfile(path, folder / f"{number}.png")
            for record in records(split, *questions):
                file.write(json.dumps(record) + "\n")
            print(f"{split}: {len(paths)} pictures, {len(questions[0])} questions")
    print(output / "records.jsonl")


if __name__ == "__main__":
    main()

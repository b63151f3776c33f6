"""Does a checkpoint know which questions it can answer? Test questions beside questions that are off, each kind apart.

    python benchmarks/known_or_off.py CHECKPOINT --other OTHER/records.jsonl --tasks_file single_robot_selection.json \
        --photos FOLDER --screenshots FOLDER --output known.json

Off are: questions about other things on known pictures; known questions on other pictures, on none, on noise, on one
colour; and both at once. For each kind it prints the AUROC of `confidence` against the test questions, before and with
what `embervlm.model.known` adds, and the share that gets `answer: None`. Nothing is fitted on any of them.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from embervlm.data.records import read_records  # noqa: E402
from embervlm.evaluation.batches import chunks  # noqa: E402
from embervlm.evaluation.calibration import expected_calibration_error  # noqa: E402
from embervlm.evaluation.eval_data import EvalData, Evaluation, load_eval_data  # noqa: E402
from embervlm.evaluation.known import fit_known  # noqa: E402
from embervlm.judge.metrics import is_right  # noqa: E402
from embervlm.model.decoding import Decoding  # noqa: E402
from embervlm.model.embervlm import EmberVLM  # noqa: E402
from embervlm.model.generation import generate_answers, known_of, look  # noqa: E402
from embervlm.model.known import settled  # noqa: E402

NUM_KNOWN, NUM_OFF = 300, 50
GENERAL = """
What is 2+2?
Who wrote Hamlet?
What is the capital of France?
Translate good morning into Spanish.
How many legs does a spider have?
Write a poem about the autumn rain.
What time does the train to Berlin leave?
Explain photosynthesis in one sentence.
Which planet is the largest in our solar system?
How do I bake sourdough bread?
Is a tomato a fruit or a vegetable?
Sort the numbers 9, 3, 7 and 1.
Who won the football match last night?
What does the word ephemeral mean?
Tell me a joke about penguins.
How far away is the moon?
What is the boiling point of water in Fahrenheit?
Please summarise the article above.
Why is the sky blue?
What is the person in the picture wearing?
How many cats are on the sofa?
What is written on the sign?
Does milk contain lactose?
Write a Python function that reverses a list.
When did the Second World War end?
What should I cook for dinner tonight?
Name three rivers in South America.
What is the square root of 144?
How do vaccines work?
Is it going to rain tomorrow in London?
""".strip().splitlines()
ROBOTS_REWORDED = """
Bring the load to the flag. Which robots can do it?
Please carry the load over to the flag. Which robots are suited?
Which robots are suited to carry the load to the flag?
Which robots can carry the load to the flag?
Who can deliver the load to the flag?
Move the load to the flag. Which robots fit?
Take the load over to the flag and repair the pump there. Which robots would you send?
Go to the flag without the load and inspect the site. Which robots are suited?
Leave the load behind, walk to the flag and film the site. Which robots can do that?
Open the gate at the flag; the load stays here. Which robots are suited?
Repair the pump right here. Which robots are suited?
Inspect the site now. Which robots are able to?
Film this site at once. Which robots are suited?
Deliver the load here, now. Which robots are suited for this?
Which robot should unlock the gate here?
Which of the robots can take the load to the flag and unlock the gate there?
We need the load at the flag. Which robots are suited to bring it?
Take the load to the flag, then inspect the site there. Which robots are right for this?
The pump at the flag is broken: take the load along and repair it. Which robots are suited?
Carry this load here and now. What robots are suited?
""".strip().splitlines()
STRANGE = ("banana", "violin", "senator", "volcano", "sandwich", "umbrella", "chess", "dentist", "opera", "whale")
"""Words that neither data set has."""
Asked = list[tuple[Any, str]]
"""Pictures, or None, with their questions."""


def off_questions(known: Asked, kinds: dict[str, Sequence[str]], rng: random.Random) -> dict[str, Asked]:
    return {f"question: {name}": [(rng.choice(known)[0], text) for text in texts] for name, texts in kinds.items()}


def off_pictures(known: Asked, kinds: dict[str, Sequence[Any]], rng: random.Random) -> dict[str, Asked]:
    return {f"picture: {name}": [(one, rng.choice(known)[1]) for one in pictures] for name, pictures in kinds.items()}


def charts(count: int) -> list[np.ndarray]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rng, out = np.random.default_rng(0), []
    for number in range(count):
        figure, axes = plt.subplots(figsize=(3, 3), dpi=80)
        if number % 4 == 0:
            axes.plot(rng.normal(size=(30, 3)).cumsum(0))
        elif number % 4 == 1:
            axes.bar(range(6), rng.random(6))
        elif number % 4 == 2:
            axes.scatter(*rng.normal(size=(2, 50)))
        else:
            axes.pie(rng.random(5))
        axes.set_title(f"figure {number}")
        encoded = io.BytesIO()
        figure.savefig(encoded)
        plt.close(figure)
        out.append(np.array(Image.open(encoded).convert("RGB")))
    return out


def noise(count: int) -> list[np.ndarray]:
    """Fine, coarse and very coarse grain, and grain around grey."""
    rng, out = np.random.default_rng(0), []
    for number in range(count):
        size = (96, 24, 8, 96)[number % 4]
        grain = rng.integers(0, 256, size=(size, size, 3))
        if number % 4 == 3:
            grain = np.clip(128 + 40 * rng.normal(size=(size, size, 3)), 0, 255)
        out.append(np.array(Image.fromarray(grain.astype(np.uint8)).resize((96, 96), Image.Resampling.NEAREST)))
    return out


def one_colour(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    colours = [(128, 128, 128), (0, 0, 0), (255, 255, 255), *rng.integers(0, 256, size=(count - 3, 3))]
    return [np.full((96, 96, 3), colour, np.uint8) for colour in colours]


def pictures_in(folder: Path, *, parts: bool) -> list[np.ndarray]:
    """Pictures of a folder and all below it, from 200 pixels on; with `parts` also two corners of each."""
    out = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg")):
        picture = Image.open(path).convert("RGBA")
        if min(picture.size) < 200:
            continue
        white = Image.new("RGBA", picture.size, "white")
        whole = Image.alpha_composite(white, picture).convert("RGB")
        width, height = whole.size
        boxes = [(0, 0, width // 2, height // 2), (width // 2, height // 2, width, height)] if parts else []
        out += [np.array(whole), *(np.array(whole.crop(box)) for box in boxes)]
    return out


def questions(options: argparse.Namespace, data: EvalData) -> tuple[Asked, dict[str, Asked], Asked]:
    """The known ones, the kinds of off ones, and known tasks in other words."""
    rng = random.Random(0)
    known: Asked = [(record.image, record.instruction) for record in data.records]
    words: dict[str, Sequence[str]] = {"general": GENERAL}
    kinds: dict[str, Sequence[Any]] = {"none": [None] * NUM_OFF, "charts": charts(40), "noise": noise(40)}
    kinds["one colour"] = one_colour(40)
    both: Asked = []
    if options.other is not None:
        records = [r for r in read_records(options.other, candidates=()) if r.image]
        others: Asked = [(r.image, r.instruction) for r in rng.sample(records, NUM_OFF)]
        words["of other data"], kinds["of other data"] = [o[1] for o in others], [o[0] for o in others]
        both = [(picture, rng.choice(words["of other data"])) for picture, _ in others]
    if options.tasks_file is not None:
        tasks = list(dict.fromkeys(one["input"] for one in json.loads(options.tasks_file.read_text("utf-8"))))
        words["real tasks"] = rng.sample(tasks, NUM_OFF)
        words["real tasks, our form"] = [
            f"{text.removeprefix('Task:').strip()} Which robots are suited?" for text in words["real tasks"]
        ]
    for name in ("photos", "screenshots"):
        if (folder := getattr(options, name)) is not None:
            kinds[name] = pictures_in(folder, parts=name == "photos")[:NUM_OFF]
    off = {**off_questions(known, words, rng), **off_pictures(known, kinds, rng)}
    if both:
        off["both: of other data"] = both
    off["both: general, noise"] = list(zip(noise(len(GENERAL)), GENERAL))
    reworded = options.reworded.read_text("utf-8").strip().splitlines() if options.reworded else ROBOTS_REWORDED
    return known, off, [(rng.choice(known)[0], text) for text in reworded for _ in range(3)]


def one_word_replaced(known: Asked, count: int) -> Asked:
    """Known questions with a word of four letters or more replaced by a strange one."""
    rng = random.Random(1)
    out = []
    for picture, text in rng.sample(known, count):
        words = re.findall(r"\w{4,}", text)
        out.append((picture, text.replace(rng.choice(words), rng.choice(STRANGE), 1)))
    return out


def ask(model: EmberVLM, asked: Asked) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Answers without what is known, with it, and the seconds that writing and knowing took."""
    before, after, seconds = [], [], [0.0, 0.0]
    for part in chunks(asked):
        pictures, texts = [picture for picture, _ in part], [text for _, text in part]
        known, model.known = model.known, None
        start = time.perf_counter()
        written = generate_answers(model, pictures, texts, Decoding())
        seconds[0] += time.perf_counter() - start
        model.known = known
        with torch.inference_mode():
            visual, seen = look(model, pictures)
            start = time.perf_counter()
            found = known_of(model, visual, seen, texts, Decoding())
            seconds[1] += time.perf_counter() - start
        before += written
        after += settled(written, found, Decoding().min_known)
    return before, after, seconds


def auroc(known: Sequence[float], off: Sequence[float]) -> float:
    """Probability that a known question has the higher value; a tie counts half (Fawcett 2006)."""
    ranks = rankdata([*known, *off])
    return float((ranks[: len(known)].sum() - len(known) * (len(known) + 1) / 2) / len(known) / len(off))


def values(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(result[name]) for result in results]


def mean(results: Sequence[dict[str, Any]]) -> float:
    return float(np.mean(values(results, "confidence")))


def refused(results: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([result["answer"] is None for result in results]))


def measure(model: EmberVLM, options: argparse.Namespace, data: EvalData) -> dict[str, Any]:
    known, off, reworded = questions(options, data)
    plain, settled_known, seconds = ask(model, known)
    right = [is_right(result["answer_set"], record) for result, record in zip(plain, data.records)]
    rows, every = {}, ([], [])  # type: dict[str, Any], tuple[list[Any], list[Any]]
    for name, asked in off.items():
        before, after, _ = ask(model, asked)
        every[0].extend(before)
        every[1].extend(after)
        rows[name] = _row(plain, settled_known, before, after)
    rows["all"] = _row(plain, settled_known, *every)
    near = {"in other words": reworded, "with a strange word": one_word_replaced(known, NUM_OFF)}
    asked_near = {name: ask(model, asked)[1] for name, asked in near.items()}
    return {
        "num_known": len(known),
        "refused_known": refused(settled_known),
        "confidence_known": [mean(plain), mean(settled_known)],
        "ece_known": [expected_calibration_error(values(r, "confidence"), right) for r in (plain, settled_known)],
        "kinds": rows,
        "near": {
            name: {"num": len({text for _, text in near[name]}), "refused": refused(found), "confidence": mean(found)}
            for name, found in asked_near.items()
        },
        "known_s": seconds[1] / len(known),
        "answer_s": seconds[0] / len(known),
    }


def _row(known: Any, known_after: Any, off: Any, off_after: Any) -> dict[str, Any]:
    return {
        "num": len(off),
        "auroc_before": auroc(values(known, "confidence"), values(off, "confidence")),
        "auroc": auroc(values(known_after, "confidence"), values(off_after, "confidence")),
        "auroc_known": auroc(values(known_after, "known"), values(off_after, "known")),
        "confidence_before": mean(off),
        "confidence": mean(off_after),
        "refused": refused(off_after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reasoning_data", help="default: the data that the checkpoint was trained on")
    parser.add_argument("--other", type=Path, help="records about something else")
    parser.add_argument("--tasks_file", type=Path, help="single_robot_selection.json")
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--screenshots", type=Path, help="folder of screenshots")
    parser.add_argument("--reworded", type=Path, help="known tasks in other words, one a line; default: the robots'")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = EmberVLM.from_pretrained(options.checkpoint)
    job = Evaluation(checkpoint=options.checkpoint, reasoning_data=options.reasoning_data, num_samples=NUM_KNOWN)
    data = load_eval_data(job, model.config.image_size, tuple(model.config.candidates), model.config.fill)
    if data.known is None:
        raise SystemExit(f"{options.checkpoint}: its data have too few val records")
    model.known = fit_known(model, data.known)
    result = measure(model, options, data)
    means, error = ("{:.3f} -> {:.3f}".format(*result[f"{name}_known"]) for name in ("confidence", "ece"))
    print(f"{result['num_known']} known questions, {result['refused_known']:.1%} refused")
    print(f"their mean confidence {means}, its expected calibration error {error}")
    print(f"{'off':28}{'number':>7}{'AUROC before':>14}{'AUROC':>8}{'refused':>9}{'mean confidence':>24}")
    for name, row in result["kinds"].items():
        means = f"{row['confidence_before']:.2f} -> {row['confidence']:.2f}"
        print(f"{name:28}{row['num']:7}{row['auroc_before']:14.3f}{row['auroc']:8.3f}{row['refused']:9.1%}{means:>24}")
    for name, row in result["near"].items():
        print(f"{row['num']} known questions {name}: {row['refused']:.0%} refused, confidence {row['confidence']:.2f}")
    print(f"per question: {result['answer_s'] * 1e3:.1f} ms for the answer, {result['known_s'] * 1e3:.2f} ms to know")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

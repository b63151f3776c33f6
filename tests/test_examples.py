"""The files of examples/ run as their first lines say."""

from __future__ import annotations

import json
import runpy
import signal
from pathlib import Path

import pytest
from served import serving
from training_helpers import REPOSITORY, make_data, write_model_yaml

from embervlm.signals import STOP_SIGNALS

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def example(name: str, *args: object) -> None:
    runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"))["main"](*map(str, args))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_start_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    is_test_bed = "pip install" in "\n".join(lines[:6])
    assert len(lines) < (350 if is_test_bed else 60) and f"python examples/{path.name} " in "\n".join(lines[:6])


def test_a_model_is_asked(lively_model, records, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lively_model.save_pretrained(tmp_path)
    example("ask_a_model", tmp_path, records[0].image, records[0].instruction)
    said = capsys.readouterr().out
    assert "Step 1: " in said and "It finds " in said and "Answer to the follow-up: " in said


def test_the_weakest_of_a_file_of_chains_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, *others = (REPOSITORY / "tests" / "data" / "unseen_chains.jsonl").read_text(encoding="utf-8").splitlines()
    chain = json.loads(good)
    broken = {**chain, "instruction": "The broken one?", "steps": [chain["steps"][0]] * 3}
    (tmp_path / "chains.jsonl").write_text("\n".join([good, json.dumps(broken), *others[:2]]))
    example("score_chains", tmp_path / "chains.jsonl", 1)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "The broken one?" and "reasoning_consistency 0.0" in said[1]


@pytest.mark.slow
def test_a_file_of_ones_own_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(make_data(tmp_path, 18).read_text())
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, records)))
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # training takes them for good
    tiny = ["--model", write_model_yaml(tmp_path), "--max_steps", 2, "--max_reasoning_length", 400]
    example("train_on_your_file", own, tmp_path / "out", *tiny)
    for number, handler in before.items():
        signal.signal(number, handler)
    said = capsys.readouterr().out
    assert "every record can be used for training" in said and records[0]["instruction"] in said and "(given: " in said


@pytest.mark.parametrize(
    ("question", "answer", "chain"),
    [
        ("what color is the shape?", "teal", ["The question asks for the color.", "The color is teal."]),
        ("is no circle present?", "no", ["The question asks whether a circle is absent.", "so the answer is no."]),
        ("is there a red shape?", "no", ["The question asks whether a red shape is there.", "A red shape is absent"]),
    ],
)
def test_chains_of_easy_vqa_say_what_the_pictures_own_questions_tell(
    question: str, answer: str, chain: list[str]
) -> None:
    made = runpy.run_path(str(REPOSITORY / "examples" / "make_easy_vqa.py"))
    others = [("is there a circle in the image?", "yes"), ("does the image not contain a black shape?", "yes")]
    colors = [color for color in made["COLORS"] if color not in ("teal", "black")]
    others += [(f"is there a {color} shape?", "no") for color in colors]  # teal is what they leave
    shown = made["what_is_shown"](others)
    assert shown == ("teal", "circle")
    assert made["what_is_shown"](others[:1]) == ("", "circle")
    found = made["chain"](question, answer, *shown)
    assert found.startswith("Step 1: The picture shows a teal circle.\nStep 2: ") and "\nConclusion: " in found
    assert all(part in found for part in chain)


@pytest.mark.slow
def test_a_mission_is_planned_with_a_port(lively_model, scene_data, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lively_model) as client:
        example("plan_with_a_port", scene_data / "images", client.base_url)
    said = capsys.readouterr().out
    assert (said.count(".jpg: ") == 8 and "goes (" in said) or "a person decides (the model: " in said

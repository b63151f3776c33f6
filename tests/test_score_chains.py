"""`embervlm score-chains`: chains of any model in, the same lines with scores and reasons out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from embervlm.cli import main
from embervlm.data.records import ReasoningRecord
from embervlm.evaluation.batches import known_of
from embervlm.judge.chain_file import MAX_CHARACTERS, MAX_STEPS
from embervlm.judge.metrics import ChainScorer

METRICS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "adjacent_similarity")
LAMP = {
    "id": "lamp",
    "steps": [
        "The question is whether the lamp shines while the switch is open.",
        "An open switch interrupts the circuit, so no current flows through the lamp.",
        "A lamp only shines while current flows through it, so it does not shine.",
        "Conclusion: the lamp does not shine.",
    ],
    "answer": "No",
    "gold_answer": "No",
    "instruction": "Does the lamp shine while the switch of its circuit is open?",
    "facts": {"switch": "open"},
}


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def scored(capsys, path: Path, *flags: str) -> list[dict]:
    main(["score-chains", str(path), "--json", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_same_lines_come_out_with_scores_and_reasons(tmp_path, capsys):
    extra = {**LAMP, "teacher": "x", "number": 7}
    (line,) = scored(capsys, write(tmp_path / "chains.jsonl", extra))
    scores = line.pop("scores")
    assert line == extra
    assert all(0 <= scores[name] <= 1 for name in METRICS)
    assert scores["reasoning_consistency"] > 0.9 and scores["logical_flow_score"] > 0.8
    assert scores["final_answer_accuracy"] == 1.0 and scores["reasons"] == []
    assert set(scores["completeness_by_type"]) >= {"problem_analysis", "conclusion"} and scores["parts"]


def test_reasons_name_the_redundant_step_and_the_pair_that_contradicts(tmp_path, capsys):
    repeats = {**LAMP, "steps": [*LAMP["steps"][:3], "Step 4: " + LAMP["steps"][1], LAMP["steps"][3]]}
    opposes = {**LAMP, "steps": ["Current flows through it.", "No current flows through it.", *LAMP["steps"][2:]]}
    closed = {
        **LAMP,
        "steps": ["The switch is closed.", *LAMP["steps"][1:]],
        "facts": {"switch": "open", "door": "closed"},
    }
    first, second, third = scored(capsys, write(tmp_path / "chains.jsonl", repeats, opposes, closed))
    assert first["scores"]["reasons"] == ["step 4 repeats step 2"]
    assert "step 2 contradicts step 1" in second["scores"]["reasons"]
    assert third["scores"]["reasons"][0] == "step 1 says 'switch is closed', but switch is open"
    assert second["scores"]["reasoning_consistency"] == third["scores"]["reasoning_consistency"] == 0


def test_what_a_line_may_leave_out_may_be_left_out(tmp_path, capsys):
    bare = {"steps": LAMP["steps"], "answer": "No"}
    (line,) = scored(capsys, write(tmp_path / "chains.jsonl", bare))
    assert line["scores"]["final_answer_accuracy"] is None and line["scores"]["reasoning_consistency"] > 0.5


SEEN = {
    "steps": ["It has a beak and feathers.", "It stands on one leg.", "So it is a stork.", "Conclusion: a stork."],
    "answer": "stork",
    "gold_answer": "stork",
    "instruction": "Which animal is drawn here?",
}


def test_what_a_step_reads_off_a_picture_is_not_made_up(tmp_path, capsys):
    """Without facts and gold chain nobody but the chain's author knows what the picture shows."""
    elsewhere = {**SEEN, "image": "a.png", "steps": ["Rent is due in May.", "Banks close at noon.", "Pay it before."]}
    told = {**SEEN, "image": "a.png", "facts": {"animal": "stork"}}
    lines = [SEEN, {**SEEN, "image": "a.png"}, {**SEEN, "img_path": "a.png"}, elsewhere, told]
    main(["score-chains", str(write(tmp_path / "chains.jsonl", *lines)), "--json"])
    captured = capsys.readouterr()
    text, pictured, named, other, known = (json.loads(line)["scores"] for line in captured.out.splitlines())
    assert pictured["reasons"] == named["reasons"] == [] and pictured["reasoning_consistency"] > 0.95
    assert text["reasoning_consistency"] < 0.7 and known["reasoning_consistency"] < 0.9
    assert other["reasoning_consistency"] < 0.2 and "does not speak of the question" in other["reasons"][0]
    assert "3 of 5 lines have a picture and neither facts nor gold_steps" in captured.err
    assert "1 of 5 lines have nothing but the question" in captured.err


def test_an_evaluation_of_a_record_without_a_chain_knows_that_it_has_a_picture():
    record = ReasoningRecord(record_id="1", image="a.png", instruction=SEEN["instruction"], steps=(), answer=("stork",))
    scores = [
        ChainScorer().score(SEEN["steps"], known_of(replace(record, image=image), {}, ["stork"]))
        for image in ("a.png", None)
    ]
    assert scores[0]["reasoning_consistency"] > 0.95 and scores[1]["reasoning_consistency"] < 0.7


def test_answers_are_sets_in_any_spelling(tmp_path, capsys):
    robots = {"candidates": ["Drone", "Robot with Legs"], "gold_answer": ["Robot with Legs", "Drone"]}
    lines = [{**LAMP, **robots, "answer": answer} for answer in ("drone and robot with legs", ["Drone"], "Drone")]
    found = [line["scores"]["final_answer_accuracy"] for line in scored(capsys, write(tmp_path / "c.jsonl", *lines))]
    assert found == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    ["The correct answer is (B) because A is wrong.", "not A but B", "The answer is B. It is not A.", "B, not A"],
)
def test_an_answer_in_a_sentence_is_the_choice_that_it_gives(answer, tmp_path, capsys):
    line = {**LAMP, "candidates": ["A", "B", "C"], "answer": answer, "gold_answer": "B"}
    (found,) = scored(capsys, write(tmp_path / "c.jsonl", line))
    assert found["scores"]["final_answer_accuracy"] == 1.0


def test_a_number_in_words_is_one_answer(tmp_path, capsys):
    line = {**LAMP, "answer": "Three hundred and five.", "gold_answer": "305"}
    (found,) = scored(capsys, write(tmp_path / "c.jsonl", line))
    assert found["scores"]["final_answer_accuracy"] == 1.0


def test_empty_chains_score_zero_and_are_counted(tmp_path, capsys):
    empty = [{**LAMP, "steps": steps} for steps in ([], ["", " "], ["Conclusion:"], "")]
    path, output = write(tmp_path / "chains.jsonl", LAMP, *empty), tmp_path / "out.jsonl"
    main(["score-chains", str(path), "--output_file", str(output)])
    out = capsys.readouterr().out
    assert "5 chains; 4 are empty and 0 unparseable, and these score 0" in out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines[1:]:
        assert [line["scores"][name] for name in METRICS] == [0, 0, 0, 0] and line["scores"]["reasons"] == [
            "the chain is empty"
        ]
    mean = lines[0]["scores"]["reasoning_consistency"] / 5  # the empty ones are not skipped
    assert f"reasoning_consistency   {mean:.4f}" in out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "invalid JSON"),
        ("[1, 2]", "is a list, not an object"),
        ('{"answer": "x"}', "steps: is missing"),
        ('{"steps": [1]}', "steps: is a list, not a list of texts"),
        ('{"steps": ["a"], "instruction": 3}', "instruction: is a number"),
        ('{"steps": ["a"], "facts": [{"x": 1}]}', "facts: is a list"),
        ('{"steps": ["a"], "answer": {"x": 1}}', "answer: is an object"),
        (json.dumps({"steps": ["a"] * (MAX_STEPS + 1)}), f"at most {MAX_STEPS}"),
        (json.dumps({"steps": ["word " * MAX_CHARACTERS]}), "at most 30,000"),
    ],
)
def test_a_bad_line_is_named_scores_zero_and_stops_nothing(tmp_path, capsys, line, problem):
    path = write(tmp_path / "chains.jsonl", LAMP, "", line, LAMP)
    main(["score-chains", str(path), "--json"])
    captured = capsys.readouterr()
    first, bad, last = [json.loads(text) for text in captured.out.splitlines()]
    assert first["scores"] == last["scores"]
    assert [bad["scores"][name] for name in METRICS] == [0, 0, 0, 0]
    assert bad["scores"]["reasons"][0].startswith("unparseable: ") and problem in bad["scores"]["reasons"][0]
    assert f"{path} line 3: " in captured.err and problem in captured.err
    assert "3 chains; 0 are empty and 1 unparseable" in captured.err


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", "\n\n", "the file is empty"),
        ("chains.json", "[]", 'unknown suffix ".json"'),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_of_error(tmp_path, capsys, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["score-chains", str(path)])
    assert (
        str(stopped.value).startswith("error: ") and problem in str(stopped.value) and str(path) in str(stopped.value)
    )


def test_reference_chains_teach_order_and_values_of_facts(tmp_path, capsys):
    train = [{**LAMP, "facts": {"switch": value}} for value in ("open", "closed", "half open")]
    reference = write(tmp_path / "train.jsonl", *train)
    told = {**LAMP, "steps": ["The switch is half open.", *LAMP["steps"][1:]]}
    (line,) = scored(capsys, write(tmp_path / "chains.jsonl", told), "--reference", str(reference))
    assert "step 1 says 'switch is half open', but switch is open" in line["scores"]["reasons"]


def test_a_data_set_is_a_reference_without_its_pictures(tmp_path, capsys):
    record = {"instruction": "<image> What is it?", "answer": "a stork", "reasoning": "Step 1: It has a beak."}
    record |= {"image": "gone.png", "metadata": {"boxes": {"beak": [0, 0, 4, 4]}, "images_base64": "iVBO"}}
    reference = write(tmp_path / "records.jsonl", record, {**record, "image": ["a.png", "b.png"]})
    with_it = scored(capsys, write(tmp_path / "chains.jsonl", SEEN), "--reference", str(reference))
    assert with_it[0]["scores"]["final_answer_accuracy"] == 1


def test_a_bad_line_of_the_reference_is_an_error(tmp_path):
    reference = write(tmp_path / "train.jsonl", LAMP, {"steps": 3})
    with pytest.raises(SystemExit, match="train.jsonl line 2: steps: is a number"):
        main(["score-chains", str(write(tmp_path / "chains.jsonl", LAMP)), "--reference", str(reference)])


def test_a_chain_scores_the_same_in_any_company_and_process(tmp_path):
    other = {**LAMP, "steps": LAMP["steps"][::-1], "facts": {"switch": "closed", "lamp": "dark"}}
    alone, together = write(tmp_path / "alone.jsonl", LAMP), write(tmp_path / "together.jsonl", other, other, LAMP)
    last = [
        subprocess.run(
            [sys.executable, "-m", "embervlm.cli", "score-chains", str(path), "--json"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.splitlines()[-1]
        for path, seed in ((alone, "1"), (together, "2"))
    ]
    assert last[0] == last[1]


def test_a_file_that_holds_no_chain_ends_in_an_error_that_says_what_it_is(tmp_path, capsys):
    record = {"instruction": "What is it?", "answer": "a stork", "reasoning": "Step 1: It has a beak."}
    with pytest.raises(SystemExit, match="no line could be scored"):
        main(["score-chains", str(write(tmp_path / "records.jsonl", record, {"step": ["One."], "answer": "1"}))])
    told = capsys.readouterr().err
    assert "line 1: steps: is missing; this is a record of a data set" in told
    assert 'line 2: steps: is missing; rename "step"' in told


def test_a_misspelt_name_is_told_and_another_one_is_not(tmp_path, capsys):
    line = {**LAMP, "gold_anwser": "No", "teacher": "x", "images": ["a.png"]}
    line.pop("gold_answer")
    main(["score-chains", str(write(tmp_path / "chains.jsonl", line))])
    assert '1 of 1 lines have "gold_anwser", which is not read: is it gold_answer?' in (out := capsys.readouterr().out)
    assert "teacher" not in out and '"images"' not in out


def test_the_scores_replace_no_input(tmp_path):
    path = write(tmp_path / "chains.jsonl", LAMP)
    with pytest.raises(SystemExit, match="is the input; choose another file"):
        main(["score-chains", str(path), "--output_file", str(path)])
    assert json.loads(path.read_text()) == LAMP

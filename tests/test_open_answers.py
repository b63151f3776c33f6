"""Answers in free words: compared by what they say, chosen from nothing, and no part of the answer head."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from scripted_teacher import chain

from embervlm.cli import main
from embervlm.curate.teachers.answers import Rejected, Reply, answer_schema, messages, read_reply
from embervlm.curate.teachers.collection import Question
from embervlm.data.dataset import encode_reasoning
from embervlm.data.records import ReasoningRecord, read_records, write_records
from embervlm.data.samples import Grid
from embervlm.evaluation.result import _values
from embervlm.judge.metrics import is_right
from embervlm.model.decoding import Decoding
from embervlm.model.generation import generate_from_visual, look
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.chain_text import parse_answer
from embervlm.words.open_answers import same_answers

CHAIN = "Step 1: There are two red cubes.\nStep 2: One more is blue.\nConclusion: Three cubes."
SAME = [
    ("3.0", "3"),
    ("three", "3"),
    ("Three.", "3"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("70000 people", "70,000"),
    ("$18", "18"),
    ("18 dollars", "$18"),
    ("$18.00", "18"),
    ("25 percent", "25%"),
    ("3 km", "3 kilometers"),
    ("12 m2", "12"),
    ("The answer is 3 apples", "3"),
    ("minus three", "-3"),
    ("\u22123", "-3"),
    ("\u00bd", "0.5"),
    ("1 1/2", "1.5"),
    ("three hundred and five", "305"),
    ("twenty-one", "21"),
    ("3 million", "3,000,000"),
    ("Red ball.", "the red ball"),
    ("blue, red", "red and blue"),
    ("two red cubes", "2 red cubes"),
    ("a", "A"),
    ("It is Paris", "paris"),
    ("10K", "10,000"),
    ("3M", "3,000,000"),
    ("2/3", "two thirds"),
    ("two and a half", "2.5"),
    ("x>3", "x > 3"),
    ("c++.", "C++"),
    ("12-14", "12 - 14"),
    ("ice-cream", "ice cream"),
    ("Paris - France", "Paris France"),
    (r"The answer is \boxed{5}.", "5"),
    (r"$\frac{1}{2}$", "1/2"),
    (r"\(\dfrac{1}{2}\)", "0.5"),
    (r"\text{cat}", "cat"),
    (r"50\%", "50%"),
    (r"45^\circ", "45 degrees"),
    ("20 \u00b0C", "20 degrees Celsius"),
    ("$5", "5"),
    ("$5 and $6", "$6, $5"),
    ("**7**", "7"),
    ("`7`", "7"),
    ("about 5", "5"),
    ("x = 5", "5"),
    ("2 + 3 = 5", "5"),
    ("Option B", "B"),
    ("No, it is not.", "no"),
    ("Yes, the cat is black.", "Yes"),
    ("1st", "first"),
    ("first", "1st"),
    ("the 21st floor", "21st floor"),
    ("half", "1/2"),
    ("grey", "gray"),
]
OTHER = [
    ("3.5", "3"),
    ("-3", "3"),
    ("It is not 3 but 4", "3"),
    ("1 2 3 4 5 6 7 8 9", "3"),
    ("", "3"),
    ("3 or 4", "3"),
    ("3", "3 km"),
    ("3 m", "3 km"),
    ("000,1", "1,000"),
    ("70, 000", "70,000"),
    ("33", "3"),
    ("not 3", "3"),
    ("3/4", "3"),
    ("one two", "3"),
    ("three four", "7"),
    ("B", "A"),
    ("no", "yes"),
    ("red", "red and blue"),
    ("3, 4", "3"),
    ("3 4", "3"),
    ("3 2 1", "3"),
    ("3 - 4", "3"),
    ("3 maybe 4", "3"),
    ("3 apples 4 pears", "3"),
    ("three 4", "3"),
    ("A+", "A-"),
    ("A+", "A"),
    ("x > 3", "x < 3"),
    ("x + 3", "x - 3"),
    ("2x+1", "2x-1"),
    ("C#", "C++"),
    ("10K", "10"),
    ("two thirds", "2"),
    ("twenty fifth", "4"),
    ("No, it is not.", "yes"),
    ("1st", "1"),
    ("1st", "2nd"),
    ("second", "2"),
    ("x = 6", "5"),
    ("x = 5", "y = 5"),
    ("Option B", "A"),
    (r"\boxed{6}", "5"),
    ("20 \u00b0C", "20 \u00b0F"),
    ("no dog", "dog"),
]


def record(answer, candidates=(), **fields):
    return ReasoningRecord(
        record_id="q",
        image=None,
        instruction="How many cubes?",
        answer=(answer,),
        steps=(),
        metadata={"candidates": list(candidates)},
        **fields,
        default_candidates=ROBOTS,
    )


@pytest.mark.parametrize(("said", "gold"), SAME)
def test_an_open_answer_that_says_the_same_is_right(said, gold):
    assert same_answers([said], [gold]) and is_right([said], record(gold))


@pytest.mark.parametrize(("said", "gold"), OTHER)
def test_an_open_answer_that_names_the_gold_among_others_is_wrong(said, gold):
    assert not same_answers([said], [gold]) and not is_right([said], record(gold))


@pytest.mark.parametrize("text", ["3.5", "-3", "1,300", "It is \u22123"])
def test_a_closed_question_does_not_find_a_number_inside_another(text):
    assert parse_answer(text, ("3", "300", "7")) == ()
    assert parse_answer("It is 3.", ("3", "7")) == ("3",)


def test_records_of_today_and_of_older_converters_are_open_and_stay_so(tmp_path):
    path = tmp_path / "d.json"
    spelled = [("70,000 people, or so", []), ("3 and 4", ["3 and 4"]), ("Yes", ["Yes", "No"])]
    values = [
        {"instruction": f"{n}?", "reasoning": CHAIN, "answer": answer, "metadata": {"candidates": own}}
        for n, (answer, own) in enumerate(spelled)
    ]
    path.write_text(json.dumps(values))
    first, old, closed = read_records(path, candidates=ROBOTS)
    assert first.answer == ("70,000 people, or so",) and old.answer == ("3 and 4",)
    assert first.candidates == old.candidates == () and closed.candidates == ("Yes", "No")
    write_records(tmp_path / "d.jsonl", [first, old, closed])
    again = read_records(tmp_path / "d.jsonl", candidates=ROBOTS)
    assert [(r.answer, r.candidates) for r in again] == [(r.answer, r.candidates) for r in (first, old, closed)]


def test_the_answer_head_is_asked_about_closed_records_only(tokenizer, make_collator):
    steps = ("There are two red cubes.", "One more is blue.", "Conclusion: Three cubes.")
    closed = [record(name, ("Yes", "No")) for name in ("Yes", "No")]
    mixed = [dataclasses.replace(r, steps=steps) for r in (closed[0], record("Yes"), closed[1], record("three"))]
    samples = encode_reasoning(mixed, tokenizer, grid=Grid(3, 3), max_length=512)
    batch = make_collator(mixed)(samples[:], step=0)
    assert batch.targets["answers"].tolist() == [[1, 0], [0, 1]] and batch.counts["answer"] == 4
    for only_open in (samples[1:2], samples[3:]):
        batch = make_collator(mixed)(only_open, step=0)
        assert batch.counts["answer"] == 0 and batch.targets["answers_real"].sum() == 0


def test_an_open_answer_is_what_the_model_wrote_and_has_no_head_probabilities(lively_model):
    with torch.no_grad():
        visual, seen = look(lively_model, [None] * 3)
    asked, short = ["How many?", "Is it?", "Which robot?"], Decoding(max_new_tokens=6, form="direct")
    open_one, closed, robots = generate_from_visual(lively_model, visual, seen, asked, short, [(), ("Yes", "No"), None])
    assert open_one["answer_set"] == [open_one["text"]] and "head_probabilities" not in open_one
    assert list(closed["head_probabilities"]) == ["Yes", "No"] and len(robots["head_probabilities"]) == 5


def test_the_metrics_of_the_head_leave_open_answers_out():
    scores = dict.fromkeys(
        ("reasoning_consistency", "step_completeness", "logical_flow_score", "adjacent_similarity"), 1.0
    )
    closed = {
        "scores": {**scores, "parts": {"conclusion_agrees": 0.0}},
        "correct": True,
        "is_open": False,
        "head_answer": ["Yes"],
        "gold_answer": ["No"],
        "answer_set": ["No"],
        "reasoning_steps": ["a"],
        "cut_off": None,
    }
    free = {**closed, "is_open": True, "gold_answer": ["three"], "answer_set": ["3"], "scores": {**scores, "parts": {}}}
    del free["head_answer"]
    values = _values([closed, free], {})
    assert values["head_accuracy"] == [0.0] and values["head_agreement"] == [0.0]
    assert values["final_answer_accuracy"] == [1.0, 1.0]
    assert values["conclusion_agreement"] == [0.0]  # the other chain has no conclusion
    assert _values([free], {})["head_accuracy"] == []


def test_a_teacher_of_an_open_question_is_not_told_the_answer_and_may_word_it_its_own_way():
    question = Question(key="k", record=record("1,739"))
    asked = json.dumps([messages(question, None), answer_schema(question.record.candidates)])
    assert "1,739" not in asked and "enum" not in json.dumps(answer_schema(())["properties"]["answer"])
    assert "The possible answers are" not in asked
    found = read_reply(Reply(content=chain("1739")), question, 0, teacher_model="t")
    assert found.answer == ("1,739",) and found.candidates == ()
    with pytest.raises(Rejected, match="wrong answer: 1740 instead of 1,739"):
        read_reply(Reply(content=chain("1740")), question, 0, teacher_model="t")


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("70,000", "70000", 1.0),
        ("1,000", "000,1", 0.0),
        ("000, 70", "70,000", 0.0),
        ("5 and 70,000", "70000, 5", 1.0),
        ("The answer is 12.", 12, 1.0),
    ],
)
def test_score_chains_does_not_split_an_answer_at_its_thousands(tmp_path, capsys, answer, gold, right):
    path = tmp_path / "chains.jsonl"
    steps = ["The town has 70,000 people.", f"Conclusion: {answer}."]
    path.write_text(json.dumps({"steps": steps, "answer": answer, "gold_answer": gold}) + "\n")
    main(["score-chains", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["scores"]["final_answer_accuracy"] == right

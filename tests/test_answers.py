"""What a teacher is told, and how its answer becomes a record."""

from __future__ import annotations

import json

import pytest
from scripted_teacher import chain

from embervlm.curate.teachers.answers import Rejected, Reply, answer_schema, messages, read_reply, scene_text
from embervlm.curate.teachers.collection import Question
from embervlm.data.records import ReasoningRecord
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

FACTS = {"place": "cliff", "load": "heavy", "ground": "steep", "Drone": "suited", "Humanoid": "unsuited"}


def question(answer=("Drone",), **fields):
    fields = {"image": None, "metadata": {}, "steps": (), **fields}
    record = ReasoningRecord(
        record_id="q1", instruction="Film the roof.", answer=answer, **fields, default_candidates=ROBOTS
    )
    return Question(key="k", record=record)


def read(content, *, answer=("Drone",), thinking="", cut_off=False, sample=0, **fields):
    reply = Reply(content=content, thinking=thinking, cut_off=cut_off)
    return read_reply(reply, question(answer, **fields), sample, teacher_model="deepseek-r1")


def rejection(*args, **options):
    with pytest.raises(Rejected) as caught:
        read(*args, **options)
    return str(caught.value)


# ---- accepted


def test_structured_steps_become_the_chain_with_its_types():
    record = read(chain("Drone"))
    assert record.steps == ("The task needs a robot that fits the place.", "Suited here: Drone.", "Conclusion: Drone.")
    assert record.metadata["step_types"] == ["problem_analysis", "solution_selection", "conclusion"]
    assert record.answer == ("Drone",) and record.confidence == 0.9


@pytest.mark.parametrize("form", ["```json\n{}\n```", "Here it is:\n{}\nI hope this helps.", "<think>hm</think>\n{}"])
def test_the_object_is_found_among_other_words(form):
    assert read(form.replace("{}", chain("Drone"))).num_steps == 2


def test_the_record_says_where_it_is_from():
    record = read(chain("Drone"), sample=2, metadata={"split_group": "g", "step_types": ["old"], "seen": [["place"]]})
    assert record.record_id == "q1#3"
    assert record.metadata == {
        "split_group": "g",
        "source": "teacher_generated",
        "origin": "q1",
        "validated": True,
        "teacher_model": "deepseek-r1",
        "step_types": ["problem_analysis", "solution_selection", "conclusion"],
    }


def test_numbered_thinking_is_the_chain_of_an_answer_in_words():
    record = read("<think>Well.\nStep 1: The roof is high.\nStep 2: A drone flies.</think>\nAnswer: Drone")
    assert record.steps == ("The roof is high.", "A drone flies.", "Conclusion: Drone.")


def test_paragraphs_of_thinking_are_steps():
    record = read("Drone", thinking="The roof is high.\n\nOnly one robot flies.\nIt is the drone.")
    assert record.steps == ("The roof is high.", "Only one robot flies.\nIt is the drone.", "Conclusion: Drone.")


def test_thinking_without_its_opening_tag_is_still_thinking():
    assert read("The roof is high.</think>Drone").steps[0] == "The roof is high."


def test_steps_in_words_are_the_chain_and_the_answer_line_is_not():
    record = read("Sure!\nStep 1: High.\nStep 2: It flies.\nConclusion: Drone.\n**Final answer:** Drone")
    assert record.steps == ("High.", "It flies.", "Conclusion: Drone.")


def test_a_step_that_numbers_itself_is_not_numbered_twice():
    text = json.dumps(
        {"steps": ["Step 1: High.", "2nd thought."], "conclusion": "Conclusion: Drone", "answer": "Drone"}
    )
    assert read(text).steps == ("High.", "2nd thought.", "Conclusion: Drone")


def test_an_open_question_takes_any_valid_answer():
    assert read(chain(["Humanoid", "Drone"]), answer=()).answer == ("Drone", "Humanoid")


def test_candidates_of_the_record_go_before_the_robots():
    assert read(chain("blue"), answer=("blue",), metadata={"candidates": ["red", "blue"]}).answer == ("blue",)


# ---- rejected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty: "),
        ("<think>hm</think>", "empty: there is no text behind the thinking"),
        (chain("Humanoid"), "wrong answer: Humanoid instead of Drone"),
        (chain(["Drone", "Humanoid"]), "wrong answer: Drone, Humanoid instead of Drone"),
        (chain("Drohne"), 'answer "Drohne" is not one of'),
        (chain("Drone", conclusion="Humanoid."), "conclusion: names Humanoid, the answer is Drone"),
        (chain("Drone")[:-30], "malformed JSON: "),
        (chain("Drone", steps=[]), "steps: "),
        (chain("Drone", steps=[{"type": "guess", "text": "x"}]), "step type: 'guess' of step 1"),
        (chain("Drone", steps=[{"type": "problem_analysis", "text": " "}]), "steps: step 1 has no text"),
        (chain("Drone", steps=[{"type": "problem_analysis", "text": "a"}, "b"]), "step type: some"),
        (chain("Drone", steps=[{"type": "problem_analysis", "text": "A.\nStep 2: B."}]), "steps: 1 written, 2 read"),
        (chain("Drone", steps=["x"] * 65), "reasoning: 65 steps, more than 64"),
        (chain("Drone", confidence=95), "confidence: 95 is not between 0 and 1"),
        (chain("Drone", answer=[]), "answer: is empty"),
        (chain("Drone", answer=None), "answer: is missing"),
        ('{"answer": "Drone"}', "reasoning: is "),
        ("Drone", "reasoning: is "),
        ("The Drone, not the Humanoid, of course.\nStep 1: It flies.", "answer"),
        ("[" * 100_000, "reasoning: is "),
        ("{" * 100_000, "malformed JSON: "),
        ('{"a":' * 100_000, "malformed JSON: "),
    ],
)
def test_an_answer_is_rejected_with_its_reason(content, reason):
    assert rejection(content).startswith(reason)


def test_an_answer_that_was_cut_off_is_rejected_even_if_it_reads():
    assert rejection(chain("Drone"), cut_off=True).startswith("cut off")


# ---- asked


def text_of(chat):
    return json.dumps(chat)


def test_the_gold_answer_is_not_told():
    chat = messages(question(("Humanoid",), metadata={"facts": FACTS}, image="/x.jpg"), None)
    assert "unsuited" not in text_of(chat) and "suited" not in text_of(chat)


def test_a_teacher_that_sees_nothing_is_told_the_scene():
    chat = messages(question(image="/x.jpg", metadata={"scene": {"place": "cliff", "load": "heavy"}}), None)
    assert "What the picture shows: place is cliff; load is heavy." in chat[1]["content"]


def test_a_teacher_that_sees_is_sent_the_picture_and_not_the_facts():
    chat = messages(question(image="/x.jpg", metadata={"scene": {"place": "cliff"}}), "data:image/png;base64,AAAA")
    assert chat[1]["content"][0] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert "cliff" not in text_of(chat)


def test_facts_without_verdicts_stand_in_for_the_scene():
    assert scene_text(question(metadata={"facts": FACTS}).record) == "place is cliff; load is heavy; ground is steep"


def test_a_record_that_says_nothing_of_its_scene_has_no_text_for_it():
    assert scene_text(question(metadata={"scene": "a cliff"}).record) is None


def test_every_object_of_the_schema_is_strict():
    schema = answer_schema(("red", "blue"))
    for part in (schema, schema["properties"]["steps"]["items"]):
        assert part["additionalProperties"] is False and part["required"] == list(part["properties"])
    assert schema["properties"]["answer"]["items"]["enum"] == ["red", "blue"]

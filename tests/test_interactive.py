"""The guide's advanced topics on the model: templates, follow-up questions, self-verification."""

import dataclasses
import json

import pytest

from embervlm.config import ConfigError
from embervlm.data.records import ReasoningRecord, read_records
from embervlm.model import interactive
from embervlm.model.interactive import TEMPLATES, Reasoning, as_reasoning, lay_out
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

CHAIN = ["Look at it. It is high.", "So it must fly.", "Drones fly.", "Conclusion: Drone."]


def reasoning(steps=CHAIN, **changes):
    return Reasoning(
        question="Which?", steps=list(steps), answer="Drone", answer_set=["Drone"], confidence=0.5, **changes
    )


@pytest.fixture
def sure(monkeypatch):
    """`sure(probability of a step)`: a step validator with these opinions."""

    def set_to(opinion):
        monkeypatch.setattr(interactive, "step_probabilities", lambda *_, **__: [opinion(step) for step in _[4]])

    return set_to


# ---- templates


def test_a_template_orders_the_chain_and_leaves_nothing_out():
    found = lay_out(CHAIN, TEMPLATES["analysis"])
    assert [heading for heading, _ in found] == list(TEMPLATES["analysis"])
    assert " ".join(text for _, text in found) == "Look at it. It is high. So it must fly. Drones fly. Drone."
    long = [f"Step {n}." for n in range(9)]
    assert [text.count(".") for _, text in lay_out([*long, "Conclusion: Drone."], TEMPLATES["comparative"])] == [
        3,
        3,
        3,
        1,
    ]


def test_a_template_of_blocks_is_repeated_for_every_step():
    assert lay_out(CHAIN, TEMPLATES["step_by_step"]) == [
        ("Step 1:", "Look at it."),
        ("Rationale:", "It is high."),
        ("Step 2:", "So it must fly."),
        ("Step 3:", "Drones fly."),
        ("Conclusion:", "Drone."),
    ]


def test_headings_that_the_model_writes_itself_are_kept():
    steps = ["Constraints: It is high.", "Problem Analysis: Who flies?", "Conclusion: Drone."]
    assert lay_out(steps, TEMPLATES["analysis"]) == [
        ("Constraints:", "It is high."),
        ("Problem Analysis:", "Who flies?"),
        ("Conclusion:", "Drone."),
    ]


def test_a_template_can_be_ones_own_and_an_unknown_one_is_named(lively_model, records):
    found = lively_model.generate_with_template(
        image=records[0].image,
        instruction="Fly.",
        template="mine",
        templates={"mine": ["Because:", "So:"]},
        max_new_tokens=8,
    )
    assert all(heading in ("Because:", "So:", "Conclusion:") for heading, _ in found.sections)
    with pytest.raises(ConfigError, match="template: 'mien' is not one of analysis, step_by_step, comparative"):
        lively_model.generate_with_template(None, "Fly.", template="mien")
    with pytest.raises(ConfigError, match="no heading"):
        lay_out(CHAIN, [])


def test_a_heading_opens_its_step_and_the_model_writes_on_where_that_leads_to_no_fault(
    lively_model, records, monkeypatch
):
    monkeypatch.setattr(interactive, "faults", lambda *_: [])
    asked = {"template": ["What is asked:", "What is seen:"], "max_new_tokens": 12}
    found = lively_model.generate_with_template(records[0].image, "Who can fly?", **asked)
    assert [step.split(":")[0] for step in found.steps[:2]] == ["What is asked", "What is seen"]
    assert [heading for heading, _ in found.sections][:2] == asked["template"]


def test_headings_that_lead_astray_are_laid_over_a_chain_of_the_models_own(lively_model, records, monkeypatch):
    monkeypatch.setattr(interactive, "faults", lambda *_: ["step 1 says nothing"])
    asked = {"template": ["What is asked:", "What is seen:"], "max_new_tokens": 12}
    found = lively_model.generate_with_template(records[0].image, "Who can fly?", **asked)
    free = lively_model.generate_reasoning(records[0].image, "Who can fly?", max_new_tokens=12)
    assert found.steps == free.steps


# ---- reasoning


def test_generated_reasoning_is_that_of_generate_with_reasoning(lively_model, records):
    record = records[0]
    found = lively_model.generate_reasoning(record.image, record.instruction, max_new_tokens=20)
    plain = lively_model.generate_with_reasoning(record.image, record.instruction, max_new_tokens=20)
    assert found.steps == plain["reasoning_steps"] and found.answer == plain["answer"]
    assert found.confidence == pytest.approx(plain["confidence"], abs=1e-6)


def test_reasoning_is_a_record_that_can_be_read_back(records, tmp_path):
    found = dataclasses.replace(reasoning(), image=records[0].image)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(found.record()) + "\n")
    (read,) = read_records(path, allow_outside=True, candidates=ROBOTS)
    assert isinstance(read, ReasoningRecord)
    assert list(read.steps) == CHAIN and read.answer == ("Drone",) and read.instruction == "Which?"


def test_a_follow_up_keeps_the_steps_that_still_hold(lively_model, records, sure):
    sure(lambda step: 0.1 if step == "Drones fly." else 0.9)
    found = lively_model.reason(
        records[0].image, "And if it is fragile?", previous_reasoning=reasoning(), max_new_tokens=6
    )
    assert found["reasoning"].kept_steps == 2 and found["reasoning_steps"][0] == CHAIN[0]
    assert found["reasoning_steps"][1].startswith(CHAIN[1])  # an untrained model may not end it
    assert found["reasoning"].question == "Which? And if it is fragile?"
    assert set(found) == {"reasoning", "reasoning_steps", "answer", "answer_set", "confidence", "known", "why"}


def test_earlier_reasoning_may_be_a_result_steps_or_text():
    assert as_reasoning({"reasoning": reasoning()}).steps == CHAIN
    assert as_reasoning({"reasoning_steps": CHAIN, "answer": "Drone"}).steps == CHAIN
    assert as_reasoning(CHAIN).steps == as_reasoning(str(reasoning())).steps == CHAIN
    with pytest.raises(ConfigError, match="reasoning: int is not"):
        as_reasoning(3)


# ---- verification


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (CHAIN, []),
        (CHAIN[-1:], ["1 steps: too few for a chain"]),
        (CHAIN[:3], ["it has no conclusion"]),
        ([CHAIN[0], "look at it.  It is high.", CHAIN[3]], ["it says 2 times: look at it. it is high."]),
        ([*CHAIN[:3], "Conclusion: Humanoid."], ["the conclusion names Humanoid, the answer is Drone"]),
        ([*CHAIN[:3], "Conclusion: The crane."], ["the conclusion does not name Drone"]),
        ([*CHAIN[:3], "Conclusion: Drone, Humanoid."], ["the conclusion names Drone, Humanoid, the answer is Drone"]),
        ([*CHAIN[:3], "Conclusion: Drone, not Humanoid."], []),
        ([*CHAIN[:2], "5 + 3 = 9 crates.", CHAIN[3]], ["step 3 says '5 + 3 = 9', which does not come out"]),
        (["The wall is high.", CHAIN[1], "The wall is not high.", CHAIN[3]], ["step 3 denies step 1"]),
    ],
)
def test_the_form_of_a_chain_is_checked(lively_model, sure, steps, expected):
    sure(lambda step: 0.9)
    assert lively_model.reasoning_faults(reasoning(steps)) == expected
    assert lively_model.verify_reasoning(reasoning(steps)) is not bool(expected)


@pytest.mark.parametrize(("limit", "name"), [("steps", "max_reasoning_steps"), ("tokens", "max_new_tokens")])
def test_a_cut_off_chain_that_concludes_otherwise_says_both(lively_model, sure, limit, name):
    sure(lambda step: 0.9)
    cut = dataclasses.replace(reasoning([*CHAIN[:2], "Conclusion: Underwater Robot, Robot with Legs."]), cut_off=limit)
    assert lively_model.reasoning_faults(cut) == [
        f"it is cut off by {name}",
        "the conclusion names Robot with Legs, Underwater Robot, the answer is Drone",
    ]
    assert not lively_model.verify_reasoning(cut)


def test_a_chain_with_choices_of_its_own_is_held_against_them_and_kept_with_them(lively_model, sure):
    sure(lambda step: 0.9)
    own = dataclasses.replace(
        reasoning([*CHAIN[:2], "Conclusion: the tram."]), answer_set=["Bus"], candidates=("Bus", "Tram")
    )
    assert lively_model.reasoning_faults(own) == ["the conclusion names Tram, the answer is Bus"]
    assert own.record()["metadata"]["candidates"] == ["Bus", "Tram"]
    assert dataclasses.replace(own, answer_set=["three"], candidates=()).record()["metadata"]["candidates"] == []
    assert "candidates" not in reasoning(CHAIN).record()["metadata"]


def test_a_step_that_the_validator_doubts_is_named(lively_model, sure):
    sure(lambda step: 0.3 if "fly." in step else 0.9)
    assert [fault[:14] for fault in lively_model.reasoning_faults(reasoning())] == ["step 2 follows", "step 3 follows"]


def test_steps_alone_need_their_question(lively_model):
    with pytest.raises(ConfigError, match="give image= and question= as well"):
        lively_model.verify_reasoning(CHAIN)
    assert isinstance(lively_model.verify_reasoning(CHAIN, question="Which?"), bool)


def test_under_the_constraint_the_chain_with_the_fewest_faults_is_given(lively_model, records, monkeypatch):
    drawn = []

    def faults(model, one, *_):
        drawn.append(one)
        return [] if len(drawn) in (4, 14) else ["wrong", "wrong"]  # the third of those that are drawn then

    monkeypatch.setattr(interactive, "faults", faults)
    found = lively_model.generate_reasoning(
        records[0].image, "Fly.", constraint="ensure_logical_consistency", max_new_tokens=40, temperature=1.5, seed=2
    )
    assert len(drawn) == 1 + 1 + interactive.ATTEMPTS and found is drawn[3]
    assert len({tuple(one.steps) for one in drawn}) > 2
    with pytest.raises(ConfigError, match="constraint: 'be_nice' is not known"):
        lively_model.generate_reasoning(None, "Fly.", constraint="be_nice")


def test_chains_drawn_under_the_constraint_choose_among_the_callers_candidates(lively_model, monkeypatch):
    drawn = []

    def faults(model, one, *_):
        drawn.append(one)
        return ["wrong"]

    monkeypatch.setattr(interactive, "faults", faults)
    lively_model.generate_reasoning(
        None, "Fly.", constraint="ensure_logical_consistency", max_new_tokens=6, candidates=("hard", "soft")
    )
    assert {one.candidates for one in drawn} == {("hard", "soft")}


def test_the_models_mode_is_left_as_it_was(lively_model, records):
    for training in (True, False):
        lively_model.train(training)
        lively_model.verify_reasoning(lively_model.generate_reasoning(records[0].image, "Fly.", max_new_tokens=3))
        assert lively_model.training is training


def test_a_question_without_words_is_refused(lively_model):
    with pytest.raises(ConfigError, match="the question is empty"):
        lively_model.reason(None, "  ")


# ---- the guide's own chains, validated and kept


def test_a_sound_chain_passes_the_validator_and_a_broken_one_does_not():
    from embervlm import reasoning_validator

    assert reasoning_validator(reasoning())
    assert not reasoning_validator(reasoning(CHAIN[:3]))
    assert not reasoning_validator(reasoning([CHAIN[0], CHAIN[0], CHAIN[3]]))
    assert not reasoning_validator(reasoning([*CHAIN[:3], "Conclusion: Humanoid."]))
    assert not reasoning_validator(dataclasses.replace(reasoning(), answer="", answer_set=[]))
    assert reasoning_validator("Step 1: It is high.\nStep 2: So it must fly.\nConclusion: Drone.")


def test_the_validator_asks_the_model_where_it_is_given(tiny_model, sure):
    from embervlm import reasoning_validator
    from embervlm.evaluation.own_chains import reasoning_problems

    sure(lambda step: 0.2 if "high" in step else 0.9)
    assert not reasoning_validator(reasoning(), model=tiny_model)
    assert reasoning_problems(reasoning(), tiny_model) == ["step 1 follows with probability 0.20 only"]


def test_kept_chains_are_records_with_their_picture_each_once(tmp_path, scene_data, capsys):
    from embervlm import save_to_dataset

    picture = next((scene_data / "images").iterdir())
    path = tmp_path / "kept" / "own.jsonl"
    for chain in (CHAIN, CHAIN, [CHAIN[0], *CHAIN[2:]]):
        save_to_dataset(reasoning(chain, image=picture), path)
    first, second = read_records(path, candidates=ROBOTS)
    assert list(first.steps) == CHAIN and first.answer == ("Drone",) and second.num_steps == 2
    assert first.metadata["source"] == "self_generated"
    assert open(first.image, "rb").read() == picture.read_bytes() and str(tmp_path / "kept") in first.image
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 2 records"


def test_a_chain_without_question_or_answer_is_no_record(tmp_path):
    from embervlm import save_to_dataset

    with pytest.raises(ConfigError, match="without its question is not a record"):
        save_to_dataset(CHAIN, tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match="without its answer"):
        save_to_dataset(dataclasses.replace(reasoning(), answer_set=[]), tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("question", "template", "said"),
    [(" ", "analysis", "the question is empty"), ("Which?", [], "template: has no heading")],
)
def test_a_template_or_question_without_words_is_refused(lively_model, question, template, said):
    with pytest.raises(ConfigError, match=said):
        lively_model.generate_with_template(None, question, template=template)

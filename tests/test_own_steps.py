"""How well the validator knows the model's own mistakes, and how much attention rests on what a step reads."""

import pytest

from embervlm.evaluation.explain import attention_by_thing, looked_at
from embervlm.evaluation.own_steps import OwnSteps, auroc, summarise
from embervlm.model.decoding import Decoding
from embervlm.report.table import own_steps_lines
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

RIGHT = ([True, True], [0.9, 0.8], True)


def test_the_area_under_the_curve_counts_pairs_and_ties_half():
    assert auroc([True, True, False], [0.9, 0.2, 0.5]) == 0.5
    assert auroc([True, False], [0.7, 0.7]) == 0.5
    assert auroc([True, True, False, False], [0.9, 0.8, 0.1, 0.2]) == 1


def test_steps_behind_the_first_wrong_one_are_not_asked_about():
    """Three valid steps, all above one half; two wrong ones, one of them above."""
    found = summarise([RIGHT, ([False, False, True], [0.4, 0.9, 0.1], False), ([True, False], [0.6, 0.7], False)])
    assert (found["valid"], found["wrong"]) == (3, 2)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["auroc"] == pytest.approx((3 + 2) / 6)


def test_a_chain_passes_where_each_of_its_steps_does():
    chains = [RIGHT, ([True, True], [0.9, 0.4], True), ([True], [0.9], False), ([True, False], [0.9, 0.1], True)]
    found = summarise(chains)
    assert (found["right_chains"], found["right_chains_passed"]) == (2, 0.5)
    assert (found["wrong_chains"], found["wrong_chains_passed"]) == (2, 0.5)  # a wrong answer, and a wrong step


def test_without_a_wrong_step_nothing_is_said_of_accuracy():
    found = summarise([RIGHT])
    assert found["balanced_accuracy"] is found["auroc"] is found["wrong_chains_passed"] is None
    assert "n/a" in own_steps_lines({"own_steps": {"temperature": 1.0, "greedy": found}})


def test_records_without_facts_give_no_figure():
    from embervlm.data.records import ReasoningRecord

    record = ReasoningRecord(
        record_id="a", image=None, instruction="Which?", steps=("Look.",), answer=("Drone",), default_candidates=ROBOTS
    )
    asked = OwnSteps([record], [{"reasoning_steps": [], "answer_set": []}], {})
    assert asked.tasks("folder", None, Decoding()) == [] and asked.result({}) is None
    assert own_steps_lines({"own_steps": None, "attention": {}}) == ""


SAMPLE = {
    "attention": {"grid": [2, 2], "steps": [[0.5, 0.2, 0.2, 0.1], [0.0, 0.0, 0.0, 1.0]]},
    "boxes": [{"kind": "sky", "box": [0, 0, 1, 0.5]}, {"kind": "load", "box": [0.6, 0.6, 0.9, 0.9]}],
}


def test_of_each_thing_that_a_step_reads_the_share_in_its_box_stands_beside_what_the_box_covers():
    found = looked_at(SAMPLE, [["sky", "load", "flag"], ["load"]])
    assert found == [{"sky": [0.7, 0.5], "load": [0.1, 0.25]}, {"load": [1.0, 0.25]}]
    assert attention_by_thing([found, None]) == {
        "load": {"num": 2, "share": pytest.approx(0.55), "chance": 0.25},
        "sky": {"num": 1, "share": 0.7, "chance": 0.5},
    }


def test_a_chain_with_other_steps_than_the_gold_one_says_nothing_of_what_was_looked_at():
    assert looked_at(SAMPLE, [["sky"]]) is None
    assert looked_at({**SAMPLE, "attention": None}, [["sky"], []]) is None
    assert looked_at({**SAMPLE, "boxes": None}, [["sky"], []]) is None

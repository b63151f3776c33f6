"""Chains and answers as text: what is formatted parses back, and no text a model writes raises."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embervlm.data.records import parse_answer, parse_reasoning_text
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run import run_onnx
from embervlm.words.chain_text import format_reasoning

# ---- chains as text

words = st.lists(st.sampled_from(["heavy", "load", "step", "2", "wet,", "drone.", "-", "7", "\u00e9"]), min_size=1).map(
    " ".join
)
lines = words.filter(lambda line: not line.startswith("step"))
chains = st.lists(st.lists(lines, min_size=1, max_size=3).map("\n".join), min_size=1, max_size=6)


@given(chains, lines | st.none())
def test_formatted_steps_parse_back_to_the_same_steps(steps, conclusion):
    steps = (*steps, f"Conclusion: {conclusion}") if conclusion else tuple(steps)
    assert parse_reasoning_text(format_reasoning(steps)) == steps


pieces = st.sampled_from(
    [
        "Step 1:",
        "Step 2:",
        "Step 3. ",
        "step 4",
        "Conclusion:",
        "**Step 2:**",
        "<|reasoning_start|>",
        "<reasoning>",
        "<|reasoning_end|>",
        " ",
        "\n",
        "- a",
        "b",
        "...",
        "**",
        "\u2028",
    ]
)


@given(st.text() | st.lists(pieces, max_size=12).map("".join))
@example("STEP 0:STEP 0 Step 2:")
@settings(max_examples=400)
def test_any_text_parses_without_error_and_to_a_fixed_point(text):
    steps = parse_reasoning_text(text)
    assert parse_reasoning_text(format_reasoning(steps)) == steps


@pytest.mark.parametrize(
    "text", ["", "The drone is best.", "<|reasoning_start|>", "\n\n", "Step", "<|reasoning_end|>Step 1: x"]
)
def test_text_without_a_chain_gives_no_steps(text):
    assert parse_reasoning_text(text) == ()


def test_text_cut_off_before_the_end_marker_gives_the_steps_so_far():
    assert parse_reasoning_text("<|reasoning_start|>\nStep 1: Look.\nStep 2: The lo") == ("Look.", "The lo")


def test_text_outside_the_markers_is_not_part_of_the_chain():
    text = "Sure!\n<|reasoning_start|>\nStep 1: Look.\n<|reasoning_end|>\nPrimary: Drone"
    assert parse_reasoning_text(text) == ("Look.",)


def test_bold_step_headers_are_understood():
    assert parse_reasoning_text("**Step 1:** Look.\n### **Step 2: Decide**\n**Conclusion:** Fly") == (
        "Look.",
        "Decide",
        "Conclusion: Fly",
    )


def test_a_reference_to_an_earlier_step_starts_no_new_step():
    assert parse_reasoning_text("Step 1: Look.\nStep 2: From Step 1: it is wet.") == (
        "Look.",
        "From Step 1: it is wet.",
    )


# ---- answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Drone, Humanoid", ("Drone", "Humanoid")),
        ("Primary: Humanoid, Secondary: Robot with Wheels", ("Humanoid", "Robot with Wheels")),
        ("humanoid and DRONE", ("Drone", "Humanoid")),
        ("The best choice is the robot with legs.", ("Robot with Legs",)),
        ("robot_with_wheels", ("Robot with Wheels",)),
        ("Dronelike things", ()),
        ("", ()),
    ],
)
def test_answer_text_names_robots(text, expected):
    assert parse_answer(text, ROBOTS) == expected


def test_longer_name_is_not_also_counted_as_the_shorter_one():
    assert parse_answer("robot with wheels", ("Robot", "Robot with Wheels")) == ("Robot with Wheels",)


def test_one_letter_choice_is_not_found_in_an_article():
    assert parse_answer("a ladder, so B", ("A", "B")) == ("B",)
    assert parse_answer(" b. ", ("A", "B")) == ("B",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B. A bird of prey", "B"),
        ("(B) A bird of prey", "B"),
        ("**B)** A bird of prey", "B"),
        ("b) vitamin A.", "B"),
        ("A. Yes. B. No", "AB"),
        ("A. B.", "AB"),
        ("(A) and (B)", "AB"),
        ("A, B", "AB"),
        ("A: see B", "A"),
        ("It is B. A bird", "AB"),
    ],
)
def test_a_letter_before_its_text_is_the_answer_and_not_a_letter_within(text, expected):
    assert parse_answer(text, tuple("ABCD")) == tuple(expected)
    assert run_onnx.parse_answer(text, tuple("ABCD")) == list(expected)


@given(st.text(), st.lists(st.text(), max_size=4))
def test_answer_parsing_never_raises(text, candidates):
    assert set(parse_answer(text, candidates)) <= set(candidates)

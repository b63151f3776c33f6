"""Each metric on chains a person would accept, and on the same chains damaged in one way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import pytest

from embervlm.judge.completeness import identify_step_types
from embervlm.judge.contradiction import opposite_steps
from embervlm.judge.metrics import (
    TARGETS,
    ChainScorer,
    balanced_accuracy,
    bootstrap_interval,
    compare_with_targets,
    final_answer_accuracy,
    per_candidate_precision_recall,
)
from embervlm.judge.reading import ChainContext
from embervlm.judge.replaced import replaced_details
from embervlm.report.pages import samples_page
from embervlm.report.table import gold_chain_lines, group_lines, metrics_table
from embervlm.words.claims import Claim, ClaimReader, content_words
from embervlm.words.english import tokens
from embervlm.words.wording import clauses_of

ROBOTS = ("Drone", "Underwater Robot", "Humanoid", "Robot with Wheels", "Robot with Legs")
ROBOT_DOMAINS = {
    "job": {"repair", "carry", "film"},
    "need": {"hands", "payload", "camera"},
    "place": {"stairs", "flooded tunnel", "open water", "warehouse", "cliff"},
    "weather": {"clear", "rain", "wind"},
    "load": {"light", "medium", "heavy"},
    "flag": {"near", "middle", "far"},
    "trip": {"six hours", "eighteen hours", "one day"},
    "sky": {"dawn", "noon", "dusk", "night"},
    "arrival": {"dawn", "noon", "dusk", "night"},
    "light": {"day", "dark"},
    "ground": {"firm", "slippery", "steps", "deep water", "shallow water"},
    **{robot: {"yes", "no"} for robot in ROBOTS},
}
SCIENCE_DOMAINS = {
    "material": {"iron", "copper", "wood"},
    "conducts": {"well", "badly"},
    "switch": {"open", "closed"},
    "lamp": {"on", "off"},
}
P, C, S, END = "problem_analysis", "constraint_checking", "solution_selection", "conclusion"


@dataclass(frozen=True)
class Gold:
    """A chain that deserves full marks, with what is known about its question."""

    steps: list[str]
    context: ChainContext


def gold(instruction, lines, facts, answer, domains, candidates=()) -> Gold:
    types, steps = zip(*lines, strict=True)
    context = ChainContext(
        instruction=instruction,
        facts=facts,
        domains=domains,
        reference_steps=steps,
        step_types=types,
        answer=answer,
        gold_answer=answer,
        candidates=candidates,
    )
    return Gold(list(steps), context)


def robot_gold(job, need, place, load, flag, trip, sky, arrival, light, weather, ground, suited) -> Gold:
    """A chain in the style of the rule teacher."""
    verdict = {robot: "yes" if robot in suited else "no" for robot in ROBOTS}
    lines = [
        (P, f"The job is {job}, so the need is {need}. The place is {place}."),
        (C, f"The load is {load} and the flag is {flag}, so the trip is {trip}."),
        (C, f"The sky is {sky}, plus {trip} the arrival is {arrival}, so the light is {light}."),
        (C, f"The arrival is {arrival}, weather is {weather}, so the ground is {ground}."),
        (S, f"Drone: weather is {weather}, light is {light}, load is {load}, so Drone is {verdict['Drone']}."),
        (S, f"Underwater Robot: ground is {ground}, so Underwater Robot is {verdict['Underwater Robot']}."),
        (S, f"Humanoid: ground is {ground}, trip is {trip}, so Humanoid is {verdict['Humanoid']}."),
        (S, f"Robot with Wheels: ground is {ground}, so Robot with Wheels is {verdict['Robot with Wheels']}."),
        (S, f"Robot with Legs: ground is {ground}, so Robot with Legs is {verdict['Robot with Legs']}."),
        (END, f"Conclusion: {', '.join(suited)}."),
    ]
    facts = dict(
        job=job,
        need=need,
        place=place,
        load=load,
        flag=flag,
        trip=trip,
        sky=sky,
        arrival=arrival,
        light=light,
        weather=weather,
        ground=ground,
        **verdict,
    )
    instruction = f"Take the load to the flag and {job} there. Which robots are suited?"
    return gold(instruction, lines, facts, frozenset(suited), ROBOT_DOMAINS, ROBOTS)


def science_gold(material, conducts, switch, lamp, answer) -> Gold:
    lines = [
        (P, f"The question asks about the circuit: the material is {material}, and the switch is {switch}."),
        (C, f"Because the material is {material}, it conducts {conducts}."),
        (S, f"It conducts {conducts} and the switch is {switch}, therefore the lamp is {lamp}."),
        (END, f"Conclusion: {answer}."),
    ]
    facts = {"material": material, "conducts": conducts, "switch": switch, "lamp": lamp}
    return gold("Does the lamp in this circuit shine?", lines, facts, {answer}, SCIENCE_DOMAINS)


STAIRS = robot_gold(
    "repair",
    "hands",
    "stairs",
    "heavy",
    "far",
    "eighteen hours",
    "dusk",
    "noon",
    "day",
    "rain",
    "slippery",
    ["Robot with Legs"],
)
ROBOT_CHAINS = [
    STAIRS,
    robot_gold(
        "carry",
        "payload",
        "warehouse",
        "light",
        "middle",
        "six hours",
        "dawn",
        "noon",
        "day",
        "clear",
        "firm",
        ["Drone", "Humanoid", "Robot with Wheels", "Robot with Legs"],
    ),
    robot_gold(
        "film",
        "camera",
        "open water",
        "medium",
        "far",
        "eighteen hours",
        "night",
        "dusk",
        "dark",
        "wind",
        "deep water",
        ["Underwater Robot"],
    ),
    robot_gold(
        "film",
        "camera",
        "stairs",
        "light",
        "near",
        "six hours",
        "noon",
        "dusk",
        "dark",
        "clear",
        "steps",
        ["Humanoid", "Robot with Legs"],
    ),
]
SCIENCE_CHAINS = [
    science_gold("iron", "well", "closed", "on", "Yes"),
    science_gold("wood", "badly", "closed", "off", "No"),
    science_gold("copper", "well", "open", "off", "No"),
]
GUIDE = gold(
    "Which robot should pick boxes from high shelves?",
    [
        (
            P,
            "Analyze the task requirements\n- The task involves picking boxes from HIGH shelves\n"
            "- This requires significant reach capability\n- The robot must be able to lift heavy boxes",
        ),
        (
            C,
            "Evaluate robot capabilities\n- Humanoid robots have arms with good reach (2m+)\n"
            "- Drones cannot carry heavy boxes reliably\n- Wheeled robots have limited vertical reach",
        ),
        (
            S,
            "Consider stability and safety\n- Humanoid robots provide stable lifting platform\n"
            "- Can maintain balance while reaching high\n- Safety mechanisms prevent accidents",
        ),
        (END, "Conclusion: Humanoid robot is the best choice"),
    ],
    {},
    {"Humanoid"},
    {},
    ROBOTS,
)
CHAINS = [*ROBOT_CHAINS, *SCIENCE_CHAINS, GUIDE]


@pytest.fixture(scope="module")
def scorer() -> ChainScorer:
    return ChainScorer.fit([chain.steps for chain in CHAINS], {**ROBOT_DOMAINS, **SCIENCE_DOMAINS})


PLAIN = ChainScorer()
"""Nothing fitted."""


def score_chain(steps, context, scorer=PLAIN):
    return scorer.score(steps, context)


def reasoning_consistency(steps, context):
    return PLAIN.score(steps, context)["reasoning_consistency"]


def step_completeness(steps, context):
    return PLAIN.score(steps, context)["step_completeness"]


def logical_flow_score(steps, context, scorer=PLAIN):
    return scorer.score(steps, context)["logical_flow_score"]


def adjacent_similarity(steps):
    return PLAIN.score(steps, ChainContext())["adjacent_similarity"]


def claims(step: str, **domains) -> list[str]:
    return [str(claim) for claim in ClaimReader(domains).read(step)]


# --- what good chains score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.steps[-1][:40])
def test_a_gold_chain_gets_full_marks(chain, scorer):
    scores = score_chain(chain.steps, chain.context, scorer)
    assert scores.pop("reasons") == []
    assert scores.pop("logical_flow_score") > 0.9
    assert {name: scores[name] for name in TARGETS if name in scores} == dict.fromkeys(scores.keys() & TARGETS, 1.0)


def test_an_unseen_gold_chain_gets_full_marks_for_its_order():
    scorer = ChainScorer.fit([chain.steps for chain in ROBOT_CHAINS[1:]], ROBOT_DOMAINS)
    assert scorer.score(STAIRS.steps, STAIRS.context)["parts"]["order"] > 0.95


# --- what damage costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.steps[-1][:40])
def test_a_repeated_step_lowers_consistency(chain):
    steps = [*chain.steps[:2], chain.steps[1], *chain.steps[2:]]
    assert reasoning_consistency(steps, chain.context) == pytest.approx(1 - 1 / len(steps))


@pytest.mark.parametrize("again", ["Step 7: {}", "7. {}", "Next, {}", "- {}!"])
def test_a_step_repeated_under_another_number_is_still_redundant(again, scorer):
    steps = [*STAIRS.steps[:2], again.format(STAIRS.steps[0].upper()), *STAIRS.steps[2:]]
    assert score_chain(steps, STAIRS.context, scorer)["reasons"] == ["step 3 repeats step 1"]


def test_the_same_words_and_claims_in_another_order_are_redundant(scorer):
    steps = [*STAIRS.steps[:2], "So the trip is eighteen hours, the flag is far and the load is heavy."]
    assert score_chain(steps, STAIRS.context, scorer)["reasons"] == ["step 3 says the same as step 2"]


def test_the_first_conclusion_may_repeat_a_step_and_the_second_may_not():
    context = ChainContext(instruction="Which robot can lift the box?")
    lifts, ends = "The humanoid robot can lift the box.", "Conclusion: the humanoid robot can lift the box."
    assert reasoning_consistency(["Only one robot can lift this box.", lifts, ends], context) == 1
    twice = ["Only one robot can lift this box.", ends, ends]
    assert reasoning_consistency(twice, context) == pytest.approx(2 / 3)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.steps[-1][:40])
def test_shuffled_steps_lower_logical_flow(chain, scorer):
    rng = random.Random(0)
    shuffled = [rng.sample(chain.steps, len(chain.steps)) for _ in range(20)]
    shuffled = [steps for steps in shuffled if steps != chain.steps]
    scores = [logical_flow_score(steps, chain.context, scorer) for steps in shuffled]
    assert max(scores) < 1
    assert sum(scores) / len(scores) < 0.8  # a random order beats half the random orders: 0.4 / 2 + 0.6 by chance


def test_reversed_steps_get_nothing_for_their_order(scorer):
    assert scorer.score(STAIRS.steps[::-1], STAIRS.context)["parts"]["order"] < 0.05


def test_a_wrong_fact_costs_consistency_and_flow_and_names_the_truth(scorer):
    steps = [STAIRS.steps[0].replace("stairs", "cliff"), *STAIRS.steps[1:]]
    scores = score_chain(steps, STAIRS.context, scorer)
    assert scores["reasons"] == ["step 1 says 'place is cliff', but place is stairs"]
    assert scores["reasoning_consistency"] == 0
    assert scores["parts"]["sound_share"] == pytest.approx(0.9)
    assert scores["logical_flow_score"] == pytest.approx(0.7, abs=0.02)


def test_a_later_step_that_corrects_an_earlier_mistake_is_sound():
    steps = [STAIRS.steps[0].replace("stairs", "cliff"), "The place is stairs.", *STAIRS.steps[1:]]
    scores = score_chain(steps, STAIRS.context)
    assert scores["reasons"] == ["step 1 says 'place is cliff', but place is stairs"]
    assert scores["parts"]["sound_share"] == pytest.approx(10 / 11)


def test_steps_that_disagree_are_a_contradiction_when_no_fact_is_known(scorer):
    context = ChainContext(instruction="Does the switch light the lamp?", domains=SCIENCE_DOMAINS)
    steps = ["The switch is open.", "The switch is closed, so the lamp is on."]
    reasons = score_chain(steps, context, scorer)["reasons"]
    assert reasons == ["step 2 says 'switch is closed', but an earlier step says 'switch is open'"]


def test_a_sum_that_does_not_come_out_is_a_contradiction():
    steps = [
        "She eats 3 and bakes with 4 of 16 eggs, so 16 - 3 - 4 = 8 are left.",
        "She sells the eggs for 8 * 2 = 16.",
    ]
    reasons = score_chain(steps, ChainContext(instruction="What does she earn with 16 eggs?"))["reasons"]
    assert reasons == ["step 1 says '16 - 3 - 4 = 8', which does not come out"]


def test_a_statement_and_its_negation_contradict_each_other_in_any_subject():
    steps = ["Copper conducts electricity well.", "As copper does not conduct electricity well, the lamp is dark."]
    assert "contradicts step 1" in str(score_chain(steps, ChainContext())["reasons"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The shape in figure 3 is a regular polygon with equal sides.", "figure 2"),
        ("The circle in the picture is a regular shape with equal sides.", "star"),
        ("The left wall is too high for the robot with wheels.", "right"),
        ("In the office of Anna the window stands wide open all day.", "Maria"),
    ],
)
def test_what_is_denied_of_one_thing_is_not_denied_of_another(one, other):
    first = {"figure 2": "figure 3", "star": "circle", "right": "left", "Maria": "Anna"}[other]
    denied = one.replace(" is ", " is not ").replace(" stands ", " never stands ")

    def judged(second):
        reasons = ChainScorer().score([one, second, "Conclusion: yes."], ChainContext(instruction="Which?"))["reasons"]
        return [reason for reason in reasons if "contradicts" in str(reason)]

    assert judged(denied) and not judged(denied.replace(first, other))


def test_what_she_does_and_he_does_not_is_no_contradiction():
    assert opposite_steps(["She likes cold water.", "He does not like cold water."]) is None
    assert opposite_steps(["This wall is too high.", "That wall is not too high."]) is None
    assert opposite_steps(["This wall is too high.", "The wall is not too high."]) == (1, 2)


@pytest.mark.parametrize(("one", "same"), [("1,000 grams", "1000 grams"), ("$2.50", "$2.5"), ("\u22123", "-3")])
def test_a_number_in_another_spelling_is_the_same_number(one, same):
    assert clauses_of(f"It is {one}.") == clauses_of(f"It is {same}.")
    assert content_words(f"It is {one}.") == content_words(f"It is {same}.")
    assert replaced_details(f"The box is {one}.", f"The box is {same}.") == []


def test_the_marks_of_a_script_belong_to_the_word_and_scripts_without_blanks_have_words():
    assert tokens("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e") == [
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0926\u0941\u0928\u093f\u092f\u093e",
    ]
    assert tokens("\u7ea2\u8272\u7684\u5706") == list("\u7ea2\u8272\u7684\u5706")


def test_what_is_supposed_contradicts_nothing():
    steps = ["The battery is not empty.", "If the battery is empty, the lamp is dark."]
    assert score_chain(steps, ChainContext())["reasons"] == []


def test_a_wrong_conclusion_costs_flow_and_consistency(scorer):
    steps = [*STAIRS.steps[:-1], "Conclusion: Drone."]
    wrong = replace(STAIRS.context, answer={"Drone"})
    assert logical_flow_score(steps, wrong, scorer) <= 0.7
    assert reasoning_consistency(steps, wrong) == 0


def test_a_right_conclusion_that_the_steps_do_not_support_lowers_flow(scorer):
    steps = [step.replace("Robot with Legs is yes", "Robot with Legs is no") for step in STAIRS.steps]
    assert logical_flow_score(steps, STAIRS.context, scorer) <= 0.7


def test_a_wrong_conclusion_does_not_follow_from_steps_without_a_fault():
    steps = ["The nail is made of steel.", "Steel is drawn to a magnet, but copper is not.", "Conclusion: the nail."]
    right = ChainContext(instruction="Nail or copper coin?", answer={"the nail"}, gold_answer={"the nail"})
    assert score_chain(steps, right)["parts"]["conclusion_follows"] > 0.8
    wrong = replace(right, answer={"the coin"})
    assert score_chain([*steps[:-1], "Conclusion: the coin."], wrong)["parts"]["conclusion_follows"] == 0


def test_a_conclusion_other_than_the_answer_lowers_flow(scorer):
    elsewhere = replace(GUIDE.context, answer={"Drone"})
    assert logical_flow_score(GUIDE.steps, elsewhere, scorer) <= 0.7


def test_a_conclusion_does_not_name_what_it_excludes(scorer):
    steps = [*GUIDE.steps[:-1], "Conclusion: Humanoid robot rather than Drone, not Robot with Legs"]
    assert logical_flow_score(steps, GUIDE.context, scorer) > 0.9


@pytest.mark.parametrize("steps", [[], ["", "  "], ["."]])
def test_an_empty_chain_scores_zero(steps, scorer):
    scores = score_chain(steps, STAIRS.context, scorer)
    assert (scores["reasoning_consistency"], scores["step_completeness"], scores["logical_flow_score"]) == (0, 0, 0)


@pytest.mark.parametrize("steps", [["The place is stairs."], ["The place is stairs."] * 5])
def test_fewer_than_two_distinct_steps_are_not_consistent(steps):
    assert reasoning_consistency(steps, STAIRS.context) == 0


@pytest.mark.parametrize("own, other", [(STAIRS, ROBOT_CHAINS[2]), (SCIENCE_CHAINS[0], SCIENCE_CHAINS[1])])
def test_the_chain_of_another_question_of_its_kind_is_contradicted(own, other):
    assert reasoning_consistency(other.steps, own.context) <= 0.25


@pytest.mark.parametrize("own, other", [(STAIRS, SCIENCE_CHAINS[0]), (SCIENCE_CHAINS[0], STAIRS), (STAIRS, GUIDE)])
def test_the_chain_of_another_domain_is_unsupported_and_incomplete(own, other):
    assert reasoning_consistency(other.steps, own.context) <= 0.25
    assert step_completeness(other.steps, own.context) <= 0.25


def test_without_facts_a_chain_about_something_else_does_not_support_itself():
    context = ChainContext(instruction="Which robot should pick boxes?")
    steps = ["Photosynthesis turns sunlight to sugar.", "Sugar feeds leaves.", "Leaves need sunlight."]
    assert reasoning_consistency(steps, context) == 0


def test_a_claim_about_something_this_question_does_not_have_is_unsupported(scorer):
    facts = {name: value for name, value in STAIRS.context.facts.items() if name != "trip"}
    reasons = score_chain(STAIRS.steps, replace(STAIRS.context, facts=facts), scorer)["reasons"]
    assert "step 2 claims something about trip, which this question does not have" in reasons


# --- completeness -------------------------------------------------------------------------------------------------


def test_a_missing_step_costs_its_share_of_its_type():
    assert step_completeness([*STAIRS.steps[:1], *STAIRS.steps[2:]], STAIRS.context) == pytest.approx(1 - 1 / 3 / 4)


def test_a_missing_type_costs_a_quarter():
    assert step_completeness(GUIDE.steps[:-1], GUIDE.context) == pytest.approx(0.75)


def test_a_step_with_wrong_values_still_fills_its_slot():
    steps = [STAIRS.steps[0].replace("stairs", "cliff").replace("hands", "camera"), *STAIRS.steps[1:]]
    assert step_completeness(steps, STAIRS.context) == 1.0


def test_one_step_repeated_fills_one_slot():
    assert step_completeness([STAIRS.steps[1]] * 10, STAIRS.context) == pytest.approx(1 / 3 / 4)


def test_one_step_with_every_key_word_fills_one_slot_without_a_gold_chain():
    step = "Analyze the task, evaluate each constraint, compare and select the best option"
    assert PLAIN.score([step], ChainContext())["parts"]["type_coverage"] == 0.25


def test_the_guides_example_is_complete_without_a_gold_chain():
    scores = PLAIN.score(GUIDE.steps, ChainContext())
    assert scores["parts"]["type_coverage"] == 1.0
    assert scores["step_completeness"] > 0.9


def test_a_key_word_alone_is_no_step_type():
    assert identify_step_types(["Analyze.", "Conclusion:", "Conclusion: Drone"]) == [
        frozenset(),
        frozenset(),
        frozenset({"conclusion"}),
    ]


# --- claims -------------------------------------------------------------------------------------------------------


def test_a_value_word_that_is_also_a_name_is_read_as_the_value():
    step = "Drone: light is day, load is light, so Drone is yes."
    domains = {"light": {"day", "dark"}, "load": {"light", "heavy"}, "Drone": {"yes", "no"}}
    assert claims(step, **domains) == ["light is day", "load is light", "Drone is yes"]


def test_the_longest_value_is_read_first():
    assert claims("The place is open water.", place={"open", "open water"}) == ["place is open water"]


def test_a_value_directly_before_its_name_is_a_claim():
    assert claims("With a heavy load it is slow.", load={"light", "heavy"}) == ["load is heavy"]


def test_a_value_after_the_next_name_or_sentence_is_no_claim():
    assert claims("The load and the flag are far. Heavy.", load={"heavy", "far"}, flag={"far"}) == ["flag is far"]


def test_a_negated_claim_contradicts_the_value_it_denies(scorer):
    assert ClaimReader({"weather": {"rain"}}).read("The weather is not rain.") == (Claim("weather", "rain", True),)
    context = ChainContext(instruction="What weather?", facts={"weather": "rain"}, domains={"weather": {"rain", "sun"}})
    reasons = score_chain(["The weather is not rain.", "The weather isn't sun."], context, scorer)["reasons"]
    assert reasons == ["step 1 says 'weather is not rain', but weather is rain"]


def test_verdicts_in_other_words_are_understood(scorer):
    domains = {"Drone": {"suited", "unsuited"}, "Humanoid": {"suited", "unsuited"}}
    context = ChainContext(instruction="Which robot?", domains=domains, answer={"Drone"})
    steps = ["The robot Drone is unsuited.", "The robot Humanoid is suited.", "Conclusion: Drone."]
    reasons = score_chain(steps, context, scorer)["reasons"]
    assert reasons == ["step 3 says 'Drone is suited', but an earlier step says 'Drone is unsuited'"]


# --- plain numbers ------------------------------------------------------------------------------------------------


def test_adjacent_similarity_matches_a_hand_worked_case():
    # numbers weigh the same and are like themselves alone: one of two shared each way is 1/2, the same again is 1
    assert adjacent_similarity(["7 8", "7 9", "7 9"]) == pytest.approx((1 / 2 + 1) / 2)
    assert adjacent_similarity(["7 8"]) == 0.0


def test_words_that_all_training_chains_have_count_less():
    steps = ["red box", "red sun"]
    fitted = ChainScorer.fit([[f"red {thing}"] for thing in ("car", "house", "tree", "dog")])
    plain, common = (s.score(steps, ChainContext())["adjacent_similarity"] for s in (PLAIN, fitted))
    assert common < plain


def test_final_answer_accuracy_is_set_equality():
    assert final_answer_accuracy(["humanoid ", "Drone"], ["Drone", "Humanoid"]) == 1.0
    assert final_answer_accuracy(["Drone"], ["Drone", "Humanoid"]) == 0.0


def test_precision_and_recall_are_none_where_nothing_was_counted():
    table = per_candidate_precision_recall([{"A"}, {"A"}], [{"A"}, {"B"}])
    assert table == {
        "A": {"precision": 0.5, "recall": 1.0, "support": 1.0},
        "B": {"precision": None, "recall": 0.0, "support": 1.0},
    }


def test_balanced_accuracy_of_a_constant_guess_is_one_half():
    assert balanced_accuracy([1, 1, 1, 0], [1, 1, 1, 1]) == 0.5


def test_the_bootstrap_interval_holds_the_mean_and_repeats_with_its_seed():
    values = [0.0, 1.0] * 50
    low, high = bootstrap_interval(values)
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62
    assert bootstrap_interval(values) == (low, high)


def test_a_metric_at_its_target_does_not_meet_it():
    metrics = {"reasoning_consistency": 0.85, "step_completeness": 0.91, "logical_flow_score": None}
    compared = compare_with_targets(metrics)
    assert [entry["met"] for entry in compared.values()] == [False, True, None, None]
    assert compared["reasoning_consistency"]["target"] == ">0.85"


def test_accuracies_without_picture_or_reasoning_must_stay_a_margin_below():
    metrics = {"final_answer_accuracy": 0.9, "swapped_image_accuracy": 0.66, "no_reasoning_accuracy": 0.8}
    compared = compare_with_targets(metrics)
    assert compared["swapped_image_accuracy"] == {"target": "<=0.650", "met": False}
    assert compared["no_reasoning_accuracy"] == {"target": "<=0.800", "met": True}
    assert "swapped_image_accuracy" not in compare_with_targets({"swapped_image_accuracy": 0.1})


def test_no_target_asks_an_accuracy_to_be_below_zero():
    compared = compare_with_targets(
        {"final_answer_accuracy": 0.2, "swapped_image_accuracy": 0.0, "no_reasoning_accuracy": 0.0}
    )
    assert "swapped_image_accuracy" not in compared and compared["no_reasoning_accuracy"]["target"] == "<=0.100"


def test_the_table_fits_80_columns_and_shows_missing_values():
    metrics = {"reasoning_consistency": 0.8499, "no_reasoning_same_time_accuracy": None}
    text = metrics_table(
        {"checkpoint": "/x" * 60, "split": "val", "metrics": metrics, "targets": compare_with_targets(metrics)}
    )
    assert max(map(len, text.splitlines())) <= 80
    assert next(line for line in text.splitlines() if "consistency" in line).split()[1:] == [
        "0.8499",
        ">0.85",
        "no",
        "high",
    ]
    assert next(line for line in text.splitlines() if "same_time" in line).split()[1:] == ["n/a", "-", "-", "low"]


def test_the_console_says_accuracy_by_wording_and_how_far_to_trust_the_confidence():
    row = {"num": 4, "reasoning": 0.5, "no_reasoning": None}
    result = {
        "impact_by_complexity": {"simple": row},
        "accuracy_by_wording": {"count": {**row, "reasoning": 1.0}, "value": row},
        "calibration": {"ece": 0.055, "ece_uncalibrated": 0.2468},
    }
    assert group_lines(result).splitlines() == [
        "accuracy by wording: count 1.000 of 4, value 0.500 of 4",
        "confidence: expected calibration error 0.055 (0.247 before it was fitted on val)",
    ]
    assert group_lines({"accuracy_by_wording": {"None": row}, "calibration": None}) == ""


def test_a_chain_is_scored_in_a_few_hundredths_of_a_second(scorer):
    started = time.process_time()  # 6 ms are wanted for each; this only finds what costs several times that
    for index in range(200):
        steps = [step.replace("rain", f"rain {index}") for step in STAIRS.steps[1:]]  # no step is in a cache
        score_chain(steps, STAIRS.context, scorer)
    assert time.process_time() - started < 6


def test_a_conclusion_in_words_agrees_with_yes_or_no():
    steps = ["An open switch interrupts the circuit, so no current flows.", "Conclusion: the lamp does not shine."]
    context = ChainContext(instruction="Does the lamp shine while the switch is open?")
    found = [
        score_chain(steps, replace(context, answer={answer}))["parts"]["conclusion_follows"] for answer in ("No", "Yes")
    ]
    assert found == [1.0, 0.0]


@pytest.mark.parametrize(
    ("conclusion", "reason"),
    [
        ("Conclusion: Drone and Humanoid.", "it names Drone, Humanoid, the answer is Humanoid"),
        ("Conclusion: Drone.", "it names Drone, the answer is Humanoid"),
        ("Conclusion: nobody can.", "it does not name the answer"),
    ],
)
def test_a_conclusion_that_names_another_answer_is_told_as_a_reason_and_shown_on_the_page(tmp_path, conclusion, reason):
    steps = ["The stairs are steep.", "A humanoid climbs stairs.", conclusion]
    context = ChainContext(
        instruction="Who climbs the stairs?",
        answer=frozenset({"Humanoid"}),
        candidates=frozenset({"Drone", "Humanoid"}),
    )
    scores = ChainScorer().score(steps, context)
    assert scores["reasons"][-1] == f"step 3 concludes otherwise: {reason}"
    sample = {
        "id": "1",
        "instruction": "Who?",
        "reasoning_steps": steps,
        "answer_set": ["Humanoid"],
        "correct": True,
        "gold_answer": ["Humanoid"],
        "scores": scores,
        "image": None,
    }
    assert reason in samples_page([sample], tmp_path / "samples.html", "Samples").read_text(encoding="utf-8")
    fits = ChainScorer().score([*steps[:2], "Conclusion: Humanoid."], context)
    assert not any("concludes otherwise" in reason for reason in fits["reasons"])


def digits(left, right, question):
    """What somebody wrote about two digits, whose questions name little of what their chains say."""
    seen = [f"The left digit is {left}.", f"The right digit is {right}."]
    if question == "What is the sum of the digits?":
        return question, (*seen, f"{left} + {right} = {left + right}.", f"Conclusion: {left + right}.")
    if question == "Which digit is larger, left or right?":
        larger = "left" if left > right else "right"
        return question, (*seen, f"{max(left, right)} is more than {min(left, right)}.", f"Conclusion: {larger}.")
    return question, (*seen, f"Conclusion: {left if 'left' in question else right}.")


DIGIT_QUESTIONS = (
    "Which digit is on the left?",
    "Which digit is on the right?",
    "Which digit is larger, left or right?",
    "What is the sum of the digits?",
)


@pytest.fixture(scope="module")
def digit_scores():
    """`digit_scores(left, right, question, steps)`: of the gold chain, or of `steps` in its place."""
    numbers = [(a, b) for a in range(10) for b in range(10) if a != b]
    scorer = ChainScorer.fit([digits(*numbers[i % 90], DIGIT_QUESTIONS[i % 4])[1] for i in range(360)])

    def scores(left, right, question, steps=None):
        instruction, gold = digits(left, right, question)
        answer = frozenset({gold[-1].removeprefix("Conclusion: ").rstrip(".")})
        context = ChainContext(instruction=instruction, reference_steps=gold, answer=answer, gold_answer=answer)
        return scorer.score(gold if steps is None else steps, context)

    return scores


@pytest.mark.parametrize("question", DIGIT_QUESTIONS)
@pytest.mark.parametrize(("left", "right"), [(3, 8), (7, 2), (6, 5)])
def test_no_gold_chain_has_to_say_more_than_it_does(digit_scores, question, left, right):
    found = digit_scores(left, right, question)
    for name in ("reasoning_consistency", "step_completeness", "logical_flow_score"):
        assert found[name] > 0.95, found


def test_a_chain_with_less_than_its_gold_chain_or_beside_it_scores_less(digit_scores):
    question = "Which digit is larger, left or right?"
    gold = digits(3, 8, question)[1]
    whole = digit_scores(3, 8, question)
    short = digit_scores(3, 8, question, (gold[0], gold[-1]))
    assert short["step_completeness"] < whole["step_completeness"] - 0.2
    aside = digit_scores(3, 8, question, ("Trains leave at noon.", "The weather stays dry.", gold[-1]))
    assert aside["reasoning_consistency"] < 0.5


def test_a_step_about_the_opposite_side_repeats_nothing(digit_scores):
    same = ("The left digit is 7.", "The right digit is 7.", "Conclusion: 7.")
    assert digit_scores(7, 7, "Which digit is on the left?", same)["reasons"] == []
    again = ("The left digit is 7.", "The left digit is 7.", "Conclusion: 7.")
    assert any("repeats" in reason for reason in digit_scores(7, 7, "Which digit is on the left?", again)["reasons"])


def test_gold_chains_below_a_target_are_told():
    targets = {"reasoning_consistency": {"target": ">0.85"}, "swapped_image_accuracy": {"target": "<=0.7"}}
    low = {"targets": targets, "gold_chains": {"reasoning_consistency": 0.6, "step_completeness": None}}
    assert "reasoning_consistency 0.600 themselves" in gold_chain_lines(low)
    assert gold_chain_lines({"targets": targets, "gold_chains": {"reasoning_consistency": 0.9}}) == ""
    assert gold_chain_lines({"targets": targets}) == ""

"""The rule teacher: what a chain says follows from the picture, and leads to the answer."""

import re

import pytest

from embervlm.robots.facts import SceneFacts, all_facts
from embervlm.robots.rules import (
    KINDS,
    ROBOT_ORDER,
    SLOW_PLACES,
    TASKS,
    TIDAL_PLACES,
    TRIPS,
    Task,
    arrival_after,
    caption,
    claim_domains,
    countdown,
    derive,
    forecast_after,
    glossary,
    teach,
)

GUIDE_STEP_TYPES = {"problem_analysis", "constraint_checking", "solution_selection", "conclusion"}
BASE = {"place": "field", "weather": "clear", "sky": "noon", "load": "light", "flag": "near"}


@pytest.fixture(scope="module")
def chains():
    """Every chain this teacher can write, for a third of the scenes."""
    scenes = list(all_facts())[::3]
    return [(facts, task, teach(facts, task)) for facts in scenes for task in TASKS]


def scene(**facts):
    return SceneFacts(**{**BASE, **facts})


def haul(job="inspect"):
    return Task(kind="haul", job=job)


# ---- chains


def test_every_chain_has_three_to_ten_steps(chains):
    assert {len(chain.steps) for *_, chain in chains} <= set(range(3, 11))


def test_longer_questions_have_longer_chains():
    lengths = [len(teach(scene(), Task(kind=kind, job="inspect")).steps) for kind in KINDS]
    assert lengths == sorted(set(lengths))


def test_chains_cover_the_guides_step_types(chains):
    assert {kind for *_, chain in chains for kind in chain.step_types} == GUIDE_STEP_TYPES


def test_every_chain_starts_with_the_problem_and_ends_in_one_conclusion(chains):
    for *_, chain in chains:
        assert chain.step_types[0] == "problem_analysis"
        assert [kind for kind in chain.step_types if kind == "conclusion"] == [chain.step_types[-1]]


def test_steps_types_and_seen_facts_are_parallel(chains):
    assert all(len(chain.steps) == len(chain.step_types) == len(chain.seen) for *_, chain in chains)


def test_the_conclusion_names_exactly_the_answer(chains):
    for *_, chain in chains:
        assert chain.steps[-1] == f"Conclusion: {', '.join(chain.answer)}."


def test_the_answer_is_the_robots_whose_verdict_is_suited(chains):
    for *_, chain in chains:
        assert chain.answer == tuple(robot for robot in ROBOT_ORDER if chain.claims[robot] == "suited")


def test_every_verdict_is_given_once_in_a_chain(chains):
    for *_, chain in chains:
        text = " ".join(chain.steps)
        assert [text.count(f": {robot} is {chain.claims[robot]}.") for robot in ROBOT_ORDER] == [1] * len(ROBOT_ORDER)


def test_every_claim_in_a_chain_is_what_its_claims_say(chains):
    names = sorted(claim_domains(), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w]){'(' + '|'.join(names) + ')'} is ([a-z ]+?)(?=[,.:]| after|$)", re.IGNORECASE)
    for facts, task, chain in chains:
        for step in chain.steps:
            found = pattern.findall(step)
            assert found or step.startswith("Conclusion")
            for name, value in found:
                key = name if name in chain.claims else name.lower()
                assert chain.claims[key] == value, (facts, task, step)


def test_claims_stay_within_their_domains(chains):
    domains = claim_domains()
    for *_, chain in chains:
        assert all(value in domains[name] for name, value in chain.claims.items())


def test_a_step_states_every_fact_that_it_is_said_to_read(chains):
    for facts, _, chain in chains:
        for step, names in zip(chain.steps, chain.seen):
            assert all(f" is {getattr(facts, name)}" in step for name in names)


def test_the_chain_says_nothing_about_a_place_at_sea_level_without_its_tide(chains):
    for facts, _, chain in chains:
        assert ("tide" in chain.claims) == (facts.place in TIDAL_PLACES)


def test_an_instruction_is_one_of_few(chains):
    instructions = {task.instruction for _, task, _ in chains}
    assert len(instructions) == len(TASKS) <= 16


def test_an_instruction_gives_none_of_the_scene_away():
    values = {"warehouse", "stairs", "tunnel", "rubble", "cliff", "water", "field", "crowd", "rain", "wind", "fog"}
    assert not values & set(re.findall(r"\w+", " ".join(task.instruction.lower() for task in TASKS)))


def test_the_glossary_covers_every_word_of_every_chain(chains):
    known = set(re.findall(r"[\w']+", " ".join(glossary()).lower()))
    spoken = set(re.findall(r"[\w']+", " ".join(" ".join(chain.steps) for *_, chain in chains).lower()))
    assert spoken - known == set()


def test_every_rule_of_the_glossary_on_the_ground_agrees_with_the_chains(chains):
    rules = {line.split(", so the ground is ")[0]: line for line in glossary() if "so the ground is" in line}
    for *_, chain in chains:
        for step in chain.steps:
            if ", so the ground is " in step and "forecast is" in step:
                assert rules[step.split(", so the ground is ")[0]] == step


def test_a_caption_states_all_facts(chains):
    for facts, _, _ in chains[:: len(TASKS)]:
        assert all(f"{name} is {value}" in caption(facts) for name, value in facts.as_dict().items())


# ---- hand-worked cases


@pytest.mark.parametrize(
    ("sky", "quarters", "expected"),
    [("noon", 0, "noon"), ("noon", 1, "dusk"), ("dusk", 2, "dawn"), ("night", 3, "dusk"), ("dawn", 4, "dawn")],
)
def test_the_time_of_arrival_goes_round_the_day(sky, quarters, expected):
    assert arrival_after(sky, quarters) == expected


@pytest.mark.parametrize(
    ("weather", "quarters", "expected"),
    [("clear", 1, "clear"), ("clear", 2, "wind"), ("wind", 3, "rain"), ("rain", 5, "clear"), ("fog", 2, "clear")],
)
def test_a_front_passes_every_twelve_hours(weather, quarters, expected):
    assert forecast_after(weather, quarters) == expected


@pytest.mark.parametrize(
    ("facts", "trip"),
    [
        ({}, "six hours"),
        ({"flag": "far"}, "eighteen hours"),
        ({"load": "medium"}, "six hours"),
        ({"flag": "far", "load": "heavy"}, "one day"),
        ({"place": "rubble"}, "twelve hours"),
        ({"place": "rubble", "flag": "far", "load": "heavy"}, "one day"),
    ],
)
def test_distance_and_a_slow_pace_each_add_to_the_trip(facts, trip):
    assert derive(scene(**facts), haul())["trip"] == trip


@pytest.mark.parametrize(
    ("sky", "quarters", "said"),
    [
        ("noon", 1, "To go: six hours at noon."),
        ("dusk", 3, "To go: eighteen hours at dusk, twelve hours at night, six hours at dawn."),
    ],
)
def test_the_hours_of_a_trip_are_counted_down(sky, quarters, said):
    assert countdown(sky, quarters) == said


def test_a_countdown_ends_a_quarter_before_the_arrival(chains):
    for _, task, chain in chains:
        if task.kind != "now":
            last = re.search(r"six hours at (\w+)\. So the arrival is (\w+),", chain.steps[2])
            assert last and arrival_after(last[1], 1) == last[2] == chain.claims["arrival"]


def test_a_load_that_is_left_behind_does_not_slow_the_trip():
    assert derive(scene(load="heavy"), Task(kind="walk", job="film"))["trip"] == TRIPS[0]


def test_here_and_now_there_is_no_trip():
    assert not {"trip", "arrival", "forecast", "pace"} & derive(scene(), Task(kind="now", job="film")).keys()


@pytest.mark.parametrize("place", SLOW_PLACES)
def test_the_pace_in_a_slow_place_is_slow(place):
    assert derive(scene(place=place), haul())["pace"] == "slow"


@pytest.mark.parametrize(("sky", "tide", "ground"), [("dawn", "high", "deep water"), ("noon", "low", "steep")])
def test_the_tide_decides_for_the_foot_of_a_cliff(sky, tide, ground):
    claims = derive(scene(place="cliff", sky=sky), Task(kind="now", job="film"))
    assert (claims["tide"], claims["ground"]) == (tide, ground)


def test_a_haul_over_open_water_worked_by_hand():
    """Noon, far flag, medium load: 3 quarters, so dawn; high tide; the wind of noon has turned to rain."""
    chain = teach(scene(place="open water", weather="wind", sky="noon", load="medium", flag="far"), haul("inspect"))
    known = {
        "pace": "quick",
        "trip": "eighteen hours",
        "arrival": "dawn",
        "daylight": "present",
        "forecast": "rain",
        "tide": "high",
        "ground": "deep water",
    }
    assert {name: chain.claims[name] for name in known} == known
    assert chain.answer == ("Underwater Robot",)


def test_a_repair_here_and_now_worked_by_hand():
    """Noon in a clear field: firm ground by daylight, but hands are needed, and only one robot has good ones."""
    chain = teach(scene(), Task(kind="now", job="repair"))
    assert chain.answer == ("Humanoid", "Robot with Legs")
    assert chain.claims["Drone"] == chain.claims["Robot with Wheels"] == "unsuited"

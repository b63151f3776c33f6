"""Augmented chains: what may change, what may not, and how many there are."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.config_data import AUGMENTATION_STRATEGIES, AugmentationConfig
from embervlm.curate.augment import GIVE_UP_AFTER, augment, augment_cached
from embervlm.curate.duplicates import ChainIndex, find_duplicates
from embervlm.curate.paraphrase import RuleParaphraser
from embervlm.curate.strategies import Origin, expand, fault_of, reorder, simplify
from embervlm.data.facts import reader_of
from embervlm.data.records import DataError, ReasoningRecord, read_records, write_records
from embervlm.data.splits import split_records
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.chain_graph import ChainGraph
from embervlm.words.claims import ClaimReader
from embervlm.words.numbers import numbers_in

NUM_NEW = 600


def record(*steps, answer=("Crane",), **metadata):
    """A record about anything but robots."""
    metadata = {"candidates": ["Crane", "Truck", "Boat"], **metadata}
    return ReasoningRecord(
        record_id="r1",
        image=None,
        instruction="Which vehicle?",
        steps=steps,
        answer=answer,
        metadata=metadata,
        default_candidates=ROBOTS,
    )


def origin_of(given, **options):
    return Origin(given, reader_of([given]), options.get("max_steps", 64))


def texts(rows):
    return [text for text, _ in rows]


@pytest.fixture(scope="module")
def augmented(records):
    return augment(records, NUM_NEW, seed=3)


@pytest.fixture(scope="module")
def reader(records):
    return reader_of(records)


# ---- what depends on what


def graph(*steps, conclusion="Crane.", domains=None, step_types=(), instruction="Which vehicle?"):
    return ChainGraph(
        steps,
        conclusion,
        instruction=instruction,
        reader=ClaimReader.of(domains or {}),
        names=("Crane", "Truck", "Boat"),
        step_types=step_types,
    )


def test_a_step_depends_on_the_one_that_introduces_its_words():
    assert graph("The hill is steep.", "A boat floats.", "Steep roads slow trucks.").needs == [set(), set(), {0}]


def test_words_of_the_question_are_introduced_by_no_step():
    assert graph("The hill is steep.", "Avoid the hill.", instruction="Which way up the hill?").needs == [set(), set()]


def test_a_step_depends_on_the_first_claim_about_a_name_it_claims_something_about():
    domains = {"soil": {"wet", "dry"}, "Truck": {"fit", "unfit"}, "Boat": {"fit", "unfit"}}
    found = graph("The soil is wet.", "Soil is wet: Truck is unfit.", "Soil is wet: Boat is unfit.", domains=domains)
    assert found.needs == [set(), {0}, {0}]


def test_a_sentence_that_points_back_stays_behind_the_one_before():
    found = graph("Rain fell.", "So mud covers roads.", "Cranes stand far off.")
    orders = {tuple(found.new_order(random.Random(seed))[0]) for seed in range(40)}
    assert orders == {(0, 1, 2), (2, 0, 1)}


@pytest.mark.parametrize("step", ["First, look around.", "Step 1 shows mud.", "The previous step rules boats out."])
def test_a_chain_that_counts_its_steps_aloud_is_not_reordered(step):
    assert graph(step, "Cranes lift pipes.", "Trucks carry sand.").new_order(random.Random(0)) is None


def test_steps_of_different_types_keep_their_order():
    types = ("problem_analysis", "constraint_checking", "constraint_checking")
    found = graph("Rain fell.", "Cranes lift pipes.", "Trucks carry sand.", step_types=types)
    assert {tuple(found.new_order(random.Random(seed))[0]) for seed in range(40)} == {(0, 1, 2), (0, 2, 1)}


def test_what_the_conclusion_needs_by_way_of_others_is_not_spare():
    found = graph("Pipes weigh tons.", "Tons ask for a crane.", "Boats float.")
    assert found.spare == {2}


def test_nothing_is_spare_where_the_conclusion_touches_no_step():
    assert not graph("Pipes weigh tons.", "Boats float.", conclusion="All fine.").spare


# ---- paraphrase


def rewritten(text, **domains):
    paraphraser = RuleParaphraser(ClaimReader.of(domains))
    return {paraphraser.rewrite(text, random.Random(seed)) for seed in range(60)}


def test_a_consequence_is_worded_in_several_ways():
    found = rewritten("The hill is steep, so the truck stays below.")
    assert "Because the hill is steep, the truck stays below." in found and len(found) >= 5


def test_premises_of_one_claim_each_change_places():
    found = rewritten("Soil is wet, load is big: Truck is unfit.", soil=["wet"], load=["big"], Truck=["unfit"])
    assert "Since load is big and soil is wet, Truck is unfit." in found


@pytest.mark.parametrize(
    "text",
    [
        "Is the hill steep, so that it slips?",
        "Opposite poles attract",
        "Since 1990, Paris is bigger.",
        'He said "no, so the truck stays".',
    ],
)
def test_what_no_rule_understands_stays_as_it_is(text):
    assert rewritten(text) == {text}


def test_a_name_of_the_data_set_has_no_synonym():
    assert rewritten("Trucks require fuel.") == {f"Trucks {verb} fuel." for verb in ("require", "need", "call for")}
    assert rewritten("Trucks require fuel.", need=["fuel"]) == {"Trucks require fuel.", "Trucks call for fuel."}


def test_bullets_stay_on_their_lines():
    for text in rewritten("Look at it\n- The hill is steep, so the truck stays below."):
        assert text.startswith("Look at it\n- ")


def test_the_premise_stays_before_its_consequence(records, reader):
    """A model that writes the verdict first would learn to guess it."""
    paraphraser = RuleParaphraser(reader)
    step = next(step for r in records for step in r.steps if ": Drone is" in step)
    for seed in range(40):
        text = paraphraser.rewrite(step, random.Random(seed))
        assert text.index("Drone") > text.lower().index("daylight")


# ---- the other strategies


def test_simplify_drops_what_the_conclusion_does_not_need():
    given = record("Pipes weigh tons.", "Tons ask for a crane.", "Boats float.", "Conclusion: Crane.")
    assert texts(simplify(origin_of(given), random.Random(0))) == ["Pipes weigh tons.", "Tons ask for a crane."]


def test_simplify_takes_step_types_and_what_is_seen_along():
    given = record(
        "Pipes weigh tons.",
        "Boats float.",
        "Tons ask for a crane.",
        "Conclusion: Crane.",
        step_types=["a", "b", "c", "conclusion"],
        seen=[["pipe"], ["boat"], [], []],
    )
    rows = simplify(origin_of(given), random.Random(0))
    assert [extra for _, extra in rows] == [{"step_types": "a", "seen": ["pipe"]}, {"step_types": "c", "seen": []}]


def test_expand_states_a_true_fact_of_the_scene_that_was_not_stated():
    given = record("The soil is wet.", "Conclusion: Boat.", answer=("Boat",), scene={"soil": "wet", "wind": "calm"})
    rows = expand(origin_of(given), random.Random(0))
    assert len(rows) == 2 and "wind is calm" in rows[0][0] and rows[1][0] == "The soil is wet."


def test_expand_lengthens_a_step_where_the_chain_is_as_long_as_the_longest():
    given = record("The soil is wet.", "Conclusion: Boat.", answer=("Boat",), scene={"soil": "wet", "wind": "calm"})
    rows = expand(origin_of(given, max_steps=1), random.Random(0))
    assert len(rows) == 1 and "wind is calm" in rows[0][0] and rows[0][0].endswith("The soil is wet.")


def test_expand_does_not_state_what_the_chain_derives():
    given = record(
        "The soil is wet.",
        "Soil is wet, so the grip is bad.",
        "Conclusion: Boat.",
        answer=("Boat",),
        scene={"soil": "wet"},
        facts={"soil": "wet", "grip": "bad"},
    )
    assert isinstance(expand(origin_of(given), random.Random(0)), str)


def test_reorder_says_so_where_only_one_order_is_free():
    given = record("Rain fell.", "Rain makes mud.", "Mud stops trucks.", "Conclusion: Boat.", answer=("Boat",))
    assert reorder(origin_of(given), random.Random(0)) == "no other order is possible"


# ---- checks


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["The soil is dry."], "claims changed"),
        (["The mud is 3 m deep."], "claims changed"),
        (["The soil is wet, 4 m deep."], "numbers changed"),
    ],
)
def test_a_wording_that_says_something_else_is_refused(rows, reason):
    given = record("The soil is wet, 3 m deep.", "Conclusion: Boat.", answer=("Boat",), facts={"soil": "wet"})
    origin = Origin(given, ClaimReader.of({"soil": {"wet", "dry"}}), 9)
    assert fault_of(origin, [(text, {}) for text in rows], "paraphrase") == reason


def test_a_fact_that_is_not_true_is_refused():
    given = record("Look.", "Conclusion: Boat.", answer=("Boat",), facts={"soil": "wet"})
    origin = Origin(given, ClaimReader.of({"soil": {"wet", "dry"}}), 9)
    assert fault_of(origin, [("The soil is dry.", {}), ("Look.", {})], "expand") == "claims changed"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (record("The soil is dry.", "Conclusion: Crane.", facts={"soil": "wet"}), "contradicts"),
        (record("The soil is wet.", "Conclusion: Boat."), "disagrees"),
    ],
)
def test_nothing_is_made_from_a_chain_that_is_wrong_itself(given, reason):
    other = replace(given, record_id="r2", steps=(), metadata={"facts": {"soil": "dry"}})
    made, report = augment([given, other], 10)
    assert not made
    (why,) = [why for why, ids in report.refused_origins.items() if ids == ["r1"]]
    assert reason in why


def test_without_validation_it_is_taken_as_it_is():
    made, _ = augment(
        [record("Mud is deep, so the truck stays.", "Pipes lie here.", "Conclusion: Boat.")], 3, validate=False
    )
    assert made and not any(one.metadata["validated"] for one in made)


def test_a_chain_that_differs_in_function_words_alone_is_a_near_duplicate():
    index, asked = ChainIndex(), record("Boats float.")
    assert index.refusal(asked, ["The soil is wet, so boats float."]) is None
    assert index.refusal(asked, ["The soil is wet, so boats float."]) == "duplicate"
    assert index.refusal(asked, ["Soil is wet; therefore the boats float."]) == "near duplicate"
    assert index.refusal(asked, ["Boats float on wet soil."]) is None


# ---- the whole


def test_the_strategies_get_the_guides_shares(augmented):
    made, report = augmented
    assert {name: report.strategies[name].asked / NUM_NEW for name in AUGMENTATION_STRATEGIES} == pytest.approx(
        AUGMENTATION_STRATEGIES
    )
    assert len(made) == report.made == NUM_NEW
    assert Counter(one.metadata["augmentation"] for one in made) == {n: s.made for n, s in report.strategies.items()}


def test_every_new_record_keeps_what_its_split_goes_by(records, augmented):
    by_id = {one.record_id: one for one in records}
    for one in augmented[0]:
        origin = by_id[one.metadata["origin"]]
        assert (one.image, one.instruction, one.answer) == (origin.image, origin.instruction, origin.answer)
        assert one.metadata["split_group"] == origin.metadata["split_group"]


def test_new_records_fall_into_the_split_of_their_origin(records, augmented):
    split_of = {one.record_id: name for name, found in split_records(records).items() for one in found}
    for name, found in split_records([*records, *augmented[0]]).items():
        assert {split_of[one.metadata.get("origin", one.record_id)] for one in found} <= {name}


def test_claims_of_new_chains_are_those_of_their_origin(records, augmented, reader):
    by_id = {one.record_id: one for one in records}
    for one in augmented[0]:
        origin = by_id[one.metadata["origin"]]
        new, old = ({claim for step in r.steps for claim in reader.read(step)} for r in (one, origin))
        facts = one.metadata["facts"]
        assert all(facts[claim.name] == claim.value for claim in new)
        strategy = one.metadata["augmentation"]
        assert new <= old if strategy == "simplify" else new >= old if strategy == "expand" else new == old


def test_step_types_and_what_is_seen_stay_parallel_to_the_steps(augmented):
    for one in augmented[0]:
        assert len(one.steps) == len(one.metadata["step_types"]) == len(one.metadata["seen"])
        assert one.metadata["step_types"][-1] == "conclusion"


def test_no_chain_gets_more_steps_than_the_longest_given_one(records, augmented):
    assert max(one.num_steps for one in augmented[0]) <= max(one.num_steps for one in records)


def test_no_chain_comes_twice_for_a_question_and_picture(records, augmented):
    keys = [(one.image, one.instruction, one.steps) for one in [*records, *augmented[0]]]
    assert len(set(keys)) == len(keys)


def test_no_new_record_is_one_that_the_data_check_would_report(records, augmented):
    given = find_duplicates(records, {one.image: one.image for one in records if one.image})
    found = find_duplicates([*records, *augmented[0]], {one.image: one.image for one in records if one.image})
    assert [repeat for repeat in found if repeat.index >= len(records)] == []
    assert len(found) == len(given)


def test_ids_are_distinct(records, augmented):
    ids = [one.record_id for one in [*records, *augmented[0]]]
    assert len(set(ids)) == len(ids)


def test_the_count_of_distinct_chains_is_that_of_the_texts(records, augmented):
    made, report = augmented
    num_texts = len({one.steps for one in [*records, *made]})
    assert 0.95 * num_texts <= report.distinct_chains <= num_texts


def test_the_same_seed_makes_the_same_records(records):
    first, second, other = (augment(records[:6], 40, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second != other


def test_where_there_are_no_more_distinct_chains_it_stops_below_the_target():
    made, report = augment([record("Rain fell.", "Boats float.", "Conclusion: Boat.", answer=("Boat",))], 50)
    assert [one.steps for one in made] == [
        ("Boats float.", "Rain fell.", "Conclusion: Boat."),
        ("Boats float.", "Conclusion: Boat."),
    ]
    assert report.wanted == 50 and report.made == 2
    assert report.strategies["paraphrase"].refused == {"duplicate": GIVE_UP_AFTER}


def test_nothing_is_made_from_an_augmentation(records):
    made, _ = augment(records[:4], 8)
    again, report = augment(made, 8)
    assert not again and report.origins == 0


def test_two_records_of_one_id_are_an_error(records):
    with pytest.raises(DataError, match=f"record {records[0].record_id}: id: appears 2 times"):
        augment([records[0], records[0]], 1)


def test_a_teacher_words_chains_in_place_of_the_rules(records):
    def teacher(given, rng):
        return [f"Surely and plainly stated here: {step}" for step in given.steps[: given.num_steps]]

    made, _ = augment([one for one in records if one.num_steps == 3][:3], 10, teacher=teacher)
    paraphrased = [one for one in made if one.metadata["augmentation"] == "paraphrase"]
    assert len(paraphrased) == 3 and all(one.steps[0].startswith("Surely") for one in paraphrased)


def test_a_teacher_that_changes_a_claim_is_refused(records):
    def teacher(given, rng):
        return [step.replace("unsuited", "suited") for step in given.steps[: given.num_steps]]

    wrong = [one for one in records if any("unsuited" in step for step in one.steps)][:3]
    made, report = augment(wrong, 10, teacher=teacher)
    assert not any(one.metadata["augmentation"] == "paraphrase" for one in made)
    assert report.strategies["paraphrase"].refused["claims changed"] == 3 * GIVE_UP_AFTER


# ---- command and cache


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_command_writes_records_that_read_back_and_a_report(scene_data, suffix, capsys):
    path = scene_data / f"augmented{suffix}"
    main(
        [
            "data",
            "augment",
            "--input",
            str(scene_data / "reasoning_data.json"),
            "--output_file",
            str(path),
            "--target-samples",
            "200",
            "--validate_reasoning",
            "--seed",
            "5",
        ]
    )
    found = read_records(path, candidates=ROBOTS)
    report = json.loads((scene_data / "augmented.augmentation.json").read_text())
    assert len(found) == 200 and report["made"] == 152
    assert f"distinct chains for training: {report['distinct_chains']}" in capsys.readouterr().out
    origins = {one.record_id for one in split_records(found)["train"]}
    assert {one.metadata["origin"] for one in found if "origin" in one.metadata} <= origins


def test_the_command_says_that_it_stopped_below_the_target(tmp_path, capsys):
    one = record("Rain fell.", "Boats float.", "Conclusion: Boat.", answer=("Boat",), split="train")
    write_records(tmp_path / "in.jsonl", [one])
    main(["data", "augment", "--input", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")])
    assert "stopped 49997 below --target_samples 50000" in capsys.readouterr().out
    assert len(read_records(tmp_path / "out.jsonl", candidates=ROBOTS)) == 3


def test_the_command_says_what_is_wrong_with_its_flags(scene_data):
    from embervlm.curate.augment import augment_file

    with pytest.raises(ConfigError, match="must end in .json or .jsonl"):
        augment_file(scene_data / "reasoning_data.json", scene_data / "out.csv", target_samples=9, domain=ROBOTS_DOMAIN)


def test_training_reads_from_the_cache_what_the_first_process_made(records, tmp_path):
    config = AugmentationConfig(target_samples=len(records) + 30)
    made = augment_cached(records, config, tmp_path, 0, make=True)
    assert len(made) == config.target_samples and made[: len(records)] == records
    assert augment_cached(records, config, tmp_path, 0, make=False) == made
    for one in made[len(records) :]:
        assert one.metadata["boxes"] and len(one.metadata["seen"]) == len(one.steps)


def test_training_augments_by_the_shares_of_its_settings(records, tmp_path):
    config = AugmentationConfig(target_samples=len(records) + 6, augmentation_strategies={"simplify": 1.0})
    made = augment_cached(records, config, tmp_path, 0, make=True)[len(records) :]
    assert [one.metadata["augmentation"] for one in made] == ["simplify"] * 6


def test_other_records_are_not_read_from_the_same_cache(records, tmp_path):
    config = AugmentationConfig(target_samples=30)
    augment_cached(records[:10], config, tmp_path, 0, make=True)
    augment_cached(records[1:11], config, tmp_path, 0, make=True)
    augment_cached(records[:10], config, tmp_path, 1, make=True)
    corrected = replace(records[0], metadata=records[0].metadata | {"facts": {}})
    augment_cached([corrected, *records[1:10]], config, tmp_path, 0, make=True)
    assert len(list(tmp_path.glob("augmented-*.jsonl"))) == 4


def test_records_enough_are_left_alone(records, tmp_path):
    assert augment_cached(records, AugmentationConfig(target_samples=5), tmp_path, 0, make=True) == records
    assert not list(tmp_path.iterdir())


def test_augmentation_needs_no_torch():
    code = "import sys; sys.modules.update(torch=None); import embervlm.curate.augment, embervlm.data.curriculum"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


# ---- chains that calculate

SUMS = {
    "Mia buys 3 packs of 8 pens and 5 packs of 6 pencils, and gives 14 away. How many things does she keep?": (
        "Mia has 3 * 8 = 24 pens.",
        "Mia has 5 * 6 = 30 pencils.",
        "Pens and pencils make 24 + 30 = 54 things.",
        "After the gift 54 - 14 = 40 things remain.",
        "Conclusion: 40.",
    ),
    "A farm sells 40 eggs at $2 and 20 jars at $5, and pays $80 for feed. What does it earn?": (
        "The eggs bring 40 * $2 = $80.",
        "The jars bring 20 * $5 = $100.",
        "Sales come to $80 + $100 = $180.",
        "Without the feed $180 - $80 = $100 is earned.",
        "Conclusion: $100.",
    ),
    "A school has 1,200 pupils; 1/3 walk, 450 ride a bike, and the rest take buses for 50. How many buses go?": (
        "Walking is chosen by 1,200 / 3 = 400 pupils.",
        "On foot or by bike come 400 + 450 = 850 pupils.",
        "By bus come 1200 - 850 = 350 pupils.",
        "The buses number 350 / 50 = 7.",
        "Conclusion: 7.",
    ),
    "Tom runs 4 km on Monday, twice as far on Tuesday, and 5 km on Friday. How far in all?": (
        "Tuesday's run is 2 * 4 = 8 km.",
        "Monday and Tuesday make 4 + 8 = 12 km.",
        "All runs make twelve + 5 = 17 km.",
        "Conclusion: 17 km.",
    ),
    "Ann saves $15 a week for 6 weeks, her brother $10 a week for 9 weeks. A tent costs $200. What is missing?": (
        "Ann saves 15*6 = $<<15*6=90>>90.",
        "Her brother saves 10*9 = $<<10*9=90>>90.",
        "Both have $90 + $90 = $180.00.",
        "Missing are 200 - 180 = $20.",
        "Conclusion: $20.",
    ),
    "A tank of 500 litres loses 20% and then gets 60 litres. How full is it?": (
        "The loss is 20% of 500 = 100 litres.",
        "A tank of 500 litres keeps 500 - 100 = 400 litres.",
        "In the end 400 + 60 = 460 litres are in it.",
        "Conclusion: 460 litres.",
    ),
}
"""Question -> chain; written for this test."""


def computed_before_use(question, given, order):
    """Whether each number that a step computes in `given` is computed in `order` before any step that uses it there."""
    results = [numbers_in(text)[1] for text in given]
    for place, text in enumerate(order):
        at = given.index(text) if text in given else None
        if at is None:
            continue
        needed = [i for i in range(at) if results[i] & numbers_in(text)[0]]
        if any(given[i] not in order[:place] for i in needed):
            return False
    return True


@pytest.mark.parametrize("question", SUMS, ids=lambda text: text.split()[0] + text.split()[1])
@pytest.mark.parametrize("strategy", [reorder, simplify])
def test_a_chain_that_calculates_keeps_each_sum_before_the_steps_that_use_its_result(question, strategy):
    steps = SUMS[question]
    given = ReasoningRecord(
        record_id="q",
        image=None,
        instruction=question,
        steps=steps,
        metadata={"candidates": []},
        answer=(steps[-1].removeprefix("Conclusion: ").rstrip("."),),
        default_candidates=ROBOTS,
    )
    origin = origin_of(given)
    for seed in range(60):
        found = strategy(origin, random.Random(seed))
        if isinstance(found, str):
            continue
        order = texts(found)
        assert computed_before_use(question, steps[:-1], order), order
        if strategy is simplify:  # what leads to the answer stays
            assert order[-1] == steps[-2], order


def test_steps_that_do_not_use_each_others_results_may_still_change_places():
    question, steps = next(iter(SUMS.items()))
    given = ReasoningRecord(
        record_id="q",
        image=None,
        instruction=question,
        steps=steps,
        metadata={"candidates": []},
        answer=("40",),
        default_candidates=ROBOTS,
    )
    orders = {tuple(texts(reorder(origin_of(given), random.Random(seed)))) for seed in range(20)}
    assert orders == {(steps[0], steps[1], *steps[2:4]), (steps[1], steps[0], *steps[2:4])}


def test_a_number_in_other_clothes_is_the_same_number():
    used, results = numbers_in("Half of 1,200 is 600, so twelve + $3.50 = $15.50 <<12+3.5=15.5>>.")
    assert used == {1200, 600, 12, Fraction(7, 2)} and results == {Fraction(31, 2)}

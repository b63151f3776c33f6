"""Invalid steps: each differs from a valid one in just the way its name says."""

import dataclasses
import random

import pytest

from embervlm.data.dataset import encode_reasoning
from embervlm.data.facts import fact_domains
from embervlm.data.negatives import MAX_PREVIOUS_TOKENS, NEGATIVE_KINDS, PairMaker, contradict
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid, step_texts
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.claims import ClaimReader


@pytest.fixture(scope="module")
def maker(records, samples, tokenizer):
    return PairMaker(records, samples, tokenizer)


@pytest.fixture(scope="module")
def drawn(maker, samples):
    """(sample, ids of its steps, its valid pair, an invalid pair), many of each kind."""
    found = []
    for sample in samples:
        for seed in range(4):
            valid, *negatives = maker.pairs(sample, random.Random(seed), NEGATIVE_KINDS)
            found += [(sample, steps_of(sample), valid, negative) for negative in negatives]
    return found


def steps_of(sample):
    text = [*sample.prompt, *sample.target]
    return [text[start - 1 : end] for start, end in sample.step_spans]


def of_kind(drawn, kind):
    found = [case for case in drawn if case[3].kind == kind]
    assert len(found) > 20
    return found


def joined(steps):
    return [token for step in steps for token in step]


def index_of(previous, steps):
    """How many steps stand before the one that is judged."""
    most = MAX_PREVIOUS_TOKENS - 1  # the first token opens the chain
    return next(i for i in range(len(steps) + 1) if joined(steps[:i])[-most:] == previous[1:])


def test_a_valid_pair_is_a_step_of_the_chain_after_those_before_it(drawn):
    for _, steps, valid, _ in drawn:
        assert valid.valid and steps[index_of(valid.previous, steps)] == valid.step


def test_only_valid_pairs_are_called_valid(drawn):
    assert not any(negative.valid for *_, negative in drawn)


def test_no_negative_is_the_step_that_comes_next(drawn):
    for _, steps, _, negative in drawn:
        index = index_of(negative.previous, steps)
        assert index == len(steps) or steps[index] != negative.step


def test_a_step_of_another_picture_comes_from_another_picture(drawn, records, samples):
    for sample, _, _, negative in of_kind(drawn, "other_picture"):
        own = records[sample.record].image
        sources = {records[s.record].image for s in samples if negative.step in steps_of(s)}
        assert sources - {own}


def test_a_step_of_another_picture_is_no_step_of_this_chain(drawn):
    for _, steps, _, negative in of_kind(drawn, "other_picture"):
        assert negative.step not in steps


def test_a_step_of_another_picture_mostly_answers_the_same_question(drawn, records, samples):
    same = [
        any(records[s.record].asked == records[sample.record].asked for s in samples if negative.step in steps_of(s))
        for sample, _, _, negative in of_kind(drawn, "other_picture")
    ]
    assert sum(same) / len(same) > 0.5


def test_a_step_in_the_wrong_order_comes_later_in_the_chain(drawn):
    for _, steps, _, negative in of_kind(drawn, "wrong_order"):
        assert negative.step in steps[index_of(negative.previous, steps) + 1 :]


def test_steps_of_the_same_type_may_stand_in_either_order(drawn, records):
    for sample, steps, _, negative in of_kind(drawn, "wrong_order"):
        types = records[sample.record].metadata["step_types"]
        index = index_of(negative.previous, steps)
        assert types[steps.index(negative.step, index)] != types[index]


def test_a_repeated_step_was_said_before(drawn):
    for _, steps, _, negative in of_kind(drawn, "repeated"):
        assert negative.step in steps[: index_of(negative.previous, steps)]


def test_a_contradicted_step_differs_from_the_valid_one_in_one_value(drawn, records, tokenizer):
    reader = ClaimReader.of(fact_domains(records))
    for sample, _, valid, negative in of_kind(drawn, "contradicted"):
        right, wrong = (reader.read(tokenizer.decode(pair.step)) for pair in (valid, negative))
        facts = records[sample.record].metadata["facts"]
        ((true, false),) = {both for both in zip(right, wrong, strict=True) if both[0] != both[1]}
        assert true.name == false.name and true.value == facts[true.name] != false.value
        assert negative.previous == valid.previous


def test_contradicting_a_step_replaces_its_value_by_another_of_the_domain():
    step = "The sky is noon, so the daylight is present."
    found = {
        contradict(step, {"sky": "noon"}, ClaimReader.of({"sky": {"noon", "dusk", "dawn"}}), random.Random(seed))
        for seed in range(20)
    }
    assert found == {"The sky is dusk, so the daylight is present.", "The sky is dawn, so the daylight is present."}


def test_a_value_is_replaced_wherever_the_step_states_it_whatever_stands_between():
    reader = ClaimReader.of({"job": {"hands", "cameras"}, "Drone": {"suited", "unsuited"}})
    step = "The job needs hands, so the Drone is unsuited. The job takes hands."
    wrong = {contradict(step, {"job": "hands"}, reader, random.Random(seed)) for seed in range(5)}
    assert wrong == {"The job needs cameras, so the Drone is unsuited. The job takes cameras."}


@pytest.mark.parametrize(
    ("facts", "domains"),
    [
        ({}, {}),
        ({"sky": "night"}, {"sky": frozenset({"night", "dusk"})}),
        ({"sky": "noon"}, {"sky": frozenset({"noon"})}),
    ],
)
def test_a_step_that_states_nothing_is_not_contradicted(facts, domains):
    assert contradict("The sky is noon.", facts, ClaimReader.of(domains), random.Random(0)) == "The sky is noon."


def test_the_same_random_state_draws_the_same_pairs(maker, samples):
    for sample in samples[:10]:
        assert maker.pairs(sample, random.Random(5)) == maker.pairs(sample, random.Random(5))


def test_without_named_kinds_a_valid_step_gets_one_invalid_one(maker, samples):
    for seed, sample in enumerate(samples):
        kinds = [pair.kind for pair in maker.pairs(sample, random.Random(seed))]
        assert kinds[0] == "valid" and len(kinds) == 2


def test_all_kinds_are_drawn_in_turn(maker, samples):
    kinds = {pair.kind for seed in range(30) for s in samples[:9] for pair in maker.pairs(s, random.Random(seed))}
    assert kinds == {"valid", *NEGATIVE_KINDS}


def test_a_long_chain_is_read_from_its_end(tokenizer):
    steps = tuple(f"Step number {i} says {'so ' * 20}." for i in range(30))
    record = ReasoningRecord(
        record_id="r", image=None, instruction="Q?", steps=steps, answer=("Drone",), default_candidates=ROBOTS
    )
    (sample,) = encode_reasoning([record], tokenizer, grid=Grid(3, 3), max_length=10**6)
    pairs = [PairMaker([record], [sample], tokenizer).pairs(sample, random.Random(seed))[0] for seed in range(20)]
    assert max(len(pair.previous) for pair in pairs) == MAX_PREVIOUS_TOKENS
    whole = [tokenizer.ids["<|reasoning_start|>"], *joined(steps_of(sample))]
    for pair in pairs:
        index = steps_of(sample).index(pair.step)
        assert whole[: 1 + sum(map(len, steps_of(sample)[:index]))][-MAX_PREVIOUS_TOKENS:] == pair.previous


def test_a_record_alone_without_facts_gets_only_the_negatives_that_can_be_made(tokenizer):
    record = ReasoningRecord(
        record_id="r",
        image=None,
        instruction="Q?",
        steps=("Look.", "Go."),
        answer=("Drone",),
        default_candidates=ROBOTS,
    )
    (sample,) = encode_reasoning([record], tokenizer, grid=Grid(3, 3), max_length=512)
    maker = PairMaker([record], [sample], tokenizer)
    kinds = {p.kind for seed in range(20) for p in maker.pairs(sample, random.Random(seed), NEGATIVE_KINDS)}
    assert kinds == {"valid", "repeated", "wrong_order"}


def test_a_chain_of_one_step_without_facts_has_a_valid_pair_only(tokenizer):
    record = ReasoningRecord(
        record_id="r", image=None, instruction="Q?", steps=("Look.",), answer=("Drone",), default_candidates=ROBOTS
    )
    (sample,) = encode_reasoning([record], tokenizer, grid=Grid(3, 3), max_length=512)
    pairs = PairMaker([record], [sample], tokenizer).pairs(sample, random.Random(0), NEGATIVE_KINDS)
    assert [pair.kind for pair in pairs] == ["valid"]


def test_fact_domains_collect_every_value_of_all_records(records):
    domains = fact_domains(records)
    assert domains["place"] == {record.metadata["facts"]["place"] for record in records}


def test_records_without_facts_add_nothing_to_the_domains(records):
    assert fact_domains([dataclasses.replace(records[0], metadata={})]) == {}


def test_the_contradicted_text_is_of_the_step_that_is_judged(drawn, records, tokenizer):
    for sample, steps, _, negative in of_kind(drawn, "contradicted"):
        texts, conclusion = step_texts(records[sample.record])
        valid = [*texts, conclusion][index_of(negative.previous, steps)]
        assert len(tokenizer.decode(negative.step).split(",")) == len(valid.split(","))

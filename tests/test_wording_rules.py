"""Sums, comparisons, replaced details, denials: what two texts say of each other word by word, in any subject."""

from __future__ import annotations

import dataclasses
import time

import pytest

from embervlm.judge.arithmetic import calculates_again, wrong_arithmetic
from embervlm.judge.metrics import ChainScorer
from embervlm.judge.reading import ChainContext
from embervlm.judge.replaced import replaced_details
from embervlm.words.opposites import Alternatives
from embervlm.words.wording import Rarity, Reading, clauses_of


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("She sells 16 - 3 - 4 = 8 eggs.", "16 - 3 - 4 = 8"),
        ("180 / 60 = 3 hours", None),
        ("26 is less than 27, so one vote is missing.", None),
        ("26 is not less than 27, so one vote is missing.", "26 is not less than 27"),
        ("One hour is not less than the two hours that are needed.", "One hour is not less than the two hours"),
        ("Carp need 3 milligrams, which is more than 4, so no.", "3 milligrams, which is more than 4"),
        ("450 isn't less than 500.", "450 isn't less than 500"),
        ("5 is less than 2,000.", None),
        ("450 euros is no more than 500.", None),
        ("12% is more than 20%.", "12% is more than 20%"),
    ],
)
def test_a_sum_or_comparison_that_does_not_come_out(text, wrong):
    assert wrong_arithmetic(text) == wrong


@pytest.mark.parametrize(
    "text",
    [
        "2 hours is more than 90 minutes.",  # other units
        "This one is more than 5 years old.",  # no number
        "The temperature at 8 is lower than 5 degrees.",  # a time of day
        "Half of 40 is less than 30.",
        "If 5 is more than 7, nothing holds.",
        "4 is less than 3 times 2.",
        "5 million is more than 10.",
        "9:30 is later than 9:45 would be.",
        "The sum of 3 and 2 is more than 4.",
    ],
)
def test_what_is_no_plain_comparison_is_left_alone(text):
    assert wrong_arithmetic(text) is None


def test_the_same_sum_again_says_nothing_new():
    first = "That leaves 48 - 12 = 36 good apples."
    assert calculates_again("Taking the bruised ones away, 48 - 12 = 36 are still good.", first)
    assert not calculates_again("After 5 are eaten, 36 - 5 = 31 remain.", first)
    assert not calculates_again("Since 48 - 12 = 36, the 40 that were ordered cannot be sent.", first)
    assert not calculates_again("The good apples are counted.", first)


_LISTS = ("red, red and blue", "red, green and blue", "red and blue")


@pytest.mark.parametrize(
    ("text", "known", "found"),
    [
        ("Insects have eight legs.", "Insects have six legs.", [("eight", "six")]),
        ("Cara has to work on Thursday.", "Cara has to work on Wednesday.", [("thursday", "wednesday")]),
        ("Belgrade comes before that.", "Belgrade only comes after that.", [("before", "after")]),
        ("The soil is bone dry.", "The soil is soaking wet.", [("dry", "wet")]),
        (
            "The wait adds 40 minutes, 17:05 + 0:40 = 17:45.",
            "The wait adds 20 minutes, 17:05 + 0:20 = 17:25.",
            [("40", "20"), ("0:40", "0:20"), ("17:45", "17:25")],
        ),
        ("In short, insects have six legs.", "Insects have six legs.", None),
        ("So insects have only six legs.", "Insects have six legs.", []),
        ("Carp need 3 milligrams.", "Trout need 7 milligrams.", None),  # of something else
        ("Friday is out.", "Monday is out.", None),
        ("A large box is heavy.", "A big box is heavy.", None),  # no opposites
        ("Counting them gives six.", "Counting them gives 6.", []),
        ("Counting them gives six.", "Counting them gives 5.", [("six", "5")]),
        ("The bars are red, green and blue.", "The bars are blue, red, and green.", []),
        ("The chart has red, red and blue bars.", "The chart has red, green and blue bars.", [_LISTS[:2]]),
        ("The chart has red and blue bars.", "The chart has red, green and blue bars.", [_LISTS[2:0:-1]]),
        ("The day is wet and cold.", "The day is dry and cold.", [("wet and cold", "dry and cold")]),
        ("The day is wet and bright.", "The day is cold and loud.", None),  # of something else
        ("", "Insects have six legs.", None),
    ],
)
def test_details_that_exclude_each_other(text, known, found):
    assert replaced_details(text, known) == found


@pytest.mark.parametrize("text", ["5 is more than 3 if " * 1500, "1 2 " * 7000, "7 - 7 = 0 " * 3000, "a " * 15_000])
def test_a_long_text_takes_no_longer_for_it(text):
    started = time.process_time()
    wrong_arithmetic(text), calculates_again(text, text), replaced_details(text, text + "9"), clauses_of(text)
    assert time.process_time() - started < 5


def test_names_are_left_alone_where_others_may_be_meant():
    assert replaced_details("The shop is closed on Sunday.", "The shop is closed on Monday.", names=False) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The picture shows a dog.", [("dog", "cat")]),
        ("The picture shows a fire truck.", [("fire truck", "cat")]),
        ("The picture shows an animal.", None),  # the answer to another question
        ("The picture shows a mouse.", None),  # both were the answer once
        ("The picture shows a bat.", None),  # never an answer
    ],
)
def test_two_answers_to_one_question_exclude_each_other(text: str, found) -> None:
    asked = [
        ("What is it?", ["cat"]),
        ("what  is it?", ["Dog"]),
        ("What is it?", ["fire truck"]),
        ("What is it?", ["mouse"]),
        ("Which kind?", ["animal"]),
        ("Which kind?", ["vehicle"]),
        ("What is in it?", ["cat", "mouse"]),
    ]
    known = "The picture shows a cat."
    assert replaced_details(text, known, alternatives=Alternatives(asked)) == found
    scorer = ChainScorer.fit(asked=asked)
    context = ChainContext(instruction="What is it?", reference_steps=[known, "Conclusion: cat."])
    contradicted = "where 'cat' is known" in str(scorer.score([text, "Conclusion: cat."], context)["reasons"])
    assert contradicted == (found is not None)


KINDS = [("What is drawn here?", ["shrimp"]), ("What is drawn here?", ["sandal"]), ("How many?", ["3"])]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "step 2 says 'sandal', and the answer is 'shrimp'"),
        ({"answer": frozenset(["boat"])}, ""),  # nobody has said that the two exclude each other
        ({"answer": frozenset(["shrimp"])}, ""),
        ({"gold_answer": frozenset()}, ""),
        ({"instruction": "Is it a sandal or a shrimp?"}, ""),
        ({"reference_steps": ("A sandal has no legs, and this has.", "So a shrimp is drawn.")}, ""),
    ],
)
def test_a_step_that_names_a_wrong_answer_is_false_in_whatever_words(changes, reason):
    """A gold chain that says it in other words cannot be compared with word by word."""
    known = {
        "instruction": "What is drawn here?",
        "answer": frozenset(["sandal"]),
        "gold_answer": frozenset(["shrimp"]),
        "reference_steps": ("The shape is that of a shrimp.", "It has many legs."),
        **changes,
    }
    scorer = ChainScorer.fit(asked=KINDS)
    scores = scorer.score(["It has many legs.", "It must be a sandal."], ChainContext(**known))
    found = [each for each in scores["reasons"] if "and the answer is" in each]
    assert found == ([reason] if reason else [])
    assert not reason or scores["reasoning_consistency"] == 0


@pytest.mark.parametrize(
    ("conclusion", "answer", "agrees"),
    [
        ("Conclusion: 6.", "six", 1.0),
        ("Conclusion: there are six of them.", "6", 1.0),
        ("Conclusion: there are six of them.", "5", 0.0),
        ("Conclusion: the tallest bar is red.", "blue", 0.0),
        ("There are six of them.", "6", None),  # no conclusion
    ],
)
def test_a_conclusion_names_the_answer_behind_it(conclusion: str, answer: str, agrees: float | None) -> None:
    context = ChainContext(instruction="How many bars?", answer={answer}, gold_answer={"6"})
    parts = ChainScorer.fit().score(["The bars are counted.", conclusion], context)["parts"]
    assert parts.get("conclusion_agrees") == agrees


def test_a_count_in_words_leads_to_the_number() -> None:
    gold = ("The picture shows a row of bars.", "Counting them gives six.", "Conclusion: 6")
    context = ChainContext(instruction="How many bars?", reference_steps=gold, answer={"6"}, gold_answer={"6"})
    in_digits = (gold[0], "Counting them gives 6.", gold[2])
    for steps in (gold, in_digits):
        scores = ChainScorer.fit().score(steps, context)
        assert scores["reasons"] == [] and scores["parts"]["conclusion_follows"] == 1.0
        assert scores["reasoning_consistency"] == 1.0 and scores["step_completeness"] > 0.9


def test_a_planted_detail_is_told_and_what_is_given_is_not():
    gold = ("Insects have six legs.", "Lea counted more than that on her animal.", "Conclusion: a spider.")
    context = ChainContext(
        instruction="Is it an insect or a spider?",
        reference_steps=gold,
        answer=frozenset({"spider"}),
        gold_answer=frozenset({"spider"}),
    )
    scorer = ChainScorer.fit()
    assert scorer.score(gold, context)["reasons"] == []
    planted = scorer.score(["Insects have eight legs.", *gold[1:]], context)
    assert planted["reasons"] == ["step 1 says 'eight' where 'six' is known: 'Insects have six legs.'"]
    assert planted["reasoning_consistency"] == 0


def test_a_denial_reaches_the_clause_behind_it():
    for denial in ("It is not true that if it rains, the road is wet.", "It is not true that just this case fits."):
        assert clauses_of(denial)[0].negated, denial
    free = clauses_of("It is not the one for this, although it dives well.")
    assert not free[-1].negated  # nothing that follows is denied


@pytest.mark.parametrize("text", ["The leak may come from the pipe.", "It is lack of light, thirst or cold."])
def test_what_is_only_possible_is_not_stated(text):
    assert all(clause.supposed for clause in clauses_of(text))


def test_names_are_like_no_other_name():
    reading = Reading(["We meet on Monday in a big hall.", "They meet on Tuesday in a large hall."], Rarity())
    place = {word: number for number, word in enumerate(reading.words)}
    assert reading.alike[place["monday"], place["tuesday"]] == 0 < reading.alike[place["big"], place["larg"]]


def test_a_text_that_only_holds_the_words_grants_nothing():
    gold = ("April has 30 days.", "So 30 - 20 = 10 days of the loan fall in April.", "Conclusion: 10 days.")
    context = ChainContext(
        instruction="How many days of the loan fall in April?",
        reference_steps=gold,
        answer=frozenset({"10 days"}),
        gold_answer=frozenset({"10 days"}),
    )
    denied = ChainScorer.fit().score(["It is not true that April has 30 days.", *gold[1:]], context)
    assert denied["reasons"][0] == "step 1 contradicts what is given: 'April has 30 days.'"


def test_a_conclusion_before_its_reasons_leads_to_less():
    steps = ["The pad keeps the glass warm.", "Water only dims glass that is cold.", "Therefore the glass stays clear."]
    context = ChainContext(
        instruction="Why does the glass stay clear?",
        reference_steps=tuple(steps),
        answer=frozenset({"clear glass"}),
        gold_answer=frozenset({"clear glass"}),
    )
    scorer = ChainScorer.fit()
    in_order, early = (scorer.score(order, context) for order in (steps, [steps[0], steps[2], steps[1]]))
    assert early["parts"]["conclusion_follows"] < in_order["parts"]["conclusion_follows"]
    assert early["logical_flow_score"] < in_order["logical_flow_score"]


def test_an_answer_that_is_worked_out_in_the_conclusion_follows_from_its_other_words():
    steps = ["Heating the oven takes 20 minutes.", "The bird goes in at 17:15.", "So switch the oven on at 16:55."]
    context = ChainContext(
        instruction="When has the oven to be switched on?",
        reference_steps=tuple(steps),
        answer=frozenset({"16:55"}),
        gold_answer=frozenset({"16:55"}),
    )
    scorer = ChainScorer.fit()
    alone = dataclasses.replace(context, reference_steps=())
    assert 0 < scorer.score(steps, alone)["parts"]["conclusion_follows"] <= 0.5
    assert scorer.score(steps, context)["parts"]["conclusion_follows"] == 1  # as clearly as the gold chain's
    for known in (context, alone):
        wrong = dataclasses.replace(known, answer=frozenset({"17:10"}))
        assert scorer.score([*steps[:2], "Conclusion: 17:10."], wrong)["parts"]["conclusion_follows"] == 0

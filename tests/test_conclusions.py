"""Which candidates a conclusion gives as its answer."""

from __future__ import annotations

import pytest

from embervlm.curate.chain_checks import ChainJob, check_chain
from embervlm.judge.metrics import ChainScorer
from embervlm.judge.reading import ChainContext
from embervlm.words.claims import concluded_names, conclusion_fault, is_conclusion

NAMES = frozenset(("yes", "no", "yellow", "red", "circle", "3"))
"""The answers of all kinds of questions together, as `--domain none` finds them in the data."""


@pytest.mark.parametrize(
    ("conclusion", "answer", "names"),
    [
        ("A yellow shape is absent, so the answer is no.", "no", "no"),
        ("A yellow shape is absent, so the answer is no.", "yes", "no"),
        ("The circle is yellow. Answer: yellow", "yellow", "yellow"),
        ("So the right answer here is: red, as the circle is red.", "red", "red circle"),
        ("Among the yellow and the red ones, the answer is 3.", "3", "3"),
        ("A yellow circle is there, so yes.", "yes", "yes"),
        ("There is no doubt that it is red.", "red", "red"),
        ("A yellow circle is there, so yes.", "no", "yes"),
        ("Yes, there is no red one.", "yes", "yes"),
        ("Conclusion: No, the yellow one is there.", "yes", "no"),
        ("Red, because yellow is taken.", "red", "red"),
        ("Because yellow is taken, red", "red", "red"),
        ("Red and yellow, so that both are there.", "red", "red yellow"),
        ("Red and yellow.", "red", "red yellow"),
        ("The answer is not known, so red.", "red", "red"),
        ("It is a boat.", "red", ""),
    ],
)
def test_what_stands_behind_the_answer_is_counts_and_yes_or_no_beside_other_names(conclusion, answer, names) -> None:
    assert concluded_names(conclusion, NAMES, [answer]) == frozenset(names.split())


@pytest.mark.parametrize(
    ("conclusion", "names"),
    [
        ("A penguin cannot fly, so B", "B"),
        ("A penguin or D", "D"),
        ("A bird", "A"),
        ("A and B fit.", "A B"),
        ("B, because A and C are smaller", "B"),
        ("The answer is B. A bird of prey", "B"),
        ("The answer cannot be A, C or D, so B.", "B"),
        ("It isn't A but B.", "B"),
        ("A is not the one, B is", "A B"),
    ],
)
def test_an_article_is_no_choice_where_another_one_is_named(conclusion, names) -> None:
    assert concluded_names(conclusion, "ABCD", ["B"]) == frozenset(names.split())


def test_a_step_that_excludes_an_answer_is_no_conclusion() -> None:
    assert not is_conclusion("The answer is not A, since A is the smallest.")
    assert is_conclusion("The answer is A.")


def test_a_conclusion_that_says_what_it_compared_is_no_fault_and_another_answer_is() -> None:
    text = "Conclusion: A yellow shape is absent, so the answer is no."
    assert conclusion_fault(text, ["no"], NAMES) is None
    assert conclusion_fault(text, ["yes"], NAMES) == "names no, the answer is yes"


@pytest.mark.parametrize(("answer", "agrees"), [("no", 1.0), ("yes", 0.0)])
def test_the_judge_holds_a_conclusion_against_the_answer_and_not_against_the_gold_one(
    answer: str, agrees: float
) -> None:
    """`conclusion_agreement` was the accuracy, since every conclusion but the gold one named too much."""
    context = ChainContext(
        instruction="is a yellow shape present?",
        candidates=NAMES,
        reference_steps=(
            "The picture shows a yellow circle.",
            "Conclusion: A yellow shape is there, so the answer is yes.",
        ),
        answer=frozenset([answer]),
        gold_answer=frozenset(["yes"]),
    )
    steps = ["The picture shows a red circle.", "Conclusion: A yellow shape is absent, so the answer is no."]
    assert ChainScorer().score(steps, context)["parts"]["conclusion_agrees"] == agrees


@pytest.mark.parametrize(("answer", "found"), [("no", False), ("yes", True)])
def test_the_data_checks_call_no_right_conclusion_wrong(answer: str, found: bool) -> None:
    steps = ("The picture shows a red circle.", "Conclusion: A yellow shape is absent, so the answer is no.")
    job = ChainJob(
        instruction="is a yellow shape present?",
        steps=steps,
        facts=(),
        candidates=tuple(sorted(NAMES)),
        answer=(answer,),
        looking=frozenset(),
        is_pictured=True,
    )
    assert any(kind == "conclusion" for kind, *_ in check_chain(job, domains={})) is found

"""The judge of sums: right ones are never called wrong, wrong ones are found where the whole sum is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embervlm.judge.arithmetic import calculates_again, wrong_arithmetic
from embervlm.judge.metrics import ChainScorer
from embervlm.judge.reading import ChainContext

CHAINS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "arithmetic_chains.jsonl").read_text("utf-8").splitlines()
]
"""Everyday arithmetic, written for this test: each chain is right; `planted` is one step of it with a wrong sum."""
RIGHT = """
5 + 3 = 8 * 2 = 16|x + 3 = 8|2x = 10|Day 3 = 4 + 5 miles|three times 4 + 2 = 14|the sum of 3 and 4 + 2 = 9
half of 6 + 4 = 7|9 + 5 = 2 pm|2 dozen + 3 = 27|50 cents + 50 cents = $1|3:30 + 2 = 5:30|It is not 5 + 3 = 9.
5 + 3 = 9 is wrong|50 + 20% = 60|7 = 3 + 4|2 km + 500 m = 2500 m|$5k + 3 = 8|1,5 + 1,5 = 3|5 + 3 = 8 - x|3 * 20 = 1 hour
11/3 = 3 remainder 2|66.7% = 2/3|**5 + 3 = 8**|(5 + 3 = 8)|-5 * -3 = 15|3 + 4 = 7 - so he has 7|f(3) = 9 + 1|5 != 3 + 1
3 / 0 = 4|2 ** 9999999 = 3|((((5 + 3 = 8|5 + = 3|= = =|$ = %|A4 + 3 = 9|Page 7 + 2 = 4
3 tens + 4 ones = 34|5! = 120, 3! + 1 = 7|log(100) + 1 = 3|2 * 45 = 90 minutes = 1 hour 30 minutes|3 + 4i + 2 = 5 + 4i
36 inches / 12 = 3 feet|17 / 4 = 4.25|10% of the 50 students = 5 students|12 pm + 3 hours = 3 pm
1.2 million + 0.3 million = 1.5|20 - 3 * 4 = 20 - 12 = 8 left|1st + 2nd = 3 + 5 = 8
\u20ac1.200 + \u20ac300 = \u20ac1.500|12.500 km - 2.500 km = 10.000 km|3 * 1.000 = 3.000
It works 8 hours/day * 5 days/week = 40 hours/week.
8 m^2 + 12 m^2 = 20 m^2|8 m\u00b2 + 12 m\u00b2 = 20 m\u00b2|2 x + 3 = 7|7 = 3 + 2 x|2 x + 3 x = 10|x^2 + 3 = 7
\u22125 + 3 = \u22122
12 pm is earlier than 1 pm.|500 BC is earlier than 400 BC.|Is 2 + 3 = 6? No.
The sum of 3 and 4 is 7.|The difference between 4 and 9 is 5.|the difference of 4 and 9 is -5
The product of 3 and 5 is 15|The average of 2, 4, and 6 is 4
the average of 3 and 4 is 3.5|20% of $50 is $10.|20 percent of 50 students is 10
Half of 30 is 15.|half of 9 is about 5|a third of 10 is 3.33|Twice 8 is 16|The sum of 5 and 3 squared is 14
Half of 30 is 5 more than 10|20% of 50 is 5 less than 15.|The sum of 3 and 4 is 7 times larger|2 + half of 6 = 5
The sum of 1,000 and 2,500 is 3,500.|Is half of 30 is 16?|The sum of 3 apples and 4 apples is 7 apples
"""
WRONG = """
5 + 3 = 9|$1,200 + $300 = $1,600|20% of 50 = 15|15 / 60 = 30%|3 * 4 = 10 + 3 = 12|1/2 + 1/4 = 2/4|5² + 12² = 14²
2(5 + 3) = 17|10 \u2212 4 = 7|\u22123 + 5 = 3|3x4=13|3 boxes * 4 apples = 13 apples
48/2 = <<48/2=25>>25 clips|0.1 + 0.2 = 0.4
**5 + 3 = 9**|7 = 3 + 5|3 + 4 = 8 - so he has 8|100 / 7 = about 20|1/4 of 80 = 25|5 plus 3 equals 9
1.200 + 300 = 1.600|1.250 + 1.250 = 2.600
8 m^2 + 12 m^2 = 21 m^2|2 x + 3 x = 6 x|5 m + 3 m = 9|Right? No, 2 + 3 = 6.
The sum of 3 and 4 is 8.|The difference between 9 and 4 is 6.|The product of 3 and 5 is 16.|a quarter of 100 is 20
The average of 2, 4 and 6 is 5.|20% of 50 is 20.|So half of 30 is 16.|The sum of 3 apples and 4 apples is 8 apples
"""


def lines(text):
    return [part for line in text.strip().splitlines() for part in line.split("|")]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain['id']}-{chain['form']}")
def test_a_right_chain_of_everyday_arithmetic_raises_no_alarm_and_a_planted_wrong_sum_is_found(chain):
    assert [wrong_arithmetic(step) for step in chain["steps"]] == [None] * len(chain["steps"])
    assert wrong_arithmetic(chain["planted"][1])


def test_bars_around_a_number_are_no_end_of_a_sum():  # the lists above are split at bars
    assert wrong_arithmetic("|-5| - 2 + 4 = 7") is None


@pytest.mark.parametrize("text", lines(RIGHT))
def test_what_is_right_or_not_understood_as_a_whole_is_left_alone(text):
    assert wrong_arithmetic(text) is None


@pytest.mark.parametrize("text", lines(WRONG))
def test_a_sum_that_is_understood_and_does_not_come_out_is_named_as_it_stands(text):
    found = wrong_arithmetic(text)
    assert found and found in text


def test_the_whole_score_of_arithmetic_chains_falls_with_the_wrong_sum_alone():
    scorer = ChainScorer.fit()
    for chain in CHAINS[::4]:
        answer = frozenset([chain["answer"]])
        context = ChainContext(instruction=chain["instruction"], answer=answer, gold_answer=answer)
        at, wrong = chain["planted"]
        spoilt = [wrong if place == at else step for place, step in enumerate(chain["steps"])]
        assert scorer.score(chain["steps"], context)["reasoning_consistency"] > 0.3, chain["id"]
        assert scorer.score(spoilt, context)["reasoning_consistency"] == 0, chain["id"]


def test_a_text_of_signs_alone_is_judged_in_no_time():
    for text in ("1+" * 5_000 + "1 = 2", "(" * 5_000 + "= 1", "1 = " * 2_000, "3 of " * 2_000 + "= 2"):
        assert wrong_arithmetic(text) is None or "=" in text


def test_a_step_that_only_repeats_a_sum_is_seen_whatever_its_separators():
    assert calculates_again("So that is $1,200 + $300 = $1,500.", "1200 + 300 = 1500, as 1,200 and 1,500 say.")
    assert not calculates_again("1,200 + 400 = 1,600", "1,200 + 300 = 1,500")

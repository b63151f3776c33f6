"""What a step says again: by the rules the same words or claims, else what an earlier step says in other words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embervlm.judge.arithmetic import calculates_again
from embervlm.judge.reading import ANSWER, FAULT, FIRST_STEP, QUESTION, ChainReading, Fault, ReadStep
from embervlm.words.wording import ramp

SAME_WORDS_JACCARD = 0.9
REDUNDANT = (0.52, 0.75)
"""Similarity to an earlier step that entails this one: below the first the step is new, from the second it is not."""
ADDS = (0.05, 0.25)
"""Share of a step's words that an earlier one lacks and the rest of the chain or the question has."""


def repetition(step: ReadStep, earlier: Sequence[ReadStep]) -> str | None:
    """The rule: the same words in order, or the same claims in almost the same words. The first conclusion is free."""
    if step.concludes and not any(other.concludes for other in earlier):
        return None
    words, claims = set(step.words), set(step.claims)
    for number, other in enumerate(earlier, 1):
        if step.words == other.words:
            return f"repeats step {number}"
        shared = len(words.intersection(other.words))
        if shared and claims == set(other.claims) and shared >= SAME_WORDS_JACCARD * len(words.union(other.words)):
            return f"says the same as step {number}"
    return None


def redundancy(reading: ChainReading, j: int) -> Fault:
    """The rule, else how sure an earlier step entails step j, resembles it, and leaves nothing for it to add."""
    step, earlier = reading.steps[j], reading.steps[:j]
    if reason := repetition(step, earlier):
        return Fault(1.0, reason)
    if not earlier or (step.concludes and not any(other.concludes for other in earlier)):
        return Fault()
    scores = ramp(reading.similarity[:j, j], *REDUNDANT)
    for i in np.flatnonzero(scores):
        if not calculates_again(step.text, earlier[i].text):  # the result is what it says, whatever else it names
            claims_more = not set(step.claims) <= set(earlier[i].claims) or _opposed(reading, j, int(i))
            scores[i] *= 0.0 if claims_more else reading.entails[i, j] * (1 - _adds(reading, j, int(i)))
    best = int(scores.argmax())
    sure = float(scores[best])
    return Fault(sure, f"says the same as step {best + 1}" if sure >= FAULT else "")


def _opposed(reading: ChainReading, j: int, i: int) -> bool:
    """Whether one step has a word and the other its opposite: "the left one is 8", "the right one is 8"."""
    mine, other = set(reading.places(j)), set(reading.places(i))
    return any({a, b} <= mine ^ other and (a in mine) != (b in mine) for a, b in reading.words.opposites)


def _adds(reading: ChainReading, j: int, i: int) -> float:
    """How sure step j speaks of something that step i does not, and that the question or other steps name.

    Words of a mere paraphrase are new to the whole chain.
    """
    words, places = reading.words, reading.places(j)
    if not places:
        return 0.0
    own = reading.steps[j].words
    # A repeat of j makes nothing new, unless it is the conclusion.
    others = [n for n, step in enumerate(reading.steps) if n != i and n != j and (step.words != own or step.concludes)]
    elsewhere = np.zeros(len(words.words), dtype=bool)
    for row in (QUESTION, ANSWER, *(FIRST_STEP + n for n in others)):
        elsewhere[words.text_places[row]] = True
    new = (1 - words.text_cover[2][places, FIRST_STEP + i]) * elsewhere[places]
    return float(ramp(new @ words.weights[places] / words.weights[places].sum(), *ADDS))

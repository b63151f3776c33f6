"""How complete a chain is: its types of steps, its grounds, the facts and the gold chain."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

from embervlm.judge.reading import ANSWER, FIRST_STEP, KNOWN, QUESTION, ChainContext, ChainReading, ReadStep, read_steps
from embervlm.words.chain_text import STEP_TYPES
from embervlm.words.claims import all_words, content_words, is_conclusion, named_candidates
from embervlm.words.english import REASON_WORDS, any_of
from embervlm.words.wording import clauses_of, ramp

MIN_WORDS_OF_A_TYPE = 4
MIN_SHARED_NAMES = 0.5
MIN_TOKEN_F1 = 0.6
SAME_STEP = (0.35, 0.7)
"""Likeness of a step to one of the gold chain: below the first another step, from the second the same."""
_TYPE_KEYWORDS = {
    "problem_analysis": re.compile(
        r"\b(?:analy[sz]\w*|identif\w*|understand\w*|task|job|problem|question|goal|asks?|asked|requires?|requirements?"
        r"|needs?|needed|given|involves?|observ\w*|shows?)\b"
    ),
    "constraint_checking": re.compile(
        rf"{any_of(*REASON_WORDS, 'so', 'unless', 'if')}|\b(?:constraints?|limit\w*|conditions?|cannot|can't|must|only"
        r"|unable|able|too|enough|capab\w*|evaluat\w*|check\w*|verif\w*|requires?|depends?|safe\w*|risks?)\b"
    ),
    "solution_selection": re.compile(
        r"\b(?:select\w*|choos\w*|choice|chosen|best|better|suit\w*|unsuit\w*|fits?|options?|alternatives?|compar\w*"
        r"|consider\w*|combin\w*|prefer\w*|therefore|hence|solution|yes|no|works?)\b"
    ),
}


def identify_step_types(steps: Sequence[str]) -> list[frozenset[str]]:
    """The `STEP_TYPES` each step could be: it has a key word of the type and at least 4 content words.

    A conclusion is told by its beginning, may be shorter, and is nothing else. The guide's function of this name
    gives one flat list; a step that fits several types must still fill only one, so they are kept per step.
    """
    return [_possible_types(step) for step in steps]


@lru_cache(maxsize=1 << 16)
def _possible_types(step: str) -> frozenset[str]:
    if is_conclusion(step):
        return frozenset({"conclusion"}) if content_words(step) else frozenset()
    if len(content_words(step)) < MIN_WORDS_OF_A_TYPE:
        return frozenset()
    text = " ".join(all_words(step))
    return frozenset(name for name, pattern in _TYPE_KEYWORDS.items() if pattern.search(text))


def matched(fits: NDArray[np.generic]) -> list[tuple[int, int]]:
    """(row, column) of the best one-to-one matching (Kuhn 1955), without pairs that do not fit at all."""
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns) if fits[row, column]]


def reference_coverage(steps: Sequence[ReadStep], context: ChainContext) -> dict[str, float]:
    """Type of the gold chain's steps -> share of them that one of `steps` fills, each one of them."""
    golds = read_steps(context.reference_steps, context)
    fits = np.array([[_fills(step, gold, context) for step in steps] for gold in golds])
    slots, filled = Counter(context.step_types), Counter(context.step_types[row] for row, _ in matched(fits))
    return {name: filled[name] / count for name, count in slots.items()}


def _fills(step: ReadStep, gold: ReadStep, context: ChainContext) -> bool:
    if step.concludes or gold.concludes:
        candidates = context.all_candidates
        both = step.concludes and gold.concludes
        return both and (not candidates or bool(named_candidates(step.text, candidates)))
    names, wanted = ({claim.name for claim in each.claims} for each in (step, gold))
    if wanted and len(names & wanted) >= MIN_SHARED_NAMES * len(wanted):
        return True
    shared = (Counter(step.words) & Counter(gold.words)).total()
    return 2 * shared >= MIN_TOKEN_F1 * (len(step.words) + len(gold.words))


def type_coverage(reading: ChainReading, usable: Sequence[int], ends: int | None) -> dict[str, float]:
    """Each of `STEP_TYPES` -> 1 where one of the steps `usable` is it, else 0; each step is one type at most."""
    fits = np.array([[name in _types(reading, j, j == ends) for j in usable] for name in STEP_TYPES])
    found = {row for row, _ in matched(fits)}
    return {name: float(row in found) for row, name in enumerate(STEP_TYPES)}


def _types(reading: ChainReading, j: int, ends: bool) -> set[str]:
    """Types that step j could be; `ends`: it is the conclusion."""
    if ends:
        return {"conclusion"}
    text, row, share = reading.steps[j].text, FIRST_STEP + j, reading.words.text_cover[0]
    types = set(_possible_types(text))
    if len(reading.places(j)) >= MIN_WORDS_OF_A_TYPE:
        if max(share[QUESTION, row], share[KNOWN, row]) >= 0.25:
            types.add("problem_analysis")
        if any(clause.negated or clause.is_result for clause in clauses_of(text)):
            types.add("constraint_checking")
        if reading.words.text_places[ANSWER] and share[row, ANSWER] >= 0.5:
            types.add("solution_selection")
    return types


def gold_coverage(reading: ChainReading, usable: Sequence[int]) -> float:
    """How much of the gold chain is said, one step for each of its steps."""
    likeness = reading.likeness_to_gold[:, list(usable)]
    return float(sum(ramp(likeness[pair], *SAME_STEP) for pair in matched(likeness)) / len(likeness))


def gold_order(reading: ChainReading) -> NDArray[np.float64] | None:
    """`[step, step]` from -1 to 1: how sure the gold chain has the row's step before the column's; None without one."""
    likeness = reading.likeness_to_gold
    if not likeness.size:
        return None
    place, sure = np.zeros(len(reading.steps)), np.zeros(len(reading.steps))
    for row, column in matched(likeness):
        place[column], sure[column] = row, ramp(likeness[row, column], *SAME_STEP)
    return np.asarray(np.sign(place[None, :] - place[:, None]) * np.outer(sure, sure))


def grounds(reading: ChainReading, sound: Sequence[float], usable: Sequence[int], ends: int | None) -> float:
    """1 - 0.5^k for the k sound steps on which the conclusion builds, directly or by way of others.

    A step builds on another that has one of its words, or a synonym.
    """
    words = reading.words
    said = np.zeros((len(reading.steps) + 1, len(words.words)), dtype=np.float32)
    for row, places in enumerate([words.text_places[ANSWER], *words.text_places[FIRST_STEP : reading.end]]):
        said[row, places] = 1
    linked = said @ (words.alike >= 0.8) @ said.T > 0
    reached = {0} if ends is None else {0, ends + 1}
    new = reached
    while new:
        new = {j + 1 for j in usable if linked[list(new), j + 1].any()} - reached
        reached = reached | new
    return float(1 - 0.5 ** sum(sound[row - 1] for row in reached if row and row - 1 != ends))


def fact_coverage(steps: Sequence[ReadStep], context: ChainContext) -> float:
    """Share of the known facts that one of `steps` claims or says."""
    claimed = {claim.name for step in steps for claim in step.claims}
    words = {word for step in steps for word in all_words(step.text)}
    said = [
        name in claimed or set(all_words(f"{name} {value}".replace("_", " "))) <= words
        for name, value in context.facts.items()
    ]
    stems = [_stems(step.text) for step in steps]
    for wanted in map(_stems, context.statements):
        best = max((len(wanted & step) / len(wanted) for step in stems), default=0.0) if wanted else 1.0
        said.append(best >= MIN_TOKEN_F1)
    return float(np.mean(said))


def _stems(text: str) -> set[str]:
    return {word for clause in clauses_of(text) for word in clause.words}

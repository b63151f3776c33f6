"""Whether the conclusion names the answer, and whether the steps before it lead there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from embervlm.judge.reading import ANSWER, FAULT, FIRST_STEP, ChainContext, ChainReading
from embervlm.words.claims import all_words, concluded_names, conclusion_fault
from embervlm.words.english import POLAR
from embervlm.words.numbers import in_digits
from embervlm.words.open_answers import same_answers
from embervlm.words.wording import clauses_of

FADING = 0.7
"""What the step before counts, compared with the one after it."""
BESIDE_THE_CHAIN = 0.7
"""What an answer gets that stands beside the chain, not in it."""


def final_answer_accuracy(predicted: Collection[str], gold: Collection[str], *, is_open: bool = False) -> float:
    """1.0 when both sets are equal, ignoring case and surrounding blanks; else 0.0.

    The guide compares with ==; its answers are lists, whose order carries no meaning here.
    Args:
        is_open: the answers are free words, of which "3" and "three" are the same; see `same_answers`.
    """
    return float(same_answers(predicted, gold) if is_open else _as_set(predicted) == _as_set(gold))


def _as_set(names: Iterable[str]) -> frozenset[str]:
    names = [names] if isinstance(names, str) else names
    return frozenset(name.strip().casefold() for name in names)


def is_gold(answer: Collection[str], context: ChainContext) -> float:
    """Whether `answer` is the gold one; without candidates as free words."""
    return final_answer_accuracy(answer, context.gold_answer, is_open=not context.candidates)


def conclusion_of(reading: ChainReading) -> int | None:
    """The last step that is written as a conclusion, else the last step where it names the answer, else the last
    one that follows from something ("so", "therefore") and names it.
    """
    steps, context = reading.steps, reading.context
    marked = [j for j, step in enumerate(steps) if step.concludes]
    if marked or not steps or not context.answer:
        return marked[-1] if marked else None
    results = [j for j, step in enumerate(steps) if any(clause.is_result for clause in clauses_of(step.text))]
    tried = [len(steps) - 1, *reversed(results)]
    return next((j for j in tried if names_answer(steps[j].text, context)), None)


def names_answer(text: str, context: ChainContext) -> bool:
    """Whether `text` names exactly the answer; without one whatever it names."""
    answer = _as_set(context.answer)
    if not answer:
        return True
    if context.gold_answer and text in context.reference_steps[-1:]:
        return bool(is_gold(answer, context))
    if named := concluded_names(text, context.all_candidates, context.answer):
        return bool(final_answer_accuracy(named, context.answer, is_open=not context.candidates))
    words, wanted = _said(text), {word for name in answer for word in _said(name)}
    if answer < POLAR and (clauses := clauses_of(text)) and not wanted & words:
        return clauses[-1].negated == (answer <= {"no", "false"})  # "No", and "it does not"
    return bool(wanted) and wanted <= words


def _said(text: str) -> set[str]:
    """Words of `text`, number words as numbers."""
    return set(map(in_digits, all_words(text)))


def wrong_conclusion(reading: ChainReading, ends: int | None) -> str:
    """What is wrong where the conclusion names another answer; empty where nothing is."""
    if ends is None or not reading.steps[ends].concludes:
        return ""
    text, context = reading.steps[ends].text, reading.context
    if names_answer(text, context):
        return ""
    fault = conclusion_fault(text, context.answer, context.all_candidates)
    return f"concludes otherwise: it {fault or 'does not name the answer'}"


def conclusion_follows(reading: ChainReading, ends: int | None, strongest: float) -> float:
    """Whether the conclusion names the answer, and the earlier steps lead to it.

    Where steps call candidates suitable or not: 1 when these are the ones named, and all were judged before. Else
    how clearly the steps speak for what is named, the later the more. 0 where the answer is known to be another,
    though no step contradicts the facts: from true steps nothing false follows.
    Args:
        ends: index of the conclusion.
        strongest: how sure the surest contradiction of the chain is.
    """
    context = reading.context
    if not context.answer if ends is None else not names_answer(reading.steps[ends].text, context):
        return 0.0
    if context.gold_answer and context.answer and not is_gold(context.answer, context) and strongest < FAULT:
        return 0.0
    stated = _by_verdicts(reading, len(reading.steps) if ends is None else ends)
    if stated is not None:
        return stated
    return _leads_to(reading, ends) * (BESIDE_THE_CHAIN if ends is None else 1)


def _by_verdicts(reading: ChainReading, last: int) -> float | None:
    """Whether the steps call exactly the answer suitable, all up to step `last`; None where they call nothing so."""
    context = reading.context
    verdicts: dict[str, bool] = {}
    for j, step in enumerate(reading.steps):
        for claim in step.claims if not step.concludes else ():
            if claim.name in context.verdict_names:
                if j > last and claim.name not in verdicts:
                    return 0.0  # concluded before this candidate was judged
                verdicts[claim.name] = context.says_suitable(claim.value) != claim.negated
    if not verdicts:
        return None
    return float(_as_set(name for name, suitable in verdicts.items() if suitable) == _as_set(context.answer))


def _leads_to(reading: ChainReading, ends: int | None) -> float:
    """From 0 to 1: half for the step that speaks most for it, half for all that is said of it.

    What comes only after the conclusion led to nothing.
    """
    if context_free(reading.context.answer):
        return 1.0
    size = len(reading.steps)
    before = size if ends is None else ends
    answer, concluded = reading.words.text_places[ANSWER], [] if ends is None else reading.places(ends)
    # An answer that is worked out ("at 16:55") stands in no step before; what is said with it then has to.
    rest = [place for place in concluded if place not in answer]
    support = _spoken_for(reading, answer or concluded, before) or 0.5 * _spoken_for(reading, rest, before)
    return support if ends is None or not before else support * before / (size - 1)


def context_free(answer: Collection[str]) -> bool:
    """Yes, no, or a letter: an answer that no step can speak of."""
    names = _as_set(answer)
    return bool(names) and all(name in POLAR or (len(name) == 1 and name.isalpha()) for name in names)


def _spoken_for(reading: ChainReading, places: Sequence[int], before: int) -> float:
    """How clearly the first `before` steps say the words at `places`.

    Late steps count more, but not where the gold chain is known, which says more about the order.
    """
    if not places or not before:
        return 0.0
    words = reading.words
    weights = words.weights[places] / words.weights[places].sum()
    said = np.zeros(before)
    for j in range(before):
        for number in words.spans[FIRST_STEP + j]:
            hit = float(weights @ words.alike[np.ix_(places, words.places[number])].max(axis=1))
            if hit >= abs(said[j]):
                said[j] = -hit if words.clauses[number].negated else hit
    fading = (FADING if not reading.likeness_to_gold.size else 1.0) ** np.arange(before)[::-1]
    mean = max(0.0, float(fading @ said / fading.sum()))
    return float(np.clip(0.5 * max(0.0, said.max()) + 0.5 * mean**0.5, 0, 1))

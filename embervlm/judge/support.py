"""What a step stands on: words of the question, of the facts, of the answer and of other steps."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache

import numpy as np

from embervlm.judge.reading import ANSWER, FAULT, FIRST_STEP, QUESTION, ChainContext, ChainReading, Fault, ReadStep
from embervlm.words.claims import content_words
from embervlm.words.english import CONNECTIVES, any_of, sentences
from embervlm.words.wording import SYNONYM, Array, Reading, clauses_of, ramp

MIN_CONTEXT_SHARE = 0.5
"""With known facts, a step without claims needs this share of its content words in the context."""
SUPPORTED = (0.08, 0.30)
"""Share of a step's words that the question, the facts or other steps have too."""
SUPPORTED_WORDS = (0.6, 1.2)
"""Rarities of those words, the very same ones, added up: 1 is one word that few texts have."""
SUPPORTED_ANYHOW = (0.8, 1.0)
"""Share from which on it does not matter how rare they are."""
RELEVANT = (0.05, 0.35)
"""Share of the question that the chain speaks of."""


def known_words(context: ChainContext) -> set[str]:
    """Content words of the question, its facts and the gold chain."""
    facts = [text for fact in context.facts.items() for text in fact]
    texts = [context.instruction, *facts, *context.statements, *context.reference_steps]
    return {word for text in texts for word in content_words(text)}


def lack_of_support(step: ReadStep, known: Collection[str], context: ChainContext) -> str | None:
    """The rule: what a step without a true claim shares with the words `known` so far."""
    if not step.words:
        return "says nothing"
    if not known:  # a first step without any context: there is nothing to hold it against
        return None
    share = sum(word in known for word in step.words) / len(step.words)
    if context.facts:
        if reason := _claims_unknown(step, context):
            return reason
        if not step.claims and not step.concludes:
            few = share < MIN_CONTEXT_SHARE
            return f"only {share:.0%} of its words occur in the question, the facts or earlier steps" if few else None
    if share or any(context.facts.get(claim.name) == claim.value for claim in step.claims):
        return None
    return "shares no word with the question, the facts or earlier steps"


def _claims_unknown(step: ReadStep, context: ChainContext) -> str | None:
    unknown = sorted({claim.name for claim in step.claims} - set(context.facts)) if context.facts else []
    return f"claims something about {', '.join(unknown)}, which this question does not have" if unknown else None


def lack_of_words(reading: ChainReading, j: int, supported: Array, anchor: float) -> Fault:
    """The rules about claims, else how sure step j shares hardly a word with anything around it.

    Args:
        supported: `[step]`, see `support`.
        anchor: how sure the chain speaks of the question at all, in [0, 1].
    """
    step, context = reading.steps[j], reading.context
    if not step.words:
        return Fault(1.0, "says nothing")
    if reason := _claims_unknown(step, context):
        return Fault(1.0, reason)
    if name := _told_otherwise(reading, j):
        return Fault(1.0, f"says something of {name} that is not known: it is {context.facts[name]}")
    if step.concludes or any(context.confirms(claim) or not context.facts for claim in step.claims):
        return Fault()
    sure = 1 - (1.0 if context.is_seen_alone else float(supported[j])) * anchor
    if sure < FAULT:
        return Fault(sure)
    if supported[j] < FAULT and not context.is_seen_alone:
        return Fault(sure, "shares hardly a word with the question, the facts or other steps")
    return Fault(sure, "belongs to a chain that does not speak of the question")


def support(reading: ChainReading) -> Array:
    """`[step]` how sure its words stand in the question, the facts, the answer or other steps.

    Of its words a share must, and more than one or two: "This is an interesting question" names the question.
    """
    words, end = reading.words, reading.end
    out = np.zeros(len(reading.steps), np.float32)
    for j in range(len(out)):
        if places := reading.places(j):
            said = np.delete(words.text_cover[2][places, :end], FIRST_STEP + j, axis=1).max(axis=1)
            share = words.weights[places] @ said / words.weights[places].sum()
            exact = words.english_weights[places] @ (said > SYNONYM)
            enough = max(ramp(exact, *SUPPORTED_WORDS), ramp(share, *SUPPORTED_ANYHOW))
            out[j] = ramp(share, *SUPPORTED) * enough
    return out


def relevance(reading: ChainReading) -> float:
    """How much of the question the chain speaks of, or of the chain the question; 1 where there is none."""
    words, rows = reading.words, reading.words.text_places[QUESTION]
    if not rows:
        return 1.0
    share, _, best = words.text_cover
    own = slice(FIRST_STEP, reading.end)
    said = best[:, own].max(axis=1, initial=0)
    weights = words.weights**3  # what tells this question from others, not what all of them say
    last = sorted({place for number in _asking(words) for place in words.places[number]}) or rows

    def spoken(places: list[int]) -> float:
        return float(weights[places] @ said[places] / weights[places].sum())

    of_steps = float(share[QUESTION, own].max(initial=0))
    return max(spoken([*rows, *last]), min(spoken(rows), spoken(last), of_steps))


def spoken_of_answer(reading: ChainReading) -> float:
    """How much of the answer the chain's steps before its end speak of; 0 where it has none."""
    share = reading.words.text_cover[0]
    return float(share[ANSWER, FIRST_STEP : reading.end - 1].max(initial=0))


def _asking(words: Reading) -> list[int]:
    """Clauses of the question's last sentence: where a long preamble ends and the task is told."""
    counts = [count for part in sentences(words.texts[QUESTION]) if (count := len(clauses_of(part)))]
    return list(words.spans[QUESTION])[-counts[-1] :] if counts else []


def _told_otherwise(reading: ChainReading, j: int) -> str | None:
    """The first known fact of which step j says, right after its name, what mostly stands nowhere else."""
    words, step = reading.words, reading.steps[j]
    claimed = {claim.name for claim in step.claims}
    elsewhere: set[str] = set()
    for name, value in reading.context.facts.items():
        if (
            name in claimed
            or value.casefold() in step.text.casefold()
            or not (match := _says_of(name).search(step.text))
        ):
            continue
        rows = [places for row, places in enumerate(words.text_places[: reading.end]) if row != FIRST_STEP + j]
        elsewhere = elsewhere or {words.words[place] for places in rows for place in places}
        stated = {word for clause in clauses_of(match[1]) for word in clause.words}
        if stated and 2 * len(stated - elsewhere) >= len(stated):
            return name
    return None


@lru_cache(maxsize=1 << 10)
def _says_of(name: str) -> re.Pattern[str]:
    """Matches "NAME is WORDS" up to the clause's end."""
    return re.compile(
        rf"(?<!\w){re.escape(name)}\s+(?:is|are|was|were)\s+([^,.;:!?]{{1,40}}?)"
        rf"(?=[,.;:!?]|\s+{any_of(*CONNECTIVES, 'and', 'or', 'which', 'for', 'to', 'than')}|$)",
        re.IGNORECASE,
    )

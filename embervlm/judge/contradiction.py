"""What a step denies: facts, other steps, what is given, or arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from embervlm.judge.arithmetic import wrong_arithmetic
from embervlm.judge.reading import FAULT, FIRST_STEP, ChainContext, ChainReading, Fault, ReadStep
from embervlm.judge.replaced import replaced_details
from embervlm.words.claims import Claim, all_words, content_words, named_candidates, statements
from embervlm.words.english import NEGATION, is_negation, is_number
from embervlm.words.numbers import in_digits
from embervlm.words.wording import Array, ramp

MIN_SHARED_OF_REPLACED = 0.3
"""Share of a step's words that a given text has, from which on the two are compared word by word."""
SAID_WHOLLY = (0.85, 0.95)
"""Share of a step that a given text says, which therefore is given as well."""
SAID_MOSTLY = (0.4, 0.6)
"""Share of that text which the step says: the words of a step may stand in a long text that says something else."""


def all_claims(step: ReadStep, context: ChainContext) -> list[Claim]:
    """What a step claims; a conclusion that names a candidate also claims that it is suitable."""
    if not step.concludes:
        return list(step.claims)
    domains = dict(context.reader.key)
    named = named_candidates(step.text, context.verdict_names) - {claim.name for claim in step.claims}
    values = [(name, value) for name in sorted(named) for value in domains[name] if context.says_suitable(value)]
    return [*step.claims, *(Claim(name, value) for name, value in values)]


def claims_contradict(claims: Sequence[Claim], earlier: Mapping[str, Claim], context: ChainContext) -> str | None:
    """The rule: a claim against the facts, or where they say nothing of it, against an earlier one of its name.

    A claim about a known fact is held against the fact alone, so a step that corrects an earlier mistake is sound.
    """
    within: dict[str, Claim] = {}
    for claim in claims:
        if _differ(claim, other := within.setdefault(claim.name, claim)):
            return f"says both '{other}' and '{claim}'"
        confirmed = context.confirms(claim)
        if confirmed is False:
            return f"says '{claim}', but {claim.name} is {context.facts[claim.name]}"
        if confirmed is None and claim.name in earlier and _differ(claim, earlier[claim.name]):
            return f"says '{claim}', but an earlier step says '{earlier[claim.name]}'"
    return None


def _differ(claim: Claim, other: Claim) -> bool:
    if claim.negated and other.negated:
        return False
    return (claim.value == other.value) == (claim.negated or other.negated)


def contradiction(reading: ChainReading, j: int, rule: str | None, earlier: Sequence[Fault], granted: Array) -> Fault:
    """The rule's finding, a wrong sum, a replaced detail, else how sure an earlier step or a given text denies step j.

    Args:
        earlier: this function's findings of the steps before.
        granted: `[step]`, see `granted_by_given`.
    """
    step, context = reading.steps[j], reading.context
    if rule:
        return Fault(1.0, rule)
    if wrong := wrong_arithmetic(step.text):
        return Fault(1.0, f"says '{wrong}', which does not come out")
    if step.concludes:  # whether it follows is a question of its own
        return Fault()
    if detail := _replaced(reading, j):
        return Fault(1.0, "says '{}' where '{}' is known: '{}'".format(*detail))
    if answers := _other_answer(step.text, context):
        return Fault(1.0, "says '{}', and the answer is '{}'".format(*answers))
    # What the facts confirm is right even where an earlier step, itself against the facts, said otherwise.
    checked = [found for claim in step.claims if (found := context.confirms(claim)) is not None]
    known = bool(checked) and all(checked)
    scores = [0.0 if known and earlier[i].sure >= FAULT else float(reading.opposes[i, j]) for i in range(j)]
    # What one given text says and another denies is a matter of wording: "it" is another thing in each.
    scores += [float(sure * (1 - granted[j])) for sure in reading.denied[::-1, j]]
    best = max(range(len(scores)), key=scores.__getitem__, default=0)
    sure = scores[best] if scores else 0.0
    if sure < FAULT:
        return Fault(sure)
    text = f"step {best + 1}" if best < j else f"what is given: '{_short(reading.given[j - 1 - best])}'"
    return Fault(sure, f"contradicts {text}")


def granted_by_given(reading: ChainReading) -> Array:
    """`[step]`: how sure one of the given texts says the step and does not deny it."""
    share = reading.words.text_cover[0]
    own, given = slice(FIRST_STEP, reading.end), slice(reading.end, reading.end + len(reading.given))
    said = ramp(share[given, own], *SAID_WHOLLY) * ramp(share[own, given].T, *SAID_MOSTLY)
    return (said * (1 - reading.denied)).max(axis=0, initial=0)  # type: ignore[no-any-return]


def _replaced(reading: ChainReading, j: int) -> tuple[str, str, str] | None:
    """A detail of step j, what is given or stands in the gold chain in its place, and where."""
    gold = set(reading.context.reference_steps)
    first: tuple[str, str, str] | None = None
    for text, shared in zip(reading.given, reading.words.text_words_shared[reading.end :, FIRST_STEP + j]):
        if shared < MIN_SHARED_OF_REPLACED:
            continue
        names = text in gold  # else not all names may be given
        alternatives = reading.context.alternatives
        found = replaced_details(reading.steps[j].text, text, names=names, alternatives=alternatives)
        if found == []:
            return None  # it is given
        if found and first is None:
            first = (*found[0], _short(text))
    return first


def _other_answer(text: str, context: ChainContext) -> tuple[str, str] | None:
    """The chain's answer and the gold one, where these exclude each other and a step names the first alone.

    "It must be a sandal." is false of a shrimp, whatever words the gold chain has for it. Numbers, letters and yes or
    no may stand in a step for something else, and so may what the question or the gold chain name.
    """
    if len(context.answer) != 1 or len(context.gold_answer) != 1:
        return None
    ours, gold = (" ".join(name.casefold().split()) for (name,) in (context.answer, context.gold_answer))
    if not context.alternatives.exclude(ours, gold) or not set(ours.split()) - {"yes", "no"} or len(ours) < 3:
        return None
    if is_number(in_digits(ours)) or NEGATION.search(text) or _names(text, gold) or not _names(text, ours):
        return None
    told = (context.instruction, *context.reference_steps)
    return None if any(_names(each, ours) for each in told) else (ours, gold)


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.casefold()) is not None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


_PERSONS = frozenset("i you he she we they this that these those".split())
"""Words that point to one thing and not to another, and are no content words."""


def opposite_steps(steps: Sequence[str]) -> tuple[int, int] | None:
    """The first two steps, counted from 1, of which one says a sentence of the other with a "not" in it; else None.

    Needs neither facts nor domains: "The wall is too high." and "The wall is not too high." in any subject.
    """
    text = "\n".join(steps).casefold()
    if not NEGATION.search(text):
        return None
    said: dict[tuple[str, ...], list[tuple[int, bool, frozenset[str]]]] = {}
    for number, step in enumerate(steps, 1):
        for statement in statements(step):
            words = content_words(statement)
            bare = tuple(word for word in words if not (is_negation(word) or word == "without"))
            if len(bare) < 2 or statement.endswith("?"):
                continue
            negated = (len(words) - len(bare)) % 2 == 1
            persons = frozenset(all_words(statement)) & _PERSONS
            for first, other, others in said.setdefault(bare, []):
                # "She likes it" and "He does not like it" may both be true.
                if other != negated and (persons == others or not persons or not others):
                    return first, number
            said[bare].append((number, negated, persons))
    return None

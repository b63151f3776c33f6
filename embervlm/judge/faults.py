"""The faults of the steps of a chain, and what is known about the question that it answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from embervlm.words.claims import (
    NEGATION,
    SENTENCE_END,
    Claim,
    ClaimReader,
    content_words,
    is_conclusion,
    named_candidates,
)

SUITABLE_VALUES = frozenset({"yes", "suited", "suitable", "true"})
"""Values with which a chain says 'this candidate fits'; `ChainContext.suitable_values` overrides them."""


MIN_CONTEXT_SHARE = 0.5
"""With known facts, a step without claims needs this share of its content words in the context."""


SAME_WORDS_JACCARD = 0.9


@dataclass(frozen=True, kw_only=True)
class ChainContext:
    """What is known about the question a chain answers. Everything may be empty; then less can be checked."""

    instruction: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fact name -> true value, for all that a correct chain may claim; {} when nothing is known."""
    statements: Sequence[str] = ()
    """Facts that are sentences."""
    domains: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Fact name -> every value seen over the data set."""
    reference_steps: Sequence[str] = ()
    """Gold chain."""
    step_types: Sequence[str] = ()
    """Type of each of `reference_steps`."""
    answer: Collection[str] = frozenset()
    """Predicted set."""
    gold_answer: Collection[str] = frozenset()
    candidates: Collection[str] = frozenset()
    """Names an answer can hold. Empty: every name of `domains` with two values, one of `suitable_values`."""
    suitable_values: Collection[str] = SUITABLE_VALUES
    """Values with which a step says that a candidate fits."""

    def __post_init__(self) -> None:
        if self.step_types and len(self.step_types) != len(self.reference_steps):
            raise ValueError(f"{len(self.step_types)} step_types for {len(self.reference_steps)} reference_steps")

    @cached_property
    def reader(self) -> ClaimReader:
        """Reads the names of `domains` and `facts`."""
        domains = {name: frozenset(values) for name, values in self.domains.items()}
        unusual = {name: value for name, value in self.facts.items() if value not in domains.get(name, ())}
        domains |= {name: domains.get(name, frozenset()) | {value} for name, value in unusual.items()}
        return ClaimReader.of(domains, frozenset(name for name in self.facts if name not in self.domains))

    @cached_property
    def verdict_names(self) -> frozenset[str]:
        """Candidates that a step can call suitable or not: names with two values, one of `suitable_values`."""
        names = _verdict_names(self.reader.key, frozenset(self.suitable_values))
        return names & set(self.candidates) if self.candidates else names

    @cached_property
    def all_candidates(self) -> frozenset[str]:
        return self.verdict_names | set(self.candidates) | set(self.answer) | set(self.gold_answer)


@dataclass(frozen=True)
class StepFaults:
    """Why a step does not count; None where it has no such fault."""

    redundant: str | None = None
    contradicted: str | None = None
    unsupported: str | None = None

    @property
    def any(self) -> bool:
        return bool(self.redundant or self.contradicted or self.unsupported)


def judge_steps(steps: Sequence[str], context: ChainContext) -> list[StepFaults]:
    """Faults of each step; the rules are those of `embervlm.judge.metrics.reasoning_consistency`.

    A claim about a known fact is held against the fact alone, so a step that corrects an earlier mistake is sound.
    Only sound steps become context for later ones, so a chain about something else does not support itself.
    """
    reader = context.reader
    known_words = set(content_words(context.instruction))
    for name, value in context.facts.items():
        known_words.update(content_words(name), content_words(value))
    for step in (*context.statements, *context.reference_steps):
        known_words.update(content_words(step))
    claimed: dict[str, Claim] = {}
    earlier: list[tuple[tuple[str, ...], frozenset[str], frozenset[Claim]]] = []
    concluded = False
    faults = []
    for step in steps:
        words, claims, concludes = content_words(step), list(reader.read(step)), is_conclusion(step)
        said = (words, frozenset(words), frozenset(claims))
        redundant = None if concludes and not concluded else _repetition(said, earlier)
        if concludes:
            made = {claim.name for claim in claims}
            claims += _implied_claims(step, context, exclude=made)
        contradicted = _contradiction(claims, claimed, context)
        if not words:
            unsupported: str | None = "says nothing"
        elif not known_words:  # a first step without any context: there is nothing to hold it against
            unsupported = None
        else:
            unsupported = _lack_of_support(said, concludes, known_words, context)
        fault = StepFaults(redundant, contradicted, unsupported)
        faults.append(fault)
        if not (contradicted or unsupported):
            known_words.update(words)
        for claim in claims:
            claimed.setdefault(claim.name, claim)
        earlier.append(said)
        concluded = concluded or concludes
    return faults


def opposite_steps(steps: Sequence[str]) -> tuple[int, int] | None:
    """The first two steps, counted from 1, of which one says a sentence of the other with a "not" in it; else None.

    Needs neither facts nor domains: "The wall is too high." and "The wall is not too high." in any subject.
    """
    text = "\n".join(steps).casefold()
    if not (NEGATION.search(text) or "cannot" in text):
        return None
    said: dict[tuple[str, ...], tuple[int, bool]] = {}
    for number, step in enumerate(steps, 1):
        for sentence in SENTENCE_END.split(step):
            words = content_words(sentence)
            bare = tuple(word for word in words if not _is_negation(word))
            if len(bare) < 2 or sentence.rstrip().endswith("?"):
                continue
            negated = (len(words) - len(bare)) % 2 == 1
            first, other = said.setdefault(bare, (number, negated))
            if other != negated:
                return first, number
    return None


def _is_negation(word: str) -> bool:
    return word in ("not", "no", "never", "cannot", "without") or word.endswith(("n't", "n\u2019t"))


def _repetition(
    said: tuple[tuple[str, ...], frozenset[str], frozenset[Claim]],
    earlier: Sequence[tuple[tuple[str, ...], frozenset[str], frozenset[Claim]]],
) -> str | None:
    words, word_set, claims = said
    for index, (other_words, other_set, other_claims) in enumerate(earlier, 1):
        if words == other_words:
            return f"repeats step {index}"
        shared = len(word_set & other_set)
        if claims == other_claims and shared and shared >= SAME_WORDS_JACCARD * len(word_set | other_set):
            return f"says the same as step {index}"
    return None


def _contradiction(claims: Sequence[Claim], claimed: Mapping[str, Claim], context: ChainContext) -> str | None:
    within: dict[str, Claim] = {}
    for claim in claims:
        if claim.name in within and _differ(claim, within[claim.name]):
            return f"says both '{within[claim.name]}' and '{claim}'"
        within.setdefault(claim.name, claim)
        if claim.name in context.facts:
            if (claim.value == context.facts[claim.name]) == claim.negated:
                return f"says '{claim}', but {claim.name} is {context.facts[claim.name]}"
        elif claim.name in claimed and _differ(claim, claimed[claim.name]):
            return f"says '{claim}', but an earlier step says '{claimed[claim.name]}'"
    return None


def _lack_of_support(
    said: tuple[tuple[str, ...], frozenset[str], frozenset[Claim]],
    concludes: bool,
    known_words: set[str],
    context: ChainContext,
) -> str | None:
    words, _, claims = said
    if context.facts:
        if unknown := sorted({claim.name for claim in claims} - set(context.facts)):
            return f"claims something about {', '.join(unknown)}, which this question does not have"
        if not claims and not concludes:
            share = sum(word in known_words for word in words) / len(words)
            if share < MIN_CONTEXT_SHARE:
                return f"only {share:.0%} of its words occur in the question, the facts or earlier steps"
            return None
    if any(context.facts.get(claim.name) == claim.value for claim in claims):
        return None
    if not any(word in known_words for word in words):
        return "shares no word with the question, the facts or earlier steps"
    return None


def _implied_claims(step: str, context: ChainContext, exclude: Collection[str]) -> list[Claim]:
    """A conclusion that names a candidate says that it is suitable."""
    domains = dict(context.reader.key)
    suitable = {value.casefold() for value in context.suitable_values}
    return [
        Claim(name, value)
        for name in sorted(named_candidates(step, context.verdict_names) - set(exclude))
        for value in domains[name]
        if value.casefold() in suitable
    ]


def _differ(claim: Claim, other: Claim) -> bool:
    if claim.negated and other.negated:
        return False
    return (claim.value == other.value) == (claim.negated or other.negated)


@lru_cache(maxsize=256)
def _verdict_names(domains: frozenset[tuple[str, frozenset[str]]], suitable: frozenset[str]) -> frozenset[str]:
    suitable = frozenset(value.casefold() for value in suitable)
    return frozenset(
        name
        for name, values in domains
        if len(values) <= 2 and sum(value.casefold() in suitable for value in values) == 1
    )

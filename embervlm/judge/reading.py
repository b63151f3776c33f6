"""A chain and its question, read once: what every function of this folder judges.

`read_steps` is all that the rules need. `ChainReading` compares the words of every text with those of every other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from embervlm.judge.backends import Backends, EmbeddedBackend
from embervlm.words.claims import Claim, ClaimReader, content_words, is_conclusion
from embervlm.words.english import sentences
from embervlm.words.opposites import NO_ALTERNATIVES, Alternatives
from embervlm.words.wording import Array, Reading

SUITABLE_VALUES = frozenset({"yes", "suited", "suitable", "true"})
"""Values with which a chain says 'this candidate fits'; `ChainContext.suitable_values` overrides them."""
FAULT = 0.5
"""From this certainty on, a fault is reported as a reason."""
QUESTION, KNOWN, ANSWER, FIRST_STEP = range(4)
"""Rows of `ChainReading.words`."""


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
    alternatives: Alternatives = NO_ALTERNATIVES
    """What cannot both be true in these data."""
    is_pictured: bool = False
    """Whether the question is about a picture."""

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

    @property
    def is_told(self) -> bool:
        """Whether more is known than the question. Where not, whatever a step reads off the picture looks made up."""
        return bool(self.facts or self.statements or self.reference_steps)

    @property
    def is_seen_alone(self) -> bool:
        """Whether steps read off a picture what nobody has told: each may name what stands nowhere else."""
        return self.is_pictured and not self.is_told

    @cached_property
    def all_candidates(self) -> frozenset[str]:
        return self.verdict_names | set(self.candidates) | set(self.answer) | set(self.gold_answer)

    def says_suitable(self, value: str) -> bool:
        return value.casefold() in {suitable.casefold() for suitable in self.suitable_values}

    def confirms(self, claim: Claim) -> bool | None:
        """Whether the facts say what `claim` says; None where they say nothing of it."""
        known = self.facts.get(claim.name)
        return None if known is None else (claim.value == known) != claim.negated


class ReadStep(NamedTuple):
    """One step as the rules read it."""

    text: str
    words: tuple[str, ...]
    """Content words, in order."""
    claims: tuple[Claim, ...]
    concludes: bool


def read_steps(steps: Sequence[str], context: ChainContext) -> tuple[ReadStep, ...]:
    read = context.reader.read
    return tuple(ReadStep(step, content_words(step), read(step), is_conclusion(step)) for step in steps)


class Fault(NamedTuple):
    """How sure it is that a step has a fault, in [0, 1], and what it is where that is at least `FAULT`."""

    sure: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ChainReading:
    """One chain, its words and how its texts relate. Rows of matrices are premises, columns what they speak of."""

    steps: tuple[ReadStep, ...]
    context: ChainContext
    words: Reading
    """Of the question, what is known, the answer, the steps, what is given, and the gold chain."""
    given: tuple[str, ...]
    """What steps must not contradict."""
    similarity: Array
    """`[step, step]` in [0, 1]."""
    entails: Array
    """`[step, later step]` how sure the later one follows; 0 elsewhere."""
    opposes: Array
    """The same of a contradiction."""
    denied: Array
    """`[given, step]` how sure the two contradict each other."""
    likeness_to_gold: Array
    """`[gold step, step]` geometric mean of what each says of the other."""

    @classmethod
    def of(
        cls, steps: Sequence[str], context: ChainContext, backends: Backends, words: EmbeddedBackend
    ) -> ChainReading:
        """`words` compares words, whatever the backends are."""
        known = [f"{name} is {value}." for name, value in context.facts.items()]
        known = [*known, *context.statements, *context.reference_steps]
        given = [*context.statements, *(part for part in sentences(context.instruction) if not part.endswith("?"))]
        given += [step for step in context.reference_steps if not is_conclusion(step)]
        background = [context.instruction, " ".join(known), ", ".join(sorted(context.answer))]
        texts = [*background, *steps, *given, *context.reference_steps]
        size, end = len(steps), FIRST_STEP + len(steps)
        premises = range(FIRST_STEP, end + len(given))
        pairs = [(a, b) for b in range(FIRST_STEP, end) for a in premises if a < b or a >= end]
        entailed, opposed = np.zeros((2, size + len(given), size), np.float32)
        rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T - FIRST_STEP
        entailed[rows, columns], opposed[rows, columns] = backends.entailment.judge(texts, pairs)
        reading = words.reading(texts)
        share, own, gold = reading.text_cover[0], slice(FIRST_STEP, end), slice(end + len(given), None)
        return cls(
            steps=read_steps(steps, context),
            context=context,
            words=reading,
            given=tuple(given),
            similarity=backends.similarity.matrix(texts)[own, own],
            entails=entailed[:size],
            opposes=opposed[:size],
            denied=opposed[size:],
            likeness_to_gold=np.sqrt(share[gold, own] * share[own, gold].T),
        )

    @property
    def end(self) -> int:
        """Row behind the last step."""
        return FIRST_STEP + len(self.steps)

    def places(self, step: int) -> list[int]:
        """Words of a step, as places in `words.words`."""
        return self.words.text_places[FIRST_STEP + step]

    @property
    def is_empty(self) -> bool:
        return not any(step.words for step in self.steps)


@lru_cache(maxsize=256)
def _verdict_names(domains: frozenset[tuple[str, frozenset[str]]], suitable: frozenset[str]) -> frozenset[str]:
    suitable = frozenset(value.casefold() for value in suitable)
    return frozenset(
        name
        for name, values in domains
        if len(values) <= 2 and sum(value.casefold() in suitable for value in values) == 1
    )

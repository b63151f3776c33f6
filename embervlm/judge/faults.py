"""Faults of the steps of a chain, by rules alone and measured.

Both judges hold the same reading of a step against the same rules. `judge_steps` stops there: each fault is certain, it
compares no words by meaning, and a whole data set takes seconds, so it checks records, makes labels for the validator
and says which of a model's own steps are right. `judge_chain` goes on where the rules find nothing: it says how sure a
fault is, in chains of any wording, which is right for a score and wrong for a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embervlm.judge.contradiction import all_claims, claims_contradict, contradiction, granted_by_given
from embervlm.judge.reading import ChainContext, ChainReading, Fault, ReadStep, read_steps
from embervlm.judge.redundancy import redundancy, repetition
from embervlm.judge.support import (
    RELEVANT,
    known_words,
    lack_of_support,
    lack_of_words,
    relevance,
    spoken_of_answer,
    support,
)
from embervlm.words.claims import Claim
from embervlm.words.wording import ramp


@dataclass(frozen=True)
class StepFaults:
    """Why a step does not count; None where it has no such fault."""

    redundant: str | None = None
    contradicted: str | None = None
    unsupported: str | None = None

    @property
    def any(self) -> bool:
        return bool(self.redundant or self.contradicted or self.unsupported)

    def reason(self, context: ChainContext) -> str | None:
        """The fault of a step about a picture: one that nothing supports has none where nothing is known."""
        return self.contradicted or self.redundant or (self.unsupported if context.is_told else None)


def judge_steps(steps: Sequence[str], context: ChainContext) -> list[StepFaults]:
    """Faults of each step by rules alone.

    Only sound steps become context for later ones, so a chain about something else does not support itself.
    """
    read = read_steps(steps, context)
    known, faults = known_words(context), []
    for number, (step, contradicted) in enumerate(zip(read, contradicted_claims(read, context))):
        unsupported = lack_of_support(step, known, context)
        faults.append(StepFaults(repetition(step, read[:number]), contradicted, unsupported))
        if not (contradicted or unsupported):
            known.update(step.words)
    return faults


def contradicted_claims(steps: Sequence[ReadStep], context: ChainContext) -> list[str | None]:
    """Of each step, the claim that the facts, an earlier step or the step itself contradicts."""
    claimed: dict[str, Claim] = {}
    found = []
    for step in steps:
        claims = all_claims(step, context)
        found.append(claims_contradict(claims, claimed, context))
        for claim in claims:
            claimed.setdefault(claim.name, claim)
    return found


@dataclass(frozen=True)
class StepJudgment:
    """How sure each fault of a step is."""

    redundant: Fault
    contradicted: Fault
    unsupported: Fault

    @property
    def sound(self) -> float:
        return (1 - self.redundant.sure) * (1 - self.contradicted.sure) * (1 - self.unsupported.sure)

    @property
    def reasons(self) -> list[str]:
        return [fault.reason for fault in (self.redundant, self.contradicted, self.unsupported) if fault.reason]


def judge_chain(reading: ChainReading, gold: ChainReading | None = None) -> list[StepJudgment]:
    """Faults of each step, by the rules and beyond them by its words.

    Args:
        gold: The gold chain read like the other. No chain has to speak of the question more than it does.
    """
    wanted = 1.0 if gold is None else min(1.0, relevance(gold) / RELEVANT[1])
    anchor = float(ramp(relevance(reading) + RELEVANT[1] * (1 - wanted), *RELEVANT))
    if reading.context.is_seen_alone:
        anchor = max(anchor, float(ramp(spoken_of_answer(reading), *RELEVANT)))
    supported, granted = support(reading), granted_by_given(reading)
    contradictions: list[Fault] = []
    for j, rule in enumerate(contradicted_claims(reading.steps, reading.context)):
        contradictions.append(contradiction(reading, j, rule, contradictions, granted))
    return [
        StepJudgment(redundancy(reading, j), found, lack_of_words(reading, j, supported, anchor))
        for j, found in enumerate(contradictions)
    ]

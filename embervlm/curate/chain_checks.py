"""The checks of one chain and its question.

Nothing here knows robots: what can be answered comes from the record, what can be claimed from the data's facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embervlm.data.facts import fact_domains
from embervlm.data.record_fields import quote
from embervlm.data.records import ReasoningRecord
from embervlm.judge.contradiction import opposite_steps
from embervlm.judge.faults import judge_steps
from embervlm.judge.flow import context_free
from embervlm.judge.reading import ChainContext
from embervlm.words.chain_text import CONCLUSION
from embervlm.words.claims import all_words, concluded_names, content_words, is_conclusion, named_candidates
from embervlm.words.english import STOP_WORDS
from embervlm.words.numbers import in_digits
from embervlm.words.open_answers import same_answers

MAX_DOMAIN_VALUES = 200
"""A fact with more values over the data set is free text, which no pattern can look for."""
MAX_DOMAINS = 300
"""Facts that chains are held against: the most common ones."""
Finding = tuple[str, str, str, str]
"""Kind, field, what and fix."""


def checkable_facts(records: Sequence[ReasoningRecord]) -> dict[str, frozenset[str]]:
    """Fact name -> values, of the facts that a pattern can look for."""
    used = Counter(name for record in records for name in record.metadata.get("facts") or {})
    domains = fact_domains(records)
    few_values = [name for name, _ in used.most_common() if len(domains[name]) <= MAX_DOMAIN_VALUES]
    return {name: domains[name] for name in few_values[:MAX_DOMAINS]}


@dataclass(frozen=True)
class ChainJob:
    """What the check of one chain needs; small, since it goes to another process."""

    instruction: str
    steps: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    candidates: tuple[str, ...]
    answer: tuple[str, ...]
    looking: frozenset[int] = frozenset()
    """Places, from 1, of the steps that `metadata.seen` says are about something in the picture."""
    is_pictured: bool = False

    @classmethod
    def of(cls, record: ReasoningRecord, domains: Mapping[str, frozenset[str]]) -> ChainJob:
        known = (record.metadata.get("facts") or {}).items()
        facts = tuple((name, value) for name, value in known if name in domains)
        seen = record.metadata.get("seen") or ()
        looking = frozenset(place for place, names in enumerate(seen, 1) if names)
        is_pictured = record.image is not None
        return cls(record.instruction, record.steps, facts, record.candidates, record.answer, looking, is_pictured)


def check_chain(job: ChainJob, *, domains: Mapping[str, frozenset[str]]) -> list[Finding]:
    """Kind, field, what and fix of each finding in one chain and its question."""
    out: list[Finding] = []
    answer = ", ".join(job.answer)
    context = ChainContext(
        instruction=job.instruction,
        facts=dict(job.facts),
        domains=domains,
        candidates=job.candidates,
        answer=job.answer,
    )
    faults = judge_steps(job.steps, context)
    # where nobody knows what the picture shows, steps may say it in words of their own, but they lead to the answer
    alien = len(faults) > 2 and all(fault.unsupported for fault in faults[:-1]) and not _lead_to(job)
    told = context.is_told or not job.is_pictured or alien
    for place, (text, fault) in enumerate(zip(job.steps, faults), 1):
        step = "the conclusion" if text.startswith(CONCLUSION) else f"step {place}"
        if fault.contradicted:
            fix = "correct the step, or metadata.facts" if job.facts else "correct the step"
            out.append(("contradiction", "reasoning", f"{step} {fault.contradicted}", fix))
        if fault.redundant:
            out.append(("repetition", "reasoning", f"{step} {fault.redundant}", "drop the step"))
        # "Conclusion: five" need only name the answer, and a step about a box is supported by the picture
        if fault.unsupported and told and not is_conclusion(text) and place not in job.looking:
            fix = "say what it is about, or drop the step"
            out.append(("unsupported", "reasoning", f"{step} {fault.unsupported}", fix))
    if (opposite := opposite_steps(job.steps)) is not None:
        first, second = opposite
        what = f"step {second} says the opposite of " + (f"step {first}" if first != second else "itself")
        out.append(("contradiction", "reasoning", what, "correct one of the two"))
    if job.steps and is_conclusion(last := job.steps[-1]):
        concluded = last.removeprefix(CONCLUSION).strip()
        named = concluded_names(concluded, job.candidates, job.answer)
        listed = ", ".join(name for name in job.candidates if name in named)
        if not job.candidates and _other_words(concluded, job.answer):
            listed = quote(concluded)
        if listed and named != set(job.answer):
            what = f"the conclusion names {listed}, the answer is {answer}"
            out.append(("conclusion", "reasoning", what, "correct the one that is wrong"))
    named = named_candidates(job.instruction, job.candidates)
    if named and named == set(job.answer) and len(named) < len(job.candidates):
        what = f"names {answer} and no other candidate"
        out.append(("given_away", "instruction", what, "ask without the answer, or name every candidate"))
    return out


def _lead_to(job: ChainJob) -> bool:
    """Whether steps before the conclusion speak of the answer, or the answer is one that no step can speak of."""
    if context_free(job.answer):
        return True
    wanted = {word for text in job.answer for word in _words(text)}
    return any(wanted & _words(step) for step in job.steps[:-1])


def _other_words(conclusion: str, answer: Sequence[str]) -> bool:
    """Whether a conclusion and an answer in free words share none, and are not the same number."""
    ours, theirs = _words(conclusion), {word for text in answer for word in _words(text)}
    polar = context_free(answer) and not context_free([conclusion.rstrip(".")])
    return bool(ours and theirs) and not polar and not ours & theirs and not same_answers([conclusion], answer)


def _words(text: str) -> set[str]:
    return {in_digits(word) for word in content_words(text)} | {
        in_digits(word) for word in all_words(text)
    } - STOP_WORDS

"""What a drawn chain is rewarded for in phase 3: each part a function of its record and what the model wrote.

A chain is what `generate_with_reasoning` gives: `reasoning_steps`, `answer_set`, `text` (the answer as written),
`num_tokens`, `cut_off`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from embervlm.data.records import ReasoningRecord
from embervlm.judge.faults import judge_steps
from embervlm.judge.metrics import is_right
from embervlm.judge.reading import ChainContext
from embervlm.words.chain_text import CONCLUSION, strict_answer
from embervlm.words.claims import conclusion_fault, is_conclusion
from embervlm.words.open_answers import LIST_SEPARATOR

LENGTH_BUFFER_RATIO = 0.25
"""Share of the most tokens over which `length` falls from 0 to -1."""
Chain = Mapping[str, Any]


def answer_reward(record: ReasoningRecord, chain: Chain) -> float:
    """1.0 for the right answer, by the comparison of an evaluation, unless it is gamed; see `gaming_fault`."""
    return float(is_right(chain["answer_set"], record) and not gaming_fault(record, chain))


def gaming_fault(record: ReasoningRecord, chain: Chain) -> str:
    """How a chain with the right answer could have come by it without reasoning; empty where it did not.

    It names the answer more than once or among other words, concludes with something else, has no reasons, or says
    the answer before them.
    """
    steps, candidates = list(chain["reasoning_steps"]), record.candidates
    if _is_padded(chain["text"], candidates):
        return "the answer is not named once and alone"
    reasons = [step for step in steps if not step.startswith(CONCLUSION)]
    if not reasons:
        return "there are no reasons before the answer"
    if any(is_conclusion(step) for step in steps[:-1]):
        return "it answers before its reasons"
    if _is_padded_or_bare(reasons[0], record):
        return "its first step is the answer"
    if steps[-1].startswith(CONCLUSION):
        fault = conclusion_fault(steps[-1], record.answer, candidates)
        return f"the conclusion {fault}" if fault else ""
    return ""


def _is_padded(text: str, candidates: Sequence[str]) -> bool:
    """Whether an answer names something twice, or holds more than names."""
    if candidates:
        names, others = strict_answer(text.strip(" ."), tuple(candidates))
        return bool(others) or len(names) != len(set(names))
    parts = [part.casefold() for part in LIST_SEPARATOR.split(text.strip()) if part]
    return len(parts) != len(set(parts))


def _is_padded_or_bare(step: str, record: ReasoningRecord) -> bool:
    """Whether a step says nothing but the answer."""
    if record.candidates:
        names, others = strict_answer(step.strip(" ."), record.candidates)
        return bool(names) and not others
    return is_right([step.strip(" .")], record)


def form_reward(chain: Chain) -> float:
    """1.0 for a chain of steps with an answer behind it, which ended by itself."""
    return float(bool(chain["reasoning_steps"]) and bool(chain["answer_set"]) and not chain["cut_off"])


def soundness_reward(record: ReasoningRecord, chain: Chain, domains: Mapping[str, Collection[str]]) -> float:
    """Share of the steps that repeat and contradict nothing, by the judge's rules; 0.0 without steps.

    Where the record knows its facts, they must not make up anything either. Where it does not, whatever a step reads
    off the picture would count as made up.
    """
    steps = chain["reasoning_steps"]
    context = ChainContext(
        instruction=record.instruction,
        facts=record.metadata.get("facts") or {},
        domains=domains,
        answer=frozenset(chain["answer_set"]),
        candidates=frozenset(record.candidates),
    )
    wrong = [fault.reason(context) for fault in judge_steps(steps, context)]
    return sum(not found for found in wrong) / len(steps) if steps else 0.0


def length_reward(chain: Chain, most_tokens: int) -> float:
    """0.0, and down to -1.0 over the last `LENGTH_BUFFER_RATIO` of `most_tokens` (DAPO, Yu et al. 2025, eq. 13)."""
    buffer = LENGTH_BUFFER_RATIO * most_tokens
    return -min(1.0, max(0.0, (chain["num_tokens"] - (most_tokens - buffer)) / buffer))


def rewards_of(
    records: Sequence[ReasoningRecord],
    chains: Sequence[Chain],
    parts: Collection[str],
    *,
    domains: Mapping[str, Collection[str]],
    most_tokens: int,
) -> dict[str, list[float]]:
    """Each of our own `parts` of every chain; `records` has the record of each."""
    found: dict[str, list[float]] = {}
    pairs = list(zip(records, chains, strict=True))
    if "answer" in parts:
        found["answer"] = [answer_reward(record, chain) for record, chain in pairs]
    if "form" in parts:
        found["form"] = [form_reward(chain) for _, chain in pairs]
    if "soundness" in parts:
        found["soundness"] = [soundness_reward(record, chain, domains) for record, chain in pairs]
    if "length" in parts:
        found["length"] = [length_reward(chain, most_tokens) for _, chain in pairs]
    return found

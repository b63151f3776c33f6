"""Invalid steps for the step validator, which learns to distinguish them from valid ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embervlm.data.facts import fact_domains
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Sample, Samples, step_texts
from embervlm.data.splits import text_hash
from embervlm.data.store import question_hashes
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.words.claims import ClaimReader

NEGATIVE_KINDS = ("other_picture", "wrong_order", "contradicted", "repeated")
PAIR_SEGMENTS = ("visual", "question", "previous", "step")
"""What the validator reads, in the order in which it stands before it."""
MAX_PAIR_TOKENS = 512
"""Longest question, previous steps and step together; fewer where the language model reads fewer."""
MAX_PREVIOUS_TOKENS = 256
"""Of the chain so far the validator reads this many tokens, from its end."""


def fit_pair(
    question: list[int], previous: list[int], step: list[int], limit: int = MAX_PAIR_TOKENS
) -> tuple[list[int], list[int], list[int]]:
    """The three with at most `limit` tokens together.

    Where they are longer, the previous steps keep their end, in half of the room at most; the step its beginning, in a
    quarter or what the question leaves of the rest; the question its beginning.
    """
    previous = previous[max(0, len(previous) - min(MAX_PREVIOUS_TOKENS, limit // 2)) :]
    step = step[: max(limit // 4, limit - len(question) - len(previous))]
    return question[: limit - len(previous) - len(step)], previous, step


def cut_for_validator(sizes: np.ndarray, limit: int) -> str:
    """A line about the chains that the step validator cannot read at once; empty if there are none.

    Args:
        sizes: tokens of question and chain, `[samples, 2]`.
    """
    previous = min(MAX_PREVIOUS_TOKENS, limit // 2)
    longer = int(((sizes.sum(1) > limit) | (sizes[:, 1] > previous)).sum())
    if not longer:
        return ""
    return (
        f"{longer:,} of {len(sizes):,} chains are longer than the step validator reads: question, chain so far and "
        f"step have at most {limit} tokens, of which {previous} are the end of the chain so far"
    )


@dataclass(frozen=True, kw_only=True)
class StepPair:
    """A chain so far and a step that may or may not come next, with the tokens that mark steps in a chain."""

    kind: str
    """`valid` or one of `NEGATIVE_KINDS`."""
    previous: list[int]
    step: list[int]

    @property
    def valid(self) -> bool:
        return self.kind == "valid"


def contradict(step: str, facts: Mapping[str, str], reader: ClaimReader, rng: random.Random) -> str:
    """`step` with the value of one of the `facts` replaced by another that `reader` knows; unchanged where it states
    none."""
    values = {name: sorted(known - {facts.get(name)}) for name, known in reader.key}
    stated = [place for place in _stated(step, facts, reader) if values[place[0]]]
    if not stated:
        return step
    chosen = rng.choice(list(dict.fromkeys(name for name, _, _ in stated)))
    other = rng.choice(values[chosen])
    for name, start, end in reversed(stated):
        if name == chosen:
            step = step[:start] + other + step[end:]
    return step


def _stated(step: str, facts: Mapping[str, str], reader: ClaimReader) -> list[tuple[str, int, int]]:
    """The facts that `step` states, each with where its value starts and ends."""
    found = reader.placed(step)
    return [(claim.name, a, b) for claim, a, b in found if not claim.negated and facts.get(claim.name) == claim.value]


class PairMaker:
    """Draws valid and invalid steps for records; same random state, same pairs."""

    def __init__(
        self, records: Sequence[ReasoningRecord], samples: Sequence[Sample], tokenizer: ReasoningTokenizer
    ) -> None:
        self._records, self._tokenizer = records, tokenizer
        self._samples, self._reader = samples, ClaimReader.of(fact_domains(records))
        self._rows = samples.rows if isinstance(samples, Samples) else np.array([s.record for s in samples], np.int32)
        """Record of each sample."""
        questions = question_hashes(records)[self._rows]
        self._by_question = np.argsort(questions, kind="stable").astype(np.int32)
        """Samples with the same question stand together, in their order."""
        self._questions = questions[self._by_question]

    def _same_question(self, record: ReasoningRecord) -> np.ndarray:
        """The samples that ask the same."""
        wanted = np.uint64(text_hash(record.asked))
        first, last = (int(np.searchsorted(self._questions, wanted, side)) for side in ("left", "right"))
        return self._by_question[first:last]

    def pairs(self, sample: Sample, rng: random.Random, kinds: Sequence[str] = ()) -> list[StepPair]:
        """A valid step of the chain, and one invalid one for each of `kinds` that can be made (one drawn if empty)."""
        steps = self._step_ids(sample)
        index = rng.randrange(len(steps))
        pairs = [StepPair(kind="valid", previous=self._previous(steps, index), step=steps[index])]
        wanted = list(kinds) or rng.sample(NEGATIVE_KINDS, len(NEGATIVE_KINDS))
        for kind in wanted:
            made = self._negative(kind, sample, steps, index, rng)
            if made is not None:
                pairs.append(made)
                if not kinds:
                    break
        return pairs

    @property
    def knows_facts(self) -> bool:
        """Whether any record says what is true, so that a value can be known to be wrong."""
        return bool(self._reader.key)

    def value_places(self, sample: Sample, limit: int = MAX_PAIR_TOKENS) -> list[tuple[int, int, int]]:
        """Of each known value that the chain states: its first token, and the first and one-past-last of its step.

        The step begins with the token that opens it. Steps for which something is cut off (`fit_pair`) are left out.
        """
        record = self._records[sample.record]
        facts = record.metadata.get("facts") or {}
        texts, conclusion = step_texts(record)
        out = []
        for text, (start, end) in zip((*texts, *([] if conclusion is None else [conclusion])), sample.step_spans):
            whole = [*sample.prompt, *sample.target]
            read = (sample.prompt, whole[len(sample.prompt) : start - 1], whole[start - 1 : end])
            if fit_pair(*read, limit) != read:
                continue
            ids = whole[start:end]
            first = {name: at for name, at, _ in reversed(_stated(text, facts, self._reader))}
            for at in sorted(first.values()):
                (before,) = self._tokenizer.following([text[:at].rstrip()])
                if before == ids[: len(before)] and len(before) < len(ids):  # no token reaches into the value
                    out.append((start + len(before), start - 1, end))
        return out

    def _negative(
        self, kind: str, sample: Sample, steps: list[list[int]], index: int, rng: random.Random
    ) -> StepPair | None:
        record = self._records[sample.record]
        if kind == "other_picture":
            same, everyone = self._same_question(record), range(len(self._samples))
            for pool in (same, same, same, everyone, everyone):
                other = int(pool[rng.randrange(len(pool))])
                other_steps = self._step_ids(self._samples[other])
                if self._records[int(self._rows[other])].image != record.image or record.image is None:
                    step = other_steps[min(index, len(other_steps) - 1)]
                    if step not in steps:
                        return StepPair(kind=kind, previous=self._previous(steps, index), step=step)
            return None
        if kind == "repeated":
            if index == 0:
                index = rng.randrange(1, len(steps)) if len(steps) > 1 else 0
            if index == 0:
                return None
            return StepPair(kind=kind, previous=self._previous(steps, index), step=rng.choice(steps[:index]))
        if kind == "wrong_order":
            types = record.metadata.get("step_types") or ()
            later = [i for i in range(index + 1, len(steps)) if len(types) != len(steps) or types[i] != types[index]]
            if not later:
                return None
            return StepPair(kind=kind, previous=self._previous(steps, index), step=steps[rng.choice(later)])
        texts, conclusion = step_texts(record)
        text = (texts if conclusion is None else [*texts, conclusion])[index]
        wrong = contradict(text, record.metadata.get("facts") or {}, self._reader, rng)
        if wrong == text:
            return None
        step = [steps[index][0], *self._tokenizer.following([wrong])[0]]
        return StepPair(kind=kind, previous=self._previous(steps, index), step=step)

    @staticmethod
    def _step_ids(sample: Sample) -> list[list[int]]:
        """Every step with the token that opens it."""
        text = [*sample.prompt, *sample.target]
        return [text[start - 1 : end] for start, end in sample.step_spans]

    def _previous(self, steps: list[list[int]], index: int) -> list[int]:
        start = self._tokenizer.ids["<|reasoning_start|>"]
        return [start, *(token for step in steps[:index] for token in step)][-MAX_PREVIOUS_TOKENS:]

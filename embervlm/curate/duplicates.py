"""Records that repeat others: exact duplicates, near duplicates, and the same question with different answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from embervlm.data.records import ReasoningRecord
from embervlm.data.splits import normalised_text
from embervlm.words.claims import all_words, content_words

NEAR_JACCARD = 0.9
"""Share of word triples that two texts have in common, from which they are near duplicates."""
SAME_CONTENT_JACCARD = 0.95
"""Two chains for one question and picture say the same from this Jaccard index of their content words' shingles on."""
SHINGLE_WORDS = 3
_CANDIDATE_JACCARD = 0.8
"""What MinHash looks for: below `NEAR_JACCARD`, as it only estimates."""
_NUM_PERMUTATIONS = 64
MOST_COMPARED = 64
"""Texts of one picture and answer that are compared in pairs, which is exact; of more, MinHash chooses the pairs."""

Repeat = Literal["duplicate", "near_duplicate", "conflict"]


@dataclass(frozen=True)
class Duplicate:
    """Record `index` repeats the earlier record `first`."""

    kind: Repeat
    index: int
    first: int


def words_of(instruction: str, steps: Sequence[str]) -> list[str]:
    return [word for text in (instruction, *steps) for word in all_words(text)]


def shingles_of(words: Sequence[str]) -> frozenset[str]:
    """Every `SHINGLE_WORDS` neighbouring words."""
    return frozenset(
        " ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))
    )


def find_duplicates(records: Sequence[ReasoningRecord], pictures: Mapping[str, str]) -> list[Duplicate]:
    """The records that repeat an earlier one about the same picture (by content; no picture counts as one), by index.

    duplicate: the same instruction, steps and answer, case and punctuation aside. near_duplicate: the same answer, and
    word triples of instruction and steps that overlap by `NEAR_JACCARD` (Jaccard). conflict: the same instruction
    with another answer.
    Args:
        pictures: path -> digest over the picture's content.
    """
    found: list[Duplicate] = []
    exact: dict[Hashable, int] = {}
    asked: dict[Hashable, int] = {}
    distinct: dict[Hashable, list[int]] = defaultdict(list)  # (picture, answer) -> records with different texts
    for index, record in enumerate(records):
        picture = pictures.get(record.image) if record.image is not None else None
        question, answer = normalised_text(record.instruction), frozenset(record.answer)
        own = (picture, answer, question, *map(normalised_text, record.steps))
        if (first := exact.setdefault(own, index)) != index:
            found.append(Duplicate("duplicate", index, first))
            continue
        first = asked.setdefault((picture, question), index)
        if frozenset(records[first].answer) != answer:
            found.append(Duplicate("conflict", index, first))
        distinct[picture, answer].append(index)
    for group in distinct.values():
        if len(group) > 1:
            found += _near_duplicates(records, group)
    return sorted(found, key=lambda duplicate: duplicate.index)


def _near_duplicates(records: Sequence[ReasoningRecord], group: Sequence[int]) -> list[Duplicate]:
    @lru_cache(maxsize=4096)  # not all at once: a set of strings takes 10 KB
    def shingles(index: int) -> frozenset[str]:
        return shingles_of(words_of(records[index].instruction, records[index].steps))

    known = _Estimated() if len(group) > MOST_COMPARED else _Compared()
    found = []
    for index in group:
        mine = shingles(index)
        for first in known.candidates(mine):
            other = shingles(first)
            if len(mine & other) >= NEAR_JACCARD * len(mine | other):
                found.append(Duplicate("near_duplicate", index, first))
                break
        else:  # only what is new is compared with: a thousand variants of one text cost a thousand comparisons
            known.add(index)
    return found


class _Compared:
    """Every text that was added is a candidate."""

    def __init__(self) -> None:
        self._known: list[int] = []

    def candidates(self, _: frozenset[str]) -> Sequence[int]:
        return self._known

    def add(self, index: int) -> None:
        self._known.append(index)


class _Estimated:
    """Texts that MinHash (Broder 1997) takes for like ones: millions are not compared in pairs."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH  # imports scipy

        self._known = MinHashLSH(threshold=_CANDIDATE_JACCARD, num_perm=_NUM_PERMUTATIONS)

    def candidates(self, shingles: frozenset[str]) -> Sequence[int]:
        from datasketch import MinHash

        encoded = [text.encode("utf-8", "surrogatepass") for text in shingles]
        (self._last,) = MinHash.generator([encoded], num_perm=_NUM_PERMUTATIONS)
        return sorted(self._known.query(self._last))

    def add(self, index: int) -> None:
        """The text whose candidates were asked for last."""
        self._known.insert(index, self._last)


class ChainIndex:
    """The chains there are."""

    def __init__(self) -> None:
        self._exact: set[tuple[str | None, ...]] = set()
        self._words: dict[Hashable, _Likeness] = {}
        """(picture, answer) -> chains with their question, by all words: what `find_duplicates` reports."""
        self._content: dict[Hashable, _Likeness] = {}
        """(picture, question) -> chains, by the words that say something."""

    def refusal(self, record: ReasoningRecord, steps: Sequence[str]) -> str | None:
        """Why `steps` is not new for the question of `record`, or None, and then it is here from now on."""
        exact = (record.image, record.instruction, *steps)
        if exact in self._exact:
            return "duplicate"
        content = [word for step in steps for word in (*content_words(step), "\n")]
        compared = (
            (
                self._words.setdefault((record.image, frozenset(record.answer)), _Likeness(NEAR_JACCARD)),
                shingles_of(words_of(record.instruction, steps)),
            ),
            (
                self._content.setdefault((record.image, record.instruction), _Likeness(SAME_CONTENT_JACCARD)),
                shingles_of(content),
            ),
        )
        if any(near.has_like(shingles) for near, shingles in compared):
            return "near duplicate"
        self._exact.add(exact)
        for near, shingles in compared:
            near.add(shingles)
        return None


class _Likeness:
    """Texts as their shingles, compared by the Jaccard index."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._known: list[np.ndarray] = []

    @staticmethod
    def _hashes(shingles: Collection[str]) -> np.ndarray:
        return np.fromiter(map(hash, shingles), np.int64, len(shingles))

    def has_like(self, shingles: Collection[str]) -> bool:
        if not self._known:
            return False
        sizes = np.array([len(other) for other in self._known])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        found = np.isin(np.concatenate(self._known), self._hashes(shingles)).astype(np.int64)
        shared = np.add.reduceat(found, starts)
        return bool((shared >= self._least * (sizes + len(shingles) - shared)).any())

    def add(self, shingles: Collection[str]) -> None:
        self._known.append(self._hashes(shingles))

"""What answers are chosen from where neither records nor a domain say it: a closed set, if there are few answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

MIN_REPEATS = 3
"""Records for each distinct answer, on average, below which the answers are free text and no set to choose from."""


class AnswerSpace:
    """Counts answers, record by record, and says whether they are a closed set.

    Answers that differ in case and spaces alone are one, spelled as most records do. Memory is bounded: beyond `limit`
    distinct answers nothing more is counted.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: most answers of a closed set; 0: every answer is open."""
        self._limit, self.num_records = limit, 0
        self._spellings: dict[str, Counter[str]] = {}

    def add(self, answers: Iterable[str]) -> None:
        self.num_records += 1
        for answer in answers:
            if len(self._spellings) <= self._limit:
                self._spellings.setdefault(key(answer), Counter())[answer.strip()] += 1

    def closed(self) -> tuple[str, ...]:
        """The answers in alphabetical order; () where they are too many or too rarely the same."""
        distinct = len(self._spellings)
        if not 2 <= distinct <= self._limit or self.num_records < MIN_REPEATS * distinct:
            return ()
        return tuple(sorted(counts.most_common(1)[0][0] for counts in self._spellings.values()))


def key(answer: str) -> str:
    """Equal for answers that are one."""
    return " ".join(answer.split()).casefold()

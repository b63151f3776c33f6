"""What answers are chosen from where neither records nor a domain say it: a closed set, if there are few answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from embervlm.data.records import ReasoningRecord

MIN_REPEATS = 3
"""Records for each distinct answer, on average, below which the answers are free text and no set to choose from."""


def answer_kind(record: ReasoningRecord) -> str:
    """Whether a record's answer is one of the `domain`'s candidates, of its `own`, or `open`."""
    if not record.candidates:
        return "open"
    return "domain" if record.metadata.get("candidates") is None else "own"


class AnswerSpace:
    """Counts answers, record by record, and says whether those that nobody gives candidates for are a closed set.

    Answers that differ in case and spaces alone are one, spelled as most records do. Memory is bounded: beyond `limit`
    distinct answers nothing more is counted.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: most answers of a closed set; 0: every answer is open."""
        self._limit, self._num_records = limit, 0
        self._kinds = Counter[str]()
        self._spellings: dict[str, Counter[str]] = {}

    def add(self, record: ReasoningRecord) -> None:
        self._kinds[answer_kind(record)] += 1
        if record.default_candidates or record.metadata.get("candidates") is not None:
            return
        self._num_records += 1
        for answer in record.answer:
            if len(self._spellings) <= self._limit:
                self._spellings.setdefault(key(answer), Counter())[answer.strip()] += 1

    @property
    def closed(self) -> tuple[str, ...]:
        """The answers in alphabetical order; () where they are too many or too rarely the same."""
        distinct = len(self._spellings)
        if not 2 <= distinct <= self._limit or self._num_records < MIN_REPEATS * distinct:
            return ()
        return tuple(sorted(counts.most_common(1)[0][0] for counts in self._spellings.values()))

    @property
    def kinds(self) -> dict[str, int]:
        """Number of records by what their answer is: as `answer_kind` has it, or of the `closed` set of the data."""
        if not self.closed:
            return dict(self._kinds)
        counts = self._kinds - Counter(open=self._num_records)
        return {**counts, "closed": self._num_records}


def chosen_from(record: ReasoningRecord, closed: Sequence[str]) -> ReasoningRecord:
    """`record` with the `closed` set to choose from, and its answers spelled as there; itself if it says what is chosen
    from. An answer outside the set stays as it is, and no choice will be right."""
    if record.default_candidates or record.metadata.get("candidates") is not None or not closed:
        return record
    names = {key(name): name for name in closed}
    answers = tuple(names.get(key(answer), answer) for answer in record.answer)
    return replace(record, answer=answers, default_candidates=tuple(closed))


def key(answer: str) -> str:
    """Equal for answers that are one."""
    return " ".join(answer.split()).casefold()


def told_answers(kinds: Mapping[str, int], candidates: Sequence[str] = ()) -> str:
    """A line about the candidates of the answers; "" if all records use the domain's candidates."""
    spelled = {
        "domain": "choose among the domain's candidates",
        "closed": f"choose among the {len(candidates)} answers of the data ({_listed(candidates)})",
        "own": "among candidates of their own (metadata.candidates)",
        "open": "have free-text answers, which do not use the answer head",
    }
    found = [f"{kinds[name]} records {text}" for name, text in spelled.items() if kinds.get(name)]
    return f"answers: {', '.join(found)}" if set(kinds) - {"domain"} else ""


def _listed(names: Sequence[str]) -> str:
    shown = [f'"{name}"' if "," in name else name for name in names[:8]]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "")

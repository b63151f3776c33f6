"""Questions to be answered, and the answers collected so far, for every source except the rules.

Beside `data.json` lie `data.accepted.jsonl` (each accepted record with what it cost and the text it was read from) and
`data.rejected.jsonl` (each other answer with the reason). Both are written as the answers come in; `data.json` is made
from them at the end of a run, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.domain import Domain
from embervlm.data.record_pictures import is_inside
from embervlm.data.records import DataError, ReasoningRecord, read_records, record_to_json, write_dataset
from embervlm.data.shard import Shard
from embervlm.journal import Journal
from embervlm.robots.tasks import is_task_file, normalised_task, read_tasks
from embervlm.words.chain_text import parse_reasoning_text

SHOWN_REASONS = 3


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, with what is known about it."""

    key: str
    """Hash over id, instruction, picture and answer: the same question in the next run has the same key."""
    record: ReasoningRecord
    """The question as the input has it. `answer` is empty where it is not known, `steps` where there is no chain."""
    background: str = ""
    """What the input says about the robots, for the teacher; not part of the record."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, accepted or not."""

    key: str
    """`<question's key>:<sample>`; an accepted one appears once, a rejected one once for each attempt."""
    record: ReasoningRecord | None = None
    """The accepted record; None for a rejected answer."""
    reason: str = ""
    """Why it was rejected: `<kind>: <particulars>`."""
    details: dict[str, Any]
    """What it was read from, and what it cost under `usage`. JSON values."""


def read_questions(
    path: Path, domain: Domain, *, image_root: Path | None, shard: Shard, need_answers: bool
) -> list[Question]:
    """The shard's questions of a task file or of a file of records in any spelling; one that appears twice counts once.

    Args:
        need_answers: False admits records without `answer`.
    """
    if path.suffix == ".json" and is_task_file(values := _json(path)):
        found = []
        for number, (value, (text, gold)) in enumerate(zip(values, read_tasks(values, path))):
            metadata = {"split_group": f"task:{normalised_task(text)}"}
            record = ReasoningRecord(
                record_id=f"task-{number:06d}",
                image=None,
                instruction=f"{text} Which robots are suited?",
                steps=(),
                answer=gold,
                metadata=metadata,
                default_candidates=domain.candidates,
            )
            found.append((record, str(value.get("instruction", ""))))
    else:
        records = read_records(
            path,
            candidates=domain.candidates,
            image_root=image_root,
            require_reasoning=False,
            require_answer=need_answers,
        )
        found = [(record, "") for record in records]
    questions: dict[str, Question] = {}
    root = path.parent if image_root is None else image_root
    for record, background in found:
        said = record_to_json(replace(record, steps=(), metadata={}), root)
        key = hashlib.blake2b(json.dumps(said).encode(), digest_size=10).hexdigest()
        questions.setdefault(key, Question(key=key, record=record, background=background))
    if repeated := len(found) - len(questions):
        print(f"{path}: {repeated} records appear there twice; each is asked once")
    return list(shard.of(list(questions.values())))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None  # the record reader says what is wrong


def need_input(path: Path | None, what_for: str) -> Path:
    """`path`, or a ConfigError that says how to come by questions."""
    if path is None:
        raise ConfigError(
            f"{what_for}: needs questions; give a file of records or tasks with --input_dataset (embervlm data "
            "generate --teacher_model rules makes one)"
        )
    return path


def picture_root(output_file: Path, records: Sequence[ReasoningRecord], fallback: Path) -> Path:
    """What the pictures of `output_file` are relative to: its folder, or else `fallback`, and then it says so."""
    own = os.path.realpath(output_file.parent)
    if all(record.image is None or is_inside(record.image, own) for record in records):
        return output_file.parent
    print(f"{output_file}: its pictures are outside its folder; read it with --image_root {fallback}")
    return fallback


def finished_record(
    question: Question,
    sample: int,
    *,
    source: str,
    steps: Sequence[str],
    answer: tuple[str, ...],
    confidence: float | None = None,
    **metadata: Any,
) -> ReasoningRecord:
    """`question` with a new chain. What its metadata said about the old chain is left out."""
    origin = question.record
    kept = {key: value for key, value in origin.metadata.items() if key not in ("step_types", "seen")}
    return replace(
        origin,
        record_id=origin.record_id if sample == 0 else f"{origin.record_id}#{sample + 1}",
        steps=tuple(steps),
        answer=answer,
        confidence=confidence,
        metadata={**kept, "source": source, "origin": origin.record_id, "validated": True, **metadata},
    )


class Collection:
    """The answers to `questions` so far, on disk.

    Attributes:
        accepted: Key -> record in the unified spelling.
        num_rejected: Key -> answers rejected so far; `total_rejected` of all.
        usage: `prompt_tokens` and `completion_tokens` of all answers, those of earlier runs too.
        largest: The most of either that one answer took.
    """

    def __init__(
        self, output_file: Path, questions: Sequence[Question], *, image_root: Path, settings: dict[str, Any]
    ) -> None:
        self.output_file = output_file
        self._root = picture_root(output_file, [question.record for question in questions], image_root)
        self._order = {question.key: number for number, question in enumerate(questions)}
        self.accepted: dict[str, dict[str, Any]] = {}
        self.num_rejected: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.total_rejected = 0
        self._reasons: Counter[str] = Counter()
        self._chains: set[tuple[str, tuple[str, ...]]] = set()
        with ExitStack() as stack:
            try:
                self._accepted = stack.enter_context(Journal(output_file.with_suffix(".accepted.jsonl"), settings))
                self._rejected = stack.enter_context(Journal(output_file.with_suffix(".rejected.jsonl"), settings))
            except OSError as error:
                reason = f"{error.filename or output_file}: {error.strerror}"
                raise ConfigError(f"{reason}; choose an --output_file that can be written") from error
            self._journals = stack.pop_all()
        self.count(self._accepted.take())
        self.count(self._rejected.take())

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self._journals.close()

    def add(self, answers: Sequence[Answer]) -> None:
        """Put `answers` on disk, then count them."""
        self.count(self.put_on_disk(answers))

    def put_on_disk(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Entries for `count`, once they are on disk. May run in another thread, one call at a time."""
        accepted, rejected = [], []
        for answer in answers:
            if answer.record is not None:
                record = record_to_json(answer.record, self._root)
                accepted.append({"key": answer.key, "record": record, **answer.details})
            else:
                rejected.append({"key": answer.key, "reason": answer.reason, **answer.details})
        for journal, entries in ((self._accepted, accepted), (self._rejected, rejected)):
            try:
                if entries:
                    journal.append(entries)
            except OSError as error:
                raise DataError(
                    f"{journal.path}: {error.strerror}; the earlier content is intact. Free some space; "
                    f"the same command "
                    "continues"
                ) from error
        return [*accepted, *rejected]

    def count(self, entries: Sequence[dict[str, Any]]) -> None:
        for entry in entries:
            key = entry["key"]
            usage = Counter(entry.get("usage") or {})
            self.usage += usage
            self.largest |= usage
            if "reason" in entry:
                self.num_rejected[key] += 1
                self.total_rejected += 1
                self._reasons[entry["reason"].partition(":")[0]] += 1
            elif key.partition(":")[0] in self._order:  # else of a question that the input no longer holds
                self.accepted[key] = entry["record"]
                self.is_new_chain(key, parse_reasoning_text(entry["record"]["reasoning"]))

    def is_new_chain(self, key: str, steps: Sequence[str]) -> bool:
        """Whether the question has no such chain yet; from now on it has."""
        chain = (key.partition(":")[0], tuple(steps))
        known = chain in self._chains
        self._chains.add(chain)
        return not known

    def write(self, num_samples: int) -> int:
        """Write the output file, in the questions' order, with at most `num_samples` records; how many it holds."""
        if not self.accepted:
            raise DataError(f"{self.output_file}: not written, no answer was accepted; {self.rejections()}")
        records = [self.accepted[key] for key in sorted(self.accepted, key=self._place)[:num_samples]]
        write_dataset(self.output_file, records)
        return len(records)

    def _place(self, key: str) -> tuple[int, int]:
        question, _, sample = key.partition(":")
        return self._order[question], int(sample)

    def rejections(self) -> str:
        """How many answers were rejected, the commonest reasons, and where all of them are."""
        if not self._reasons:
            return "none rejected"
        common = ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(SHOWN_REASONS))
        return f"{self.total_rejected} rejected, see {self._rejected.path}: {common}"

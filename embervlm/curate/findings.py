"""The findings of a data set check, and the settings of the check."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embervlm.data.domain import NO_DOMAIN, Domain
from embervlm.data.lengths import Limits
from embervlm.data.records import ReasoningRecord

BYTES_PER_TOKEN = 4
"""For the estimate of a chain's tokens where no tokenizer is given."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding."""

    title: str
    stops_training: bool
    """Whether a record with it would stop a training run; else it trains, but teaches something wrong or nothing."""


KINDS: dict[str, Kind] = {
    "schema": Kind("Not readable, or fields missing, empty or of the wrong type", True),
    "markers": Kind("Unbalanced reasoning markers", True),
    "unknown_answer": Kind("Answers that are not among the candidates", True),
    "picture": Kind("Pictures missing or unreadable", True),
    "split": Kind("Unknown splits, or no training split", True),
    "picture_leak": Kind("The same picture in two splits", True),
    "too_long": Kind("Longer than max_reasoning_length or than the model reads", True),
    "duplicate_id": Kind("Ids used twice", True),
    "maybe_too_long": Kind("Probably too long (estimate)", False),
    "left_out": Kind("Augmented records that are too long, which training leaves out", False),
    "complexity": Kind("Complexities that a curriculum refuses", False),
    "picture_alike": Kind("Pictures in two splits that look the same", False),
    "text_leak": Kind("The same task in two splits", False),
    "conclusion": Kind("Conclusions that disagree with the answer", False),
    "contradiction": Kind("Steps that contradict each other or the facts", False),
    "repetition": Kind("Steps that repeat an earlier one", False),
    "unsupported": Kind("Steps that do not bear on the question", False),
    "numbering": Kind("Gaps in the numbering of steps", False),
    "conflict": Kind("The same question with two answers", False),
    "duplicate": Kind("Duplicates", False),
    "near_duplicate": Kind("Near duplicates", False),
    "given_away": Kind("Answers given away in the instruction", False),
    "guessable": Kind("Instructions that are answered without the picture", False),
}
"""Every kind of finding, the most serious first."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding about one record, or about the file where `number` is 0."""

    kind: str
    """A key of `KINDS`."""
    number: int
    """The record's, counted from 1; in JSONL the line."""
    field: str
    what: str
    fix: str
    other: int = 0
    """Number of the record it is compared with; 0 where there is none."""

    @property
    def stops_training(self) -> bool:
        return KINDS[self.kind].stops_training


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The settings of a data set check: the training flags of the same names."""

    domain: Domain = NO_DOMAIN
    """What the records are about: it says what an answer is chosen from where a record does not."""
    image_root: str | None = None
    """What image paths are relative to; None: the data file's folder."""
    allow_outside: bool = False
    max_reasoning_length: int = 512
    """Tokens of chain and answer."""
    positions: int | None = None
    """Of the language model, for picture and text; None: any number."""
    num_visual_tokens: int = 0
    tokenizer: str | None = None
    """Folder of the tokenizer that counts them."""
    chat_template: bool = True
    """Whether its chat template, if it has one, makes the prompts."""
    vocab_size: int | None = None
    """Without a tokenizer: of the one that a run trains on the records. None: an estimate."""
    require_reasoning: bool = True
    """Whether a record needs a chain; phase 3 learns from answers alone."""
    open_pictures: bool = True
    """Decode every picture; False only reads its bytes."""
    workers: int | None = None
    """Processes that open pictures; None: one per core."""
    unpack_dir: str | None = None
    """Folder for pictures that are contained in the records themselves; None refuses these."""

    @property
    def limits(self) -> Limits:
        return Limits(
            max_reasoning_length=self.max_reasoning_length,
            positions=self.positions,
            num_visual_tokens=self.num_visual_tokens,
        )

    @property
    def counted_with(self) -> str:
        if self.tokenizer is not None:
            return self.tokenizer
        return f"estimate: {BYTES_PER_TOKEN} bytes a token" if self.vocab_size is None else "as a run counts them"


@dataclass(kw_only=True)
class CheckedData:
    """A data set and all findings. The lists from `numbers` on are parallel, one entry per usable record."""

    path: Path
    num_values: int = 0
    """Records in the file, readable or not."""
    problems: list[Problem] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)
    """Number -> what stands in the file; where only the report needs it, of unreadable records alone."""
    where: dict[int, str] = field(default_factory=dict)
    """Number -> file and its own number or key there, where `path` names several files."""
    numbers: list[int] = field(default_factory=list)
    records: list[ReasoningRecord] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    """Of chain and answer with their markers, counted or estimated."""
    unused: Counter[str] = field(default_factory=Counter)
    """Fields that nothing reads, and in how many records they are."""
    pictures: dict[str, str] = field(default_factory=dict)
    """Path -> digest over its content, of the readable ones."""
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    """Digest -> how the picture looks from afar, of those that were decoded."""

    def add(self, kind: str, number: int, field: str, what: str, fix: str, other: int = 0) -> None:
        self.problems.append(Problem(kind=kind, number=number, field=field, what=what, fix=fix, other=other))


def problem_counts(problems: Sequence[Problem]) -> dict[str, int]:
    """Kind -> number of findings, for those that were found, the most serious first."""
    counts = Counter(problem.kind for problem in problems)
    return {name: counts[name] for name in KINDS if counts[name]}


def by_record(problems: Sequence[Problem]) -> Mapping[int, list[Problem]]:
    """Record number -> its findings."""
    found: dict[int, list[Problem]] = defaultdict(list)
    for problem in problems:
        found[problem.number].append(problem)
    return found

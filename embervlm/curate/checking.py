"""What is wrong with a data set: every finding with its record, field and fix. `validate` and `filter` stand on this.

Nothing here knows robots: what can be answered comes from the records, what can be claimed from their `metadata.facts`.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from embervlm.curate.duplicates import find_duplicates
from embervlm.data.curriculum import complexity_problem
from embervlm.data.facts import fact_domains
from embervlm.data.lengths import Limits, too_long
from embervlm.data.record_fields import unused_fields
from embervlm.data.record_pictures import PICTURE_NAMES
from embervlm.data.records import DataError, Reading, ReasoningRecord, no_records, read_values, record_to_json
from embervlm.data.sources import is_one_file, source_files, source_rules, source_values
from embervlm.data.splits import normalised_text, picture_digest, split_problem, splits_of
from embervlm.judge.contradiction import opposite_steps
from embervlm.judge.faults import judge_steps
from embervlm.judge.reading import ChainContext
from embervlm.progress import progress_bar
from embervlm.words.chain_text import CONCLUSION, number_lines, step_numbers
from embervlm.words.claims import is_conclusion, named_candidates

if TYPE_CHECKING:
    from embervlm.data.tokenizer import ReasoningTokenizer

REASONING = "reasoning"
BYTES_PER_TOKEN = 4
"""For the estimate of a chain's tokens where no tokenizer is given."""
MAX_DOMAIN_VALUES = 200
"""A fact with more values over the data set is free text, which no pattern can look for."""
MAX_DOMAINS = 300
"""Facts that chains are held against: the most common ones."""
GUESSABLE_RECORDS, GUESSABLE_SHARE = 10, 0.9
"""An instruction asked this often about pictures, with the same answer in this share, needs no picture."""
ITEMS_PER_WORKER = 500
"""Fewer pictures or chains are looked at faster in this process than another process starts."""
ITEMS_PER_CHUNK = 128
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A sort of finding."""

    title: str
    stops_training: bool
    """Whether a record with it would stop a training run; else it trains, but teaches something wrong or nothing."""


KINDS: dict[str, Kind] = {
    "schema": Kind(title="Fields missing, empty or of the wrong type", stops_training=True),
    "markers": Kind(title="Unbalanced reasoning markers", stops_training=True),
    "unknown_answer": Kind(title="Answers that are none of the candidates", stops_training=True),
    "picture": Kind(title="Pictures missing or unreadable", stops_training=True),
    "split": Kind(title="Unknown splits, or no training split", stops_training=True),
    "picture_leak": Kind(title="The same picture in two splits", stops_training=True),
    "too_long": Kind(title="Longer than max_reasoning_length or than the model reads", stops_training=True),
    "duplicate_id": Kind(title="Ids used twice", stops_training=True),
    "maybe_too_long": Kind(title="By estimate too long", stops_training=False),
    "left_out": Kind(title="Augmented records that are too long, which training leaves out", stops_training=False),
    "complexity": Kind(title="Complexities that a curriculum refuses", stops_training=False),
    "text_leak": Kind(title="The same task in two splits", stops_training=False),
    "conclusion": Kind(title="Conclusions that disagree with the answer", stops_training=False),
    "contradiction": Kind(title="Steps that contradict each other or the facts", stops_training=False),
    "repetition": Kind(title="Steps that repeat an earlier one", stops_training=False),
    "unsupported": Kind(title="Steps that do not bear on the question", stops_training=False),
    "numbering": Kind(title="Gaps in the numbering of steps", stops_training=False),
    "conflict": Kind(title="The same question with two answers", stops_training=False),
    "duplicate": Kind(title="Duplicates", stops_training=False),
    "near_duplicate": Kind(title="Near duplicates", stops_training=False),
    "given_away": Kind(title="Answers given away in the instruction", stops_training=False),
    "guessable": Kind(title="Instructions that are answered without the picture", stops_training=False),
}
"""Every kind of finding, the gravest first."""


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
    """What a data set is checked against: the training flags of the same names."""

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
    vocab_size: int | None = None
    """Without a tokenizer: of the one that a run trains on the records. None: an estimate."""

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

    open_pictures: bool = True
    """Decode every picture; False only reads its bytes."""
    workers: int | None = None
    """Processes that open pictures; None: one per core."""
    unpack_dir: str | None = None
    """Where pictures are written that stand in the records themselves; None refuses such."""


@dataclass(kw_only=True)
class CheckedData:
    """A data set and all that was found. The lists from `numbers` on are parallel, one entry per usable record."""

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

    def add(self, kind: str, number: int, field: str, what: str, fix: str, other: int = 0) -> None:
        self.problems.append(Problem(kind=kind, number=number, field=field, what=what, fix=fix, other=other))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of objects without a cycle among them: looking for one again and again takes longer than reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_garbage_collection()
def check_file(path: str | Path, options: CheckOptions, *, keep_values: bool = False) -> CheckedData:
    """Read `path` and look for every problem; `keep_values` keeps what stands in the file for all records.

    Raises:
        DataError: the file cannot be read at all, or holds no records.
        ConfigError: no readable tokenizer in `options.tokenizer`.
    """
    data = CheckedData(path=Path(path))
    _read(data, options, keep_values)
    _check_pictures(data, options)
    _drop_unusable(data)
    _check_splits(data)
    _check_chains(data, options)
    _check_repeats(data)
    _check_instructions(data)
    _check_lengths(data, options)
    order = {name: place for place, name in enumerate(KINDS)}
    data.problems.sort(key=lambda problem: (order[problem.kind], problem.number))
    return data


# ---- one record


def _read(data: CheckedData, options: CheckOptions, keep_values: bool) -> None:
    file_problems: list[str] = []
    for reading in progress_bar(_readings(data, options, file_problems), desc="read", unit=" records"):
        data.num_values += 1
        number, record = reading.number, reading.record
        if keep_values or record is None:
            data.values[number] = reading.value
        for problem in reading.problems:
            name, what, fix = _parts(problem)
            data.add(_kind_of(name, what), number, name, what, fix)
        if isinstance(reading.value, dict):
            _check_numbering(data, reading)
        if record is None:
            continue
        for kind_of_problem, found in (
            ("split", split_problem(record.metadata)),
            ("complexity", complexity_problem(record.metadata)),
        ):
            if found:
                name, what, fix = _parts(found)
                data.add(kind_of_problem, number, name, what, fix)
        if split_problem(record.metadata):
            data.values[number] = reading.value
            continue
        data.unused.update(unused_fields(record.metadata))
        data.numbers.append(number)
        data.records.append(record)
    for problem in file_problems:  # a broken line is no value
        data.num_values += 1
        text = problem.removeprefix(f"{data.path} ")
        line = None if data.where else re.search(r"(?:line|record) (\d+)", problem.removeprefix(str(data.path)))
        what, _, fix = (text if line is None else re.sub(r"^record \d+: ", "", text)).partition("; ")
        data.add("schema", int(line[1]) if line else 0, "", what, fix)
    if not data.num_values:
        raise no_records(data.path)


def _readings(data: CheckedData, options: CheckOptions, problems: list[str]) -> Iterator[Reading]:
    """Of one file, or of all that training would read under this name; these are then numbered through."""
    files, one_file = source_files(data.path), is_one_file(data.path)
    if not files or (options.unpack_dir is None and not one_file):
        raise DataError(f"{data.path}: no data file there; name one, a folder of shards, or a pattern of files")
    rules = source_rules(
        data.path, files, options.unpack_dir, image_root=options.image_root, allow_outside=options.allow_outside
    )

    def values() -> Iterator[tuple[int, str, Any]]:
        for file in files:
            for key, value in source_values(file, Path(options.unpack_dir or ""), problems, data.unused):
                number = int(key) if one_file else len(data.where) + 1
                if not one_file:
                    data.where[number] = f"{file} record {key}"
                yield number, f"{file.name}:{key}", value

    yield from read_values(values(), rules)


def _parts(problem: str) -> tuple[str, str, str]:
    """Field, what and fix of what the reader reports: `<field>: <what>; <fix>`."""
    what, _, fix = problem.rpartition("; ")
    name = re.match(r'[\w.]+(?=[: ])|"[^"]*"(?=:)', what)
    if name is None or name[0] == "is":  # of the record as a whole
        return "", what, fix
    rest = what[name.end() :]
    return name[0], rest.removeprefix(": ").strip(), fix


def _kind_of(name: str, what: str) -> str:
    if name.casefold() in PICTURE_NAMES:
        return "picture"
    if name == "answer" and " is not one of " in what:
        return "unknown_answer"
    if name == "id" and " is also the id of " in what:
        return "duplicate_id"
    return "markers" if what.startswith("unbalanced markers") else "schema"


def _check_numbering(data: CheckedData, reading: Reading) -> None:
    for name in ("reasoning", "reasoning_steps"):
        chain = reading.value.get(name)
        if isinstance(chain, list) and all(isinstance(line, str) for line in chain):
            chain = number_lines(chain)
        if not isinstance(chain, str):
            continue
        numbers = step_numbers(chain)
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                shown = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
                what = f"steps are numbered {shown}: {expected} is expected where {number} stands"
                data.add("numbering", reading.number, name, what, "number the steps 1, 2, 3, ...")
                break


# ---- pictures and splits


@dataclass(frozen=True)
class OpenedPicture:
    """What opening a picture gave: a digest over its content, or what is wrong."""

    digest: str = ""
    problem: str = ""


def open_picture(path: str, *, decode: bool = True) -> OpenedPicture:
    """Read the picture, and decode it as training does."""
    from embervlm.data.images import ImageError, load_image

    try:
        if decode:
            load_image(path)
        return OpenedPicture(digest=picture_digest(path))
    except ImageError as error:
        return OpenedPicture(problem=str(error))
    except OSError as error:
        return OpenedPicture(problem=f"{path}: {error.strerror}; correct the path, or drop the record")
    except MemoryError:
        return OpenedPicture(problem=f"{path}: does not fit into memory; scale it down")


def _check_pictures(data: CheckedData, options: CheckOptions) -> None:
    paths = list(dict.fromkeys(record.image for record in data.records if record.image is not None))
    unreadable: dict[str, str] = {}
    job = partial(open_picture, decode=options.open_pictures)
    for path, opened in zip(paths, _in_processes(job, paths, "pictures", options.workers)):
        if opened.problem:
            unreadable[path] = opened.problem
        else:
            data.pictures[path] = opened.digest
    for number, record in zip(data.numbers, data.records):
        if record.image in unreadable:
            what, _, fix = unreadable[record.image].rpartition("; ")
            data.add("picture", number, "image", what, fix)


def _in_processes(
    job: Callable[[_Item], _Found], items: Sequence[_Item], desc: str, workers: int | None
) -> Iterator[_Found]:
    """`job` of each item, in order."""
    bar = {"total": len(items), "desc": desc, "unit": f" {desc}"}
    workers = min(workers or os.cpu_count() or 1, len(items) // ITEMS_PER_WORKER)
    if workers < 2:
        yield from progress_bar(map(job, items), **bar)
        return
    try:
        # spawn: a forked process would carry a copy of all records
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from progress_bar(pool.map(job, items, chunksize=ITEMS_PER_CHUNK), **bar)
    except BrokenProcessPool as error:
        raise DataError(
            f"{desc}: a process was killed, perhaps for lack of memory; try again with --workers 1"
        ) from error


def _drop_unusable(data: CheckedData) -> None:
    """What stops training is not looked at further: other checks would stumble over it."""
    bad = {problem.number for problem in data.problems if problem.stops_training}
    for number, record in zip(data.numbers, data.records):
        if number in bad:
            data.values.setdefault(number, record_to_json(record))  # for the report's examples
    kept = [place for place, number in enumerate(data.numbers) if number not in bad]
    data.numbers = [data.numbers[place] for place in kept]
    data.records = [data.records[place] for place in kept]


def _check_splits(data: CheckedData) -> None:
    problems: list[str] = []  # pictures in two splits, which are found below with their record numbers
    data.splits = [str(split) for split in splits_of(data.records, data.pictures, problems)]
    if data.records and "train" not in data.splits:
        data.add("split", 0, "metadata.split", "no record falls into the train split", "add records")
    pictures: dict[str, int] = {}
    tasks: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(data.records):
        tasks[normalised_text(record.instruction)].append(place)
        if record.image is None:
            continue
        first = pictures.setdefault(data.pictures[record.image], place)
        if data.splits[first] != data.splits[place]:
            data.add(
                "picture_leak",
                data.numbers[place],
                "metadata.split",
                f"the picture stands in {data.splits[place]} here and in {data.splits[first]} "
                f"in record {data.numbers[first]}",
                "give both the same metadata.split",
                data.numbers[first],
            )
    for places in tasks.values():
        _check_text_leak(data, places)


def _check_text_leak(data: CheckedData, places: Sequence[int]) -> None:
    """`places` share an instruction. With pictures that is a leak only where it has one answer whatever they show."""
    if len({data.splits[place] for place in places}) == 1:
        return
    one_answer = len({frozenset(data.records[place].answer) for place in places}) == 1
    first = places[0]
    for place in places[1:]:
        with_pictures = data.records[place].image is not None and data.records[first].image is not None
        if data.splits[place] != data.splits[first] and (one_answer or not with_pictures):
            data.add(
                "text_leak",
                data.numbers[place],
                "instruction",
                f"stands in {data.splits[place]} here and in {data.splits[first]} in record {data.numbers[first]}"
                + (", with the same answer: it can be remembered" if one_answer else ""),
                "give both the same metadata.split_group",
                data.numbers[first],
            )


# ---- chains


def _checkable_facts(records: Sequence[ReasoningRecord]) -> dict[str, frozenset[str]]:
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


def _check_chains(data: CheckedData, options: CheckOptions) -> None:
    domains = _checkable_facts(data.records)
    jobs = []
    for record in data.records:
        known = (record.metadata.get("facts") or {}).items()
        facts = tuple((name, value) for name, value in known if name in domains)
        candidates = record.candidates
        jobs.append(ChainJob(record.instruction, record.steps, facts, candidates, record.answer))
    distinct = list(dict.fromkeys(jobs))  # many pictures may have one chain
    found = _in_processes(partial(check_chain, domains=domains), distinct, "chains", options.workers)
    findings = dict(zip(distinct, found))
    for number, job in zip(data.numbers, jobs):
        for finding in findings[job]:
            data.add(finding[0], number, *finding[1:])


def check_chain(job: ChainJob, *, domains: Mapping[str, frozenset[str]]) -> list[tuple[str, str, str, str]]:
    """Kind, field, what and fix of each finding in one chain and its question."""
    out: list[tuple[str, str, str, str]] = []
    answer = ", ".join(job.answer)
    context = ChainContext(
        instruction=job.instruction,
        facts=dict(job.facts),
        domains=domains,
        candidates=job.candidates,
        answer=job.answer,
    )
    for place, (text, fault) in enumerate(zip(job.steps, judge_steps(job.steps, context)), 1):
        step = "the conclusion" if text.startswith(CONCLUSION) else f"step {place}"
        if fault.contradicted:
            fix = "correct the step, or metadata.facts" if job.facts else "correct the step"
            out.append(("contradiction", "reasoning", f"{step} {fault.contradicted}", fix))
        if fault.redundant:
            out.append(("repetition", "reasoning", f"{step} {fault.redundant}", "drop the step"))
        if fault.unsupported and not is_conclusion(text):  # "Conclusion: five" need only name the answer
            fix = "name what it is about, or drop the step"
            out.append(("unsupported", "reasoning", f"{step} {fault.unsupported}", fix))
    if (opposite := opposite_steps(job.steps)) is not None:
        first, second = opposite
        what = f"step {second} says the opposite of " + (f"step {first}" if first != second else "itself")
        out.append(("contradiction", "reasoning", what, "correct one of the two"))
    if is_conclusion(last := job.steps[-1]):
        named = named_candidates(last.removeprefix(CONCLUSION), job.candidates)
        if named and named != set(job.answer):
            listed = ", ".join(name for name in job.candidates if name in named)
            what = f"the conclusion names {listed}, the answer is {answer}"
            out.append(("conclusion", "reasoning", what, "correct the one that is wrong"))
    named = named_candidates(job.instruction, job.candidates)
    if named and named == set(job.answer) and len(named) < len(job.candidates):
        what = f"names {answer} and no other candidate"
        out.append(("given_away", "instruction", what, "ask without the answer, or name every candidate"))
    return out


def _check_repeats(data: CheckedData) -> None:
    said = {
        "duplicate": ("says the same about the same picture as record", "drop one"),
        "near_duplicate": ("says almost the same about the same picture as record", "drop one, or make it differ"),
        "conflict": ("asks the same about the same picture as record", "keep the right one; its answer differs"),
    }
    for found in find_duplicates(data.records, data.pictures):
        what, fix = said[found.kind]
        first = data.numbers[found.first]
        name = "answer" if found.kind == "conflict" else "reasoning"
        data.add(found.kind, data.numbers[found.index], name, f"{what} {first}", fix, first)


def _check_instructions(data: CheckedData) -> None:
    """Instructions that many pictures share although their answer does not depend on them."""
    asked: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(data.records):
        if record.image is not None:
            asked[normalised_text(record.instruction)].append(place)
    for places in asked.values():
        answers = Counter(", ".join(data.records[place].answer) for place in places)
        answer, count = answers.most_common(1)[0]
        if len(places) >= GUESSABLE_RECORDS and count >= GUESSABLE_SHARE * len(places):
            what = f"has the answer {answer} in {count} of its {len(places)} records, whatever the picture shows"
            fix = "ask it about pictures with other answers"
            data.add("guessable", data.numbers[places[0]], "instruction", what, fix)


# ---- lengths


def _check_lengths(data: CheckedData, options: CheckOptions) -> None:
    if not data.records:
        return
    tokenizer = _tokenizer(data, options)
    counts = _estimated(data.records) if tokenizer is None else _counted(data, tokenizer)
    data.num_tokens = counts[REASONING][1][:, 1].tolist()
    seen: set[tuple[int, str]] = set()  # a record that is too long in two forms has one finding
    for form, (rows, sizes) in counts.items():
        for found in too_long(form, rows, sizes, options.limits):
            number, augmented = data.numbers[found.row], data.records[found.row].metadata.get("augmentation")
            if (number, found.field) not in seen:
                seen.add((number, found.field))
                name = "left_out" if augmented else "maybe_too_long" if tokenizer is None else "too_long"
                data.add(name, number, found.field, found.what, found.fix)


def _tokenizer(data: CheckedData, options: CheckOptions) -> ReasoningTokenizer | None:
    """What a run would count with, as far as that is known here."""
    if options.tokenizer is None and options.vocab_size is None:
        return None
    from embervlm.data.tokenizer import ReasoningTokenizer, tokenizer_of
    from embervlm.robots.rules import glossary

    if options.tokenizer is not None:
        return ReasoningTokenizer.from_folder(options.tokenizer)
    train = [record for record, split in zip(data.records, data.splits) if split == "train"]
    train.sort(key=lambda record: bool(record.metadata.get("augmentation")))  # as training has them
    return tokenizer_of(train, options.vocab_size or 0, glossary()) if train else None


def _counted(data: CheckedData, tokenizer: ReasoningTokenizer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Form -> the record of each text, and its tokens as `too_long` takes them."""
    from embervlm.data.dataset import encode_captions, encode_direct, encode_reasoning

    train = [place for place, split in enumerate(data.splits) if split == "train"]
    captions = encode_captions([data.records[place] for place in train], tokenizer)
    out = {
        found.form: (found.rows, found.sizes)
        for found in (encode_reasoning(data.records, tokenizer, 1), encode_direct(data.records, tokenizer))
    }
    return out | {captions.form: (np.array(train, int)[captions.rows], captions.sizes)}


def _estimated(records: Sequence[ReasoningRecord]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    def tokens(text: str) -> int:
        return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)

    sizes = [
        (
            tokens(record.instruction),
            4 + sum(1 + tokens(step) for step in record.steps) + tokens(", ".join(record.answer)),
        )  # 4 are around both
        for record in records
    ]
    return {REASONING: (np.arange(len(records)), np.array(sizes))}


# ---- what a report says


def problem_counts(problems: Sequence[Problem]) -> dict[str, int]:
    """Kind -> number of findings, for those that were found, the gravest first."""
    counts = Counter(problem.kind for problem in problems)
    return {name: counts[name] for name in KINDS if counts[name]}


def by_record(problems: Sequence[Problem]) -> Mapping[int, list[Problem]]:
    """Record number -> its findings."""
    found: dict[int, list[Problem]] = defaultdict(list)
    for problem in problems:
        found[problem.number].append(problem)
    return found

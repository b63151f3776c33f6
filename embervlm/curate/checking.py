"""The checks of a data set: every finding with its record, field and fix. `validate` and `filter` use this.

Nothing here knows robots: what can be answered comes from the records, what can be claimed from their `metadata.facts`.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from embervlm.curate.chain_checks import ChainJob, check_chain, checkable_facts
from embervlm.curate.duplicates import find_duplicates
from embervlm.curate.findings import BYTES_PER_TOKEN, KINDS, CheckedData, CheckOptions
from embervlm.curate.look_alikes import have_the_same_detail, pairs_from_afar, thumbnail
from embervlm.data.curriculum import complexity_problem
from embervlm.data.lengths import too_long
from embervlm.data.record_fields import unused_fields
from embervlm.data.record_pictures import PICTURE_NAMES
from embervlm.data.records import DataError, Reading, ReasoningRecord, no_records, read_values, record_to_json
from embervlm.data.sources import is_one_file, named_splits, source_files, source_rules, source_values
from embervlm.data.splits import SPLITS, normalised_text, picture_digest, split_problem, splits_of
from embervlm.data.tables import label_of, with_split
from embervlm.progress import progress_bar
from embervlm.words.chain_text import number_lines, step_numbers

if TYPE_CHECKING:
    from embervlm.data.tokenizer import ReasoningTokenizer

REASONING = "reasoning"
GUESSABLE_RECORDS, GUESSABLE_SHARE = 10, 0.9
"""An instruction asked this often about pictures, with the same answer in this share, needs no picture."""
ITEMS_PER_WORKER = 500
"""Fewer pictures or chains are looked at faster in this process than another process starts."""
ITEMS_PER_CHUNK = 128
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


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
    """Read `path` and look for every problem; `keep_values` keeps the values in the file for all records.

    Raises:
        DataError: the file cannot be read at all, or holds no records.
        ConfigError: no readable tokenizer in `options.tokenizer`.
    """
    data = CheckedData(path=Path(path))
    _read(data, options, keep_values)
    for check in CHECKS:
        check(data, options)
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
        of_metadata = {"split": split_problem(record.metadata), "complexity": complexity_problem(record.metadata)}
        for name, problem in of_metadata.items():
            if problem:
                data.add(name, number, *_parts(problem))
        if of_metadata["split"]:
            data.values[number] = reading.value
            continue
        data.unused.update(unused_fields(record.metadata))
        data.numbers.append(number)
        data.records.append(record)
    broken: set[str] = set()  # the places without a value; one may have several problems
    for problem in file_problems:
        text = problem.removeprefix(f"{data.path} ")
        counted = r"(?:line|record) (\d+)" if data.path.suffix == ".jsonl" else r"^record (\d+)"  # a list has no lines
        line = None if data.where else re.search(counted, text)
        if place := re.match(r".*? (?:line|record) [^\s:]+|", text) if data.where else line:
            broken.add(place[0] or text)
        what, _, fix = (text if line is None else re.sub(r"^record \d+: ", "", text)).partition("; ")
        data.add("schema", int(line[1]) if line else 0, "", what, fix)
    data.num_values += len(broken)
    if not data.num_values:
        raise no_records(data.path)


def _readings(data: CheckedData, options: CheckOptions, problems: list[str]) -> Iterator[Reading]:
    """Of one file, or of all that training would read under this name; these are then numbered through."""
    files, one_file = source_files(data.path), is_one_file(data.path)
    if not files or (options.unpack_dir is None and not one_file):
        raise DataError(
            f"{data.path}: no data file there; give a data file, a pattern of files, or a folder of shards or of "
            "train.jsonl, val.jsonl and test.jsonl"
        )
    rules = source_rules(
        data.path,
        files,
        options.unpack_dir,
        candidates=options.domain.candidates,
        image_root=options.image_root,
        allow_outside=options.allow_outside,
        require_reasoning=options.require_reasoning,
    )

    splits = named_splits(files)

    def values() -> Iterator[tuple[int, str, Any]]:
        for file in files:
            for key, value in source_values(file, Path(options.unpack_dir or ""), problems, data.unused):
                number = int(key) if one_file else len(data.where) + 1
                if not one_file:
                    data.where[number] = f"{file} record {key}"
                yield number, f"{label_of(file)}:{key}", with_split(value, splits.get(file))

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
                what = f"steps are numbered {shown}: {expected} is expected instead of {number}"
                data.add("numbering", reading.number, name, what, "number the steps 1, 2, 3, ...")
                break


# ---- pictures and splits


class Opened(NamedTuple):
    """A picture of the data, or why it cannot be one."""

    digest: str = ""
    """Over its content."""
    problem: str = ""
    thumbnail: bytes = b""
    """See `look_alikes`; none where it was not decoded."""


def open_picture(path: str, *, decode: bool = True) -> Opened:
    """Decoded as in training."""
    from embervlm.data.images import ImageError, load_image

    try:
        seen = thumbnail(load_image(path)).tobytes() if decode else b""
        return Opened(picture_digest(path), thumbnail=seen)
    except ImageError as error:
        return Opened(problem=str(error))
    except OSError as error:
        return Opened(problem=f"{path}: {error.strerror}; correct the path, or drop the record")
    except MemoryError:
        return Opened(problem=f"{path}: does not fit into memory; make it smaller")


def _check_pictures(data: CheckedData, options: CheckOptions) -> None:
    paths = list(dict.fromkeys(record.image for record in data.records if record.image is not None))
    unreadable: dict[str, str] = {}
    job = partial(open_picture, decode=options.open_pictures)
    for path, opened in zip(paths, _in_processes(job, paths, "pictures", options.workers), strict=True):
        if opened.problem:
            unreadable[path] = opened.problem
        else:
            data.pictures[path] = opened.digest
        if opened.thumbnail:
            data.thumbnails.setdefault(opened.digest, opened.thumbnail)
    for number, record in zip(data.numbers, data.records):
        if record.image in unreadable:
            what, _, fix = unreadable[record.image].rpartition("; ")
            data.add("picture", number, "image", what, fix)


def _drop_unusable(data: CheckedData, _: CheckOptions) -> None:
    """What stops training is not looked at further: other checks would stumble over it."""
    bad = {problem.number for problem in data.problems if problem.stops_training}
    for number, record in zip(data.numbers, data.records):
        if number in bad:
            data.values.setdefault(number, record_to_json(record))  # for the report's examples
    kept = [place for place, number in enumerate(data.numbers) if number not in bad]
    data.numbers = [data.numbers[place] for place in kept]
    data.records = [data.records[place] for place in kept]


def _check_splits(data: CheckedData, _: CheckOptions) -> None:
    problems: list[str] = []  # pictures in two splits, which are found below with their record numbers
    data.splits = [str(split) for split in splits_of(data.records, data.pictures, problems)]
    if data.records and "train" not in data.splits:
        data.add("split", 0, "metadata.split", "no record is in the train split", "add records")
    pictures: dict[str, int] = {}
    for place, record in enumerate(data.records):
        if record.image is not None:
            first = pictures.setdefault(data.pictures[record.image], place)
            if data.splits[first] != data.splits[place]:
                _add_leak(data, "picture_leak", place, first)


def _check_look_alikes(data: CheckedData, _: CheckOptions) -> None:
    """Pictures in two splits that were saved again: what is learned of one answers the other, and no bytes tell so."""
    from embervlm.data.images import load_image

    first: dict[str, int] = {}
    for place, record in enumerate(data.records):
        if record.image is not None and (digest := data.pictures[record.image]) in data.thumbnails:
            first.setdefault(digest, place)
    places = list(first.values())
    thumbnails = np.array([np.frombuffer(data.thumbnails[digest], np.uint8) for digest in first])
    order = [SPLITS.index(data.splits[place]) for place in places]
    for row, other in pairs_from_afar(thumbnails, order):
        pair = places[row], places[other]
        pictures = [load_image(str(data.records[place].image)) for place in pair]
        if have_the_same_detail(*pictures) and not _are_told_apart(data, *pair):
            _add_leak(data, "picture_alike", *pair)


def _are_told_apart(data: CheckedData, one: int, other: int) -> bool:
    """Whether the two records ask the same and are answered differently, so that their pictures do differ."""
    a, b = data.records[one], data.records[other]
    return normalised_text(a.instruction) == normalised_text(b.instruction) and set(a.answer) != set(b.answer)


def _add_leak(data: CheckedData, kind: str, place: int, first: int, more: str = "") -> None:
    """The record at `place` stands in another split than that at `first`, which says the same."""
    says_itself = data.records[place].metadata.get("split") or data.records[first].metadata.get("split")
    split = "metadata.split" if says_itself else "metadata.split_group"
    name, what, fix = {
        "picture_leak": ("metadata.split", "the picture is", "give both the same metadata.split"),
        "picture_alike": ("image", "looks the same", f"give both the same {split}"),
        "text_leak": ("instruction", "stands", f"give both the same {split}"),
    }[kind]
    number = data.numbers[first]
    where = f"in {data.splits[place]} here and in {data.splits[first]} in record {number}{more}"
    data.add(kind, data.numbers[place], name, f"{what} {where}", fix, number)


def _check_instructions(data: CheckedData, _: CheckOptions) -> None:
    """Instructions that stand in two splits, or that many pictures share although these do not change the answer."""
    tasks: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(data.records):
        tasks[normalised_text(record.instruction)].append(place)
    for places in tasks.values():
        _check_text_leak(data, places)
        pictured = [place for place in places if data.records[place].image is not None]
        answers = Counter(", ".join(data.records[place].answer) for place in pictured)
        if len(pictured) >= GUESSABLE_RECORDS and max(answers.values()) >= GUESSABLE_SHARE * len(pictured):
            answer, count = answers.most_common(1)[0]
            what = f"has the answer {answer} in {count} of its {len(pictured)} records, whatever the picture shows"
            fix = "ask it about pictures with other answers"
            data.add("guessable", data.numbers[pictured[0]], "instruction", what, fix)


def _check_text_leak(data: CheckedData, places: Sequence[int]) -> None:
    """`places` share an instruction. With pictures that is a leak only where it has one answer whatever they show."""
    if len({data.splits[place] for place in places}) == 1:
        return
    one_answer = len({frozenset(data.records[place].answer) for place in places}) == 1
    first = places[0]
    for place in places[1:]:
        with_pictures = data.records[place].image is not None and data.records[first].image is not None
        if data.splits[place] != data.splits[first] and (one_answer or not with_pictures):
            more = ", with the same answer: it can be remembered" if one_answer else ""
            _add_leak(data, "text_leak", place, first, more)


# ---- chains


def _check_chains(data: CheckedData, options: CheckOptions) -> None:
    domains = checkable_facts(data.records)
    jobs = [ChainJob.of(record, domains) for record in data.records]
    distinct = list(dict.fromkeys(jobs))  # many pictures may have one chain
    found = _in_processes(partial(check_chain, domains=domains), distinct, "chains", options.workers)
    findings = dict(zip(distinct, found, strict=True))
    for number, job in zip(data.numbers, jobs):
        for kind, name, what, fix in findings[job]:
            data.add(kind, number, name, what, fix)


def _check_repeats(data: CheckedData, _: CheckOptions) -> None:
    said = {
        "duplicate": ("reasoning", "says the same about the same picture as record", "drop one"),
        "near_duplicate": (
            "reasoning",
            "says almost the same about the same picture as record",
            "drop one, or make it differ",
        ),
        "conflict": (
            "answer",
            "asks the same about the same picture as record",
            "keep the right one; its answer differs",
        ),
    }
    for found in find_duplicates(data.records, data.pictures):
        name, what, fix = said[found.kind]
        first = data.numbers[found.first]
        data.add(found.kind, data.numbers[found.index], name, f"{what} {first}", fix, first)


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
    from embervlm.data.tokenizer import TEXT_FORMAT, ReasoningTokenizer, tokenizer_of

    if options.tokenizer is not None:
        tokenizer = ReasoningTokenizer.from_folder(options.tokenizer)
        tokenizer.use(TEXT_FORMAT, tokenizer.chat_prompt() if options.chat_template else None)
        return tokenizer
    train = [record for record, split in zip(data.records, data.splits) if split == "train"]
    train.sort(key=lambda record: bool(record.metadata.get("augmentation")))  # as training has them
    return tokenizer_of(train, options.vocab_size or 0, options.domain.glossary) if train else None


def _counted(data: CheckedData, tokenizer: ReasoningTokenizer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Form -> the record of each text, and its tokens as `too_long` takes them."""
    from embervlm.data.dataset import encode_captions, encode_direct, encode_reasoning
    from embervlm.data.samples import Grid

    train = [place for place, split in enumerate(data.splits) if split == "train"]
    captions = encode_captions([data.records[place] for place in train], tokenizer)
    out = {
        found.form: (found.rows, found.sizes)
        for found in (encode_reasoning(data.records, tokenizer, Grid(1, 1)), encode_direct(data.records, tokenizer))
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


CHECKS: tuple[Callable[[CheckedData, CheckOptions], None], ...] = (
    _check_pictures,
    _drop_unusable,
    _check_splits,
    _check_look_alikes,
    _check_chains,
    _check_repeats,
    _check_instructions,
    _check_lengths,
)
"""What is looked for once all records are read, in this order: later ones use what earlier ones found."""


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

"""A data set prepared once: its checked records on disk, read one at a time, and arrays over all records."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload
from uuid import uuid4

import numpy as np

from embervlm.data.answer_space import AnswerSpace, key
from embervlm.data.images import files_digest
from embervlm.data.lazy import Lazy
from embervlm.data.record_fields import COMPOSED_OF, FieldRules, quote, unused_fields
from embervlm.data.records import DataError, ReasoningRecord, no_records, read_record
from embervlm.data.sources import named_splits, source_files, source_rules, source_values
from embervlm.data.splits import SPLITS, Split, SplitTable, readable_digest, text_hash
from embervlm.data.tables import label_of, with_split
from embervlm.progress import progress_bar
from embervlm.run_dir import naming_unwritten, read_object, remove_tree, write_json_atomic

STORE_FORMAT = 7
_PART = ".tmp-records-"
LEFTOVER_S = 86_400.0
"""A half-prepared store that nobody has written to for so long is of a killed run."""
REMEMBERED_RECORDS = 8192
"""Parsed records that are kept, about 3 KB each; reading one again costs about 20 microseconds."""
MARKED = ("facts", "scene", "boxes", "caption", "augmentation")
"""Fields of the metadata of which it is known, without reading the record, whether it has them."""
_COLUMNS = {"offsets": np.int64, "pictures": np.uint64, "questions": np.uint64, "marks": np.uint8, "splits": np.uint8}


class RecordStore:
    """The records of one prepared data set, in a folder:

    `records.jsonl`: one checked record per line, its picture's path resolved. One `.npy` per column:
    `offsets` (where each line starts, and the end), `pictures` (hash of the path, 0 for none), `questions` (hash of the
    instruction), `marks` (a bit for each of `MARKED`), `splits`. `store.json` is written last.
    """

    def __init__(self, folder: Path, candidates: Sequence[str] | None = None) -> None:
        """`candidates`: the domain's, of a store that is still being written; else they are read."""
        self.folder = folder
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._num_records, self._first_offset = len(offsets) - 1, offsets.offset
        # read, not mapped: mapped pages count as this process's memory, and an epoch touches all
        self._file, self._offsets = (os.open(folder / name, os.O_RDONLY) for name in ("records.jsonl", "offsets.npy"))
        for file in (self._file, self._offsets):
            weakref.finalize(self, os.close, file)
        kept = read_object(folder / "store.json")["candidates"] if candidates is None else candidates
        self.candidates: tuple[str, ...] = tuple(kept)
        """The choices for an answer if its record gives none."""
        self._spelled = {key(name): name for name in self.candidates}
        self.record = lru_cache(maxsize=REMEMBERED_RECORDS)(self._record)

    def __len__(self) -> int:
        return self._num_records

    @property
    def unused(self) -> dict[str, int]:
        """Fields of records, and members of shards, that nothing reads, and in how many records they are."""
        counts: dict[str, int] = read_object(self.folder / "store.json")["unused"]
        return counts

    @property
    def several_pictures(self) -> dict[str, int]:
        """Number of records with several pictures, by how many they have."""
        counts: dict[str, int] = read_object(self.folder / "store.json")["several_pictures"]
        return counts

    @property
    def answer_kinds(self) -> dict[str, int]:
        """Records by what their answer is: of the `domain`'s candidates, of the `closed` set of the
        data, of their `own`, or `open`."""
        counts: dict[str, int] = read_object(self.folder / "store.json")["answer_kinds"]
        return counts

    def column(self, name: str) -> np.ndarray:
        """A value for each record, read anew: the whole column is seldom needed, and then for a moment."""
        values: np.ndarray = np.load(self.folder / f"{name}.npy")
        return values

    def _record(self, row: int) -> ReasoningRecord:
        size = np.dtype(_COLUMNS["offsets"]).itemsize
        found = os.pread(self._offsets, 2 * size, self._first_offset + row * size)
        start, end = np.frombuffer(found, _COLUMNS["offsets"]).tolist()
        try:
            fields = json.loads(os.pread(self._file, end - start, start))
        except ValueError as error:
            raise DataError(f"{self.folder}: damaged at record {row + 1} ({error}); delete the folder") from error
        lists = {name: tuple(fields[name]) for name in ("steps", "answer")}
        if self._spelled and fields["metadata"].get("candidates") is None:
            lists["answer"] = tuple(self._spelled.get(key(answer), answer) for answer in lists["answer"])
        return ReasoningRecord(**{**fields, **lists}, default_candidates=self.candidates)

    def split(self, name: Split) -> RecordView:
        """The records of a split, in the order of the data set."""
        return RecordView(self, np.flatnonzero(self.column("splits") == SPLITS.index(name)).astype(np.int32))

    def all(self) -> RecordView:
        return RecordView(self, np.arange(len(self), dtype=np.int32))


class RecordView(Lazy[ReasoningRecord]):
    """Some records of a store, parsed when they are asked for."""

    def __init__(self, store: RecordStore, rows: np.ndarray) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ReasoningRecord: ...
    @overload
    def __getitem__(self, index: slice) -> RecordView: ...
    def __getitem__(self, index: int | slice) -> ReasoningRecord | RecordView:
        if isinstance(index, slice):
            return self.take(index)
        return self.item(index)

    def item(self, place: int) -> ReasoningRecord:
        return self.store.record(int(self.rows[place]))

    def take(self, places: np.ndarray | slice) -> RecordView:
        return RecordView(self.store, self.rows[places])

    def column(self, name: str) -> np.ndarray:
        values: np.ndarray = self.store.column(name)[self.rows]
        return values

    def file(self, name: str, *parts: str) -> Path:
        """Where an array about just these records and `parts` is kept."""
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=12)
        digest.update(self.rows.tobytes())
        return self.store.folder / f"{name}-{digest.hexdigest()}.npy"


def kept_array(path: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """`make()`, kept in the file `path`, where there is one, and read from there again each time.

    Do not hold on to it: pages of the file that were read count as this process's memory.
    """
    if path is None:
        return make()
    if not path.exists():
        _save_array(path, make())
    values: np.ndarray = np.load(path, mmap_mode="r")
    return values


def _save_array(path: Path, values: np.ndarray) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f".tmp-{uuid4().hex}.npy")
    try:
        with naming_unwritten(path):
            np.save(part, values)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- what concerns all records, without reading them where they stand in a store


def picture_hashes(records: Sequence[ReasoningRecord]) -> np.ndarray:
    """Hash of each record's picture path, uint64; 0 for none."""
    if isinstance(records, RecordView):
        return records.column("pictures")
    return np.array([text_hash(r.image) if r.image is not None else 0 for r in records], np.uint64)


def question_hashes(records: Sequence[ReasoningRecord]) -> np.ndarray:
    """Hash of what each record asks, uint64."""
    if isinstance(records, RecordView):
        return records.column("questions")
    return np.array([text_hash(record.asked) for record in records], np.uint64)


def has_field(records: Sequence[ReasoningRecord], name: str) -> np.ndarray:
    """Whether each record's metadata hold something under `name`, one of `MARKED`."""
    if isinstance(records, RecordView):
        return (records.column("marks") & (1 << MARKED.index(name))) > 0
    return np.array([bool(record.metadata.get(name)) for record in records], bool)


def with_fields(records: Sequence[ReasoningRecord], *names: str) -> Iterator[ReasoningRecord]:
    """The records whose metadata hold something under one of `names`, all of `MARKED`."""
    if not len(records):
        return
    found = np.logical_or.reduce([has_field(records, name) for name in names])
    for place in np.flatnonzero(found):
        yield records[int(place)]


def picture_paths(records: Sequence[ReasoningRecord], *, sources: bool = False) -> Iterator[str]:
    """The distinct pictures of records, in the order in which they come first.

    With `sources` each composite is followed by the pictures that it is made of.
    """
    hashes = picture_hashes(records)
    pictured = np.flatnonzero(hashes)
    first = np.unique(hashes[pictured], return_index=True)[1]
    for place in pictured[np.sort(first)]:
        record = records[int(place)]
        assert record.image is not None
        yield record.image
        if sources:
            yield from record.metadata.get(COMPOSED_OF) or ()


# ---- preparing


def prepare(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    *,
    ready_in: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] = (),
    max_closed_answers: int = 0,
    image_root: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
    require_reasoning: bool = True,
    require_answer: bool = True,
) -> RecordStore:
    """The checked and split records of a data file, of Parquet files or of shards; kept in `cache_dir`.

    Memory grows by about 80 bytes a record. What was prepared counts as long as the files, the options and the pictures
    are what they were, by time and length. Several may prepare the same at a time: the first to end counts.
    Args:
        ready_in: a folder in which they may have been prepared already; nothing is written there.
        candidates, require_reasoning, require_answer: see `read_records`.
        max_closed_answers: without `candidates`, the most distinct answers that are a set to choose from; see
            `AnswerSpace`.
    Raises:
        DataError: with every problem of the data, as `read_records`, or of their splits, as `split_records`.
        WriteError: the cache cannot be written.
    """
    path, cache_dir = Path(path), Path(cache_dir)
    if not (files := source_files(path)):
        raise DataError(f"{path}: no such file; give a data file, a folder of shards, or a pattern of files")
    admitted = [
        name for name, wanted in (("chainless", require_reasoning), ("unanswered", require_answer)) if not wanted
    ]
    digest = _source_digest(
        files, image_root and os.path.realpath(image_root), allow_outside, max_closed_answers, *candidates, *admitted
    )
    folder, part = cache_dir / f"records-{digest}", cache_dir / f"{_PART}{digest}-{uuid4().hex[:12]}"
    for ready in (folder, Path(ready_in) / folder.name) if ready_in is not None else (folder,):
        if (store := _open(ready)) is not None:
            return store
    unpack_dir = cache_dir / f"pictures-{digest}"
    rules = source_rules(
        path,
        files,
        unpack_dir,
        candidates=candidates,
        image_root=image_root,
        allow_outside=allow_outside,
        require_reasoning=require_reasoning,
        require_answer=require_answer,
    )
    _delete_leftovers(cache_dir)
    source = _Source(path=path, files=files, unpack_dir=unpack_dir, rules=rules)
    try:
        with naming_unwritten(folder):
            part.mkdir(parents=True)
        _write(source, part, max_closed_answers)
        with naming_unwritten(folder):
            _put_in_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return RecordStore(folder)


def _put_in_place(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`, unless another run has prepared `folder` meanwhile and reads it already."""
    aside = part.with_name(f"{part.name}-replaced")
    while True:
        try:
            os.rename(part, folder)  # fails where a folder with files is: nobody's finished work is deleted unseen
            return
        except OSError:
            if not os.path.lexists(folder):
                raise
        if _open(folder) is not None:
            return
        with suppress(FileNotFoundError):  # another run has just done this
            os.rename(folder, aside)
            remove_tree(aside)


def _delete_leftovers(cache_dir: Path) -> None:
    """What killed runs left half-done. What was written lately may be another run's that lives."""
    for part in cache_dir.glob(f"{_PART}*"):
        times = [path.stat().st_mtime for path in (part, *part.iterdir()) if path.exists()]
        if time.time() - max(times, default=0) > LEFTOVER_S:
            shutil.rmtree(part, ignore_errors=True)


def _source_digest(files: Sequence[Path], *options: Any) -> str:
    found = []
    for file in files:
        try:
            about = os.stat(file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; check the path and that it can be read") from error
        found.append([os.path.realpath(file), about.st_mtime_ns, about.st_size])
    return hashlib.blake2b(json.dumps([STORE_FORMAT, found, options]).encode(), digest_size=12).hexdigest()


def _open(folder: Path) -> RecordStore | None:
    try:
        about = read_object(folder / "store.json", "pictures")
        store = RecordStore(folder)
        lengths = {len(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _COLUMNS if name != "offsets"}
    except (OSError, ValueError, EOFError):
        return None  # absent or damaged: built again
    if lengths != {len(store)}:
        return None
    return store if about["pictures"] == files_digest(picture_paths(store.all(), sources=True)) else None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The settings from which a store is made."""

    path: Path
    files: Sequence[Path]
    unpack_dir: Path
    rules: FieldRules

    def records(self, problems: list[str], unused: Counter[str]) -> Iterator[tuple[Path, int | str, ReasoningRecord]]:
        """Every good record with its file and its number or key there; what is wrong with others goes to `problems`.

        Members of shards that nothing reads are counted in `unused`.
        """
        splits = named_splits(self.files)
        for file in self.files:
            for number, given in source_values(file, self.unpack_dir, problems, unused):
                found: list[str] = []
                value = with_split(given, splits.get(file))
                record = read_record(value, f"{label_of(file)}:{number}", self.rules, found.append)
                problems += [f"{file} record {number}: {problem}" for problem in found]
                if record is not None:
                    yield file, number, record


def _write(source: _Source, folder: Path, max_closed_answers: int) -> None:
    """Fill `folder` as `RecordStore` describes it."""
    problems: list[str] = []
    table, offsets, questions, marks = SplitTable(problems=problems), array("q", [0]), array("Q"), bytearray()
    ids, space, unused, several = array("Q"), AnswerSpace(max_closed_answers), Counter[str](), Counter[str]()
    with (
        naming_unwritten(folder / "records.jsonl"),
        open(folder / "records.jsonl", "wb") as file,
        progress_bar(desc=f"check {source.path.name}", unit="record", delay=2) as bar,
    ):
        for origin, number, record in source.records(problems, unused):
            bar.update()
            unused.update(unused_fields(record.metadata))
            space.add(record)
            if pictures := record.metadata.get(COMPOSED_OF):
                several[str(len(pictures))] += 1
            ids.append(text_hash(record.record_id))
            own = {name: value for name, value in record.__dict__.items() if name != "default_candidates"}
            try:
                line = json.dumps(own, allow_nan=False).encode() + b"\n"
            except (TypeError, ValueError, RecursionError) as error:
                problems.append(f"{origin} record {number}: metadata: {error}; use only JSON values")
                continue
            table.add(record)
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            questions.append(text_hash(record.asked))
            marks.append(sum(1 << bit for bit, name in enumerate(MARKED) if record.metadata.get(name)))
    problems += _repeated_ids(np.frombuffer(ids, np.uint64), source)
    if problems:
        raise DataError.of(problems)
    if not ids:
        raise no_records(source.path)
    columns: dict[str, Any] = {"offsets": offsets, "pictures": table.picture, "questions": questions, "marks": marks}
    candidates = source.rules.candidates
    about: dict[str, Any] = {"unused": unused, "several_pictures": several, "answer_kinds": space.kinds}
    about["candidates"] = candidates or space.closed
    with naming_unwritten(folder):
        for name, values in columns.items():
            np.save(folder / f"{name}.npy", np.frombuffer(values, _COLUMNS[name]))
        np.save(folder / "splits.npy", np.zeros(len(marks), np.uint8))  # the store is read to decide on them
        store = RecordStore(folder, candidates).all()
        splits = table.assign(store, partial(readable_digest, problems=problems))
        if problems:
            raise DataError.of(problems)
        np.save(folder / "splits.npy", splits)
        pictures = files_digest(picture_paths(store, sources=True))
        write_json_atomic(folder / "store.json", {"format": STORE_FORMAT, "pictures": pictures, **about})


def _repeated_ids(ids: np.ndarray, source: _Source) -> list[str]:
    """What to say of each record whose id another has; the data are read once more only where there is one."""
    values, counts = np.unique(ids, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    problems: list[str] = []
    firsts: dict[str, tuple[Path, int | str]] = {}
    for file, number, record in source.records([], Counter()) if repeated else ():
        if text_hash(record.record_id) not in repeated:
            continue
        first_file, first = firsts.setdefault(record.record_id, (file, number))
        if (first_file, first) != (file, number):
            where = first if first_file == file else f"{first} of {first_file}"
            problems.append(
                f"{file} record {number}: id: {quote(record.record_id)} is also the id of record {where}; "
                "give each its own"
            )
    return problems

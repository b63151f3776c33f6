"""A data file prepared once: its checked records on disk, read one at a time, and arrays of what concerns them all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload
from uuid import uuid4

import numpy as np

from embervlm.config import ConfigError
from embervlm.data.images import files_digest
from embervlm.data.records import DataError, ReasoningRecord, iter_records
from embervlm.data.shards import source_files
from embervlm.data.splits import SPLITS, Split, SplitTable, text_hash
from embervlm.progress import progress_bar
from embervlm.run_dir import new_tmp_dir, read_json, write_json_atomic

STORE_FORMAT = 1
REMEMBERED_RECORDS = 4096
"""Parsed records that are kept; reading one again costs about 20 microseconds."""
MARKED = ("facts", "boxes", "caption")
"""Fields of the metadata of which it is known, without reading the record, whether it has them."""
_COLUMNS = {"offsets": np.int64, "pictures": np.uint64, "questions": np.uint64, "marks": np.uint8, "splits": np.uint8}


class RecordStore:
    """The records of one prepared file. A folder:

    `records.jsonl`: one checked record per line, its picture's path resolved. One `.npy` per column, memory-mapped:
    `offsets` (where each line starts, and the end), `pictures` (hash of the path, 0 for none), `questions` (hash of the
    instruction), `marks` (a bit for each of `MARKED`), `splits`. `store.json` is written last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
        # read, not mapped: mapped pages count as this process's memory, and an epoch touches all
        self._file = open(folder / "records.jsonl", "rb")
        self.record = lru_cache(maxsize=REMEMBERED_RECORDS)(self._record)

    def __len__(self) -> int:
        return len(self.columns["splits"])

    def _record(self, row: int) -> ReasoningRecord:
        start, end = (int(offset) for offset in self.columns["offsets"][row : row + 2])
        fields = json.loads(os.pread(self._file.fileno(), end - start, start))
        return ReasoningRecord(**{**fields, "steps": tuple(fields["steps"]), "answer": tuple(fields["answer"])})

    def split(self, name: Split) -> RecordView:
        """The records of a split, in the order of the file."""
        return RecordView(self, np.flatnonzero(self.columns["splits"] == SPLITS.index(name)).astype(np.int32))

    def splits(self) -> dict[str, RecordView]:
        return {name: self.split(name) for name in SPLITS}

    def rows(self, rows: np.ndarray) -> RecordView:
        return RecordView(self, rows)

    def all(self) -> RecordView:
        return RecordView(self, np.arange(len(self), dtype=np.int32))


class RecordView(Sequence[ReasoningRecord]):
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
            return RecordView(self.store, self.rows[index])
        return self.store.record(int(self.rows[index]))

    def column(self, name: str) -> np.ndarray:
        values: np.ndarray = self.store.columns[name][self.rows]
        return values

    def file(self, name: str, *parts: str) -> Path:
        """Where an array about just these records and `parts` is kept."""
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=12)
        digest.update(self.rows.tobytes())
        return self.store.folder / f"{name}-{digest.hexdigest()}.npy"


def save_array(path: Path, values: np.ndarray) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f".tmp-{uuid4().hex}.npy")
    try:
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
    """Hash of each record's instruction, uint64."""
    if isinstance(records, RecordView):
        return records.column("questions")
    return np.array([text_hash(record.instruction) for record in records], np.uint64)


def rows_with(records: Sequence[ReasoningRecord], name: str) -> np.ndarray:
    """Indices of the records whose metadata hold something under `name`, one of `MARKED`."""
    if isinstance(records, RecordView):
        return np.flatnonzero(records.column("marks") & (1 << MARKED.index(name)))
    return np.flatnonzero([bool(record.metadata.get(name)) for record in records])


class PicturePaths(Sequence[str]):
    """The distinct pictures of records, in the order in which they come first."""

    def __init__(self, records: Sequence[ReasoningRecord]) -> None:
        hashes = picture_hashes(records)
        pictured = np.flatnonzero(hashes)
        first = np.unique(hashes[pictured], return_index=True)[1]
        self._records, self._rows = records, pictured[np.sort(first)]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = self._records[int(self._rows[index])].image
        assert image is not None
        return image


# ---- preparing


def prepare(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
) -> RecordStore:
    """The checked and split records of a data file or of shards (see `source_files`); kept in `cache_dir`.

    One pass in memory that grows by 36 bytes a record. What was prepared counts as long as the file, the options and
    the pictures are what they were, by time and length. One process at a time; the others open it afterwards.
    Raises:
        DataError: with every problem of the file, as `read_records`, or of its splits, as `split_records`.
    """
    path, cache_dir = Path(path), Path(cache_dir)
    options = {"image_root": image_root and os.path.realpath(image_root), "allow_outside": allow_outside}
    digest = _source_digest(path, options)
    folder = cache_dir / f"records-{digest}"
    if (store := _open(folder)) is not None:
        return store
    part = new_tmp_dir(cache_dir)
    try:
        _write(
            path, part, image_root=image_root, allow_outside=allow_outside, unpack_dir=cache_dir / f"pictures-{digest}"
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(part, folder)
    except OSError as error:
        raise ConfigError(f"{cache_dir}: the prepared data cannot be written ({error.strerror}); make room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return RecordStore(folder)


def _source_digest(path: Path, options: dict[str, Any]) -> str:
    files = []
    for file in source_files(path):
        try:
            found = os.stat(file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; check the path and that it can be read") from error
        files.append([os.path.realpath(file), found.st_mtime_ns, found.st_size])
    return hashlib.blake2b(json.dumps([STORE_FORMAT, files, options]).encode(), digest_size=12).hexdigest()


def _open(folder: Path) -> RecordStore | None:
    try:
        about = read_json(folder / "store.json")
        store = RecordStore(folder)
    except (OSError, ValueError, EOFError):
        return None  # absent or damaged: built again
    return store if about["pictures"] == files_digest(PicturePaths(store.all())) else None


def _write(path: Path, folder: Path, **options: Any) -> None:
    """Fill `folder` as `RecordStore` describes it."""
    problems: list[str] = []
    table, offsets, questions, marks = SplitTable(), array("q", [0]), array("Q"), bytearray()
    with (
        open(folder / "records.jsonl", "wb") as file,
        progress_bar(desc=f"check {path.name}", unit="record", delay=2) as bar,
    ):
        for record in iter_records(path, problems, **options):
            bar.update()
            try:
                line = json.dumps(record.__dict__).encode() + b"\n"
            except (TypeError, ValueError) as error:
                problems.append(f"{path} record {record.record_id}: metadata: {error}; keep JSON values only")
                continue
            if problems:
                continue  # nothing will be kept; the rest is checked only
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            questions.append(text_hash(record.instruction))
            marks.append(sum(1 << bit for bit, name in enumerate(MARKED) if record.metadata.get(name)))
            table.add(record)
    if problems:
        raise DataError.of(problems)
    columns: dict[str, Any] = {"offsets": offsets, "pictures": table.picture, "questions": questions, "marks": marks}
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", np.frombuffer(values, _COLUMNS[name]))
    np.save(folder / "splits.npy", np.zeros(len(marks), np.uint8))  # the store is read to decide on them
    store = RecordStore(folder).all()
    np.save(folder / "splits.npy", table.assign(store))
    write_json_atomic(folder / "store.json", {"format": STORE_FORMAT, "pictures": files_digest(PicturePaths(store))})

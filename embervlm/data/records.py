"""One record of reasoning data, whichever of the Stage 4 guide's three spellings it is written in.

The guide spells the same thing three ways: teacher (`question`, `reasoning` as a list of lines), human (`question`,
`reasoning_steps`, a list of answers) and unified (`instruction`, `reasoning` as one string, `metadata`). All are read
into `ReasoningRecord`; only the unified spelling is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from embervlm.data.chain_text import (
    CONCLUSION,
    REASONING_END,
    REASONING_START,
    ROBOTS,
    format_reasoning,
    parse_answer,
    parse_reasoning_text,
)
from embervlm.data.record_fields import MAX_STEPS, FieldRules, is_inside, kind, read_fields
from embervlm.data.shards import shard_values, source_files

__all__ = [
    "REASONING_END",
    "REASONING_START",
    "ROBOTS",
    "DataError",
    "ReasoningRecord",
    "format_reasoning",
    "iter_records",
    "parse_answer",
    "parse_reasoning_text",
    "read_records",
    "record_to_json",
    "write_jsonl",
]

MAX_PRINTED_PROBLEMS = 50
MAX_WHOLE_JSON_BYTES = 64 << 20
"""A larger `.json` is read value by value: slower, and errors do not name the line."""
PARQUET_BATCH_ROWS = 512
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DataError(ValueError):
    """Something in a user's data is wrong. `problems` holds every finding; the message prints the first 50."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)

    @classmethod
    def of(cls, problems: Sequence[str]) -> DataError:
        lines = list(problems[:MAX_PRINTED_PROBLEMS])
        if hidden := len(problems) - len(lines):
            lines.append(f"... and {hidden} more")
        return cls("\n".join(lines), problems)


@dataclass(frozen=True, kw_only=True)
class ReasoningRecord:
    """A question about a picture, the chain of thought that leads to the answer, and the answer."""

    record_id: str
    """From the record's `id` or `record_id`, else `<file name>:<n>`, n counted from 1 (JSONL: the line)."""
    image: str | None
    """Resolved path of the picture; None for a text-only record."""
    instruction: str
    steps: tuple[str, ...]
    """Without the "Step i:" prefix; bullets of a step stay in it, one per line. A conclusion stands last and starts
    with "Conclusion: ". Empty for a direct-answer record."""
    answer: tuple[str, ...]
    """The set of right answers, without repeats, in the order of the candidates."""
    confidence: float | None = None
    """In [0, 1], or None where the record gives none."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Everything else the record holds; `num_steps` is not stored but computed."""

    @property
    def num_steps(self) -> int:
        """Numbered steps; the conclusion is not counted."""
        return len(self.steps) - (1 if self.conclusion else 0)

    @property
    def conclusion(self) -> str:
        """The last element of `steps` where that is a conclusion, else the empty string."""
        return self.steps[-1] if self.steps and self.steps[-1].startswith(CONCLUSION) else ""


# ---- files


def read_records(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] = ROBOTS,
    require_reasoning: bool = True,
    allow_outside: bool = False,
    max_steps: int = MAX_STEPS,
) -> list[ReasoningRecord]:
    """All records of a `.json` (a list), `.jsonl` or `.parquet` file, in its order.

    Args:
        image_root: what image paths are relative to; the data file's folder by default. A path that leaves it
            ("..", an absolute path elsewhere, a link) is refused unless `allow_outside`.
        candidates: the answers a record may give, where it does not bring its own `metadata.candidates`.
        require_reasoning: False admits direct-answer records, which have no chain; `steps` is then `()`.
        max_steps: the most numbered steps a chain may have.
    Raises:
        DataError: with every problem of the file, each as `<file> record <n>: <field>: <what>; <what to do>`.
    """
    problems: list[str] = []
    records = list(iter_records(
        path, problems, image_root=image_root, candidates=candidates, require_reasoning=require_reasoning,
        allow_outside=allow_outside, max_steps=max_steps,
    ))  # fmt: skip
    if problems:
        raise DataError.of(problems)
    return records


def iter_records(
    path: str | os.PathLike[str],
    problems: list[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] = ROBOTS,
    require_reasoning: bool = True,
    allow_outside: bool = False,
    max_steps: int = MAX_STEPS,
    unpack_dir: Path | None = None,
) -> Iterator[ReasoningRecord]:
    """The good records of a file one by one, in memory that does not grow with the file; see `read_records`.

    What is wrong with the others is appended to `problems`; the caller raises it. DataError where there is no record.
    Args:
        unpack_dir: where the pictures of `.tar` shards go; without it shards are refused.
    """
    path = Path(path)
    files = source_files(path)
    if not files:
        raise DataError(f"{path}: no file there; name a folder or a pattern of .tar shards")
    of_shards = files[0].suffix.lower() == ".tar"
    if of_shards:
        if unpack_dir is None:
            raise DataError(
                f"{path}: shards are for training and evaluation; unpack them, or give .json, .jsonl, .parquet"
            )
        unpack_dir.mkdir(parents=True, exist_ok=True)
        image_root = unpack_dir
    root = os.path.realpath(path.parent if image_root is None else image_root)
    if image_root is not None and not os.path.isdir(root):
        raise DataError(f"image root {image_root}: no such folder; name the folder that image paths are relative to")
    rules = FieldRules(
        image_root=root, candidates=tuple(candidates), require_reasoning=require_reasoning,
        allow_outside=allow_outside, max_steps=max_steps,
    )  # fmt: skip
    num_values = 0
    for where, default_id, value in _values(files, problems, unpack_dir):
        num_values += 1
        found: list[str] = []
        fields: dict[str, Any] = {}
        if isinstance(value, dict):
            fields = read_fields(value, default_id, rules, found.append)
        else:
            found.append(f"is {kind(value)}, not an object; write {{...}} with the fields of the Stage 4 guide")
        problems += [f"{where}: {problem}" for problem in found]
        if not found:
            yield ReasoningRecord(**fields)
    if not num_values and not problems:
        raise DataError(f"{path}: holds no records; write at least one, or drop the file from the configuration")


def _values(files: list[Path], problems: list[str], unpack_dir: Path | None) -> Iterator[tuple[str, str, Any]]:
    """Where each value stands, its id if it names none itself, and the value."""
    for path in files:
        if path.suffix.lower() == ".tar" and unpack_dir is not None:
            try:
                for key, value in shard_values(path, unpack_dir, problems):
                    yield f"{path} record {key}", key, value
            except OSError as error:
                problems.append(f"{path}: {error.strerror or error}; copy the shard again, or leave it out")
        else:
            for number, value in _numbered_values(path, problems):
                yield f"{path} record {number}", f"{path.name}:{number}", value


def _numbered_values(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Each value of the file with its number, counted from 1; in JSONL that is the line."""
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl", ".parquet"):
        raise DataError(f'{path}: unknown suffix "{path.suffix}"; use .json (a list), .jsonl or .parquet')
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and that it can be read") from error
    with file:
        if suffix == ".jsonl":
            yield from _jsonl_values(path, file, problems)
        elif os.fstat(file.fileno()).st_size > MAX_WHOLE_JSON_BYTES:
            yield from _streamed_json_values(path, file, problems)
        else:
            yield from _json_values(path, file.read(), problems)


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty; write records into it, or drop it from the configuration")


def _jsonl_values(path: Path, file: IO[bytes], problems: list[str]) -> Iterator[tuple[int, Any]]:
    empty = True
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            empty = False
            advice = "correct the line or drop it"
            if not line.endswith(b"\n"):
                advice = "the file ends inside this line: write it again, or drop the line"
            before = len(problems)
            value = _decode(line.rstrip(b"\n"), str(path), number, advice, problems)
            if len(problems) == before:
                yield number, value
    if empty:
        raise _empty(path)


def _json_values(path: Path, data: bytes, problems: list[str]) -> Iterator[tuple[int, Any]]:
    data = data.removeprefix(BYTE_ORDER_MARK)
    if not data.strip():
        raise _empty(path)
    before = len(problems)
    value = _decode(data, str(path), 1, "correct it there; one record per line needs the suffix .jsonl", problems)
    if len(problems) > before:
        return
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {kind(value)}, not a list of records; put the records between [ and ]")
    yield from enumerate(value, start=1)


def _streamed_json_values(path: Path, file: IO[bytes], problems: list[str]) -> Iterator[tuple[int, Any]]:
    """As `_json_values`, one value in memory at a time."""
    import ijson  # here: only files of this size need it

    start = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
    file.seek(start)
    number = 0
    try:
        if next(ijson.basic_parse(file))[0] != "start_array":
            raise DataError(f"{path}: does not hold a list of records; put the records between [ and ]")
        file.seek(start)
        for number, value in enumerate(ijson.items(file, "item", use_float=True), start=1):
            yield number, value
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        problems.append(
            f"{path}: invalid JSON behind record {number} ({reason}); correct it there, or write one record per line "
            "into a .jsonl, which names the line"
        )


def _decode(data: bytes, path: str, first_line: int, advice: str, problems: list[str]) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        problems.append(f"{path} line {line}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8")
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        problems.append(f"{path} line {line} column {error.colno}: invalid JSON ({error.msg}); {advice}")
    except RecursionError:
        problems.append(f"{path} line {first_line}: nested too deeply; a record is a flat object, drop what is inside")
    except ValueError as error:  # an integer of thousands of digits
        problems.append(f"{path} line {first_line}: invalid JSON ({error}); {advice}")
    return None


def _parquet_rows(path: Path) -> Iterator[Any]:
    """Rows without the empty fields that a table adds; `metadata` may be a struct or a JSON string."""
    try:  # imported here: slow, and JSON needs none of it
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; install it, or convert the file to .jsonl") from error
    try:
        with parquet.ParquetFile(os.fspath(path)) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                yield from map(_without_empty_fields, batch.to_pylist())
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); check the path or write the file again") from error


def _without_empty_fields(row: dict[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        with suppress(ValueError):  # what is no JSON stays a string, which the record check reports
            row["metadata"] = metadata = json.loads(metadata)
    if isinstance(metadata, dict):
        row["metadata"] = {key: value for key, value in metadata.items() if value is not None}
    return {key: value for key, value in row.items() if value is not None}


# ---- writing


def record_to_json(record: ReasoningRecord, image_root: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The record in the unified spelling; the picture's path relative to `image_root` where it lies inside."""
    out: dict[str, Any] = {"id": record.record_id}
    if record.image is not None:
        root = None if image_root is None else os.path.realpath(image_root)
        inside = root is not None and is_inside(record.image, root)
        out["image"] = os.path.relpath(record.image, root) if inside else record.image
    out["instruction"] = record.instruction
    if record.steps:
        out["reasoning"] = f"{REASONING_START}\n{format_reasoning(record.steps)}\n{REASONING_END}"
    out["answer"] = record.answer[0] if len(record.answer) == 1 else list(record.answer)
    if record.confidence is not None:
        out["confidence"] = record.confidence
    out["metadata"] = {**record.metadata, "num_steps": record.num_steps}
    return out


def write_jsonl(
    path: str | os.PathLike[str],
    records: Iterable[ReasoningRecord],
    *,
    image_root: str | os.PathLike[str] | None = None,
) -> None:
    """Writes one record per line; the file appears whole or not at all.

    Image paths are relative to `image_root`, by default the folder of `path`, where `read_records` looks for them.
    """
    path = Path(path)
    root = path.parent if image_root is None else image_root
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            for record in records:
                try:
                    file.write(json.dumps(record_to_json(record, root)) + "\n")
                except (TypeError, ValueError) as error:
                    raise DataError(f"record {record.record_id}: metadata: {error}; keep JSON values only") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

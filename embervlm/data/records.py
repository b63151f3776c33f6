"""One record of reasoning data, whichever of the Stage 4 guide's three spellings it is written in.

The guide spells the same thing three ways: teacher (`question`, `reasoning` as a list of lines), human (`question`,
`reasoning_steps`, a list of answers) and unified (`instruction`, `reasoning` as one string, `metadata`). All are read
into `ReasoningRecord`; only the unified spelling is written.
"""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from embervlm.data.errors import DataError
from embervlm.data.json_text import Decoder, JsonText
from embervlm.data.parquet_rows import holds_bytes, plain_row, without_bytes
from embervlm.data.record_fields import COMPOSED_OF, MAX_STEPS, SURROGATE, FieldRules, Report, kind, quote, read_fields
from embervlm.data.record_pictures import check_placeholders, is_inside, read_picture, without_pictures
from embervlm.data.tables import SUFFIXES, TableError, table_rows
from embervlm.run_dir import atomic_text
from embervlm.words.chain_text import (
    CONCLUSION,
    REASONING_END,
    REASONING_START,
    format_reasoning,
    parse_answer,
    parse_reasoning_text,
)

__all__ = [
    "REASONING_END",
    "REASONING_START",
    "DataError",
    "Reading",
    "ReasoningRecord",
    "file_values",
    "format_reasoning",
    "parse_answer",
    "parse_reasoning_text",
    "read_record",
    "read_records",
    "record_to_json",
    "write_dataset",
    "write_records",
]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOO_DEEP = "nested too deeply; a record is a flat object, so remove the inner levels"


@dataclass(frozen=True, kw_only=True)
class ReasoningRecord:
    """A question about a picture, the chain of thought that leads to the answer, and the answer."""

    record_id: str
    """From the record's `id` or `record_id`, else `<file name>:<n>`, n counted from 1 (JSONL: the line)."""
    image: str | None
    """Resolved path of the picture; None for a text-only record. Of several pictures it is their composite, and
    `metadata.composed_of` has their own paths."""
    instruction: str
    steps: tuple[str, ...]
    """Without the "Step i:" prefix; bullets of a step stay in it, one per line. A conclusion stands last and starts
    with "Conclusion: ". Empty for a direct-answer record."""
    answer: tuple[str, ...]
    """The set of right answers, without repeats, in the order of the candidates. Empty if it is not known."""
    confidence: float | None = None
    """In [0, 1], or None if the record gives none."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Everything else the record holds; `num_steps` is not stored but computed."""
    default_candidates: tuple[str, ...] = field(default=(), repr=False)
    """The domain's candidates, used if `metadata.candidates` is not given."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The choices for the answer: its own `metadata.candidates`, else the domain's; () for an open answer.

        The record of an open answer, which is free text, has an empty list of candidates.
        """
        own = self.metadata.get("candidates")
        return self.default_candidates if own is None else tuple(own)

    @property
    def asked(self) -> str:
        """Equal for records that ask the same, in whatever words: `metadata.question_group`, or the instruction."""
        return str(self.metadata.get("question_group") or self.instruction)

    @property
    def num_steps(self) -> int:
        """Numbered steps; the conclusion is not counted."""
        return len(self.steps) - (1 if self.conclusion else 0)

    @property
    def conclusion(self) -> str:
        """The last element of `steps` if it is a conclusion, else the empty string."""
        return self.steps[-1] if self.steps and self.steps[-1].startswith(CONCLUSION) else ""


# ---- files


def read_records(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    candidates: Sequence[str] = (),
    require_reasoning: bool = True,
    require_answer: bool = True,
    allow_outside: bool = False,
    max_steps: int = MAX_STEPS,
    unpack_dir: str | os.PathLike[str] | None = None,
    texts_alone: bool = False,
) -> list[ReasoningRecord]:
    """All records of a `.json` (a list), `.jsonl`, `.parquet`, `.arrow`, `.csv` or `.tsv` file, in its order.

    Args:
        image_root: what image paths are relative to; the data file's folder by default. A path that leaves it
            ("..", an absolute path elsewhere, a link) is refused unless `allow_outside`.
        candidates: the answers a record may give where it does not bring its own `metadata.candidates`, which are the
            domain's; none: such an answer is open.
        require_reasoning: False admits direct-answer records, which have no chain; `steps` is then `()`.
        require_answer: False admits questions whose answer is not known; `answer` is then `()`.
        max_steps: the most numbered steps a chain may have.
        unpack_dir: folder for pictures that are contained in the records themselves; None refuses these.
        texts_alone: leave the pictures out, which then need not be there.
    Raises:
        DataError: with every problem of the file, each as `<file> record <n>: <field>: <what>; <what to do>`; two
            records of one id are one.
    """
    path = Path(path)
    rules = FieldRules(
        image_root=folder_of_images(path, image_root),
        candidates=tuple(candidates),
        require_reasoning=require_reasoning,
        require_answer=require_answer,
        allow_outside=allow_outside,
        max_steps=max_steps,
        unpack_dir=None if unpack_dir is None else os.fspath(unpack_dir),
    )
    problems: list[str] = []
    records: list[ReasoningRecord] = []
    num_values = 0
    named = (
        (number, f"{path.name}:{number}", without_pictures(value) if texts_alone else value)
        for number, value in file_values(path, problems)
    )
    for reading in read_values(named, rules):
        num_values += 1
        if reading.record is not None:
            records.append(reading.record)
        problems += [f"{path} record {reading.number}: {problem}" for problem in reading.problems]
    if problems:
        raise DataError.of(problems)
    if not num_values:
        raise no_records(path)
    return records


def no_records(path: str | os.PathLike[str]) -> DataError:
    return DataError(f"{path}: contains no records; write at least one, or remove the file from the configuration")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One value of a file and the result of reading it."""

    number: int
    """Counted from 1; in JSONL the line."""
    value: Any
    """The value as in the file; a picture that it contains is replaced by its path."""
    record: ReasoningRecord | None
    """None if something is wrong with the value."""
    problems: tuple[str, ...]
    """Each as `<field>: <what>; <what to do>`."""


def read_values(values: Iterable[tuple[int, str, Any]], rules: FieldRules) -> Iterator[Reading]:
    """The reading of each value, given with its number and the id of a record that has none."""
    numbers: dict[str, int] = {}
    for number, default_id, value in values:
        found: list[str] = []
        record = read_record(value, default_id, rules, found.append)
        if record is not None and (first := numbers.setdefault(record.record_id, number)) != number:
            found.append(f"id: {quote(record.record_id)} is also the id of record {first}; give each its own")
            record = None
        if holds_bytes(value):
            given = (None, None) if record is None else (record.image, record.metadata.get(COMPOSED_OF))
            value = without_bytes(value, *given)
        yield Reading(number=number, value=value, record=record, problems=tuple(found))


def folder_of_images(path: Path, image_root: str | os.PathLike[str] | None) -> str:
    """The folder to which the image paths of the data file `path` are relative, resolved."""
    root = os.path.realpath(path.parent if image_root is None else image_root)
    if image_root is not None and not os.path.isdir(root):
        raise DataError(f"image root {image_root}: no such folder; give the folder that image paths are relative to")
    return root


def read_record(value: Any, default_id: str, rules: FieldRules, report: Report) -> ReasoningRecord | None:
    """The record that one parsed JSON value holds; None where something was reported. Never raises."""
    if not isinstance(value, dict):
        report(f"is {kind(value)}, not an object; write {{...}} with the fields of the Stage 4 guide")
        return None
    found: list[str] = []
    try:
        fields = read_fields(value, default_id, rules, found.append)
        told = len(found)
        image = fields["image"] = read_picture(value, fields["metadata"], rules, found.append)
        if len(found) == told:  # of a picture that is told to be wrong, its placeholder is not
            num_pictures = 0 if image is None else len(fields["metadata"].get(COMPOSED_OF) or (image,))
            fields["instruction"] = check_placeholders(fields["instruction"], num_pictures, found.append)
    except RecursionError:
        found = [TOO_DEEP]
    for problem in found:
        report(problem)
    return None if found else ReasoningRecord(**fields, default_candidates=rules.candidates)


def file_values(path: Path, problems: list[str], *, keyed: bool = False, inside: str = "") -> Iterator[tuple[int, Any]]:
    """Each value of the file with its number, counted from 1; in JSONL that is the line. One is in memory at a time.

    Text that is no JSON goes to `problems`; a file that cannot be read at all is a DataError. With `keyed` the records
    of a `.json` file may also be the values of one object, whose keys become their `id`; with `inside` they may be the
    list of that name in one object.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl", *SUFFIXES):
        raise DataError(
            f'{path}: unknown suffix "{path.suffix}"; use .json (a list), .jsonl, .parquet, .arrow, .csv or .tsv'
        )
    if suffix in SUFFIXES:
        for number, row in enumerate(_table_rows(path), start=1):
            row, found = plain_row(row)
            if not _told(path, number, found, problems):
                yield number, row
        return
    try:
        with open(path, "rb") as file:
            if file.peek(3).startswith(BYTE_ORDER_MARK):
                file.read(len(BYTE_ORDER_MARK))
            elif file.peek(2).startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise DataError(f"{path}: is UTF-16, as PowerShell writes it; save it as UTF-8")
            if suffix == ".jsonl":
                yield from _jsonl_values(path, file, problems)
            else:
                yield from _json_values(path, file, problems, keyed, inside)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and its permissions") from error


def _told(path: Path, number: int, found: Sequence[str], problems: list[str]) -> bool:
    """Whether something was `found` to be wrong with a value, which then is in `problems`."""
    problems += [f"{path} record {number}: {problem}" for problem in found]
    return bool(found)


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty; write records into it, or remove it from the configuration")


def _jsonl_values(path: Path, file: BinaryIO, problems: list[str]) -> Iterator[tuple[int, Any]]:
    empty, decoder = True, Decoder()
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        empty = False
        try:
            value = decoder.decode(line.rstrip(b"\n").decode("utf-8"))
        except (ValueError, RecursionError) as error:
            advice = "correct the line or delete it"
            if not line.endswith(b"\n"):
                advice = "the file ends inside this line: write it again, or delete the line"
            problems.append(f"{path} {_not_json(error, number, getattr(error, 'colno', 0), advice)}")
            continue
        if not _told(path, number, decoder.lost(), problems):
            yield number, value
    if empty:
        raise _empty(path)


def _json_values(
    path: Path, file: BinaryIO, problems: list[str], keyed: bool, inside: str
) -> Iterator[tuple[int, Any]]:
    text = JsonText(file)
    whole: Any = None
    try:
        first = text.peek()
        listed = first == "[" or (first == "{" and bool(inside))
        values = text.values_in(inside) if listed and first == "{" else text.values()
        for number, value in enumerate(values, start=1):
            if _told(path, number, text.lost(), problems):
                continue
            if listed:
                yield number, value
            else:
                whole = value
    except (ValueError, RecursionError) as error:
        advice = "correct it there; a file with one record per line needs the suffix .jsonl"
        problems.append(f"{path} {_not_json(error, text.line, text.column, advice)}")
        return
    if not first:
        raise _empty(path)
    if listed or problems:
        return
    if not keyed or not isinstance(whole, dict):
        raise DataError(f"{path}: contains {kind(whole)}, not a list of records; put the records between [ and ]")
    yield from enumerate(({"id": k, **v} if isinstance(v, dict) else v for k, v in whole.items()), start=1)


def _not_json(error: ValueError | RecursionError, line: int, column: int, advice: str) -> str:
    """The place and reason of a JSON error, and what to do."""
    if isinstance(error, UnicodeDecodeError):
        return f"line {line}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"line {line} column {column}: invalid JSON ({error.msg}); {advice}"
    if isinstance(error, RecursionError):
        return f"line {line}: {TOO_DEEP}"
    return f"line {line}: invalid JSON ({error}); {advice}"  # an integer of thousands of digits


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from table_rows(path)
    except TableError as error:
        raise DataError(str(error)) from error


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
    if record.answer:
        out["answer"] = record.answer[0] if len(record.answer) == 1 else list(record.answer)
    if record.confidence is not None:
        out["confidence"] = record.confidence
    out["metadata"] = {**record.metadata, "num_steps": record.num_steps}
    return out


def write_records(
    path: str | os.PathLike[str],
    records: Iterable[ReasoningRecord],
    *,
    image_root: str | os.PathLike[str] | None = None,
) -> None:
    """Writes `records` as `write_dataset` does.

    Image paths are relative to `image_root`, by default the folder of `path`, where `read_records` looks for them.
    """
    root = Path(path).parent if image_root is None else image_root
    write_dataset(path, (record_to_json(record, root) for record in records))


def write_dataset(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON objects as a list or, for a `.jsonl` path, one to a line; the file appears whole or not at all."""
    path = Path(path)
    lines = map(_json_line, records)
    with atomic_text(path) as file:
        if path.suffix == ".jsonl":
            file.writelines(line + "\n" for line in lines)
        else:
            file.write("[\n")
            file.writelines(f",\n{line}" if index else line for index, line in enumerate(lines))
            file.write("\n]\n")


def _json_line(value: Mapping[str, Any]) -> str:
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # half a surrogate pair is no UTF-8; JSON can hold it as an escape only
        return json.dumps(value) if SURROGATE.search(line) else line
    except RecursionError as error:
        raise DataError(f"record {value.get('id')}: metadata: nested too deeply; remove the inner levels") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"record {value.get('id')}: metadata: {error}; use only JSON values") from error

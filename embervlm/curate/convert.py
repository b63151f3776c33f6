"""`embervlm data convert`: records of other formats -> the unified format; the reader checks the result.

Nothing is guessed, nothing is dropped silently. Choices become `metadata.candidates`, explanations become steps, one
per sentence, and the answer the conclusion.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.curate.formats.choices import aokvqa, scienceqa
from embervlm.curate.formats.clevr import clevr
from embervlm.curate.formats.conversations import alpaca, llava, llava_cot, sharegpt
from embervlm.curate.formats.egoplan import egoplan
from embervlm.curate.formats.geometry3k import geometry3k
from embervlm.curate.formats.guide import human, robot_selection, teacher, unified
from embervlm.curate.formats.shared import Source
from embervlm.curate.formats.visual_cot import visual_cot
from embervlm.data.curriculum import complexity_by_steps
from embervlm.data.domain import Domain
from embervlm.data.record_fields import FieldRules, quote
from embervlm.data.record_pictures import is_inside, pictures_beside
from embervlm.data.records import DataError, ReasoningRecord, file_values, read_record, record_to_json, write_dataset
from embervlm.data.sources import is_shard, named_splits, source_files
from embervlm.data.splits import SPLITS, picture_digests
from embervlm.data.tables import with_split
from embervlm.progress import progress_bar

CONVERTERS: dict[str, Callable[[Source], list[dict[str, Any]]]] = {
    "teacher": teacher,
    "human": human,
    "unified": unified,
    "robot_selection": robot_selection,
    "scienceqa": scienceqa,
    "aokvqa": aokvqa,
    "llava": llava,
    "llava_cot": llava_cot,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "visual_cot": visual_cot,
    "clevr": clevr,
    "egoplan": egoplan,
    "geometry3k": geometry3k,
}
"""What `--from` names -> one value of the file to records in one of the guide's spellings. What gives none has been
reported."""


LISTS = {"clevr": "questions"}
"""Format -> the list of an object that holds its records."""
FOLDERS = {"geometry3k": ("data.json", "logic_form.json")}
"""Format -> the files of a record that has a folder of its own; what the others hold stands under their names."""


SENTENCE_WORDS = 5
"""From which on a free-text answer may be a sentence that holds the answer."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The result of a conversion."""

    records: list[ReasoningRecord]
    skipped: list[dict[str, Any]]
    """`{"record", "id", "problems"}` of everything that was left out; the record's number is null for a line that is no
    JSON, and the id there where the record has one."""
    picture_root: str
    """Folder that the picture paths in the output are relative to."""
    num_moved: int
    """Records whose split was changed, because their picture is also in another split."""
    num_open: int
    """Records whose answer became free text, because it is none of the domain's candidates."""


def convert_file(
    path: Path,
    output_file: Path,
    *,
    source: str,
    domain: Domain,
    image_root: Path | None = None,
    skip_bad: bool = False,
    allow_outside: bool = False,
    progress: bool = True,
) -> Converted:
    """Convert `path`, which is in the format `source`, and write the unified spelling to `output_file`.

    Args:
        path: a file, or a folder of Parquet files or of what `save_to_disk` of `datasets` wrote.
        image_root: what picture paths in `path` are relative to; its folder by default.
        skip_bad: write the records that can be converted, and list the others in `skipped_path(output_file)`.
    Raises:
        DataError: with every problem, each as `<file> record <n>: <field>: <what>; <what to do>`. Nothing is written
            then. With `skip_bad` only for a file that gives no record at all.
    """
    if source not in CONVERTERS:
        raise ConfigError(f"--from {source}: is not one of {', '.join(CONVERTERS)}")
    if output_file.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--output_file {output_file}: must end in .json or .jsonl")
    root = os.path.realpath(_folder_of(path) if image_root is None else image_root)
    if image_root is not None and not os.path.isdir(root):
        raise ConfigError(f"--image_root {image_root}: no such folder; give the one that picture paths are relative to")
    rules = FieldRules(
        image_root=root,
        candidates=domain.candidates,
        allow_outside=allow_outside,
        unpack_dir=str(pictures_beside(output_file)),
    )
    records, skipped = _convert(path, source, rules, progress)
    if skipped and not (records and skip_bad):
        raise DataError.of([_told(path, item["record"], text) for item in skipped for text in item["problems"]])
    if not records:
        raise DataError(f"{path}: contains no records; give a file with records")
    records, num_moved = _one_split_per_picture(records)
    folder = os.path.realpath(output_file.parent)
    beside = all(is_inside(record.image, folder) for record in records if record.image)  # as unpacked ones are
    picture_root = folder if beside or is_inside(root, folder) else root
    write_dataset(output_file, (record_to_json(record, picture_root) for record in records))
    if skipped:
        write_dataset(skipped_path(output_file), skipped)
    else:
        skipped_path(output_file).unlink(missing_ok=True)  # of an earlier try
    num_open = sum(record.metadata.get("candidates") == [] for record in records) if domain.candidates else 0
    return Converted(
        records=records, skipped=skipped, picture_root=picture_root, num_moved=num_moved, num_open=num_open
    )


def _convert(
    path: Path, source: str, rules: FieldRules, progress: bool
) -> tuple[list[ReasoningRecord], list[dict[str, Any]]]:
    """The records, and what was skipped as `Converted` lists it."""
    line_problems: list[str] = []
    skipped: list[dict[str, Any]] = []
    records: list[ReasoningRecord] = []
    numbers: dict[str, int] = {}
    values = _values(path, source, line_problems)
    for number, value in progress_bar(values, desc=f"convert {path.name}", unit="record", disable=not progress):
        at = Source(
            value=value,
            number=number,
            image_root=rules.image_root,
            folder=str(path.parent),
            candidates=rules.candidates,
        )
        for item in CONVERTERS[source](at) if isinstance(value, dict) else [value]:
            record = read_record(item, f"{path.name}:{number}", rules, at.report)
            if record is not None and (first := numbers.setdefault(record.record_id, number)) != number:
                at.report(f"id: {quote(record.record_id)} is also the id of record {first}; give each its own")
            elif record is not None:
                complexity = complexity_by_steps(record.num_steps)
                records.append(replace(record, metadata={"complexity": complexity, **record.metadata}))
        if at.problems:
            named = {"id": value["id"]} if isinstance(value, dict) and value.get("id") is not None else {}
            skipped.append({"record": number, **named, "problems": at.problems})
    return records, [{"record": None, "problems": [problem]} for problem in line_problems] + skipped


def _values(path: Path, source: str, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Each value of the file with its number; those of the files of a folder, or of a pattern, numbered through."""
    if source in FOLDERS and path.is_dir():
        yield from _folder_values(path, FOLDERS[source], problems)
        return
    files, keyed, inside = source_files(path), source == "scienceqa", LISTS.get(source, "")
    if files == [path]:
        yield from file_values(path, problems, keyed=keyed, inside=inside)
        return
    if not files or is_shard(files[0]):
        raise DataError(
            f"{path}: contains no data file; give one, or a folder of Parquet files, of a saved data set, or of "
            "train.json, val.json and test.json (.jsonl)"
        )
    splits = named_splits(files)
    all_values = (
        with_split(value, splits.get(file)) for file in files for _, value in file_values(file, problems, inside=inside)
    )
    yield from enumerate(all_values, start=1)


def _folder_values(path: Path, names: Sequence[str], problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Of each folder in `path` that holds the first of the files `names`: its object, and those of the others in it."""
    main, *others = names
    found = sorted(path.glob(f"*/{main}"), key=lambda file: (len(file.parent.name), file.parent.name))
    for number, file in enumerate(found, start=1):
        files = [file, *(other for name in others if (other := file.with_name(name)).is_file())]
        try:
            first, *rest = [json.loads(part.read_text("utf-8-sig")) for part in files]
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{file.parent}: not readable as JSON ({error}); correct the file, or drop the folder")
            continue
        inner = {part.stem: value for part, value in zip(files[1:], rest)}
        yield number, {**inner, **first, "folder": file.parent.name} if isinstance(first, dict) else first


def _folder_of(path: Path) -> str:
    return os.fspath(path if path.is_dir() else path.parent)


def _told(path: Path, number: int | None, problem: str) -> str:
    return problem if number is None else f"{path} record {number}: {problem}"


def skipped_path(output_file: Path) -> Path:
    """Where `skip_bad` lists what it left out."""
    return output_file.with_name(f"{output_file.stem}.skipped.jsonl")


def _one_split_per_picture(records: list[ReasoningRecord]) -> tuple[list[ReasoningRecord], int]:
    """The records, with `metadata.split` changed where one picture stands in several, and how many were changed.

    Published splits may share pictures (ScienceQA's maps); training refuses that. The held-out split keeps the
    picture: all its records go to test, else to val. The published split stays in `metadata.source_split`.
    """
    problems: list[str] = []
    digests = picture_digests([record for record in records if "split" in record.metadata], problems)
    if problems:
        raise DataError.of(problems)
    latest: dict[str, int] = {}
    for record in records:
        if record.image in digests and (split := record.metadata.get("split")) in SPLITS:
            key = digests[record.image]
            latest[key] = max(latest.get(key, 0), SPLITS.index(split))
    out, num_moved = [], 0
    for record in records:
        split = record.metadata.get("split")
        wanted = SPLITS[latest[digests[record.image]]] if record.image in digests and split in SPLITS else split
        if wanted != split:
            num_moved += 1
            record = replace(record, metadata={**record.metadata, "split": wanted, "source_split": split})
        out.append(record)
    return out, num_moved


def summary(made: Converted, output_file: Path) -> str:
    """The lines that the command prints."""
    records = made.records
    complexity = Counter(str(record.metadata["complexity"]) for record in records)
    steps = [record.num_steps for record in records]
    lines = [
        f"{output_file}: {len(records)} records, {sum(record.image is not None for record in records)} with a picture, "
        f"{min(steps)} to {max(steps)} steps ({', '.join(f'{n} {name}' for name, n in sorted(complexity.items()))})"
    ]
    if made.num_open:
        lines.append(
            f"{made.num_open} answers are none of the domain's and became free text (`candidates: []`); if they are a "
            "set to choose from, convert with `--domain none`"
        )
    if told := _told_long_answers(records):
        lines.append(told)
    if made.num_moved:
        lines.append(f"{made.num_moved} records were moved to the other split of their picture")
    if made.skipped:
        lines.append(f"{len(made.skipped)} records skipped or cut short, listed in {skipped_path(output_file)}")
    if any(record.image for record in records) and made.picture_root != os.path.realpath(output_file.parent):
        lines.append(f"read it with --image_root {made.picture_root} to find its pictures")
    return "\n".join(lines)


def _told_long_answers(records: Sequence[ReasoningRecord]) -> str:
    """A line where free-text answers are sentences, which a converter may have taken for want of something shorter."""
    free = [", ".join(record.answer) for record in records if not record.candidates]
    long = [answer for answer in free if len(answer.split()) >= SENTENCE_WORDS]
    if not long:
        return ""
    return (
        f"{len(long)} of {len(free)} free-text answers have {SENTENCE_WORDS} words or more, such as {quote(long[0])}; "
        "where the answer is shorter, end the reply with `Answer: ...`"
    )

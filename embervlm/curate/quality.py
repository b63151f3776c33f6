"""`embervlm data filter`: a quality score for every record, computed from the findings of the checks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.curate.checking import check_file, without_garbage_collection
from embervlm.curate.findings import CheckOptions, Problem, by_record
from embervlm.data.record_pictures import is_inside, pictures_beside
from embervlm.data.records import ReasoningRecord, write_dataset
from embervlm.data.sources import is_one_file


def quality(
    record: ReasoningRecord, problems: Sequence[Problem], *, num_tokens: int, max_reasoning_length: int
) -> dict[str, float]:
    """The parts of a record's quality, each in [0, 1], and `score`, their product: one grave fault is enough.

    consistency: halved by each contradiction. conclusion: 0 where it disagrees with the answer. relevance: share of
    steps that neither repeat an earlier one nor, where that is known, fail to bear on the question. form: 3/4 where the
    numbering has gaps. length: limit / tokens where that is below 1. novelty: 0 for a duplicate, 1/2 for a near
    duplicate or a question that has another answer too. question: 1/2 where the instruction gives the answer away. A
    record that would stop training has score 0.
    """
    count = Counter(problem.kind for problem in problems)
    # Whether steps about a picture of which nothing is known bear on the question is too weak a sign to drop a record.
    told = record.image is None or bool(record.metadata.get("facts"))
    idle = count["repetition"] + (count["unsupported"] if told else 0)
    parts = {
        "consistency": 0.5 ** count["contradiction"],
        "conclusion": 0.0 if count["conclusion"] else 1.0,
        "relevance": max(0.0, 1 - idle / max(1, len(record.steps))),
        "form": 0.75 if count["numbering"] else 1.0,
        "length": min(1.0, max_reasoning_length / num_tokens),
        "novelty": 0.0 if count["duplicate"] else 0.5 if count["near_duplicate"] or count["conflict"] else 1.0,
        "question": 0.5 if count["given_away"] else 1.0,
    }
    score = 0.0 if any(problem.stops_training for problem in problems) else 1.0
    for part in parts.values():
        score *= part
    return {"score": round(score, 4), **{name: round(part, 4) for name, part in parts.items()}}


def rejected_path(output: Path) -> Path:
    """Where the records below the minimum are written: `<output>.rejected.json` or `.jsonl`."""
    return output.with_name(f"{output.stem}.rejected{output.suffix}")


@without_garbage_collection()
def filter_file(
    data_file: str | Path, *, output: str | Path, min_quality_score: float, options: CheckOptions
) -> tuple[int, int]:
    """Write the records with at least the score to `output` and the others beside; the number of each.

    A kept record is written as in the file, with its quality in `metadata.quality` (an earlier one is replaced). Of
    the others are written `record` (number), `score`, `reasons` and `value`, what stands in the file.
    Raises:
        DataError: the file cannot be read at all, or holds no records.
        ConfigError: a minimum outside [0, 1], an output that cannot be written.
    """
    output = Path(output)
    if not 0 <= min_quality_score <= 1:
        raise ConfigError(f"--min_quality_score {min_quality_score}: must be from 0 to 1")
    if output.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--output {output}: must end in .json or .jsonl")
    if not is_one_file(data_file):
        raise ConfigError(f"--input {data_file}: filter reads one .json, .jsonl or .parquet file; give one")
    if output.resolve() == Path(data_file).resolve():
        raise ConfigError(f"--output {output}: is the input; choose another file")
    options = replace(options, unpack_dir=os.path.realpath(pictures_beside(output)))
    data = check_file(data_file, options, keep_values=True)
    problems = by_record(data.problems)
    usable = {number: place for place, number in enumerate(data.numbers)}
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for number in sorted({*data.values, *problems} - {0}):
        value, found, score = data.values.get(number), problems.get(number, []), 0.0
        if number in usable:
            place = usable[number]
            parts = quality(
                data.records[place],
                found,
                num_tokens=data.num_tokens[place],
                max_reasoning_length=options.max_reasoning_length,
            )
            score = parts["score"]
            value = {key: item for key, item in data.values[number].items() if key != "quality"}
            value["metadata"] = {**(value.get("metadata") or {}), "quality": parts}
            if is_inside(str(value.get("image")), str(options.unpack_dir)):
                value["image"] = os.path.relpath(value["image"], output.resolve().parent)
        if value is None or score < min_quality_score or any(problem.stops_training for problem in found):
            reasons = [f"{problem.field}: {problem.what}; {problem.fix}" for problem in found]
            rejected.append({"record": number, "score": score, "reasons": reasons, "value": value})
        else:
            kept.append(value)
    try:
        write_dataset(output, kept)
        write_dataset(rejected_path(output), rejected)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from error
    return len(kept), len(rejected)

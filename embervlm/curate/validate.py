"""`embervlm data validate`: the problems and the contents of a data set, as one JSON object."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embervlm.config import TrainConfig
from embervlm.curate.checking import check_file
from embervlm.curate.findings import KINDS, CheckedData, CheckOptions, problem_counts
from embervlm.data.answer_space import AnswerSpace, told_answers
from embervlm.data.blind import best_guess, blind_guess
from embervlm.data.record_fields import COMPOSED_OF, OTHER_DOMAIN, told_several, told_unused
from embervlm.data.splits import SPLITS
from embervlm.words.chain_text import format_reasoning

REPORT_FORMAT = 1
EXAMPLES_PER_KIND = 5
MAX_EXAMPLE_CHARACTERS = 2000
_NUM_BINS = 12


def validate(data_file: str | Path, options: CheckOptions) -> dict[str, Any]:
    """The report as JSON values: findings, examples of each kind, splits, guessing without the picture, distributions.

    `trains` is False where a record would stop a training run. Shares and accuracies are in [0, 1], or None.
    Raises:
        DataError: the file cannot be read at all, or holds no records.
    """
    data = check_file(data_file, options)
    bad = {problem.number for problem in data.problems if problem.stops_training}
    return {
        "format": REPORT_FORMAT,
        "data_file": str(data_file),
        "trains": not bad,
        "num_records": data.num_values,
        "num_stopping": len(bad - {0}),
        "num_with_findings": len({problem.number for problem in data.problems} - {0}),
        "num_text_only": sum(record.image is None for record in data.records),
        "other_domain_in_words": _told_other_domain(data),
        "answers_in_words": _told_answers(data),
        "unused": dict(data.unused.most_common()),
        "unused_in_words": told_unused(data.unused),
        "several_pictures_in_words": told_several(
            Counter(str(len(several)) for record in data.records if (several := record.metadata.get(COMPOSED_OF)))
        ),
        "distinct": {
            "pictures": len(set(data.pictures.values())),
            "instructions": len({record.instruction for record in data.records}),
            "chains": len({record.steps for record in data.records} - {()}),
        },
        "kinds": {
            name: {"title": KINDS[name].title, "stops_training": KINDS[name].stops_training, "count": count}
            for name, count in problem_counts(data.problems).items()
        },
        "splits": {name: data.splits.count(name) for name in SPLITS},
        "blind": _guessing(data),
        "length": {
            "max_reasoning_length": options.max_reasoning_length,
            "positions": options.positions,
            "counted_with": options.counted_with,
            "share_over": _share(n > options.max_reasoning_length for n in data.num_tokens),
        },
        "counts": {
            "answer": _counts(", ".join(record.answer) for record in data.records),
            "steps": _counts((record.num_steps for record in data.records), by_value=True),
            "complexity": _counts(str(record.metadata.get("complexity", "not given")) for record in data.records),
            "source": _counts(str(record.metadata.get("source", "not given")) for record in data.records),
        },
        "histograms": {
            "tokens of chain and answer": _histogram(data.num_tokens),
            "words of the instruction": _histogram([len(record.instruction.split()) for record in data.records]),
        },
        "examples": _examples(data),
        "problems": [asdict(problem) | _where(data, problem.number) for problem in data.problems],
    }


def _guessing(data: CheckedData) -> dict[str, float | None]:
    """Accuracies of guessers that see no picture; None where there is nothing to guess."""
    guessed = blind_guess(
        (split, record.asked, record.instruction, ", ".join(record.answer))
        for split, record in zip(data.splits, data.records)
    )
    found = {**guessed, "best": best_guess(guessed)} if data.records else guessed
    return {name: None if math.isnan(value) else round(value, 4) for name, value in found.items()}


def _told_answers(data: CheckedData) -> str:
    """What answers are chosen from, as a run with the default `max_closed_answers` has it."""
    space = AnswerSpace(TrainConfig.max_closed_answers)
    for record in data.records:
        space.add(record)
    return told_answers(space.kinds, space.closed)


def _told_other_domain(data: CheckedData) -> str:
    """A sentence where answers are like none of the domain's; "" where there are none."""
    count = sum(OTHER_DOMAIN in problem.fix for problem in data.problems)
    return f"{count:,} answers are none of this domain's: {OTHER_DOMAIN}" if count else ""


def _where(data: CheckedData, number: int) -> dict[str, str]:
    return {"where": data.where[number]} if number in data.where else {}


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return sum(found) / len(found) if found else None


def _counts(values: Iterable[Any], *, by_value: bool = False) -> dict[str, int]:
    """The most common first, or ordered `by_value`."""
    counts = Counter(values)
    return {str(value): count for value, count in (sorted(counts.items()) if by_value else counts.most_common())}


def _histogram(values: Sequence[int]) -> dict[str, Any] | None:
    """Smallest, median, 95th percentile and largest value, and `bins` of [first, last, count]."""
    if not values:
        return None
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // _NUM_BINS))
    filled = Counter((value - low) // width for value in values)
    return {
        "min": low,
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": high,
        "bins": [
            [low + place * width, low + (place + 1) * width - 1, filled[place]] for place in range(max(filled) + 1)
        ],
    }


def _examples(data: CheckedData) -> dict[str, list[dict[str, Any]]]:
    """Kind -> its first findings, each with what the record says."""
    place = {number: index for index, number in enumerate(data.numbers)}
    found: dict[str, list[dict[str, Any]]] = {}
    for problem in data.problems:
        examples = found.setdefault(problem.kind, [])
        if len(examples) < EXAMPLES_PER_KIND:
            shown = [_shown(data, place, number) for number in (problem.number, problem.other) if number]
            examples.append({**asdict(problem), "records": shown})
    return found


def _shown(data: CheckedData, place: dict[int, int], number: int) -> dict[str, Any]:
    if number not in place:
        value = data.values.get(number)
        text = "" if value is None else json.dumps(value, ensure_ascii=False, indent=1)
        return {"number": number, "raw": text[:MAX_EXAMPLE_CHARACTERS]}
    record = data.records[place[number]]
    return {
        "number": number,
        "split": data.splits[place[number]],
        "image": record.image,
        "instruction": record.instruction[:MAX_EXAMPLE_CHARACTERS],
        "reasoning": format_reasoning(record.steps)[:MAX_EXAMPLE_CHARACTERS],
        "answer": ", ".join(record.answer),
    }

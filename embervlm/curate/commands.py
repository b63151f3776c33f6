"""`embervlm data ...`: what the data commands do, apart from parsing their flags."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embervlm.config import ConfigError
from embervlm.data.domain import Domain
from embervlm.data.records import DataError
from embervlm.data.shard import Shard
from embervlm.progress import progress_bar
from embervlm.run_dir import read_json

if TYPE_CHECKING:
    from embervlm.curate.teachers.endpoint import EndpointConfig

DEFAULT_SAMPLES = 50_000


def generate(
    *,
    output_file: Path,
    num_samples: int | None = None,
    seed: int = 0,
    questions_per_picture: int = 1,
    input_dataset: Path | None = None,
    workers: int | None = None,
    shard: str | None = None,
) -> None:
    """Write records by the rule teacher: for scenes of its own, or for the tasks in `input_dataset`."""
    from embervlm.robots.generate import blind_accuracy, generate_for_tasks, generate_scenes
    from embervlm.robots.tasks import is_task_file, read_tasks

    part = Shard.parse(shard)
    check_output(output_file, num_samples)
    if input_dataset is not None:
        values = read_json(input_dataset)
        if not is_task_file(values):
            raise ConfigError(f"--input_dataset {input_dataset}: needs a list of records with input and output")
        tasks = read_tasks(values, input_dataset)
        records = generate_for_tasks(tasks, output_file, num_samples=num_samples, workers=workers, shard=part)
    else:
        records = generate_scenes(
            output_file,
            num_samples=num_samples or DEFAULT_SAMPLES,
            questions_per_picture=questions_per_picture,
            seed=seed,
            workers=workers,
            shard=part,
        )
    answers = Counter(record["answer"] for record in records)
    print(
        f"{output_file}: {len(records)} records, {len({r['image'] for r in records})} pictures, {len(answers)} answers"
    )
    blind = blind_accuracy(records)
    found = f"{blind['fitted_on_train']:.1%} fitted on train, {blind['in_hindsight']:.1%} at best"
    none = math.isnan(blind["in_hindsight"])
    print(f"answering from the instruction alone, test split: {'it has no records' if none else found}")


def generate_by_teacher(
    endpoint: EndpointConfig,
    *,
    domain: Domain,
    input_dataset: Path | None,
    output_file: Path,
    num_samples: int,
    image_root: Path | None = None,
    shard: str | None = None,
) -> None:
    """Chains for the questions in `input_dataset`, by a model behind an endpoint; the same call again continues.

    Raises:
        DataError: some questions got no answer; what was answered is written.
    """
    from embervlm.curate.teachers.asking import ask_endpoint
    from embervlm.curate.teachers.collection import Collection, need_input, read_questions

    part = Shard.parse(shard)
    check_output(output_file, num_samples)
    endpoint.url(), endpoint.key()  # what is wrong with them is said before anything is read
    path = need_input(input_dataset, f"--teacher_model {endpoint.teacher_model}")
    questions = read_questions(path, domain, image_root=image_root, shard=part, need_answers=False)
    settings = {
        "--source": "teacher",
        "--teacher_model": endpoint.teacher_model,
        "--shard": str(part),
        "--teacher_sees_pictures": endpoint.sees_pictures,
    }
    wanted = part.share_of(num_samples)
    with Collection(output_file, questions, image_root=image_root or path.parent, settings=settings) as collection:
        outcome = ask_endpoint(endpoint, questions, collection, num_samples=wanted)
        spent = f"{collection.usage.total():,} tokens"
        if cost := endpoint.usd(collection.usage):
            spent += f", ${cost:,.4f}"
        print(f"{len(questions)} questions, {len(collection.accepted)} accepted, {collection.rejections()}; {spent}")
        if collection.accepted or not (outcome.unanswered or outcome.stopped):
            print(f"{output_file}: {collection.write(wanted)} records")
    if outcome.stopped:
        print(f"stopped before the end: {outcome.stopped}. The same command continues")
    elif len(collection.accepted) < wanted and not outcome.unanswered:
        print(f"fewer than --num_samples {num_samples}: add questions, or raise --samples_per_record or --attempts")
    if outcome.unanswered:
        raise DataError.of(
            [
                f"record {name}: has no answer ({reason}); the same command asks again"
                for name, reason in outcome.unanswered.items()
            ]
        )


def convert_annotations(
    *,
    domain: Domain,
    input_dataset: Path | None,
    output_file: Path,
    num_samples: int,
    image_root: Path | None = None,
    shard: str | None = None,
) -> None:
    """Records that people annotated, in any of the guide's spellings, as records in the unified one."""
    from embervlm.curate.teachers.collection import need_input, picture_root
    from embervlm.data.record_pictures import pictures_beside
    from embervlm.data.records import read_records, write_records

    part = Shard.parse(shard)
    check_output(output_file, num_samples)
    path = need_input(input_dataset, "--source human")
    unpack_dir = pictures_beside(output_file)
    given = read_records(path, candidates=domain.candidates, image_root=image_root, unpack_dir=unpack_dir)
    records = part.of(given[:num_samples])
    root = picture_root(output_file, records, image_root or path.parent)
    said = {"source": "human_annotated"}
    write_records(output_file, (replace(r, metadata={**r.metadata, **said}) for r in records), image_root=root)
    print(f"{output_file}: {len(records)} records")


def merge(*, domain: Domain, shards: Sequence[Path], output_file: Path, image_root: Path | None = None) -> None:
    """One data set from several, in their order; a record that appears twice counts once.

    Raises:
        DataError: two records share an id and differ, or a picture lies where the output cannot name it.
    """
    from embervlm.data.record_pictures import is_inside, pictures_beside
    from embervlm.data.records import read_records, record_to_json, write_dataset

    check_output(output_file)
    root = output_file.parent if image_root is None else image_root
    merged: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    total = 0
    read = partial(read_records, candidates=domain.candidates, image_root=image_root, require_reasoning=False)
    for path in progress_bar(shards, desc="merge", unit="shard"):
        unpack_dir = pictures_beside(output_file)
        for record in read(path, unpack_dir=unpack_dir):
            total += 1
            if record.image is not None and not is_inside(record.image, os.path.realpath(root)):
                problems.append(
                    f"{path} record {record.record_id}: image: {record.image} is not in {root}; write the output file "
                    "to a folder that contains all pictures"
                )
            value = record_to_json(record, root)
            if merged.setdefault(record.record_id, value) != value:
                problems.append(f"{path} record {record.record_id}: id: another record has it; give each its own")
    if problems:
        raise DataError.of(problems)
    write_dataset(output_file, list(merged.values()))
    twice = f", {total - len(merged)} duplicates left out" if total > len(merged) else ""
    print(f"{output_file}: {len(merged)} records from {len(shards)} files{twice}")


def check_output(output_file: Path, num_samples: int | None = None) -> None:
    """ConfigError if `output_file` cannot be written, or would be empty."""
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"--num_samples {num_samples}: must be at least 1")
    if output_file.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--output_file {output_file}: must end in .json or .jsonl")

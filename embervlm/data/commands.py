"""`embervlm data ...`: what the data commands do, apart from parsing their flags."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError

DEFAULT_SAMPLES = 50_000


def generate(
    *, output_file: Path, num_samples: int | None = None, seed: int = 0, questions_per_picture: int = 1,
    input_dataset: Path | None = None, workers: int | None = None, teacher_model: str = "rules",
) -> None:  # fmt: skip
    """Write records by the rule teacher: for scenes of its own, or for the tasks in `input_dataset`."""
    from embervlm.data.scenes.generate import blind_accuracy, generate_for_tasks, generate_scenes
    from embervlm.data.teachers.real_tasks import is_task_file, read_tasks

    if teacher_model != "rules":
        raise ConfigError(f"--teacher_model {teacher_model}: only the embedded teacher, rules, is there yet")
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"--num_samples {num_samples}: must be at least 1")
    if output_file.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--output_file {output_file}: must end in .json or .jsonl")
    if input_dataset is not None:
        values = _read_json(input_dataset)
        if not is_task_file(values):
            raise ConfigError(f"--input_dataset {input_dataset}: needs a list of records with input and output")
        tasks = read_tasks(values, input_dataset)
        records = generate_for_tasks(tasks, output_file, num_samples=num_samples, workers=workers)
    else:
        records = generate_scenes(
            output_file, num_samples=num_samples or DEFAULT_SAMPLES, questions_per_picture=questions_per_picture,
            seed=seed, workers=workers,
        )  # fmt: skip
    answers = Counter(record["answer"] for record in records)
    print(
        f"{output_file}: {len(records)} records, {len({r['image'] for r in records})} pictures, {len(answers)} answers"
    )
    blind = blind_accuracy(records)
    print(
        "answering from the instruction alone, test split: "
        f"{blind['fitted_on_train']:.1%} fitted on train, {blind['in_hindsight']:.1%} at best"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error

"""The embedded data set: rendered scenes, questions about them, chains by the rule teacher. Same seed, same bytes."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.blind import blind_guess
from embervlm.data.chain_text import REASONING_END, REASONING_START, format_reasoning
from embervlm.data.scenes.facts import SceneFacts, all_facts
from embervlm.data.scenes.render import render_scene
from embervlm.data.splits import split_of
from embervlm.data.teachers.real_tasks import scene_for, task_record
from embervlm.data.teachers.rules import KINDS, TASKS, Task, TaughtChain, caption, teach
from embervlm.progress import progress_bar

KIND_SHARES = {"now": 0.15, "walk": 0.2, "haul": 0.65}
"""Share of each question kind; the long chains are where reasoning can show."""
MAX_ANSWER_SHARE = 0.2
"""An answer that makes up more than this of its question's records is not asked for again until it does not."""
MAX_SCENE_DRAWS = 20
"""Scenes tried for one whose answer is not too common."""
JPEG_QUALITY = 90


@dataclass(frozen=True)
class ScenePlan:
    """One picture to draw, with the questions asked about it."""

    index: int
    facts: SceneFacts
    seed: int
    tasks: tuple[Task, ...]


def plan_scenes(num_pictures: int, questions_per_picture: int, seed: int) -> list[ScenePlan]:
    """Scenes uniform over the combinations of facts; questions so that every answer is as frequent as the next.

    For each scene, questions whose answer there has been given often are passed over, so that the instruction alone
    says little about the answer.
    """
    if num_pictures < 1 or not 1 <= questions_per_picture <= len(TASKS):
        raise ConfigError(f"need at least 1 picture and 1 to {len(TASKS)} questions per picture")
    rng = random.Random(f"scenes:{seed}")
    combinations = list(all_facts())
    counts: Counter[tuple[Task, tuple[str, ...]]] = Counter()
    per_task: Counter[Task] = Counter()
    taught = {facts: {task: teach(facts, task).answer for task in TASKS} for facts in combinations}
    kinds_of_answer = {task: len({answers[task] for answers in taught.values()} - {()}) for task in TASKS}
    caps = {task: max(MAX_ANSWER_SHARE, 1.1 / number) for task, number in kinds_of_answer.items()}
    plans = []
    for index in range(num_pictures):
        chosen: list[Task] = []
        kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
        for attempt in count():  # the last one too may fall on a scene in which no robot suits any task
            facts = rng.choice(combinations)
            answers = taught[facts]
            fullness = {task: counts[task, answers[task]] / (1 + per_task[task]) / caps[task] for task in TASKS}
            open_tasks = [task for task in TASKS if answers[task]]
            good = [task for task in open_tasks if task.kind == kind and fullness[task] < 1]
            if len(open_tasks) >= questions_per_picture and (good or attempt >= MAX_SCENE_DRAWS - 1):
                break
        for _ in range(questions_per_picture):
            pool = [task for task in open_tasks if task not in chosen]
            pool = [task for task in pool if task.kind == kind] or pool
            wanted = [task for task in pool if fullness[task] < 1]  # the rarest question whose answer is not too common
            task = (
                min(wanted, key=lambda t: (per_task[t], rng.random()))
                if wanted
                else min(pool, key=fullness.__getitem__)
            )
            counts[task, answers[task]] += 1
            per_task[task] += 1
            chosen.append(task)
            kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
        plans.append(ScenePlan(index, facts, rng.getrandbits(48), tuple(chosen)))
    return plans


def scene_metadata(
    facts: SceneFacts, task: Task, chain: TaughtChain, boxes: list[dict[str, Any]], details: Mapping[str, float]
) -> dict[str, Any]:
    """Everything a record knows about its scene: ground truth, claims, step types, what each step looks at."""
    return {
        "source": "rules",
        "complexity": KINDS[task.kind],
        "num_steps": len(chain.steps) - 1,
        "validated": True,
        "question_kind": task.kind,
        "split_group": facts.key,
        "scene": facts.as_dict(),
        "facts": chain.claims,
        "step_types": list(chain.step_types),
        "seen": [list(names) for names in chain.seen],
        "boxes": boxes,
        "details": dict(details),
        "caption": caption(facts),
    }


def render_to_file(facts: SceneFacts, seed: int, path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Draw a scene into a JPEG; its boxes (each in [0, 1]) and numbers."""
    rendered = render_scene(facts, seed)
    rendered.image.save(path, quality=JPEG_QUALITY)
    boxes = [
        {"kind": item.kind, "label": item.label, "box": [round(edge, 4) for edge in item.box]}
        for item in rendered.objects
    ]
    return boxes, rendered.details


def _records_of(job: tuple[ScenePlan, str]) -> list[dict[str, Any]]:
    plan, folder = job
    name = f"{plan.index:06d}.jpg"
    boxes, details = render_to_file(plan.facts, plan.seed, Path(folder) / "images" / name)
    records = []
    for number, task in enumerate(plan.tasks):
        chain = teach(plan.facts, task)
        records.append({
            "id": f"scene-{plan.index:06d}-{number}",
            "image": f"images/{name}",
            "instruction": task.instruction,
            "reasoning": f"{REASONING_START}{format_reasoning(chain.steps)}{REASONING_END}",
            "answer": ", ".join(chain.answer),
            "confidence": 1.0,
            "metadata": scene_metadata(plan.facts, task, chain, boxes, details),
        })  # fmt: skip
    return records


def generate_scenes(
    output_file: str | Path, *, num_samples: int, questions_per_picture: int = 1, seed: int = 0,
    workers: int | None = None, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write `num_samples` records with their pictures (in `images/` beside the file); return what was written."""
    path = Path(output_file)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    plans = plan_scenes(-(-num_samples // questions_per_picture), questions_per_picture, seed)
    jobs = [(plan, str(path.parent)) for plan in plans]
    records: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done: Iterable[list[dict[str, Any]]] = pool.map(_records_of, jobs, chunksize=32)
        for group in progress_bar(done, total=len(jobs), desc="scenes", unit="picture", disable=not progress):
            records.extend(group)
    records = records[:num_samples]
    write_dataset(path, records)
    return records


def write_dataset(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON or, for a `.jsonl` path, one to a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:  # as JSON escapes: \ud800
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            file.write("[\n")
            file.writelines(_array_lines(records))
            file.write("]\n")
    os.replace(part, path)


def _array_lines(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for index, record in enumerate(records):
        yield json.dumps(record, ensure_ascii=False) + (",\n" if index + 1 < len(records) else "\n")


def blind_accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far the instruction alone goes on the test split, in [0, 1].

    `fitted_on_train` answers each instruction as the training split did most often; `in_hindsight` is the best that any
    guesser of one answer per instruction could have done on the test split itself.
    """
    guessed = blind_guess(
        (split_of(record["metadata"]["split_group"]), record["instruction"], record["answer"]) for record in records
    )
    return {name: guessed[name] for name in ("fitted_on_train", "in_hindsight")}


def generate_for_tasks(
    tasks: Sequence[tuple[str, tuple[str, ...]]], output_file: str | Path, *, num_samples: int | None = None
) -> list[dict[str, Any]]:
    """Scenes and chains for tasks that others wrote; at most `num_samples` records, one for each task."""
    path = Path(output_file)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (text, gold) in enumerate(tasks[:num_samples]):
        facts, task, chain = scene_for(text, gold)
        name = f"images/task-{index:06d}.jpg"
        boxes, details = render_to_file(facts, index, path.parent / name)
        metadata = scene_metadata(facts, task, chain, boxes, details)
        records.append(task_record(index, text, chain, metadata, name))
    write_dataset(path, records)
    return records

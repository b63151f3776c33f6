"""The embedded data set: rendered scenes, questions about them, chains by the rule teacher. Same seed, same bytes."""

from __future__ import annotations

import io
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.blind import blind_guess
from embervlm.data.records import write_dataset
from embervlm.data.shard import WHOLE, Shard
from embervlm.data.splits import split_of
from embervlm.progress import progress_bar
from embervlm.robots.facts import SceneFacts, all_facts
from embervlm.robots.render import render_scene
from embervlm.robots.rules import KINDS, TASKS, Task, TaughtChain, caption, teach
from embervlm.robots.tasks import scenes_for, task_record
from embervlm.run_dir import naming_unwritten
from embervlm.words.chain_text import REASONING_END, REASONING_START, format_reasoning

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
    rng = random.Random(f"scenes:{seed}")
    combinations = list(all_facts())
    answers_in = {facts: {task: teach(facts, task).answer for task in TASKS} for facts in combinations}
    most = max(sum(map(bool, answers.values())) for answers in answers_in.values())
    if num_pictures < 1 or not 1 <= questions_per_picture <= most:
        raise ConfigError(f"need at least 1 picture and 1 to {most} questions per picture")
    counts: Counter[tuple[Task, tuple[str, ...]]] = Counter()
    per_task: Counter[Task] = Counter()
    kinds_of_answer = {task: len({answers[task] for answers in answers_in.values()} - {()}) for task in TASKS}
    caps = {task: max(MAX_ANSWER_SHARE, 1.1 / number) for task, number in kinds_of_answer.items()}
    plans = []
    for index in range(num_pictures):
        chosen: list[Task] = []
        kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
        for attempt in itertools.count(1):
            facts = rng.choice(combinations)
            answers = answers_in[facts]
            fullness = {task: counts[task, answers[task]] / (1 + per_task[task]) / caps[task] for task in TASKS}
            open_tasks = [task for task in TASKS if answers[task]]
            good = [task for task in open_tasks if task.kind == kind and fullness[task] < 1]
            if len(open_tasks) >= questions_per_picture and (good or attempt >= MAX_SCENE_DRAWS):
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
    encoded = io.BytesIO()
    rendered.image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    with naming_unwritten(path):  # not by Pillow, which on a full disk cuts the picture off without an error
        path.write_bytes(encoded.getvalue())
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
        records.append(
            {
                "id": f"scene-{plan.index:06d}-{number}",
                "image": f"images/{name}",
                "instruction": task.instruction,
                "reasoning": f"{REASONING_START}{format_reasoning(chain.steps)}{REASONING_END}",
                "answer": ", ".join(chain.answer),
                "confidence": 1.0,
                "metadata": scene_metadata(plan.facts, task, chain, boxes, details),
            }
        )
    return records


def generate_scenes(
    output_file: str | Path,
    *,
    num_samples: int,
    questions_per_picture: int = 1,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    shard: Shard = WHOLE,
) -> list[dict[str, Any]]:
    """Write `num_samples` records with their pictures (in `images/` beside the file); return what was written.

    The shards together write the records of the whole job, each those of its own pictures.
    """
    path = Path(output_file)
    with naming_unwritten(path.parent / "images"):
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
    plans = plan_scenes(-(-num_samples // questions_per_picture), questions_per_picture, seed)
    plans[-1] = replace(plans[-1], tasks=plans[-1].tasks[: num_samples - (len(plans) - 1) * questions_per_picture])
    jobs = [(plan, str(path.parent)) for plan in shard.of(plans)]
    records: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done: Iterable[list[dict[str, Any]]] = pool.map(_records_of, jobs, chunksize=32)
        for group in progress_bar(done, total=len(jobs), desc="scenes", unit="picture", disable=not progress):
            records.extend(group)
    write_dataset(path, records)
    return records


def blind_accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far the instruction alone goes on the test split, in [0, 1].

    `fitted_on_train` answers each instruction as the training split did most often; `in_hindsight` is the best that any
    guesser of one answer per instruction could have done on the test split itself.
    """
    guessed = blind_guess(
        (split_of(record["metadata"]["split_group"]), record["instruction"], record["instruction"], record["answer"])
        for record in records
    )
    return {name: guessed[name] for name in ("fitted_on_train", "in_hindsight")}


def generate_for_tasks(
    tasks: Sequence[tuple[str, tuple[str, ...]]],
    output_file: str | Path,
    *,
    num_samples: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    shard: Shard = WHOLE,
) -> list[dict[str, Any]]:
    """Scenes and chains for tasks that others wrote: `num_samples` records, by default one for each task.

    More samples than tasks give each task several pictures, of other scenes in which its answer makes sense.
    """
    path = Path(output_file)
    with naming_unwritten(path.parent / "images"):
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
    total = len(tasks) if num_samples is None else num_samples
    jobs = [
        (index + number * len(tasks), text, scene, str(path.parent))
        for index, (text, gold) in enumerate(tasks[:total])
        for number, scene in enumerate(scenes_for(text, gold, -(-(total - index) // len(tasks))))
    ]
    jobs.sort(key=lambda job: job[0])
    with ProcessPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done = pool.map(_record_of_task, jobs := list(shard.of(jobs)), chunksize=32)
        records = list(progress_bar(done, total=len(jobs), desc="scenes", unit="picture", disable=not progress))
    write_dataset(path, records)
    return records


def _record_of_task(job: tuple[int, str, tuple[SceneFacts, Task, TaughtChain], str]) -> dict[str, Any]:
    index, text, (facts, task, chain), folder = job
    name = f"images/task-{index:06d}.jpg"
    boxes, details = render_to_file(facts, index, Path(folder) / name)
    return task_record(index, text, chain, scene_metadata(facts, task, chain, boxes, details), name)

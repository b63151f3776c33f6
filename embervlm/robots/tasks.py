"""Tasks that others wrote, without picture or reasoning: each gets a scene in which its given answer makes sense.

The given answer stays gold. Among the scenes for which the rule teacher comes to just that answer, one is taken whose
place fits the task's words; where there is none, the nearest is taken and the chain says which verdicts are the task's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from embervlm.data.records import DataError
from embervlm.robots.facts import SceneFacts, all_facts
from embervlm.robots.rules import ROBOT_ORDER, TASKS, VERDICTS, Task, TaughtChain, teach
from embervlm.words.chain_text import REASONING_END, REASONING_START, format_reasoning, parse_answer

PLACE_WORDS = {
    "warehouse": r"warehouse|factory|hospital|office|building|indoor|supermarket|store|lab|corridor|facility|kitchen",
    "stairs": r"stair|floor|climb|tower|multi-story|steps|ladder",
    "flooded tunnel": r"tunnel|pipe|sewer|cave|flood|culvert|mine",
    "rubble": r"rubble|collaps|disaster|earthquake|debris|ruin|quarry|archaeolog|construction|rescue",
    "cliff": r"cliff|mountain|height|high-rise|slope|canyon|roof|facade",
    "open water": r"water|sea|ocean|lake|river|marine|coral|reef|ship|dam|harbou?r|fish",
    "field": r"field|farm|crop|forest|terrain|agricultur|orchard|plant|livestock|outdoor|land|desert|irrigation",
    "crowd": r"crowd|people|city|street|urban|visitor|customer|airport|stadium|market|school|museum",
}
JOB_WORDS = {
    "carry": r"carry|transport|move|haul|bring|load",
    "deliver": r"deliver|distribut|supply|fetch",
    "repair": r"repair|fix|maintain|install|assembl|replace|clean|plant|harvest",
    "unlock": r"open|unlock|operate|turn|press",
    "film": r"film|photo|captur|record|map|survey|image",
    "inspect": r"inspect|check|monitor|examin|explore|search|assess|analy|detect|patrol",
}


def is_task_file(values: Any) -> bool:
    """Whether parsed JSON looks like robot-selection tasks: `instruction`, `input` and an answer, no reasoning."""
    return (
        isinstance(values, list)
        and bool(values)
        and isinstance(values[0], dict)
        and "input" in values[0]
        and ("output" in values[0] or "subtasks" in values[0])
    )


def read_tasks(values: Sequence[Any], path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(task text, gold robots) of every record; DataError lists all that lack either."""
    tasks, problems = [], []
    for number, value in enumerate(values, 1):
        text = value.get("input") if isinstance(value, Mapping) else None
        if not isinstance(text, str) or not text.removeprefix("Task:").strip():
            problems.append(f"{path} record {number}: input: is missing or not text; write the task there")
            continue
        if "output" in value:
            given = str(value["output"])
        else:
            parts = value.get("subtasks")
            given = (
                ", ".join(str(part.get("assigned_robot", "")) for part in parts if isinstance(part, Mapping))
                if isinstance(parts, list)
                else ""
            )
        answer = parse_answer(given, ROBOT_ORDER)
        if not answer:
            problems.append(f"{path} record {number}: output: {given[:80]!r} names none of {', '.join(ROBOT_ORDER)}")
            continue
        tasks.append((text.removeprefix("Task:").strip(), answer))
    if problems:
        raise DataError.of(problems)
    return tasks


def normalised_task(text: str) -> str:
    """The same for the same task in other letters or punctuation; splits are made over it."""
    return re.sub(r"\W+", " ", text).casefold().strip()


@lru_cache(maxsize=1)
def _taught() -> list[tuple[SceneFacts, Task, frozenset[str]]]:
    return [(facts, task, frozenset(teach(facts, task).answer)) for facts in all_facts() for task in TASKS]


def scenes_for(text: str, gold: tuple[str, ...], count: int) -> list[tuple[SceneFacts, Task, TaughtChain]]:
    """`count` scenes, each with a question kind and a chain that ends in `gold`; the same for the same text.

    They are drawn among those that fit best: first the answer, then the place, then the job; repeated only where there
    are fewer than `count`.
    """
    words = text.lower()
    job = max(JOB_WORDS, key=lambda name: len(re.findall(JOB_WORDS[name], words)))
    fits = {place: len(re.findall(pattern, words)) for place, pattern in PLACE_WORDS.items()}

    def fit(entry: tuple[SceneFacts, Task, frozenset[str]]) -> tuple[float, int, bool]:
        facts, task, answer = entry
        overlap = len(answer & set(gold)) / len(answer | set(gold)) if answer else 0.0
        return overlap, fits[facts.place], task.job == job

    ranks = [fit(entry) for entry in _taught()]
    best = max(ranks)
    pool = [(facts, task) for (facts, task, _), rank in zip(_taught(), ranks) if rank == best]
    rng = random.Random(f"task:{words}")
    chosen = [pair for _ in range(-(-count // len(pool))) for pair in rng.sample(pool, len(pool))][:count]
    return [(facts, task, _end_in(teach(facts, task), gold)) for facts, task in chosen]


def _end_in(chain: TaughtChain, gold: tuple[str, ...]) -> TaughtChain:
    """`chain` with the verdicts that the gold answer asks for."""
    if set(chain.answer) == set(gold):
        return chain
    claims, steps = dict(chain.claims), list(chain.steps)
    for robot in ROBOT_ORDER:
        verdict = VERDICTS[0 if robot in gold else 1]
        if claims[robot] != verdict:
            line = re.compile(rf"[^.:]*: {robot} is {claims[robot]}\.")
            steps = [line.sub(f" By the task: {robot} is {verdict}.", step).strip() for step in steps]
            claims[robot] = verdict
    steps[-1] = f"Conclusion: {', '.join(gold)}."
    return replace(chain, steps=tuple(steps), claims=claims, answer=gold)


def task_group(text: str) -> str:
    """The `split_group` of a task: the same for all spellings of it."""
    return "task:" + re.sub(r"\W+", " ", text).casefold().strip()


def task_record(index: int, text: str, chain: TaughtChain, metadata: dict[str, Any], image: str) -> dict[str, Any]:
    """The record of one real task in the unified spelling."""
    return {
        "id": f"task-{index:06d}",
        "image": image,
        "instruction": f"{text} Which robots are suited?",
        "reasoning": f"{REASONING_START}{format_reasoning(chain.steps)}{REASONING_END}",
        "answer": ", ".join(chain.answer),
        "confidence": 1.0,
        "metadata": {**metadata, "source": "real_task", "split_group": task_group(text)},
    }

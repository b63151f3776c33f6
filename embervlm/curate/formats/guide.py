"""The Stage 4 guide's own files: records in its three spellings, and robot selection without reasoning."""

from __future__ import annotations

import re
from typing import Any

from embervlm.curate.formats.shared import ANALYSIS, CHECKING, SELECTION, Source, chain_of
from embervlm.data.record_fields import kind, quote
from embervlm.robots.rules import ROBOT_ORDER
from embervlm.robots.tasks import task_group
from embervlm.words.chain_text import strict_answer


def teacher(at: Source) -> list[dict[str, Any]]:
    """`question`, `reasoning` as a list of lines, `answer`."""
    return _spelled(at, question="question", chain="reasoning", chain_type=list)


def human(at: Source) -> list[dict[str, Any]]:
    """`question`, `reasoning_steps` as a list, `answer`."""
    return _spelled(at, question="question", chain="reasoning_steps", chain_type=list)


def unified(at: Source) -> list[dict[str, Any]]:
    """`instruction`, `reasoning` as one text, `answer`, `metadata`."""
    return _spelled(at, question="instruction", chain="reasoning", chain_type=str)


def _spelled(at: Source, *, question: str, chain: str, chain_type: type) -> list[dict[str, Any]]:
    """A record in one of the guide's spellings as it is; the reader reports whatever else is wrong with it."""
    for name in (question, chain):
        if at.value.get(name) is None:
            at.report(f"{name}: is missing; this is how --from spells it, name the spelling of your file")
    given = at.value.get(chain)
    if given is not None and not isinstance(given, chain_type):
        at.report(f"{chain}: is {kind(given)}; name the spelling of your file with --from, or correct it")
    return [] if at.problems else [at.value]


def robot_selection(at: Source) -> list[dict[str, Any]]:
    """`instruction` (the fleet), `input` (the task) and `output`, or `subtasks` with the robot assigned to each.

    Neither file holds reasoning: with `output` the steps quote what the fleet's description says of the robots it
    names, with `subtasks` they are the assignments in their order, whose robots are the answer.
    """
    task = at.text("input").removeprefix("Task:").strip()
    if not task and not at.problems:
        at.report("input: is empty; write the task")
    fleet = at.text("instruction")
    if "subtasks" in at.value:
        parts, robots = _assignments(at)
    else:
        robots, unknown = strict_answer(at.text("output"), ROBOT_ORDER)
        for name in unknown:
            at.report(f"output: {quote(name)} is not one of {', '.join(ROBOT_ORDER)}; correct it or drop the record")
        described = {robot: _description(fleet, robot) for robot in robots}
        for robot in (robot for robot, text in described.items() if fleet and not text):
            at.report(f"instruction: does not describe {robot}, and there is no reasoning; add its capabilities")
        parts = [(CHECKING, text) for text in described.values()]
    if at.problems:
        return []
    answer = ", ".join(robot for robot in ROBOT_ORDER if robot in robots)
    metadata = at.metadata(
        "input instruction output subtasks", source="robot_selection", fleet=fleet, split_group=task_group(task)
    )
    chain = chain_of([(ANALYSIS, f"The task is: {task}"), *parts], answer, metadata)
    return [{"instruction": f"{task} Which robots are suited?", "answer": answer, **chain}]


def _assignments(at: Source) -> tuple[list[tuple[str, str]], list[str]]:
    """A step for each subtask in the order of execution, and the robots."""
    subtasks = at.value["subtasks"]
    if not isinstance(subtasks, list) or not subtasks or not all(isinstance(part, dict) for part in subtasks):
        at.report("subtasks: is not a list of objects; write {subtask, assigned_robot, execution_order} for each")
        return [], []
    for number, part in enumerate(subtasks, 1):
        order = part.get("execution_order")
        if not isinstance(part.get("subtask"), str) or not part["subtask"].strip():
            at.report(f"subtasks[{number}].subtask: is missing or no text; write what is to be done")
        if part.get("assigned_robot") not in ROBOT_ORDER:
            at.report(f"subtasks[{number}].assigned_robot: is not one of {', '.join(ROBOT_ORDER)}; correct it")
        if isinstance(order, bool) or not isinstance(order, int):
            at.report(f"subtasks[{number}].execution_order: is {kind(order)}, not a whole number; number the subtasks")
    if not all(isinstance(part.get("execution_order"), int) for part in subtasks):
        return [], []
    ordered = sorted(subtasks, key=lambda part: part["execution_order"])
    parts = [(SELECTION, f"{str(part.get('subtask')).rstrip('.')}: {part.get('assigned_robot')}.") for part in ordered]
    return parts, [str(part.get("assigned_robot")) for part in ordered]


def _description(fleet: str, robot: str) -> str:
    """What the fleet's description says that `robot` can do and where; "" where it does not describe it."""
    match = re.search(
        rf"^{re.escape(robot)}:\s*^capabilities:(?P<can>.*)$(?:\s*^limitations:(?P<cannot>.*)$)?"
        rf"(?:\s*^environments:(?P<where>.*)$)?",
        fleet,
        re.MULTILINE,
    )
    if match is None:
        return ""
    parts = (("capabilities", "can"), ("limitations", "cannot"), ("environments", "where"))
    named = [f"{name} are {match[group].strip(' ,')}" for name, group in parts if (match[group] or "").strip(" ,")]
    return f"{robot}: {'; '.join(named)}." if named else ""

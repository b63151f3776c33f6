"""Records of other formats -> the unified spelling. One function per format; the reader checks what comes out.

A function reports what it cannot use in the words of its own format; nothing is guessed, nothing is dropped silently.
Choices become `metadata.candidates`, explanations become steps, one per sentence, and the answer the conclusion.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.record_fields import FieldRules, Report, kind, quote
from embervlm.data.record_pictures import is_inside, pictures_beside
from embervlm.data.records import DataError, ReasoningRecord, file_values, read_record, record_to_json, write_dataset
from embervlm.data.splits import SPLITS, picture_digests
from embervlm.progress import progress_bar
from embervlm.robots.tasks import task_group
from embervlm.words.chain_text import (
    CONCLUSION,
    REASONING_END,
    REASONING_START,
    ROBOTS,
    format_reasoning,
    parse_answer,
    strict_answer,
)

ANALYSIS, CHECKING, SELECTION, CONCLUDING = (
    "problem_analysis",
    "constraint_checking",
    "solution_selection",
    "conclusion",
)
"""The Stage 4 guide's step types."""

# ---- the command


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    records: list[ReasoningRecord]
    skipped: list[dict[str, Any]]
    """`{"record", "id", "problems"}` of everything that was left out; the record's number is null for a line that is no
    JSON, and the id there where the record has one."""
    picture_root: str
    """Folder that the picture paths in the output are relative to."""
    num_moved: int
    """Records whose split was changed, because their picture also stands in another."""


def convert_file(
    path: Path,
    output_file: Path,
    *,
    source: str,
    image_root: Path | None = None,
    skip_bad: bool = False,
    allow_outside: bool = False,
    progress: bool = True,
) -> Converted:
    """Convert `path`, a file in the format `source`, and write the unified spelling to `output_file`.

    Args:
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
    root = os.path.realpath(path.parent if image_root is None else image_root)
    if image_root is not None and not os.path.isdir(root):
        raise ConfigError(f"--image_root {image_root}: no such folder; name the one that picture paths are relative to")
    rules = FieldRules(image_root=root, allow_outside=allow_outside, unpack_dir=str(pictures_beside(output_file)))
    line_problems: list[str] = []
    skipped: list[dict[str, Any]] = []
    records: list[ReasoningRecord] = []
    numbers: dict[str, int] = {}
    values = file_values(path, line_problems, keyed=source == "scienceqa")
    for number, value in progress_bar(values, desc=f"convert {path.name}", unit="record", disable=not progress):
        found: list[str] = []
        at = Source(number=number, image_root=root, report=found.append)
        for item in CONVERTERS[source](value, at) if isinstance(value, dict) else [value]:
            record = read_record(item, f"{path.name}:{number}", rules, found.append)
            if record is not None and numbers.setdefault(record.record_id, number) != number:
                first = numbers[record.record_id]
                found.append(f"id: {quote(record.record_id)} is also the id of record {first}; give each its own")
            elif record is not None:
                records.append(_with_complexity(record))
        if found:
            named = {"id": value["id"]} if isinstance(value, dict) and value.get("id") is not None else {}
            skipped.append({"record": number, **named, "problems": found})
    problems = line_problems + [
        f"{path} record {item['record']}: {text}" for item in skipped for text in item["problems"]
    ]
    if problems and not (records and skip_bad):
        raise DataError.of(problems)
    if not records:
        raise DataError(f"{path}: holds no records; name a file that does")
    records, num_moved = _one_split_per_picture(records)
    folder = os.path.realpath(output_file.parent)
    picture_root = folder if is_inside(root, folder) else root
    write_dataset(output_file, (record_to_json(record, picture_root) for record in records))
    skipped = [{"record": None, "problems": [problem]} for problem in line_problems] + skipped
    if skipped:
        write_dataset(skipped_path(output_file), skipped)
    else:
        skipped_path(output_file).unlink(missing_ok=True)  # of an earlier try
    return Converted(records=records, skipped=skipped, picture_root=picture_root, num_moved=num_moved)


def skipped_path(output_file: Path) -> Path:
    """Where `skip_bad` lists what it left out."""
    return output_file.with_name(f"{output_file.stem}.skipped.jsonl")


def complexity_of(num_steps: int) -> str:
    """The Stage 4 guide's curriculum: simple to 3 steps, medium to 5, complex beyond."""
    return "simple" if num_steps <= 3 else "medium" if num_steps <= 5 else "complex"


def _with_complexity(record: ReasoningRecord) -> ReasoningRecord:
    return replace(record, metadata={"complexity": complexity_of(record.num_steps), **record.metadata})


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


# ---- what the formats share


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a value that is converted stands."""

    number: int
    """Of the record in its file, from 1."""
    image_root: str
    """Resolved folder that picture paths are relative to."""
    report: Report


def sentences(text: str) -> list[str]:
    """`text` cut into sentences, without list marks and step headings; lines without any letter are left out."""
    out = []
    for line in text.splitlines():
        line = _LIST_MARK.sub("", line.strip()).strip()
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if not _NO_END.search(line[max(start, end.start() - 10) : end.start() + 1]):
                out.append(line[start : end.end()])
                start = end.end()
        out.append(line[start:])
    return [" ".join(sentence.split()) for sentence in out if re.search(r"\w", sentence)]


_SENTENCE_END = re.compile("[.!?][\"')\\]]*(?=\\s+[\"'(\\[]*[A-Z0-9])|[\\u3002\\uff01\\uff1f\\u0964]")
_NO_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|vs|etc|e\.g|i\.e|[A-Z])|^\s*\d+)\.$")
_LIST_MARK = re.compile(
    r"^(?:[-*\u2022]\s+|#{1,6}\s+|\d+[.)]\s+|\**step\s+\d+\**\s*[:.)-]\**\s*|\**(?:conclusion|solution|lecture)\**\s*:\**\s*)+",
    re.IGNORECASE,
)
_HEADING_INSIDE = re.compile(r"(?<=\s)(?:Step\s+\d+\s*(?::|\.\.\.)|Conclusion\s*:)")


def _chain(parts: Sequence[tuple[str, str]], answer: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`reasoning` and `metadata` of (step type, text) parts: a step for each sentence, none twice, then the answer.

    The last sentence of what checks the choices is what selects one.
    """
    steps: dict[str, str] = {}
    for step_type, text in parts:
        for sentence in sentences(text):
            # in lower case, since "Step 2:" inside a sentence would start a step
            steps.setdefault(_HEADING_INSIDE.sub(lambda heading: heading[0].lower(), sentence), step_type)
    types = list(steps.values())
    if types.count(CHECKING) > 1 and types[-1] == CHECKING:
        types[-1] = SELECTION
    end = "." if answer[-1:].isalnum() else ""
    text = format_reasoning([*steps, f"{CONCLUSION}{answer}{end}"])
    return {
        "reasoning": f"{REASONING_START}\n{text}\n{REASONING_END}",
        "metadata": {**metadata, "step_types": [*types, CONCLUDING]},
    }


def _metadata(value: Mapping[str, Any], used: str, **own: Any) -> dict[str, Any]:
    """`own`, and every field of `value` that is not `used`: as `original_<name>` where `own` has one of that name."""
    taken = {*own, "step_types", "complexity"}
    rest = {key: item for key, item in value.items() if key not in used.split() and item not in ("", None)}
    return {f"original_{key}" if key in taken else key: item for key, item in rest.items()} | own


def _text(value: Mapping[str, Any], field: str, report: Report, *, required: bool = True) -> str:
    """The text of a field, without the blanks around it; "" where it is missing, which is reported if `required`."""
    text = value.get(field)
    if text is None and not required:
        return ""
    if not isinstance(text, str):
        report(f"{field}: is {'missing' if text is None else kind(text)}; write it as text")
        return ""
    if required and not text.strip():
        report(f"{field}: is empty; write it")
    return text.strip()


def _choices(value: Mapping[str, Any], report: Report) -> list[str]:
    """The names of `choices`, with their letters in front where some differ in case only; [] if reported."""
    given = value.get("choices")
    if not isinstance(given, list) or not 2 <= len(given) <= len(ascii_uppercase):
        report("choices: is not a list of 2 to 26 texts; name every choice")
        return []
    if not all(isinstance(choice, str) and choice.strip() for choice in given):
        report("choices: holds an empty text or no text; name every choice")
        return []
    names = [" ".join(choice.split()) for choice in given]
    if len(set(names)) < len(names):
        report("choices: names a choice twice; keep each once")
        return []
    if len({name.casefold() for name in names}) < len(names):
        return [f"({letter}) {name}" for letter, name in zip(ascii_uppercase, names)]
    return names


def _right_choice(value: Mapping[str, Any], field: str, names: Sequence[str], report: Report) -> str:
    """The name that the index in `field` points at; "" if reported."""
    index = value.get(field)
    if index is None:
        report(f"{field}: is missing; add the index of the right choice (test sets may be published without)")
    elif isinstance(index, bool) or not isinstance(index, int):
        report(f"{field}: is {kind(index)}, not an index; give the place of the right choice, from 0")
    elif names and not 0 <= index < len(names):
        report(f"{field}: {str(index)[:20]} is no index of {len(names)} choices; count them from 0")
    elif names:
        return names[index]
    return ""


def _question(question: str, names: Sequence[str], context: str = "") -> str:
    """The instruction of a question with choices, which cannot be answered without seeing them."""
    lettered = " ".join(
        name if name.startswith(f"({letter}) ") else f"({letter}) {name}"
        for letter, name in zip(ascii_uppercase, names)
    )
    return "\n".join([question, *([f"Context: {context}"] if context else []), f"Choices: {lettered}"])


def _first_there(root: str, *paths: str) -> str:
    """The first of `paths` that exists below `root`, else the first: the reader then says that it does not."""
    return next((path for path in paths if os.path.exists(os.path.join(root, path))), paths[0])


# ---- the formats


def _teacher(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`question`, `reasoning` as a list of lines, `answer`."""
    return _spelled(value, at, question="question", chain="reasoning", chain_type=list)


def _human(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`question`, `reasoning_steps` as a list, `answer`."""
    return _spelled(value, at, question="question", chain="reasoning_steps", chain_type=list)


def _unified(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`instruction`, `reasoning` as one text, `answer`, `metadata`."""
    return _spelled(value, at, question="instruction", chain="reasoning", chain_type=str)


def _spelled(value: dict[str, Any], at: Source, *, question: str, chain: str, chain_type: type) -> list[dict[str, Any]]:
    """A record in one of the guide's spellings as it is; the reader reports whatever else is wrong with it."""
    wrong = False
    for field in (question, chain):
        if value.get(field) is None:
            at.report(f"{field}: is missing; this is how --from spells it, name the spelling of your file")
            wrong = True
    if value.get(chain) is not None and not isinstance(value[chain], chain_type):
        at.report(f"{chain}: is {kind(value[chain])}; name the spelling of your file with --from, or correct it")
        wrong = True
    return [] if wrong else [value]


def _robot_selection(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`instruction` (the fleet), `input` (the task) and `output`, or `subtasks` with the robot assigned to each.

    Neither file holds reasoning: with `output` the steps quote what the fleet's description says of the robots it
    names, with `subtasks` they are the assignments in their order, whose robots are the answer.
    """
    found: list[str] = []
    task = _text(value, "input", found.append).removeprefix("Task:").strip()
    if not task and not found:
        found.append("input: is empty; write the task")
    fleet = _text(value, "instruction", found.append)
    if "subtasks" in value:
        parts, robots = _assignments(value["subtasks"], found.append)
    else:
        robots, unknown = strict_answer(_text(value, "output", found.append), ROBOTS)
        for name in unknown:
            found.append(f"output: {quote(name)} is not one of {', '.join(ROBOTS)}; correct it or drop the record")
        described = {robot: _description(fleet, robot) for robot in robots}
        for robot in (robot for robot, text in described.items() if fleet and not text):
            found.append(f"instruction: does not describe {robot}, and there is no reasoning; add its capabilities")
        parts = [(CHECKING, text) for text in described.values()]
    for problem in found:
        at.report(problem)
    if found:
        return []
    answer = ", ".join(robot for robot in ROBOTS if robot in robots)
    metadata = _metadata(
        value, "input instruction output subtasks", source="robot_selection", fleet=fleet, split_group=task_group(task)
    )
    chain = _chain([(ANALYSIS, f"The task is: {task}"), *parts], answer, metadata)
    return [{"instruction": f"{task} Which robots are suited?", "answer": answer, **chain}]


def _assignments(subtasks: Any, report: Report) -> tuple[list[tuple[str, str]], list[str]]:
    """A step for each subtask in the order of execution, and the robots."""
    if not isinstance(subtasks, list) or not subtasks or not all(isinstance(part, dict) for part in subtasks):
        report("subtasks: is not a list of objects; write {subtask, assigned_robot, execution_order} for each")
        return [], []
    for number, part in enumerate(subtasks, 1):
        order = part.get("execution_order")
        if not isinstance(part.get("subtask"), str) or not part["subtask"].strip():
            report(f"subtasks[{number}].subtask: is missing or no text; write what is to be done")
        if part.get("assigned_robot") not in ROBOTS:
            report(f"subtasks[{number}].assigned_robot: is not one of {', '.join(ROBOTS)}; correct it")
        if isinstance(order, bool) or not isinstance(order, int):
            report(f"subtasks[{number}].execution_order: is {kind(order)}, not a whole number; number the subtasks")
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


def _scienceqa(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`problems.json`: id -> question, choices, answer (index), hint, lecture, solution, image, split.

    Pictures lie at `<split>/<id>/<image>`, below `images/` in the published layout.
    """
    found: list[str] = []
    question, hint = _text(value, "question", found.append), _text(value, "hint", found.append, required=False)
    names = _choices(value, found.append)
    answer = _right_choice(value, "answer", names, found.append)
    lecture, solution = (_text(value, name, found.append, required=False) for name in ("lecture", "solution"))
    if not sentences(f"{lecture}\n{solution}"):
        found.append(
            "solution: is empty, and so is lecture; write one of them, or drop the record: it has no reasoning"
        )
    split, image, identity = value.get("split"), value.get("image"), value.get("id", at.number)
    if split not in (None, *SPLITS):
        found.append(f"split: {quote(str(split))} is not one of {', '.join(SPLITS)}; correct it, or leave it out")
    if image is not None and not isinstance(image, str):
        found.append(f"image: is {kind(image)}, not a file name; correct it, or write null")
    for problem in found:
        at.report(problem)
    if found:
        return []
    metadata = _metadata(
        value, "id question choices answer hint lecture solution image", source="scienceqa", candidates=names
    )
    record: dict[str, Any] = {
        "id": f"scienceqa-{identity}",
        "instruction": _question(question, names, hint),
        "answer": answer,
        **_chain([(ANALYSIS, lecture), (CHECKING, solution)], answer, metadata),
    }
    if image:
        own = os.path.join(split or "", str(identity), image)
        record["image"] = _first_there(at.image_root, own, os.path.join("images", own))
    return [record]


def _aokvqa(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`question`, `choices`, `correct_choice_idx`, `rationales`, `image_id`, `question_id`, `split`.

    Pictures are COCO's, `<split>2017/<image_id, 12 digits>.jpg`, or lie in `image_root` itself.
    """
    found: list[str] = []
    question = _text(value, "question", found.append)
    names = _choices(value, found.append)
    answer = _right_choice(value, "correct_choice_idx", names, found.append)
    rationales, image, split = value.get("rationales"), value.get("image_id"), value.get("split")
    if not isinstance(rationales, list) or not all(isinstance(text, str) for text in rationales):
        found.append("rationales: is missing or no list of texts; write them, or drop the record: it has no reasoning")
    elif not sentences("\n".join(rationales)):
        found.append("rationales: is empty; write one, or drop the record: it has no reasoning")
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < 10**12:
        found.append(f"image_id: is {'missing' if image is None else 'no COCO id'}; give the number of the picture")
    if split not in (None, *SPLITS):
        found.append(f"split: {quote(str(split))} is not one of {', '.join(SPLITS)}; correct it, or leave it out")
    if not isinstance(identity := value.get("question_id", str(at.number)), str) or not identity:
        found.append(
            f"question_id: is {kind(identity) if identity != '' else 'empty'}; give it as text, or leave it out"
        )
    for problem in found:
        at.report(problem)
    if found:
        return []
    name = f"{image:012}.jpg"
    metadata = _metadata(
        value, "question choices correct_choice_idx rationales question_id", source="aokvqa", candidates=names
    )
    return [
        {
            "id": f"aokvqa-{identity}",
            "instruction": _question(question, names),
            "answer": answer,
            "image": _first_there(at.image_root, *([f"{split}2017/{name}"] if split else []), name),
            **_chain([(SELECTION, text) for text in rationales or ()], answer, metadata),
        }
    ]


Reply = tuple[list[tuple[str, str]], str, dict[str, Any]]
"""Parts of the chain, the text that holds the answer, and metadata."""


def _llava(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """`id`, `image`, `conversations` of human and gpt in turn; one record for each reply that reasons.

    The reply's last sentence is the answer, or its first where only that names a choice; the others are the steps.
    """
    return _conversation(value, at, "llava", _read_plain)


def _llava_cot(value: dict[str, Any], at: Source) -> list[dict[str, Any]]:
    """The same with replies as `<SUMMARY> <CAPTION> <REASONING> <CONCLUSION>`, each with its end tag."""
    return _conversation(value, at, "llava_cot", _read_tagged)


def _conversation(
    value: dict[str, Any],
    at: Source,
    source: str,
    read_reply: Callable[[str, Mapping[str, str], str, Report], Reply | None],
) -> list[dict[str, Any]]:
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        at.report("conversations: is not a list of turns in pairs; write human and gpt in turn")
        return []
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            at.report(f'conversations[{number}]: is not {{"from": "{speaker}", "value": text}}; correct the turn')
            return []
    image, identity = value.get("image"), value.get("id", source)
    if any("<image>" in turn["value"] for turn in turns) and image is None:
        at.report("image: is missing, but a turn says <image>; name the picture, or take <image> out")
        return []
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        at.report(f"id: is {kind(identity)}; give a string or a number, or leave the field out")
        return []
    records, earlier = [], ""
    for number in range(0, len(turns), 2):
        question, reply = (turn["value"].replace("<image>", "").strip() for turn in turns[number : number + 2])
        where = f"conversations[{number + 1}]"
        letters = _lettered_choices(question)
        read = read_reply(reply, letters, where, at.report)
        if read is not None:
            parts, answer, about = read
            metadata = _metadata(value, "id image conversations", source=source, **about)
            # ids of pictures are used more than once, hence the record's number
            turn_id = f"{identity}-{at.number}" + (f"-{number // 2 + 1}" if len(turns) > 2 else "")
            records.append(
                {
                    "id": turn_id,
                    "instruction": earlier + question,
                    "answer": answer,
                    "image": image,
                    **_chain(parts, answer, metadata),
                }
            )
        earlier += f"Question: {question}\nAnswer: {reply}\n"
    return records


def _lettered_choices(question: str) -> dict[str, str]:
    """Letter -> choice of "(A) hard (B) yellow", or of lines "A. hard"; {} where the question offers none."""
    for pattern in (r"(?:^|\s)\(([A-Z])\)\s*", r"(?m)^\s*([A-Z])[.):]\s+"):
        marks = list(re.finditer(pattern, question))
        start = next((i for i, mark in enumerate(marks) if mark[1] == "A"), len(marks))
        run = [mark for letter, mark in zip(ascii_uppercase, marks[start:]) if mark[1] == letter]
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(question)]
            texts = [question[mark.end() : end].split("\n")[0].strip(" ,;") for mark, end in zip(run, ends)]
            if all(texts):
                return {mark[1]: " ".join(text.split()) for mark, text in zip(run, texts)}
    return {}


def _read_plain(reply: str, letters: Mapping[str, str], where: str, report: Report) -> Reply | None:
    lines = sentences(reply)
    if len(lines) < 2:
        report(f"{where}: holds no reasoning, only an answer; add the steps, or drop the turn")
        return None
    for index in (-1, 0):
        rest = lines[:-1] if index else lines[1:]
        parts = [(CHECKING, sentence) for sentence in rest]
        if not letters:
            return _free_answer(lines[-1], parts)
        if name := _named_choice(lines[index], letters):
            return _given_answer(name, letters, parts)
    report(f"{where}: neither its last nor its first sentence names one of the choices; end with the answer")
    return None


_TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")


def _read_tagged(reply: str, letters: Mapping[str, str], where: str, report: Report) -> Reply | None:
    once = all(reply.count(f"<{tag}>") == reply.count(f"</{tag}>") == 1 for tag in _TAGS)
    pattern = r"\s*".join(rf"<{tag}>(?P<{tag}>.*?)</{tag}>" for tag in _TAGS)
    match = re.fullmatch(pattern, reply.strip(), re.DOTALL) if once else None
    if match is None:
        report(f"{where}: is not {' '.join(f'<{tag}>...</{tag}>' for tag in _TAGS)}; write each once, in this order")
        return None
    summary, caption, reasoning, conclusion = (" ".join(text.split()) for text in match.groups())
    for tag, text in (("REASONING", reasoning), ("CONCLUSION", conclusion)):
        if not re.search(r"\w", text):
            report(f"{where}: {tag} is empty; write it, or drop the turn")
            return None
    parts = [(ANALYSIS, summary), (ANALYSIS, caption), (CHECKING, match["REASONING"])]
    about = {"caption": caption} if caption else {}
    if not letters:
        return _free_answer(conclusion, parts, **about)
    if name := _named_choice(conclusion, letters):
        return _given_answer(name, letters, parts, **about)
    report(f"{where}: CONCLUSION names none of the choices, or several; name one")
    return None


def _given_answer(name: str, letters: Mapping[str, str], parts: list[tuple[str, str]], **metadata: Any) -> Reply:
    return parts, name, {**metadata, "candidates": list(letters.values())}


def _free_answer(text: str, parts: list[tuple[str, str]], **metadata: Any) -> Reply:
    """An answer without choices: robots, yes or no, or else an open one."""
    answer = _ANSWER_LEAD.sub("", text).strip().rstrip(".").strip() or text
    if answer.casefold() in ("yes", "no"):
        return parts, answer.capitalize(), {**metadata, "candidates": ["Yes", "No"]}
    known, unknown = strict_answer(answer, ROBOTS)
    if known and not unknown:
        return parts, ", ".join(robot for robot in ROBOTS if robot in known), metadata
    return parts, answer, {**metadata, "candidates": []}


_ANSWER_LEAD = re.compile(
    r"(?:(?:so|therefore|thus|hence)\W+)?(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)[\s:]*", re.IGNORECASE
)
_LETTER_ALONE = re.compile(r"\(?([A-Z])\)?[.:]?")
_LETTER_NAMED = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\)?\s*(?:[.,:;]|$)", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\(?([A-Z])[.):]\)?\s*(.+)", re.DOTALL)


def _named_choice(text: str, letters: Mapping[str, str]) -> str:
    """The one choice that `text` names, by its letter or its own words; "" where it names none or several."""
    text = text.strip()
    by_text = {name.casefold().rstrip("."): name for name in letters.values()}
    bare = _ANSWER_LEAD.sub("", text).strip()
    if (own := by_text.get(bare.casefold().rstrip("."))) is not None:
        return own
    if match := _LETTER_ALONE.fullmatch(bare):
        return letters.get(match[1], "")
    if (match := _LETTER_FIRST.fullmatch(bare)) and by_text.get(match[2].casefold().rstrip(".")) == letters.get(
        match[1]
    ):
        return letters.get(match[1], "")
    named = {match[1] for match in _LETTER_NAMED.finditer(text)}
    if len(named) == 1:
        return letters.get(named.pop(), "")
    found = parse_answer(text, tuple(letters.values()))
    return found[0] if len(found) == 1 else ""


CONVERTERS: dict[str, Callable[[dict[str, Any], Source], list[dict[str, Any]]]] = {
    "teacher": _teacher,
    "human": _human,
    "unified": _unified,
    "robot_selection": _robot_selection,
    "scienceqa": _scienceqa,
    "aokvqa": _aokvqa,
    "llava": _llava,
    "llava_cot": _llava_cot,
}
"""What `--from` names -> one value of the file to records in one of the guide's spellings. What gives none has been
reported."""


def summary(made: Converted, output_file: Path) -> str:
    """What the command prints."""
    records = made.records
    complexity = Counter(str(record.metadata["complexity"]) for record in records)
    steps = [record.num_steps for record in records]
    lines = [
        f"{output_file}: {len(records)} records, {sum(record.image is not None for record in records)} with a picture, "
        f"{min(steps)} to {max(steps)} steps ({', '.join(f'{n} {name}' for name, n in sorted(complexity.items()))})"
    ]
    if made.num_moved:
        lines.append(f"{made.num_moved} records follow their picture into the split that also holds it")
    if made.skipped:
        lines.append(f"{len(made.skipped)} records skipped or cut short, listed in {skipped_path(output_file)}")
    if any(record.image for record in records) and made.picture_root != os.path.realpath(output_file.parent):
        lines.append(f"its pictures are found with --image_root {made.picture_root}")
    return "\n".join(lines)

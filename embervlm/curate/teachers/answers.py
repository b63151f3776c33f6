"""The prompt of a teacher model, and how its answer becomes a record. Nothing here uses the network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embervlm.curate.teachers.collection import Question, finished_record
from embervlm.data.record_fields import FieldRules, read_fields
from embervlm.data.records import ReasoningRecord
from embervlm.words.chain_text import CONCLUSION, STEP_TYPES, parse_answer
from embervlm.words.open_answers import same_answers

_THOUGHT = re.compile(r"^(?:.*?<think>)?(.*?)</think>", re.DOTALL)  # some servers eat the opening tag
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_LINE = re.compile(r"^\W*(?:final\s+)?answer\W*:\W*(.+?)\W*$", re.IGNORECASE | re.MULTILINE)
_STEP = re.compile(r"^\W*step\s+\d+\b", re.IGNORECASE | re.MULTILINE)


class Rejected(Exception):
    """An answer that is not used; the message says why, as `<kind>: <particulars>`."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply of a teacher."""

    content: str
    thinking: str = ""
    """Its reasoning, if the server returns it separately (`reasoning_content`)."""
    cut_off: bool = False
    """Whether it reached its length limit."""


def scene_text(record: ReasoningRecord) -> str | None:
    """The content of the picture, for a teacher that does not see it; None if the record does not give it.

    From `metadata.scene`, else `metadata.facts` without the verdicts on the candidates, which are the answer.
    """
    known = record.metadata.get("scene") or record.metadata.get("facts")
    if not isinstance(known, Mapping):
        return None
    shown = [f"{name} is {value}" for name, value in known.items() if name not in record.candidates]
    return "; ".join(shown) or None


def answer_schema(candidates: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer, in the strict form that endpoints ask for; without candidates it is free text."""
    step = _object(type={"type": "string", "enum": list(STEP_TYPES[:-1])}, text={"type": "string"})
    named = {"enum": list(candidates)} if candidates else {}
    return _object(
        steps={"type": "array", "items": step},
        conclusion={"type": "string"},
        answer={"type": "array", "items": {"type": "string", **named}},
        confidence={"type": "number"},
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def messages(question: Question, picture: str | None) -> list[dict[str, Any]]:
    """The chat for one question. The gold answer is not in it.

    Args:
        picture: data URL, where the teacher sees pictures; else the scene's facts are told.
    """
    record = question.record
    choices = (
        f"The possible answers are: {'; '.join(record.candidates)}. Give each right one, spelled just so."
        if record.candidates
        else "Give the answer in as few words as it takes, a number in digits."
    )
    system = (
        "You teach a small model to reason in steps. Work the question out in short numbered steps, each of which says "
        "one thing that follows from the question, from what is shown, or from earlier steps; then conclude.\n"
        f"{choices}\n"
        "Reply with one JSON object and nothing else:\n"
        '{"steps": [{"type": "problem_analysis", "text": "..."}, ...], "conclusion": "...", "answer": ["..."], '
        '"confidence": 0.9}\n'
        f"The type of a step is one of {', '.join(STEP_TYPES[:-1])}; the conclusion names the answer; the confidence "
        "is from 0 to 1."
    )
    text = "\n\n".join(filter(None, (question.background, record.instruction)))
    if picture is None:
        if record.image is not None:
            text = f"What the picture shows: {scene_text(record)}.\n\n{text}"
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]
    shown = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": shown}]


def read_reply(reply: Reply, question: Question, sample: int, *, teacher_model: str) -> ReasoningRecord:
    """The record that `reply` gives to `question`.

    The chain is the JSON object's steps; where there is no such object, the "Step 1: ..." lines of the text, or else
    the paragraphs of the thinking. The record reader checks all fields.
    Raises:
        Rejected: no answer, not a valid record, or not the known answer.
    """
    content, thinking = _split_thinking(reply)
    if reply.cut_off:
        raise Rejected("cut off: the answer reached --max_answer_tokens")
    if not content:
        raise Rejected("empty: there is no text" + (" behind the thinking" if thinking else ""))
    value = _find_object(content)
    types: list[str] = []
    if value is None:
        value = {"reasoning": content if _STEP.search(content) else _chain_of(thinking), "answer": _answer_in(content)}
        if value["reasoning"] is content:
            value["reasoning"] = _without_answer(content)
    else:
        types = _flatten_steps(value, thinking)
    record = checked(value, question)
    steps = list(record.steps)
    if types and len(types) != len(steps) - bool(record.conclusion):
        raise Rejected(f"steps: {len(types)} written, {len(steps) - bool(record.conclusion)} read; one text per step")
    gold = question.record.answer
    candidates = question.record.candidates
    if gold and not (set(record.answer) == set(gold) if candidates else same_answers(record.answer, gold)):
        raise Rejected(f"wrong answer: {', '.join(record.answer)} instead of {', '.join(gold)}")
    if not record.conclusion:
        steps.append(f"{CONCLUSION}{', '.join(record.answer)}.")
    concluded = parse_answer(steps[-1], candidates)
    if concluded and not set(concluded) & set(record.answer):
        raise Rejected(f"conclusion: names {', '.join(concluded)}, the answer is {', '.join(record.answer)}")
    return finished_record(
        question,
        sample,
        source="teacher_generated",
        steps=steps,
        answer=record.answer if candidates else gold or record.answer,
        confidence=record.confidence,
        teacher_model=teacher_model,
        **({"step_types": [*types, STEP_TYPES[-1]]} if types else {}),
    )


def _split_thinking(reply: Reply) -> tuple[str, str]:
    found = _THOUGHT.match(reply.content)
    if not found:
        return reply.content.strip(), reply.thinking.strip()
    return reply.content[found.end() :].strip(), (reply.thinking or found[1]).strip()


def _find_object(content: str) -> dict[str, Any] | None:
    """The JSON object in `content`, bare, fenced or with words around it; None where there is none.

    Raises:
        Rejected: there is the beginning of one, but it is not JSON.
    """
    fenced = _FENCE.search(content)
    text = fenced[1] if fenced else content
    start = text.find("{")
    if start < 0:
        return None
    try:
        value = json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError) as error:
        if _STEP.search(text):  # a brace in a chain that is written as text
            return None
        raise Rejected(f"malformed JSON: {error}") from None
    assert isinstance(value, dict)
    return value


def _flatten_steps(value: dict[str, Any], thinking: str) -> list[str]:
    """Turns `steps` and `conclusion` of `value` into `reasoning`, and returns the type of each step."""
    steps, conclusion = value.pop("steps", None), value.pop("conclusion", None)
    types: list[str] = []
    if steps is None:
        if not value.get("reasoning") and not value.get("reasoning_steps"):
            value["reasoning"] = _chain_of(thinking)
        return types
    if not isinstance(steps, list) or not steps:
        raise Rejected("steps: not a list of at least one step")
    lines = []
    for number, step in enumerate(steps, 1):
        if isinstance(step, dict):
            if step.get("type") not in STEP_TYPES[:-1]:
                raise Rejected(f"step type: {str(step.get('type'))[:40]!r} of step {number} is not one of the schema's")
            types.append(step["type"])
            step = step.get("text")
        if not isinstance(step, str) or not step.strip():
            raise Rejected(f"steps: step {number} has no text")
        lines.append(f"Step {number}: {_STEP.sub('', step).lstrip(' :.-') if _STEP.match(step) else step.strip()}")
    if types and len(types) != len(steps):
        raise Rejected("step type: some steps have one and some have none")
    if isinstance(conclusion, str) and conclusion.strip():
        lines.append(CONCLUSION + conclusion.strip().removeprefix(CONCLUSION))
    value["reasoning"] = "\n".join(lines)
    return types


def _chain_of(thinking: str) -> list[str] | str:
    """Thinking as a chain: its own "Step N:" lines, or else its paragraphs."""
    if _STEP.search(thinking):
        return thinking[_STEP.search(thinking).start() :]  # type: ignore[union-attr]
    return [part.strip() for part in re.split(r"\n\s*\n", thinking) if part.strip()]


def _answer_in(content: str) -> str:
    """Where text without JSON gives its answer: a tag, the last "Answer:" line, or the whole text."""
    for pattern in (_ANSWER_TAG, _ANSWER_LINE):
        if found := pattern.findall(content):
            return str(found[-1]).strip()
    return content.strip(" .*\n")


def _without_answer(content: str) -> str:
    text = _ANSWER_LINE.sub("", _ANSWER_TAG.sub("", content))
    start = _STEP.search(text)
    return text[start.start() :] if start else text


def checked(value: dict[str, Any], question: Question) -> ReasoningRecord:
    """`value`'s chain, answer and confidence read by the record reader, with the question's instruction and candidates.

    Raises:
        Rejected: with every problem that the reader finds.
    """
    own: dict[str, Any] = {
        key: value[key] for key in ("reasoning", "reasoning_steps", "answer", "confidence") if key in value
    }
    metadata = {key: item for key, item in question.record.metadata.items() if key == "candidates"}
    problems: list[str] = []
    fields = read_fields(
        {**own, "instruction": question.record.instruction, "metadata": metadata},
        question.record.record_id,
        FieldRules(candidates=question.record.default_candidates),
        problems.append,
    )
    if problems:
        raise Rejected("; ".join(problems))
    return ReasoningRecord(**fields, image=None, default_candidates=question.record.default_candidates)

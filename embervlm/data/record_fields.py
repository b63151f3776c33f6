"""The fields of one record: each is checked, and every problem is reported together with its fix.

`records.py` reads files with this; nothing here raises, every finding goes to `report`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embervlm.words.chain_text import (
    CONCLUSION,
    REASONING_END,
    REASONING_START,
    number_lines,
    parse_chain,
    strict_answer,
)

MAX_STEPS = 64
MAX_CHAIN_CHARACTERS = 100_000
MAX_INSTRUCTION_CHARACTERS = 20_000
MAX_ANSWER_CHARACTERS = 2_000
"""Of all answers of a record together, and of one candidate."""
MAX_CANDIDATES = 100
MAX_ID_CHARACTERS = 200
MAX_PRINTED_UNUSED = 12
MAX_PICTURES = 16
"""Of one record."""
COMPOSED_OF = "composed_of"
"""Field of the metadata with the paths of a record's pictures where it has several; its `image` is their composite."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: JSON can spell it, UTF-8 cannot, and tokenizers refuse it."""


@dataclass(frozen=True, kw_only=True)
class FieldRules:
    """The limits and settings against which all records of one file are checked."""

    image_root: str = ""
    candidates: tuple[str, ...] = ()
    """Of an answer whose record has no `metadata.candidates`; none: such an answer is open."""
    require_reasoning: bool = True
    require_answer: bool = True
    allow_outside: bool = False
    max_steps: int = MAX_STEPS
    unpack_dir: str | None = None
    """Folder for pictures that are contained in the records themselves; None refuses these."""
    folders: dict[str, str] = field(default_factory=dict)
    images: dict[str, tuple[str | None, str]] = field(default_factory=dict)


_OWN_FIELDS = frozenset(
    "id record_id image instruction question reasoning reasoning_steps answer confidence metadata num_steps".split()
)
_READ_METADATA = frozenset(
    "augmentation boxes candidates caption composed_of complexity details facts fleet origin quality question_group "
    "question_kind scene seen source source_split split split_group step_types teacher_model validated wording".split()
)
"""Metadata that something reads, or that our own commands write for people to read."""
_WITHOUT_NULLS = frozenset(("boxes", "details", "facts", "scene"))
_OTHER_NAMES = {
    "instruction": ("query", "prompt", "problem", "input", "text", "conversations", "messages"),
    "reasoning": ("rationale", "rationales", "explanation", "solution", "chain_of_thought", "cot", "steps", "thoughts"),
    "candidates": ("choices", "options", "answer_choices"),
    "answer": ("answers", "label", "output", "response", "gold_answer", "correct_answer", "final_answer"),
}
"""Names of our fields in other data sets."""
_CONVERTED = {
    "conversations": "llava",
    "messages": "sharegpt",
    "query": "alpaca",
    "prompt": "alpaca",
    "problem": "alpaca",
}
"""Name of a question -> the format of such records."""
_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
Report = Callable[[str], None]


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    return _KINDS.get(type(value), "a list" if isinstance(value, list) else "an object")


def quote(text: str) -> str:
    """The start of `text` on one line of characters that do nothing to a terminal, in double quotes."""
    short = json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def read_fields(value: dict[str, Any], default_id: str, rules: FieldRules, report: Report) -> dict[str, Any]:
    """The arguments of a `ReasoningRecord` but its picture; of use only if nothing was reported."""
    metadata = _read_metadata(value, report)
    fields: dict[str, Any] = {
        "record_id": _read_id(value, default_id, report),
        "instruction": _read_instruction(value, metadata, report),
        "steps": _read_steps(value, rules, report),
        "answer": _read_answer(value, metadata, rules, report),
        "confidence": _read_confidence(value.get("confidence"), report),
        "metadata": metadata,
    }
    _check_metadata(metadata, len(fields["steps"]), report)
    return fields


def without_nulls(value: Any) -> Any:
    """`value` without the null fields of its objects: `datasets` gives every record the fields of all.

    An object of nulls alone is what a record without it gets, and becomes None.
    """
    if isinstance(value, dict):
        kept = {name: found for name, item in value.items() if (found := without_nulls(item)) is not None}
        return kept if kept or not value else None
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def unused_fields(metadata: Mapping[str, Any]) -> list[str]:
    """Fields of a record that are kept in its metadata and that nothing reads: boxes in a spelling of others, too."""
    unused = [name for name, item in metadata.items() if name not in _READ_METADATA and item is not None]
    boxes = metadata.get("boxes")
    if boxes and not (isinstance(boxes, list) and any(map(_is_ours, boxes))):
        unused.append("boxes")
    return unused


def told_unused(counts: Mapping[str, int]) -> str:
    """A line about the fields and files that nothing reads, the most common first; empty if there are none."""
    ordered = sorted(counts.items(), key=lambda found: (-found[1], found[0]))
    some = ", ".join(f"{quote(name)[1:-1]} ({count:,})" for name, count in ordered[:MAX_PRINTED_UNUSED])
    more = f" and {len(ordered) - MAX_PRINTED_UNUSED} more" if len(ordered) > MAX_PRINTED_UNUSED else ""
    return f"unused fields and their number of records: {some}{more}" if some else ""


def told_several(counts: Mapping[str, int]) -> str:
    """A line about the records with several pictures, from their number by that of pictures; empty without any."""
    ordered = sorted((int(number), count) for number, count in counts.items())
    some = ", ".join(f"{count:,} with {number}" for number, count in ordered)
    return f"records with several pictures: {some}; each one's are laid out in one, row by row" if some else ""


def _called_otherwise(value: Mapping[str, Any], name: str) -> str:
    """A hint which field may be the missing field `name`, or the empty string."""
    found = [other for other in _OTHER_NAMES[name] if value.get(other) not in (None, "", [], {})]
    if found and name == "instruction" and found[0] in _CONVERTED:
        return f" (`embervlm data convert --from {_CONVERTED[found[0]]}` reads {found[0]})"
    if found and name == "candidates":
        return f" (there is {quote(found[0])}: call it candidates)"
    return f" (there is {quote(found[0])})" if found else ""


def _read_metadata(value: dict[str, Any], report: Report) -> dict[str, Any]:
    """`metadata` and every field of the record that has no place of its own."""
    inner = value.get("metadata")
    if inner is not None and not isinstance(inner, dict):
        report(f"metadata: is {kind(inner)}, not an object; write {{...}} or leave the field out")
        inner = None
    metadata = {key: item for key, item in (inner or {}).items() if key != "num_steps"}
    for key, item in value.items():
        if key not in _OWN_FIELDS:
            if key in metadata and metadata[key] != item:
                report(f"{quote(key)}: differs from the same field in metadata; keep one of the two")
            metadata[key] = item
    for key in _WITHOUT_NULLS & metadata.keys():
        metadata[key] = without_nulls(metadata[key])
    given = [str(value[key]) for key in ("id", "record_id") if value.get(key) is not None]
    if len(set(given)) > 1:
        metadata.setdefault("record_id", value["record_id"])
    return metadata


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_string_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) and not _text_problem(value, MAX_INSTRUCTION_CHARACTERS)


_METADATA_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    COMPOSED_OF: (_is_strings, "a list of strings"),
    "caption": (_is_caption, f"text of at most {MAX_INSTRUCTION_CHARACTERS} characters"),
    "facts": (_is_string_map, "an object of strings"),
    "scene": (_is_string_map, "an object of strings"),
    "seen": (lambda value: isinstance(value, list) and all(map(_is_strings, value)), "a list of lists of strings"),
    "step_types": (_is_strings, "a list of strings"),
}
"""Metadata that training and evaluation read, and the form that each must have."""


def _check_metadata(metadata: Mapping[str, Any], num_steps: int, report: Report) -> None:
    """Reports metadata on which training or evaluation would fail; all other metadata is the user's own."""
    for name, (fits, wanted) in _METADATA_KINDS.items():
        if metadata.get(name) is not None and not fits(metadata[name]):
            report(f"metadata.{name}: is not {wanted}; correct it, or give your own field another name")
    types = metadata.get("step_types")
    if isinstance(types, list) and num_steps and len(types) != num_steps:
        report(
            f"metadata.step_types: {len(types)} types for {num_steps} steps; give one for each, the conclusion "
            "included, or leave it out"
        )
    boxes = metadata.get("boxes")
    for box in boxes if isinstance(boxes, list) else ():
        if _is_ours(box) and not _is_box(box):
            report(
                "metadata.boxes: a box is not {kind, label: text, box: [left, top, right, bottom] in [0, 1]}; correct"
            )
            break


def _is_ours(box: Any) -> bool:
    """Whether it is meant as a box; other data sets have other things of that name."""
    return isinstance(box, dict) and {"kind", "box"} <= set(box)


def _is_box(box: Mapping[str, Any]) -> bool:
    edges = box["box"]
    return (
        isinstance(box["kind"], str)
        and isinstance(box.get("label", ""), str)
        and isinstance(edges, list)
        and len(edges) == 4
        and all(isinstance(edge, (int, float)) and 0 <= edge <= 1 for edge in edges)
        and edges[0] < edges[2]  # not left, top, width and height
        and edges[1] < edges[3]
    )


def _text_problem(text: str, limit: int) -> str:
    """The problem that makes `text` unusable, or the empty string. All other characters are allowed."""
    if len(text) > limit:
        return f"{len(text)} characters, more than {limit}; shorten it"
    if SURROGATE.search(text):
        return "contains half of a surrogate pair, which is not a character; write the whole character or remove it"
    return ""


def _read_id(value: dict[str, Any], default: str, report: Report) -> str:
    found = next((value[key] for key in ("id", "record_id") if value.get(key) is not None), default)
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        report(f"id: is {kind(found) if found != '' else 'empty'}; give a string or a number, or leave the field out")
        return default
    if not str(found).isprintable() or len(str(found)) > MAX_ID_CHARACTERS:
        report(
            f"id: is not a text of at most {MAX_ID_CHARACTERS} printable characters; shorten it, or leave the field out"
        )
        return default
    return str(found)


def _read_instruction(value: dict[str, Any], metadata: dict[str, Any], report: Report) -> str:
    name = "instruction" if value.get("instruction") is not None else "question"
    text = value.get(name)
    if text is None:
        hint = _called_otherwise(value, "instruction")
        report(f"instruction: is missing{hint}; add the question as `instruction` or `question`")
    elif not isinstance(text, str):
        report(f"{name}: is {kind(text)}, not a string; write the question as text")
    elif not text.strip():
        report(f"{name}: is empty; write the question")
    elif problem := _text_problem(text, MAX_INSTRUCTION_CHARACTERS):
        report(f"{name}: {problem}")
    else:
        other = value.get("question")
        if name == "instruction" and other is not None and other != text:
            metadata.setdefault("question", other)
        return text.strip()
    return ""


def _read_steps(value: dict[str, Any], rules: FieldRules, report: Report) -> tuple[str, ...]:
    given = [name for name in ("reasoning", "reasoning_steps") if value.get(name) not in (None, "", [])]
    if len(given) > 1:
        report("reasoning: is given together with reasoning_steps; keep one of the two")
        return ()
    if not given:
        if rules.require_reasoning:
            blank = any(value.get(name) is not None for name in ("reasoning", "reasoning_steps"))
            other = _called_otherwise(value, "reasoning")
            what = f"reasoning: is {'empty' if blank else 'missing'}{other}"
            report(f"{what}; write the steps, drop the record, or learn from answers alone (docs/reinforcement.md)")
        return ()
    (name,) = given
    chain = value[name]
    lines = [chain] if isinstance(chain, str) else chain
    if not isinstance(lines, list):
        report(f"{name}: is {kind(chain)}; give a string or a list of strings")
        return ()
    if wrong := [line for line in lines if not isinstance(line, str)]:
        report(f"{name}: its list contains {kind(wrong[0])}; use only strings")
        return ()
    text = "\n".join(lines)
    if problem := _text_problem(text, MAX_CHAIN_CHARACTERS):
        report(f"{name}: {problem}")
        return ()
    starts, ends = text.count(REASONING_START), text.count(REASONING_END)
    if starts != ends or starts > 1 or text.find(REASONING_START) > text.find(REASONING_END):
        report(
            f"{name}: unbalanced markers, {starts} x {REASONING_START} and {ends} x {REASONING_END}; "
            "write one of each around the chain, or none"
        )
        return ()
    steps, stray = parse_chain(text if isinstance(chain, str) else number_lines(lines))
    if stray:
        report(f'{name}: {quote(stray[0])} belongs to no step; write it after "Step N:", or remove it')
    elif not steps:
        report(f'{name}: the chain is empty; write "Step 1: ..." lines, or drop the record')
    elif (num_steps := len(steps) - steps[-1].startswith(CONCLUSION)) == 0:
        report(f'{name}: a conclusion without steps; write "Step 1: ..." before it, or drop the record')
    elif num_steps > rules.max_steps:
        report(f"{name}: {num_steps} steps, more than {rules.max_steps}; shorten the chain, or raise max_steps")
    return steps


def _read_answer(
    value: Mapping[str, Any], metadata: dict[str, Any], rules: FieldRules, report: Report
) -> tuple[str, ...]:
    answer, candidates = value.get("answer"), rules.candidates
    if (own := metadata.get("candidates")) is not None:
        if not isinstance(own, list) or not all(isinstance(name, str) and name.strip() for name in own):
            report(
                "metadata.candidates: must be a list of non-empty strings; list every choice, leave it out to use the "
                "domain's choices, or write [] for a free-text answer"
            )
            return ()
        if len({name.strip().casefold() for name in own}) < len(own):
            report("metadata.candidates: lists a choice twice; keep each once")
            return ()
        if len(own) > MAX_CANDIDATES:
            report(
                f"metadata.candidates: {len(own)} choices, more than {MAX_CANDIDATES}; keep fewer, or write [] for a "
                "free-text answer"
            )
            return ()
        if problem := next(filter(None, (_text_problem(name, MAX_ANSWER_CHARACTERS) for name in own)), ""):
            report(f"metadata.candidates: {problem}")
            return ()
        if len(own) == 1:  # the answer itself, as converters once wrote an open answer: nothing is chosen
            metadata["candidates"] = own = []
        candidates = tuple(own)
    if answer is None and not rules.require_answer:
        return ()
    if answer is None:
        report(f"answer: is missing{_called_otherwise(value, 'answer')}; add the right answer or answers")
        return ()
    texts = [answer] if isinstance(answer, str) else answer
    if not isinstance(texts, list):
        report(f"answer: is {kind(answer)}; give a string or a list of strings")
        return ()
    if wrong := [text for text in texts if not isinstance(text, str)]:
        report(f"answer: its list contains {kind(wrong[0])}; use only strings")
        return ()
    if problem := _text_problem(", ".join(texts), MAX_ANSWER_CHARACTERS):
        report(f"answer: {problem}")
        return ()
    if not candidates:
        if not any(text.strip() for text in texts):
            report("answer: is empty; add the right answer or answers")
        return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    known: set[str] = set()
    unknown: list[str] = []
    for text in texts:
        names, rest = strict_answer(text, candidates)
        known.update(names)
        unknown.extend(rest)
    others = _called_otherwise(value, "candidates") if own is None else ""
    for name in unknown:
        advice = _advice(name, candidates, of_domain=own is None)
        report(f"answer {quote(name)} is not one of {_listing(candidates)}{others}; {advice}")
    if not known and not unknown:
        report("answer: is empty; add the right answer or answers")
    return tuple(name for name in candidates if name in known)


def _listing(candidates: Sequence[str]) -> str:
    return ", ".join(quote(name)[1:-1] for name in candidates[:8]) + (", ..." if len(candidates) > 8 else "")


OTHER_DOMAIN = "data about something else need `--domain none`, in the YAML `domain: none`"
"""Said where an answer is like none of the domain's."""


def _advice(name: str, candidates: Sequence[str], *, of_domain: bool) -> str:
    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name[:100].casefold(), folded, n=1)
    if of_domain and not close:
        return f"correct it or drop the record ({OTHER_DOMAIN})"
    hint = f"did you mean {quote(folded[close[0]])}? " if close else ""
    return f"{hint}correct it or drop the record"


def _read_confidence(value: Any, report: Report) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        report(f"confidence: is {kind(value)}, not a number; give a number from 0 to 1, or leave it out")
    elif not 0 <= value <= 1:  # also NaN
        report(f"confidence: {str(value)[:20]} is not between 0 and 1; correct it, or leave it out")
    else:
        return float(value)
    return None

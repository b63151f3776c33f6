"""What the formats share: reading the fields of a value, and writing its explanation as a chain."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from embervlm.data.record_fields import kind, quote
from embervlm.data.splits import SPLITS
from embervlm.words import english
from embervlm.words.chain_text import CONCLUSION, REASONING_END, REASONING_START, format_reasoning

ANALYSIS, CHECKING, SELECTION, CONCLUDING = (
    "problem_analysis",
    "constraint_checking",
    "solution_selection",
    "conclusion",
)
"""The Stage 4 guide's step types."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A value that is converted. What is wrong with it goes to `problems`, in the words of its own format."""

    value: dict[str, Any]
    number: int
    """Of the record in its file, from 1."""
    image_root: str
    """Resolved folder that picture paths are relative to."""
    folder: str = ""
    """Of the input file."""
    candidates: tuple[str, ...] = ()
    """Of the domain; none where the records are a user's own."""
    problems: list[str] = field(default_factory=list)

    def report(self, problem: str) -> None:
        self.problems.append(problem)

    def text(self, name: str, *, required: bool = True) -> str:
        """The text of a field, without the blanks around it; "" where it is missing, reported if `required`."""
        text = self.value.get(name)
        if text is None and not required:
            return ""
        if not isinstance(text, str):
            self.report(f"{name}: is {'missing' if text is None else kind(text)}; write it as text")
            return ""
        if required and not text.strip():
            self.report(f"{name}: is empty; write it")
        return text.strip()

    def one_of(self, names: str) -> str:
        """The text of the first of these fields that says anything; "" where none does, which is reported."""
        first, *others = names.split()
        name = next((name for name in names.split() if self.value.get(name) not in (None, "")), None)
        if name is not None:
            return self.text(name)
        self.report(f"{first}: is missing or empty (also looked for: {', '.join(others)}); write it as text")
        return ""

    def choices(self) -> list[str]:
        """The names of `choices`, with their letters in front where some differ in case only; [] if reported."""
        given = self.value.get("choices")
        if not isinstance(given, list) or not 2 <= len(given) <= len(ascii_uppercase):
            self.report("choices: is not a list of 2 to 26 texts; name every choice")
            return []
        if not all(isinstance(choice, str) and choice.strip() for choice in given):
            self.report("choices: holds an empty text or no text; name every choice")
            return []
        names = [" ".join(choice.split()) for choice in given]
        if len(set(names)) < len(names):
            self.report("choices: lists a choice twice; keep each once")
            return []
        if len({name.casefold() for name in names}) < len(names):
            return [f"({letter}) {name}" for letter, name in zip(ascii_uppercase, names)]
        return names

    def right_choice(self, name: str, names: Sequence[str]) -> str:
        """The choice that the index in field `name` points at; "" if reported."""
        index = self.value.get(name)
        if index is None:
            self.report(f"{name}: is missing; add the index of the right choice (test sets may be published without)")
        elif isinstance(index, bool) or not isinstance(index, int):
            self.report(f"{name}: is {kind(index)}, not an index; give the place of the right choice, from 0")
        elif names and not 0 <= index < len(names):
            self.report(f"{name}: {str(index)[:20]} is no index of {len(names)} choices; count them from 0")
        elif names:
            return names[index]
        return ""

    def split(self) -> Any:
        """`split` as it stands; one that is unknown is reported."""
        split = self.value.get("split")
        if split not in (None, *SPLITS):
            self.report(f"split: {quote(str(split))} is not one of {', '.join(SPLITS)}; correct it, or leave it out")
        return split

    def metadata(self, used: str, **own: Any) -> dict[str, Any]:
        """`own`, and every field that is not `used`: as `original_<name>` where `own` has one of that name."""
        taken = {*own, "step_types", "complexity"}
        rest = {key: item for key, item in self.value.items() if key not in used.split() and item not in ("", None)}
        return {f"original_{key}" if key in taken else key: item for key, item in rest.items()} | own

    def picture_size(self, path: str) -> tuple[int, int] | None:
        """Width and height in pixels of a picture below `image_root`; None where it is reported."""
        from PIL import Image  # here: few formats open pictures

        try:
            with Image.open(os.path.join(self.image_root, path)) as picture:
                return picture.size
        except (OSError, ValueError, Image.DecompressionBombError):
            advice = "correct the path, or set image_root: its size is needed for the boxes"
            self.report(f"image: {quote(path)} is no picture in {self.image_root}; {advice}")
            return None

    def first_there(self, *paths: str) -> str:
        """The first of `paths` that is there below `image_root`, else the first: the reader then reports it."""
        return next((path for path in paths if os.path.exists(os.path.join(self.image_root, path))), paths[0])


def sentences(text: str) -> list[str]:
    """`text` cut into sentences, without list marks and step headings; lines without any letter are left out."""
    out: list[str] = []
    for line in text.splitlines():
        found = english.sentences(_BOLD.sub(r"\1", _LIST_MARK.sub("", line.strip())))
        out += [_HEADING.sub("", sentence) for sentence in found]
    return [" ".join(sentence.split()) for sentence in out if re.search(r"\w", sentence)]


_HEADINGS = r"\**step\s+\d+\**\s*[:.)-]\**\s*|\**(?:conclusion|solution|lecture)\**\s*:\**\s*"
_HEADING = re.compile(rf"^(?:{_HEADINGS})+", re.IGNORECASE)
_LIST_MARK = re.compile(rf"^(?:[-*\u2022]\s+|#{{1,6}}\s+|\d+[.)]\s+|{_HEADINGS})+", re.IGNORECASE)
_BOLD = re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
_HEADING_INSIDE = re.compile(r"(?<=\s)(?:Step\s+\d+\s*(?::|\.\.\.)|Conclusion\s*:)")


def chain_of(parts: Sequence[tuple[str, str]], answer: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
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


def question_with_choices(question: str, names: Sequence[str], context: str = "") -> str:
    """The instruction of a question with choices, which cannot be answered without seeing them."""
    lettered = " ".join(
        name if name.startswith(f"({letter}) ") else f"({letter}) {name}"
        for letter, name in zip(ascii_uppercase, names)
    )
    return "\n".join([question, *([f"Context: {context}"] if context else []), f"Choices: {lettered}"])

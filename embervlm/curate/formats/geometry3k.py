"""Geometry3K: problems of plane geometry with a diagram, whose literals become the steps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from string import ascii_uppercase
from typing import Any

from embervlm.curate.formats.shared import ANALYSIS, CHECKING, Source, chain_of, question_with_choices


def geometry3k(at: Source) -> list[dict[str, Any]]:
    """Lu et al. 2021 (Inter-GPS), arXiv 2105.04165: the folder of a split with `<id>/data.json`, `logic_form.json`.

    `problem_text`, `choices`, `answer` (a letter), and of the literals `diagram_logic_form` and `text_logic_form`. The
    steps say what the diagram shows, what the text gives, and what is looked for; the source has no solution. The
    diagram's literals together are the caption. The picture is `<id>/img_diagram.png`.
    """
    question, names, letter = at.text("problem_text"), at.choices(), at.text("answer").upper()
    place = ascii_uppercase.find(letter) if len(letter) == 1 else -1
    if names and letter and not 0 <= place < len(names):
        at.report(f"answer: is no letter of {len(names)} choices; give A for the first")
    logic = at.value.get("logic_form")
    logic = logic if isinstance(logic, dict) else {}
    shown, told = (logic.get(name, []) for name in ("diagram_logic_form", "text_logic_form"))
    if not all(
        isinstance(text, str) for given in (shown, told) for text in (given if isinstance(given, list) else [0])
    ):
        at.report("logic_form: has no lists of literals; correct logic_form.json")
    elif not (shown or told):
        at.report("logic_form: is missing or empty; keep logic_form.json beside data.json: its literals are the steps")
    if at.problems:
        return []
    seen, said = [in_words(text) for text in shown], [in_words(text) for text in told]
    identity = at.value.get("id", at.number)
    folder = str(at.value.get("folder", identity))
    metadata = at.metadata(
        "problem_text choices compact_choices answer logic_form folder id",
        source="geometry3k",
        candidates=names,
        **({"caption": " ".join(seen)} if seen else {}),
    )
    picture = at.first_there(os.path.join(folder, "img_diagram.png"), os.path.join(folder, "img_diagram_point.png"))
    parts = [(ANALYSIS, text) for text in seen] + [(CHECKING, text) for text in said]
    return [
        {
            "id": f"geometry3k-{identity}",
            "instruction": question_with_choices(question, names),
            "answer": names[place],
            "image": picture,
            **chain_of(parts, names[place], metadata),
        }
    ]


_SENTENCES: dict[str, Callable[..., str]] = {
    "Equals": lambda a, b: f"{a} is {b}",
    "Find": lambda a: f"we look for {a}",
    "PointLiesOnLine": lambda a, b: f"point {a} lies on {b}",
    "PointLiesOnCircle": lambda a, b: f"point {a} lies on {b}",
    "Parallel": lambda a, b: f"{a} is parallel to {b}",
    "Perpendicular": lambda a, b: f"{a} is perpendicular to {b}",
    "Congruent": lambda a, b: f"{a} is congruent to {b}",
    "Similar": lambda a, b: f"{a} is similar to {b}",
    "SumOf": lambda *parts: "the sum of " + " and ".join(parts),
    "RatioOf": lambda *parts: "the ratio of " + " to ".join(parts),
    "Add": lambda *parts: " + ".join(parts),
    "Mul": lambda *parts: " * ".join(parts),
    "SquareRootOf": lambda a: f"the square root of {a}",
}
_NAME = re.compile(r"([A-Za-z]+)\((.*)\)", re.DOTALL)


def in_words(literal: str) -> str:
    """ "Equals(LengthOf(Line(A, B)), 5)" -> "The length of line AB is 5." """
    text = " ".join(_phrase(literal.strip()).split()).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def _phrase(text: str) -> str:
    match = _NAME.fullmatch(text)
    arguments = _split(match[2]) if match else None
    if match is None or arguments is None:
        return text
    name, words = match[1], [_phrase(argument) for argument in arguments]
    try:
        if name in _SENTENCES:
            return _SENTENCES[name](*words)
    except TypeError:  # another number of arguments than the language has
        pass
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    if name.endswith("Of") and not name.startswith("Is"):  # LengthOf, MeasureOf, AreaOf, ...
        return f"the {spaced} {' and '.join(words)}"
    if len(words) == 2 and name.startswith("Is"):  # IsMidpointOf, IsMedianOf, ...
        return f"{words[0]} {spaced.replace('is ', 'is the ', 1)} {words[1]}"
    if all(re.fullmatch(r"[A-Z]'?", word) for word in words):  # Line(A, B), Triangle(A, B, C), Circle(O)
        return f"{spaced} {''.join(words)}"
    return f"{spaced} of {' and '.join(words)}" if words else spaced


def _split(text: str) -> list[str] | None:
    """The arguments, cut at the commas outside brackets; None where brackets do not match."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return None
        if letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part] if not depth else None

"""Chains of thought and answers as text: what a record spells and what a model writes, read by the same code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

REASONING_START = "<|reasoning_start|>"
REASONING_END = "<|reasoning_end|>"
CONCLUSION = "Conclusion: "
STEP_TYPES = ("problem_analysis", "constraint_checking", "solution_selection", "conclusion")
"""The Stage 4 guide's step types."""

# ---- chains of thought as text

_START = re.compile(re.escape(REASONING_START) + r"|<reasoning>")
_END = re.compile(re.escape(REASONING_END) + r"|</reasoning>")
_STEP_HEADER = re.compile(r"step\s+(\d+)\s*(?::\s*|[.)\-]\s+|(?=\.\.\.)|$)", re.IGNORECASE)
_CONCLUSION_HEADER = re.compile(r"conclusion\s*:\s*", re.IGNORECASE)
_BOLD_HEADER = re.compile(r"^(?:#{1,6}\s+)?\*\*((?:step\s+\d+|conclusion)[^*]*)\*\*\s*", re.IGNORECASE)
_INLINE_HEADER = re.compile(r"(?<=\s)(?:Step\s+(\d+)\s*(?::|\.\.\.)|Conclusion\s*:)")
_BULLET = re.compile(r"[-*\u2022]\s")


def parse_reasoning_text(text: str) -> tuple[str, ...]:
    """The steps written in `text`, the conclusion last; `()` where it holds none. Never raises: for model output too.

    A step starts at a line "Step N: ..." (also "**Step N:** ...", "Step N. ..."), or inside a line at "Step N:" where
    N is the next number, since the unified spelling may put the chain on one line. Steps are renumbered from 1.
    Text outside the markers, before the first step and after the conclusion's own lines is not part of the chain.
    """
    return parse_chain(text)[0]


def format_reasoning(steps: Sequence[str]) -> str:
    """ "Step 1: ...\\nStep 2: ...\\nConclusion: ..."; `parse_reasoning_text` gives the same steps back."""
    last = len(steps) - 1
    return "\n".join(
        step if i == last and step.startswith(CONCLUSION) else f"Step {i + 1}: {step}" for i, step in enumerate(steps)
    )


def parse_chain(text: str) -> tuple[tuple[str, ...], list[str]]:
    """Steps, and the stray text that belongs to none of them."""
    body, stray = _between_markers(text)
    steps: list[list[str]] = []
    conclusion: list[str] | None = None
    current: list[str] | None = None
    num_filled = 0  # steps that hold text; an empty one is dropped, so it does not count
    closed = False  # a header after the conclusion: whatever follows is another chain, not this one
    for line in body.splitlines():
        rest = line.strip()
        if "**" in rest:
            rest = _BOLD_HEADER.sub(r"\1 ", rest, count=1).strip()
        while rest:
            if closed:
                stray.append(rest)
                break
            if rest[0] in "sS" and (header := _STEP_HEADER.match(rest)):
                if conclusion is not None:
                    closed = True
                    continue
                if current is None or current:  # else: reuse the step that is still empty
                    steps.append(current := [])
                rest = rest[header.end() :]
            elif rest[0] in "cC" and (header := _CONCLUSION_HEADER.match(rest)):
                if conclusion:
                    closed = True
                    continue
                current = conclusion = [] if conclusion is None else conclusion
                rest = rest[header.end() :]
            elif current is None:
                stray.append(rest)
                break
            elif conclusion is not None:
                conclusion.append(rest)
                break
            else:
                cut = _inline_cut(rest, str(num_filled + (not current) + 1))
                if not _STEP_HEADER.fullmatch(
                    part := rest[:cut].rstrip()
                ):  # else a header before another, without text
                    num_filled += not current
                    current.append(part)
                rest = rest[cut:]
    found = ["\n".join(lines) for lines in steps if lines]
    if conclusion:
        found.append(CONCLUSION + "\n".join(conclusion))
    return tuple(found), stray


def step_numbers(text: str) -> list[int]:
    """The numbers of the steps as `text` writes them, for those who check them: `parse_chain` numbers anew.

    Inside a line "Step N:" counts where N is above the numbers before it; a lower one refers back.
    """
    numbers: list[int] = []
    for line in _between_markers(text)[0].splitlines():
        rest = line.strip()
        if "**" in rest:
            rest = _BOLD_HEADER.sub(r"\1 ", rest, count=1).strip()
        if header := _STEP_HEADER.match(rest):
            numbers.append(int(header[1][:9]))
            rest = rest[header.end() :]
        for inline in _INLINE_HEADER.finditer(f" {rest}") if "Step" in rest else ():
            if inline[1] and int(inline[1][:9]) > (numbers[-1] if numbers else 0):
                numbers.append(int(inline[1][:9]))
    return numbers


def _inline_cut(text: str, next_number: str) -> int:
    """Where the next step or the conclusion starts inside a line; the line's length where none does."""
    if "Step" in text or "Conclusion" in text:
        for match in _INLINE_HEADER.finditer(text):
            if match[1] in (None, next_number):
                return match.start()
    return len(text)


def _between_markers(text: str) -> tuple[str, list[str]]:
    start = _START.search(text)
    begin = start.end() if start else 0
    end = _END.search(text, begin)
    outside = (text[: start.start()] if start else "", text[end.end() :] if end else "")
    body = text[begin : end.start() if end else len(text)]
    # A newline, not nothing: what stood around a marker must not grow together into a new one.
    return _END.sub("\n", _START.sub("\n", body)), [part.strip() for part in outside if part.strip()]


def _without_markers(text: str) -> str:
    return _END.sub("", _START.sub("", text)) if "<" in text else text


def _is_step_header(line: str) -> bool:
    return line[:1] in ("s", "S", "*", "#") and bool(_STEP_HEADER.match(_BOLD_HEADER.sub(r"\1 ", line)))


def number_lines(lines: Sequence[str]) -> str:
    """A list of lines or of steps as one text.

    Without any "Step N:" line each element is a step, except that a bullet belongs to the step before it (unless all
    are bullets).
    """
    bare = [_without_markers(text).strip() for text in lines]
    if any(_is_step_header(part.strip()) for text in bare for part in text.splitlines()):
        return "\n".join(lines)
    joins = any(text and not _BULLET.match(text) and not _CONCLUSION_HEADER.match(text) for text in bare)
    numbered: list[str] = []
    number = 0
    for text, content in zip(lines, bare, strict=True):
        if content and not _CONCLUSION_HEADER.match(content) and not (joins and number and _BULLET.match(content)):
            number += 1
            text = text.replace(content, f"Step {number}: {content}", 1)
        numbered.append(text)
    return "\n".join(numbered)


# ---- answers

_SEPARATOR = re.compile(r"(?:[\s,;/&+]|\band\b|\.(?=\s|$))+", re.IGNORECASE)
_NAME_END = re.compile(r"\s*[,;/&+\n]|\s+and\s", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|[,;.)\]:\n]|\band\b)[\s(\[*\"']*(?<!\w)([^\W_])(?=[)\].:]+(?:[\s*]|$))")
"""A letter before its text, at the start or behind another: "B. A bird", "(A) x, (B) y"."""
_ROLE = re.compile(
    r"(?:(?:primary|secondary|tertiary|main|lead|backup|support|fallback|answer)(?:\s+robots?)?|robots?)\s*:\s*",
    re.IGNORECASE,
)


def number_edges(name: str) -> tuple[str, str]:
    """Patterns around a whole name: 3 stands neither in 3.5 nor in 1,300 nor in -3."""
    before = r"(?<!\w)(?<!\d[.,])(?<![-\u2212])" if name[:1].isdigit() else r"(?<!\w)"
    return before, r"(?!\w)(?![.,]\d)" if name[-1:].isdigit() else r"(?!\w)"


@lru_cache(maxsize=4096)
def _name_patterns(candidates: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Each candidate with a pattern that finds it, the longest name first."""
    patterns = []
    for name in sorted(filter(str.strip, candidates), key=len, reverse=True):
        words = r"[\s_-]+".join(map(re.escape, name.split()))
        before, after = number_edges(name.strip())
        # A one-letter choice is matched as written: "a robot" does not name choice A.
        flags = re.IGNORECASE if len(name) > 1 else 0
        patterns.append((name, re.compile(rf"{before}{words}{after}", flags)))
    return tuple(patterns)


def parse_answer(text: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates that `text` names, in the order of `candidates`; `()` where it names none. Never raises.

    Longest name first, so "Robot with Wheels" is not also a candidate "Robot". Case does not matter, nor do roles
    ("Primary: Humanoid"); other words are ignored. Where a choice of one letter labels its text, the letter is meant
    and not the text: "B. A bird of prey" names B. For a model's answer, not its chain: "not a Drone" names Drone.
    """
    whole = _ROLE.sub("", text.strip(), count=1).strip(" .\t\n\"'()").casefold()
    if exact := tuple(name for name in candidates if name.casefold() == whole):
        return exact[:1]
    labels = {match[1].casefold() for match in _LABEL.finditer(text)} if _LABEL.match(text) else ()
    if lettered := tuple(name for name in candidates if len(name) == 1 and name.casefold() in labels):
        return lettered
    found = set()
    for name, pattern in _name_patterns(tuple(candidates)):
        text, count = pattern.subn("\0", text)
        if count:
            found.add(name)
    return tuple(name for name in candidates if name in found)


def strict_answer(text: str, candidates: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names in `text` that are candidates, and those that are not."""
    known: list[str] = []
    unknown: list[str] = []
    by_name = {" ".join(name.split()).casefold(): name for name in candidates}
    if (whole := by_name.get(" ".join(text.split()).casefold())) is not None:
        return [whole], []
    position = 0
    while position < len(text):
        if skip := _SEPARATOR.match(text, position):
            position = skip.end()
            continue
        for name, pattern in _name_patterns(candidates):
            match = pattern.match(text, position)
            if match and (match.end() == len(text) or _SEPARATOR.match(text, match.end())):
                known.append(name)
                position = match.end()
                break
        else:
            if role := _ROLE.match(text, position):
                position = role.end()
                continue
            end = _NAME_END.search(text, position)
            stop = end.start() if end else len(text)
            unknown.append(text[position:stop].strip())
            position = max(stop, position + 1)
    return known, unknown

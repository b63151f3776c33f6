"""Sums and comparisons of numbers in a text: which do not come out, and which two texts calculate alike."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from embervlm.judge.equations import Equation, Side, Value, equations
from embervlm.judge.told_sums import wrong_told_sum
from embervlm.words.claims import statements
from embervlm.words.english import CONNECTIVES, SUPPOSES, any_of
from embervlm.words.numbers import COUNTS, MEASURES, number, numbers_in, unit_name

_SIGNS = "-+*/x\u00d7\u00f7"
_VALUE = rf"(?:\$?\d+(?:,\d{{3}})*(?:\.\d+)?%?|{any_of(*sorted(COUNTS))})"
_MORE = frozenset("more greater larger bigger higher longer taller wider heavier later above over".split())
_LESS = frozenset("less fewer smaller lower shorter narrower lighter cheaper earlier below under".split())
_COMPARISON = re.compile(
    rf"(?<![\w.,:%$])(?P<a>{_VALUE})(?P<unit>(?:\s+[a-z]+)?)(?P<which>,?\s+(?:which|that))?\s+(?:is|are|was|were)"
    rf"(?P<denied>\s+(?:not|no)\b|n't)?\s+(?P<how>{'|'.join(sorted(_MORE | _LESS))})\b(?:\s+than)?\s+(?:the\s+)?"
    rf"(?P<b>{_VALUE})(?![\d:]|[.,]\d|\s*[{_SIGNS}=]\s*\$?\d)(?P<other>(?:\s+[a-z]+)?)",
    re.IGNORECASE,
)
_ROUNDS = re.compile(
    r"\b(?:round\w*|approx\w*|about|roughly|around|nearest|remainder|left over|whole|nearly|almost|at least|R\s?\d)\b",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(r"\b(?:not|never|instead of|rather than)\s+$", re.IGNORECASE)
_DENIED_AFTER = re.compile(r"\W*(?:is|was|would be)\s+(?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_CLOCK = frozenset(("am", "pm", "o'clock", "oclock"))
_OF_DATES = _CLOCK | frozenset("bc bce ad ce".split())
_ASKED = re.compile(r"[^.!?;\n]*\?")
_FACTORS = (7, 12, 16, 24, 30, 36, 52, 60, 100, 365, 1000, 1440, 3600)
"""From one unit of time, length, weight or money to another."""
_CLAUSE_START = re.compile(rf"(?:^|[.;:,(=]|{any_of(*CONNECTIVES, 'as', 'that', 'only')})\s*$", re.IGNORECASE)
_PREPOSITION = re.compile(
    rf"(?:\b(?:of|by|times|plus|minus|and|to|at|on|in|for|from|with|after|before|until)|[{_SIGNS}])\s*$", re.IGNORECASE
)
_DOTTED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}\.\d{3}(?![.,]?\d)")
_MOST_BEFORE = 200
"""Characters before a comparison that are looked at: a text without an end must not take for ever."""
_SCALES = frozenset(
    map(unit_name, "hundred thousand million billion dozen times plus minus percent and to or half quarter".split())
)
"""Words behind a number that make it another one."""


def wrong_arithmetic(text: str) -> str | None:
    """The first sum or comparison of numbers in `text` that does not come out, as it stands there; None where all do.

    Numbers with different units are not compared.
    """
    return _wrong_equation(text) or _wrong_comparison(text) or wrong_told_sum(_ASKED.sub(" ", text))


def calculates_again(text: str, earlier: str) -> bool:
    """Whether `text` has sums, all of them stand in `earlier` too, and so do all of its other numbers."""
    sums = _sums(text)
    return bool(sums) and sums <= _sums(earlier) and _numbers(text) <= _numbers(earlier)


def _wrong_equation(text: str) -> str | None:
    for found in equations(text):
        if not _comes_out(found, text) and not _comes_out_with_dots_between_thousands(found):
            return found.text
    return None


def _comes_out_with_dots_between_thousands(found: Equation) -> bool:
    """Whether the sides are equal where 1.200 is read as 1200, as much of Europe writes it."""
    text = _DOTTED.sub(lambda number: number[0].replace(".", ""), found.text)
    read = equations(text) if text != found.text else ()
    return bool(read) and all(_comes_out(other, text) for other in read)


def _comes_out(found: Equation, text: str) -> bool:
    """Whether the sides are equal, or may be: rounded, in another unit, or said not to be."""
    left, right = found.left, found.right
    worked, stated = (left, right) if left.calculates else (right, left)
    around = text[max(0, left.start - 40) : right.end + 40]
    about = found.about or (worked.divides and _ROUNDS.search(around) is not None)
    for value, places in _readings(stated):
        tolerance = _tolerance(stated, worked, about) / 10**places
        if any(abs(value - other) <= tolerance for other, _ in _readings(worked)):
            return True
    if right.calculates and left.value == right.first:  # "5 + 3 = 8 * 2 = 16" goes on calculating
        return True
    units = left.units | right.units
    measured = any(set(unit.replace("/", " ").split()) & MEASURES for unit in units)
    if len(units) > 1 and measured and (left.adds or not right.units & left.units):
        return True  # "1 hour + 30 minutes = 90 minutes"
    if left.units != right.units and any(len(unit) == 1 for unit in units):
        return True  # "2 x + 3 x = 10" is an equation to solve
    if not left.units and measured and _is_conversion(left.value, right.value):
        return True
    mixed = any(side.percent and side.adds and not side.all_percent for side in (left, right))
    before, after = text[max(0, left.start - 12) : left.start], text[right.end : right.end + 30]
    denied = _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after) or _ASKED.match(text, right.end)
    return mixed or bool(units & _CLOCK or denied)  # "50 + 20%" may mean a fifth more


def _readings(side: Side) -> tuple[tuple[Value, int], ...]:
    """Values, each with its places behind the point beside those written: a percentage is also the number alone."""
    return ((side.value, 2), (side.value * 100, 0)) if side.all_percent else ((side.value, 0),)


def _tolerance(stated: Side, worked: Side, about: bool) -> float:
    """Half of the last place that is written, where the result may be rounded; with "about" zeros are no places."""
    exact = stated.calculates and not stated.decimals
    rounded = about or ((worked.divides or stated.decimals > 0) and not exact)
    places = stated.decimals
    if about and not places:
        digits = str(abs(int(float(stated.value))))
        return max(1.0, 0.51 * 10 ** (len(digits) - len(digits.rstrip("0")) if digits != "0" else 0))
    return 0.51 * 10.0**-places if rounded else 1e-6


def _is_conversion(found: Value, stated: Value) -> bool:
    """Whether one is the other in a larger or smaller unit."""
    if not found or not stated:
        return False
    ratio = float(found) / float(stated)
    return any(abs(max(ratio, 1 / ratio) - factor) < 0.01 * factor for factor in _FACTORS)


def _wrong_comparison(text: str) -> str | None:
    lowered = text.casefold()
    if not any(word in lowered for word in ("than", "above", "over", "below", "under")):
        return None
    for match in _COMPARISON.finditer(text):
        before = text[max(0, match.start() - _MOST_BEFORE) : match.start()]
        unit, other = unit_name(match["unit"]), unit_name(match["other"])
        starts = _CLAUSE_START.search(before) is not None if not match["which"] else not _PREPOSITION.search(before)
        named = match["a"].casefold() in COUNTS and not unit  # "this one is more than 5 years old"
        like = match["a"].endswith("%") == match["b"].endswith("%") and (not unit or not other or unit == other)
        if (
            not starts
            or named
            or not like
            or {unit, other} & (_SCALES | _OF_DATES)
            or SUPPOSES.search(statements(before + match[0])[-1])
        ):
            continue
        a, b = (number(match[name].strip("$%")) or 0 for name in ("a", "b"))
        holds = a > b if match["how"].casefold() in _MORE else a < b
        if holds == bool(match["denied"]):
            return match[0].strip()
    return None


@lru_cache(maxsize=1 << 14)
def _sums(text: str) -> frozenset[str]:
    return frozenset(f"{found.left.key}={found.right.key}" for found in equations(text))


@lru_cache(maxsize=1 << 14)
def _numbers(text: str) -> frozenset[Fraction]:
    return frozenset().union(*numbers_in(text))

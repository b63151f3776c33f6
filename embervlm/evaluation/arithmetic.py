"""Sums and comparisons of numbers in a text: which do not come out, and which two texts calculate alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from embervlm.evaluation.wording import SUPPOSES

_NUMBER = r"\$?\d[\d,]*(?:\.\d+)?"
_SIGNS = "-+*/x\u00d7\u00f7"
_EQUATION = re.compile(
    rf"(?<![\w.,%])(-?{_NUMBER}(?:\s*[{_SIGNS}]\s*{_NUMBER})+)\s*=\s*\$?(-?\d[\d,]*(?:\.\d+)?)(?![\d%])"
)
_TERM = re.compile(rf"\d[\d,]*(?:\.\d+)?|[{_SIGNS}]")
_ANY_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

_SPELLED = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13)))
_VALUE = rf"(?:\$?\d+(?:,\d{{3}})*(?:\.\d+)?%?|\b(?:{'|'.join(_SPELLED)})\b)"
_MORE = frozenset("more greater larger bigger higher longer taller wider heavier later above over".split())
_LESS = frozenset("less fewer smaller lower shorter narrower lighter cheaper earlier below under".split())
_COMPARISON = re.compile(
    rf"(?<![\w.,:%$])(?P<a>{_VALUE})(?P<unit>(?:\s+[a-z]+)?)(?P<which>,?\s+(?:which|that))?\s+(?:is|are|was|were)"
    rf"(?P<denied>\s+(?:not|no)\b|n't)?\s+(?P<how>{'|'.join(sorted(_MORE | _LESS))})\b(?:\s+than)?\s+(?:the\s+)?"
    rf"(?P<b>{_VALUE})(?![\d:]|[.,]\d|\s*[{_SIGNS}=]\s*\$?\d)(?P<other>(?:\s+[a-z]+)?)",
    re.IGNORECASE,
)
_END = re.compile(r"[.;]")
_CLAUSE_START = re.compile(
    r"(?:^|[.;:,(=]|\b(?:since|because|as|so|but|that|only|therefore|thus|hence))\s*$", re.IGNORECASE
)
_PREPOSITION = re.compile(
    rf"(?:\b(?:of|by|times|plus|minus|and|to|at|on|in|for|from|with|after|before|until)|[{_SIGNS}])\s*$", re.IGNORECASE
)
_MOST_BEFORE = 200
"""Characters before a comparison that are looked at: a text without an end must not take for ever."""
_SCALES = frozenset("hundred thousand million billion dozen time plu minu percent and to or half quarter".split())
"""Words behind a number that make it another one, without an "s" at the end."""


def wrong_arithmetic(text: str) -> str | None:
    """The first sum or comparison of numbers in `text` that does not come out, as it stands there; None where all do.

    Numbers with different units are not compared.
    """
    return _wrong_equation(text) or _wrong_comparison(text)


def calculates_again(text: str, earlier: str) -> bool:
    """Whether `text` has sums, all of them stand in `earlier` too, and so do all of its other numbers."""
    if "=" not in text or "=" not in earlier:
        return False
    sums = _sums(text)
    return bool(sums) and sums <= _sums(earlier) and _numbers(text) <= _numbers(earlier)


def _wrong_equation(text: str) -> str | None:
    if "=" not in text:
        return None
    for match in _EQUATION.finditer(text):
        terms = _TERM.findall(match[1].replace("$", "").strip())
        try:
            found, stated = _calculate(terms), float(match[2].replace(",", ""))
        except (ValueError, ZeroDivisionError, IndexError):
            continue
        rounds = any(term in "/\u00f7" for term in terms) or "." in match[0]
        tolerance = 0.51 * 10 ** -len(match[2].partition(".")[2]) if rounds else 1e-6
        if abs(found - stated) > tolerance:
            return match[0].strip()
    return None


def _calculate(terms: Sequence[str]) -> float:
    """Value of numbers and signs in turn, products first."""
    sign = 1.0
    items = list(terms)
    if items[0] == "-":
        sign, items = -1.0, items[1:]
    total, product = 0.0, sign * float(items[0].replace(",", ""))
    for operator, number in zip(items[1::2], items[2::2], strict=True):
        value = float(number.replace(",", ""))
        if operator in "+-":
            total, product = total + product, value if operator == "+" else -value
        else:
            product = product / value if operator in "/\u00f7" else product * value
    return total + product


def _wrong_comparison(text: str) -> str | None:
    lowered = text.casefold()
    if not any(word in lowered for word in ("than", "above", "over", "below", "under")):
        return None
    for match in _COMPARISON.finditer(text):
        before = text[max(0, match.start() - _MOST_BEFORE) : match.start()]
        unit, other = _unit(match["unit"]), _unit(match["other"])
        starts = _CLAUSE_START.search(before) is not None if not match["which"] else not _PREPOSITION.search(before)
        named = match["a"].casefold() in _SPELLED and not unit  # "this one is more than 5 years old"
        like = match["a"].endswith("%") == match["b"].endswith("%") and (not unit or not other or unit == other)
        if not starts or named or not like or {unit, other} & _SCALES or SUPPOSES.search(_END.split(before)[-1]):
            continue
        a, b = _value(match["a"]), _value(match["b"])
        holds = a > b if match["how"].casefold() in _MORE else a < b
        if holds == bool(match["denied"]):
            return match[0].strip()
    return None


def _unit(text: str) -> str:
    return text.strip().casefold().removesuffix("s")


def _value(text: str) -> float:
    return float(_SPELLED.get(text.casefold()) or text.strip("$%").replace(",", ""))


@lru_cache(maxsize=1 << 14)
def _sums(text: str) -> frozenset[str]:
    return frozenset(re.sub(r"[\s,$]", "", match[0]) for match in _EQUATION.finditer(text))


@lru_cache(maxsize=1 << 14)
def _numbers(text: str) -> frozenset[str]:
    spelled = {str(_SPELLED[word]) for word in re.findall(r"[a-z]+", text.casefold()) if word in _SPELLED}
    return frozenset(_ANY_NUMBER.findall(text)) | spelled

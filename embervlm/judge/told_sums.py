"""Sums that a sentence tells in words: "the sum of 3 and 4 is 8", "20% of 50 is 20", "half of 30 is 16"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod

from embervlm.words.numbers import DIGITS, NO_UNITS, plain

_DIGITS = rf"(?:{DIGITS})"
_N = rf"[-$\u20ac\u00a3]?\s?{_DIGITS}"
_IS = r"(?:is|are|was|equals|is equal to|comes to|makes|=)\s+(?P<about>about\s+|approximately\s+|roughly\s+)?"
_GOES_ON = r"[\d%]|[.,]\d|\s*(?:[-+*/x\u00d7\u00f7^%]|(?:percent|more|less|fewer|times|of|out|over|to|or)\b)"
_RESULT = rf"(?P<result>{_N})(?!{_GOES_ON})"
_BEFORE = re.compile(
    r"(?:[-+*/x\u00d7\u00f7^=(]|\b(?:plus|minus|times|and|by|over|not|than|if))\s*(?:the\s+|a\s+)?$", re.IGNORECASE
)
"""Before a sum that is part of a longer one, denied or supposed."""
_LIST = rf"(?P<list>{_N}(?:\s+(?P<unit>[^\W\d_]+))??(?:\s*,\s*{_N})*,?\s+and\s+{_N})(?:\s+(?P<last>[^\W\d_]+))??"
_OF_SEVERAL: dict[str, Callable[[Sequence[Fraction]], Fraction]] = {
    "sum": lambda values: sum(values, Fraction()),
    "total": lambda values: sum(values, Fraction()),
    "product": lambda values: prod(values, start=Fraction(1)),
    "difference": lambda values: abs(values[0] - values[1]),
    "average": lambda values: sum(values, Fraction()) / len(values),
    "mean": lambda values: sum(values, Fraction()) / len(values),
}
_SHARES = {
    "half": Fraction(1, 2),
    "a third": Fraction(1, 3),
    "one third": Fraction(1, 3),
    "a quarter": Fraction(1, 4),
    "one quarter": Fraction(1, 4),
    "twice": Fraction(2),
    "double": Fraction(2),
    "triple": Fraction(3),
}
_SEVERAL = re.compile(
    rf"\b(?P<kind>{'|'.join(_OF_SEVERAL)})\s+(?:of|between)\s+{_LIST}\s+{_IS}{_RESULT}", re.IGNORECASE
)
_SHARE = re.compile(
    rf"(?:(?<![\w.])(?P<percent>{_DIGITS})\s*(?:%|percent)\s+of|\b(?P<share>{'|'.join(_SHARES)})(?:\s+of)?)\s+"
    rf"(?P<whole>{_N})(?:\s+(?P<last>[^\W\d_]+))?\s+{_IS}{_RESULT}",
    re.IGNORECASE,
)


def wrong_told_sum(text: str) -> str | None:
    """The first sum in words that does not come out, as it is written; None where all do.

    A result may be rounded to the decimals that it has.
    """
    text = plain(text)
    for match, value in _told(text):
        if _BEFORE.search(text[: match.start()]):
            continue
        result = _number(match["result"])
        if result < 0 and match[0].casefold().startswith("difference"):
            result = -result
        decimals = len(match["result"].partition(".")[2])
        tolerance = Fraction(1, 2 * 10**decimals) if decimals or value.denominator != 1 else Fraction(0)
        if match["about"]:
            tolerance = max(tolerance, abs(value) / 10)
        if abs(value - result) > tolerance:
            return match[0]
    return None


def _told(text: str) -> Iterator[tuple[re.Match[str], Fraction]]:
    """Each sum with its value."""
    for match in _SEVERAL.finditer(text):
        values = [_number(found) for found in re.findall(_N, match["list"])]
        kind = match["kind"].casefold()
        if _are_units(match["unit"], match["last"]) and (kind != "difference" or len(values) == 2):
            yield match, _OF_SEVERAL[kind](values)
    for match in _SHARE.finditer(text):
        share = Fraction(match["percent"].replace(",", "")) / 100 if match["percent"] else None
        if _are_units(match["last"]):
            yield match, (_SHARES[match["share"].casefold()] if share is None else share) * _number(match["whole"])


def _are_units(*words: str | None) -> bool:
    """Whether these may follow a number without changing it, unlike "squared"."""
    return not any(word and word.casefold() in NO_UNITS for word in words)


def _number(text: str) -> Fraction:
    return Fraction(re.sub(r"[^\d.-]", "", text))

"""Whether two answers in free words are the same one.

As is usual for questions about pictures (VQA, Antol et al. 2015): case, articles, punctuation and number words do not
matter, numbers are compared by value, a list as a set. Nor do the marks of LaTeX and Markdown, and what says no more
than the answer does: "about 5", "x = 5", "Option B", "No, it is not". A unit counts where the right answer has one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from functools import lru_cache

from embervlm.words.english import ARTICLES, POLAR, RESULT_WORDS, any_of
from embervlm.words.markup import unmarked
from embervlm.words.numbers import CURRENCIES, DIGITS, MOST_UNIT_WORDS, NO_UNITS, NUMBER_WORDS, number, plain, unit_name

LIST_SEPARATOR = re.compile(r"\s*(?:;|(?<!\d),|,(?!\d{3}(?!\d))|\band\b|&|\n)\s*", re.IGNORECASE)
"""Between the parts of a list; a comma before three digits belongs to a number."""
_LEAD = re.compile(
    rf"(?:{any_of(*RESULT_WORDS)}\W+)?(?:(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)|it(?:\s+is|'s)\b"
    r"|there\s+(?:is|are)\b)[\s:]*",
    re.IGNORECASE,
)
_SAYS_NO_MORE = re.compile(
    r"(?:about|around|approximately|approx\.?|roughly|~|\u2248)\s*(?=[-+$\u20ac\u00a3\u00a5]?\d)"
    r"|(?:option|choice|letter)\s+(?=\(?[A-Z]\)?\W*$)",
    re.IGNORECASE,
)
_POLAR_FIRST = re.compile(r"(yes|no|true|false)\s*[,;:.!\u2014]", re.IGNORECASE)
_ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)
_PLACES = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_AMERICAN = {"grey": "gray", "colour": "color", "coloured": "colored", "centre": "center", "aeroplane": "airplane"}
_DEGREES = {"": " degrees", "c": " degrees celsius", "f": " degrees fahrenheit"}
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$\u20ac\u00a3\u00a5]?)\s*(?P<value>[-+]?(?:(?:\d+\s+)?(?:{DIGITS})\s*/\s*(?:{DIGITS})|{DIGITS}))"
    r"\s*(?P<unit>%|[^\W\d_][^\d,;:!?]*)?"
)
_WORD = re.compile(rf"(?:(?<!\w)-)?(?:{DIGITS})|\w+(?:['\u2019]\w+)*|[^\w\s]")
_SIGN = re.compile(
    r"[<>=\u2260\u2264\u2265\u00b1]+"
    r"|(?<=\w)[-+#]+(?=[\s.,;)]*$|\s)"  # behind a word: "A+", "C#", "Na+"
    r"|(?<=[\w)])\s*\+\s*(?=[\w(])|(?<=\d)\s*-\s*(?=[\w(])|(?<=[\w)])\s+-\s+(?=\d)"  # between parts of a sum
)
"""What tells two answers apart though it is no word."""
MOST_NUMBER_WORDS = 24
"""Of an amount in words with its unit; a longer text is none."""
_SCALES = {"k": 1_000, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000, "bn": 1_000_000_000}
"""Letters right behind a number that may be units as well: 10K are ten thousand or ten kelvin."""


def same_answers(predicted: Collection[str], gold: Collection[str]) -> bool:
    """Whether both say the same things, in any order; without any answer they do not."""
    if len(predicted) == len(gold) == 1:
        (one,), (other,) = predicted, gold
        one, other = _bare(one), _bare(other)
        if "=" in one and "=" not in other:
            one = one.rpartition("=")[2].strip()
        if other and _same(one, other):  # "three hundred and five" is no list
            return True
        if other.casefold() in POLAR and (first := _POLAR_FIRST.match(one)):
            return first[1].casefold() == other.casefold()
    found, wanted = _parts(predicted), _parts(gold)
    return bool(wanted) and len(found) == len(wanted) and all(any(_same(a, b) for a in found) for b in wanted)


def _parts(answers: Collection[str]) -> list[str]:
    return list(dict.fromkeys(part for text in answers for part in LIST_SEPARATOR.split(_bare(text)) if part))


def _bare(text: str) -> str:
    text = _LEAD.sub("", unmarked(text).strip(), count=1).strip(" .!\"'")
    text = re.sub(r"\s*\u00b0\s*([CF]\b|)", lambda found: _DEGREES[found[1].casefold()], text, flags=re.IGNORECASE)
    text = _SAYS_NO_MORE.sub("", text, count=1) if _SAYS_NO_MORE.match(text) else text
    return "a half" if text.casefold() == "half" else text


def _same(predicted: str, gold: str) -> bool:
    wanted = _quantity(gold)
    if wanted is None:
        return _words(predicted) == _words(gold) and _signs(predicted) == _signs(gold)
    found = _quantity(predicted)
    if found is None:
        return False
    if _scale(predicted) or _scale(gold):
        return not _scaled(predicted, found).isdisjoint(_scaled(gold, wanted))
    return found[0] == wanted[0] and wanted[1] in ("", found[1])


def _scale(text: str) -> int | None:
    letter = re.search(r"\d\s*([A-Za-z]+)\W*$", text)
    return _SCALES.get(letter[1]) if letter else None


def _scaled(text: str, quantity: tuple[Fraction, str]) -> set[tuple[Fraction, str]]:
    """What a quantity may be whose unit may be a scale: 10K are 10 of K, or 10,000."""
    scale = _scale(text)
    return {quantity} | ({(quantity[0] * scale, "")} if scale else set())


def _signs(text: str) -> tuple[str, ...]:
    return tuple(match[0].strip() for match in _SIGN.finditer(plain(text)))


@lru_cache(maxsize=1 << 14)
def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Value and unit of a text that is one number, perhaps with its unit; else None."""
    text = plain(text).strip(" .!\"'")
    if _ORDINAL.match(text):
        return None
    if (match := _QUANTITY.fullmatch(text)) is not None:
        value, unit = number(match["value"]), (match["unit"] or "").strip(" .")
        scale = unit.split()[0].casefold() if unit else ""
        if value is not None and scale in NUMBER_WORDS:  # "3 million"
            value, unit = number(f"{match['value']} {scale}"), unit[len(scale) :].strip()
        if value is None or (match["currency"] and unit and unit_name(unit) != CURRENCIES[match["currency"]]):
            return None
        return _with_unit(-value if match["sign"] == "-" else value, CURRENCIES.get(match["currency"], unit))
    words = text.split()
    for end in range(len(words) if len(words) <= MOST_NUMBER_WORDS else 0, 0, -1):  # "three hundred boxes"
        if (value := number(" ".join(words[:end]))) is not None:
            return _with_unit(value, " ".join(words[end:]))
    return None


def _with_unit(value: Fraction, unit: str) -> tuple[Fraction, str] | None:
    """None where what stands behind the number is no unit, such as another number: "3 or 4", "3 4"."""
    words = unit.casefold().split()
    if len(words) > MOST_UNIT_WORDS or NO_UNITS & set(words) or any(number(word) is not None for word in words):
        return None
    return value, unit_name(unit)


@lru_cache(maxsize=1 << 14)
def _words(text: str) -> tuple[str, ...]:
    """Words without case, articles and punctuation, number words as digits; of an article alone, itself."""
    text = _ORDINAL.sub(lambda found: _place(int(found[1])), plain(text).casefold().replace("\u2019", "'"))
    tokens = [_AMERICAN.get(token, token) for token in _WORD.findall(text)]
    words = [token for token in tokens if re.search(r"\w", token)]
    out = [word for word in words if word not in ARTICLES] or words
    values = [number(word) for word in out]
    return tuple(word if value is None else str(value) for word, value in zip(out, values)) or tuple(tokens)


def _place(number: int) -> str:
    return _PLACES[number] if number < len(_PLACES) else f"place{number}"

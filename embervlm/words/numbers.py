"""Numbers as people write them: `1,000`, `-3`, `3/4`, `three hundred and five`; exact, as fractions."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from embervlm.words.english import stem

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
"""A number without its sign; a comma stands in it only before each three digits."""
MINUS_SIGNS = "-\u2212\u2013\ufe63\uff0d"
VULGAR = {
    "\u00bd": "1/2",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "\u00bc": "1/4",
    "\u00be": "3/4",
    "\u2155": "1/5",
    "\u215b": "1/8",
}
_SMALL = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 20 + 10 * place for place, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())
}
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
COUNTS = frozenset((*_SMALL, *_TENS))
NUMBER_WORDS = COUNTS | frozenset(_SCALES)
ORDINALS = frozenset("first second third fourth fifth sixth seventh eighth ninth tenth half twice".split())
"""And other words that count."""


def in_digits(word: str) -> str:
    """`word`, or if it is a number word up to ninety in lower case, that number."""
    value = _SMALL.get(word, _TENS.get(word))
    return word if value is None else str(value)


_NUMBER = re.compile(rf"[-+]?\s*(?:{DIGITS})")
_RATIO = re.compile(rf"(?:(?P<whole>\d+)\s+)?(?P<over>{DIGITS})\s*/\s*(?P<under>{DIGITS})")


def plain(text: str) -> str:
    """`text` with one kind of minus, and vulgar fractions spelled out."""
    for sign in MINUS_SIGNS[1:3]:
        text = text.replace(sign, "-")
    for sign, ratio in VULGAR.items():
        text = re.sub(rf"(?<=\d)\s*{sign}", f" {ratio}", text).replace(sign, ratio)
    return text


_WRITTEN = re.compile(rf"(?<![\w.,])(?:{DIGITS})|[^\W\d_]+")
_RESULT = re.compile(rf"(?:=|\u2248|\bequals?\b|\bis equal to\b)\s*(?:about\s+)?[^\w\s]*\s*(?P<value>{DIGITS})")
_NOTE = re.compile(r"<<[^>]*>>")
"""Of GSM8K's calculator."""


def numbers_in(text: str) -> tuple[frozenset[Fraction], frozenset[Fraction]]:
    """Values that `text` writes in digits or words, without its results, and these: what an equals sign leads to."""
    text = _NOTE.sub("", plain(text))
    results = frozenset(Fraction(match["value"].replace(",", "")) for match in _RESULT.finditer(text))
    used = set()
    for match in _WRITTEN.finditer(_RESULT.sub("=", text)):
        word = match[0].casefold()
        if word[0].isdigit() or word[0] == ".":
            used.add(Fraction(word.replace(",", "")))
        elif word in _SMALL or word in _TENS:
            used.add(Fraction(_SMALL.get(word, _TENS.get(word, 0))))
    return frozenset(used), results


def number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, in digits, as a ratio or in words; else None."""
    text = plain(text).strip()
    sign = 1
    if text[:1] in ("-", "+"):
        sign, text = (-1 if text[0] == "-" else 1), text[1:].strip()
    elif text.casefold().startswith(("minus ", "negative ")):
        sign, text = -1, text.split(maxsplit=1)[1]
    if _NUMBER.fullmatch(text) and text[0] not in "-+":
        return sign * Fraction(text.replace(",", ""))
    if ratio := _RATIO.fullmatch(text):
        over, under = (Fraction(ratio[name].replace(",", "")) for name in ("over", "under"))
        return sign * (Fraction(ratio["whole"] or 0) + over / under) if under else None
    found = spelled(text)
    return None if found is None else sign * found


def spelled(text: str) -> Fraction | None:
    """The value of a number in words ("twenty-one", "three hundred and five", "3.5 million"); else None."""
    total, current, seen = Fraction(0), Fraction(0), False
    words = text.casefold().replace("-", " ").split()
    for place, word in enumerate(words):
        if word in _SMALL or word in _TENS:
            value = _SMALL.get(word, _TENS.get(word, 0))
            if seen and current % (100 if value >= 10 else 10) and current:
                return None  # "one two" is two numbers
            current, seen = current + value, True
        elif word in _SCALES and (seen or word == "hundred"):
            current = (current or Fraction(1)) * _SCALES[word]
            if _SCALES[word] > 100:
                total, current = total + current, Fraction(0)
            seen = True
        elif word == "and" and seen and place + 1 < len(words):
            continue
        elif place == 0 and _NUMBER.fullmatch(word):
            current, seen = Fraction(word.replace(",", "")), True
        else:
            return None
    return total + current if seen else None


# ---- units

CURRENCIES = {"$": "dollar", "US$": "dollar", "\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen", "\u20b9": "rupee"}
_SPELLINGS = """
    percent %; kilometre kilometer km kms; metre meter m; centimetre centimeter cm; millimetre millimeter mm; kilogram
    kg kgs; gram g; hour h hr hrs; minute min mins; second s sec secs; dollar usd buck; euro eur; litre liter l; foot ft
    feet; pound lb lbs; ounce oz; inch in
"""
"""Units, each with its other spellings."""
_NAMES = {stem(word): words.split()[0] for words in _SPELLINGS.split(";") for word in words.split()}
NO_UNITS = frozenset(
    """not no nor of and or than more less fewer is are was were if so then by times plus minus to at from between half
    twice double triple dozen hundred thousand million billion tens ones hundreds thousands quarter third squared cubed
    over equal each a an the he she it they we you i which that this but because when while""".split()
)
"""Words that make of a number something else than an amount of a thing."""
MOST_UNIT_WORDS = 4


@lru_cache(maxsize=1 << 12)
def unit_name(text: str) -> str:
    """`text`, a unit, in one spelling and number: "kms" is "kilometre"; of other things the stems."""
    stems = [stem(word) for word in text.casefold().replace("per cent", "percent").split()]
    return " ".join(_NAMES.get(word, word) for word in stems)


MEASURES = frozenset(_NAMES.values()) - {"percent"} | frozenset(
    map(
        unit_name,
        """day week month year cent penny pence quarter dime nickel mile yard ton ml gallon quart pint cup tablespoon
        teaspoon dozen degree""".split(),
    )
)
"""Units of which one can be worked out in another: `1 hour + 30 minutes = 90 minutes`."""

"""Numbers as people write them: `1,000`, `-3`, `3/4`, `three hundred and five`; exact, as fractions."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
_FRACTIONS = {
    word: value
    for value, words in enumerate(
        "half/halves third/thirds quarter/quarters/fourth/fourths fifth/fifths sixth/sixths seventh/sevenths "
        "eighth/eighths ninth/ninths tenth/tenths".split(),
        start=2,
    )
    for word in words.split("/")
}
"""Words for one part, and for several, with how many of them make a whole."""
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
COUNTS = frozenset((*_SMALL, *_TENS))
NUMBER_WORDS = COUNTS | frozenset(_SCALES)
ORDINALS = frozenset("first second third fourth fifth sixth seventh eighth ninth tenth half twice".split())
"""And other words that count."""


_WRITTEN_NUMBER = re.compile(
    r"(?P<minus>[-\u2212])?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<decimals>\d+))?(?P<percent>%?)"
)


@lru_cache(maxsize=1 << 14)
def in_digits(word: str) -> str:
    """A number in one spelling: "1,000" and "1000" are 1000, "2.50" is 2.5, a number word up to ninety its number.

    Another word, which is expected in lower case, as it stands.
    """
    if found := _WRITTEN_NUMBER.fullmatch(word):
        decimals = (found["decimals"] or "").rstrip("0")
        whole = found["whole"].replace(",", "").lstrip("0") or "0"
        return f"{'-' if found['minus'] else ''}{whole}{'.' if decimals else ''}{decimals}{found['percent']}"
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
    """The value of a number in words ("twenty-one", "three hundred and five", "3.5 million", "two thirds"), or None."""
    words = text.casefold().replace("-", " ").split()
    if len(words) > 1 and words[-1] in _FRACTIONS:
        return _fraction(words)
    total, current, seen = Fraction(0), Fraction(0), False
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


def _fraction(words: Sequence[str]) -> Fraction | None:
    """ "two thirds", "a quarter", "two and a half"; None of "twenty fifth", which is a place in an order."""
    whole = Fraction(0)
    if "and" in words[:-1]:
        place = len(words) - 1 - words[::-1].index("and")
        found, words = spelled(" ".join(words[:place])), words[place + 1 :]
        if found is None or len(words) < 2:
            return None
        whole = found
    count = Fraction(1) if words[:-1] in (["a"], ["an"]) else spelled(" ".join(words[:-1]))
    several = words[-1].endswith(("s", "halves"))
    if count is None or several == (count == 1):
        return None
    return whole + count / _FRACTIONS[words[-1]]


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
    twice double triple dozen hundred thousand million billion tens ones hundreds thousands quarter third quarters
    thirds halves squared cubed
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

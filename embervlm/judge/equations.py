"""Equations of numbers in a text, as far as both sides are understood as a whole; whatever is not is left alone.

Read are signs in all their spellings, thousands separators, currencies, percent, units behind numbers, brackets,
powers, square roots, fractions, chains (a = b = c) and rounding.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from embervlm.words.numbers import CURRENCIES, DIGITS, MOST_UNIT_WORDS, NO_UNITS, unit_name

Value = Fraction | float
_TOKEN = re.compile(
    rf"(?P<note><<[^>]*>>)|(?P<num>{DIGITS})|(?P<eq>(?<![!<>=])={{1,2}}(?![=>])|\bis equal to\b|\bequals\b)"
    r"|(?P<about>[\u2248\u2243\u2245]|~=?)|(?P<cur>US\$|\\?[$\u20ac\u00a3\u00a5\u20b9])|(?P<pct>\\?%|\bper\s?cent\b)"
    r"|(?P<op>\*\*|[-\u2212\u2013+*/\u00d7\u00f7\u00b7^]|\\(?:times|cdot|div)"
    r"|\b(?:times|plus|minus|multiplied by|divided by)\b|[xX](?=\s?[\d($\u20ac\u00a3]))"
    r"|(?P<square>[\u00b2\u00b3])|(?P<root>\u221a|\bsqrt\b)|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<word>[^\W\d_]+(?:['\u2019][^\W\d_]+)*(?:/[^\W\d_]+)?(?:\^[23](?!\d)|[\u00b2\u00b3])?)|(?P<other>\n|\S)",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"(?![xX]\s?[\d($])(?!(?:kg|g|km|m|cm|mm|l|ml|h|s|min|mph|ft|in|lbs?|oz|hrs?)\b)[^\W\d_\u00b2\u00b3]\w*|[,:.]\d[\d,:.]*",
    re.IGNORECASE,
)
"""What makes of a number something else where it touches it: a time, a name, a decimal comma."""
_OPERATORS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": "*",
    "\u00b7": "*",
    "\\times": "*",
    "\\cdot": "*",
    "\u00f7": "/",
    "\\div": "/",
    "^": "**",
    "times": "*",
    "plus": "+",
    "minus": "-",
    "multiplied by": "*",
    "divided by": "/",
    "x": "*",
}
_PARTS = frozenset(("num", "cur", "pct", "op", "square", "root", "open", "close"))
_HALF_SAID = frozenset("times plus minus half twice double triple third quarter squared over percent".split())
_OTHER_NUMBER = _HALF_SAID | frozenset("dozen hundred thousand million billion cubed".split())
"""Words that make of the number before them another one."""
_LABELS = frozenset(
    "step day week month year case part question option item section no number figure page room".split()
)
_LETTER = re.compile(r"[^\W\d_](?:\W.?)?")
"""An unknown, or the unit of one letter that is written like it; with a power."""
_SKIPPED = frozenset("exactly only just a total of".split())
_ABOUT = frozenset("about approximately roughly around nearly almost approx over".split())
_MOST_TOKENS = 120
"""Of one side."""
_MOST_DIGITS, _MOST_EXPONENT, _LARGEST = 30, 64, 10**30


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Side:
    """One side of an equation."""

    value: Value
    key: str
    """The expression without blanks, units and currencies."""
    units: frozenset[str]
    first: Value | None
    """Its first number."""
    decimals: int
    """Digits behind the last number's point."""
    calculates: bool
    divides: bool
    percent: bool
    all_percent: bool
    adds: bool
    about: bool
    start: int
    end: int


@dataclass(frozen=True)
class Equation:
    """Two sides that are said to be equal."""

    text: str
    left: Side
    right: Side
    about: bool


@lru_cache(maxsize=1 << 13)
def equations(text: str) -> tuple[Equation, ...]:
    """Every equation in `text` with both sides understood, of which at least one is calculated."""
    if not any(sign in text for sign in ("=", "\u2248", "equal", "~")):
        return ()
    return tuple(_equations(text))


def _equations(text: str) -> Iterator[Equation]:
    tokens = list(_tokens(text))
    for place, token in enumerate(tokens):
        if token.kind not in ("eq", "about"):
            continue
        left, right = _left_of(tokens, place), _right_of(tokens, place + 1)
        if left is None or right is None or not (left.calculates or right.calculates):
            continue
        yield Equation(text[left.start : right.end].strip(), left, right, token.kind == "about" or right.about)


def _tokens(text: str) -> Iterator[Token]:
    place = 0
    while (match := _TOKEN.search(text, place)) is not None:
        kind, found, place = match.lastgroup or "other", match[0], match.end()
        if kind == "note":  # GSM8K's calculator
            continue
        before = text[match.start() - 1 : match.start()]
        if kind == "num" and (joined := _JOINED.match(text, place)):
            kind, place = "bad", joined.end()
        elif kind == "num" and (before.isalpha() and before not in "xX"):
            kind = "bad"  # "A4"
        elif kind == "op" and found in "xX" and before.isalpha():
            kind = "bad"
        elif kind == "op":
            found = _OPERATORS.get(found.casefold(), found)
        yield Token(kind, found, match.start(), place)


def _left_of(tokens: Sequence[Token], end: int) -> Side | None:
    """The side that ends before `end`: as far to the left as its tokens go on."""
    start = end
    while start > 0:
        if end - start > _MOST_TOKENS:
            return None
        token = tokens[start - 1]
        if token.kind in _PARTS or _is_of(tokens, start - 1):
            start -= 1
        elif token.kind == "word" and (first := _units_before(tokens, start)) is not None:
            start = first
        else:
            break
    before = tokens[start - 1] if start else None
    while start < end and tokens[start].kind == "op" and tokens[start].text == "**":  # bold text
        start += 1
    start += max(0, _unmatched(tokens[start:end]))
    if before is not None and before.kind == "word":
        word = before.text.casefold()
        two_back = tokens[start - 2] if start > 1 else None
        joined = word == "and" and two_back is not None and _closes_number(tokens, start - 2)
        numbered = start < end and tokens[start].kind == "op"  # "x - 3"; "is -3" is a negative number
        if numbered and tokens[start].end == tokens[start + 1].start and tokens[start].start > before.end:
            numbered = len(word) == 1
        if word in _HALF_SAID or word in _LABELS or joined or numbered:
            return None
        if word == "of" and _is_share(tokens, start - 2):
            return None
    if before is not None and before.kind == "bad":
        return None
    opens = tokens[start] if start < end else None
    if (
        opens is not None
        and opens.kind == "op"
        and (opens.text != "-" or (before is not None and before.text in "!\u00b0|"))
    ):
        return None  # "3! + 1", "|-5| - 2"
    if opens is not None and opens.kind == "open" and before is not None and before.end == opens.start:
        if before.kind == "word":
            return None  # "log(100)"
    side = _side(tokens, start, end)
    if side is not None and not side.calculates and before is not None and before.kind in ("word", "bad"):
        return None  # "day 3 = ..."
    return side


def _units_before(tokens: Sequence[Token], end: int) -> int | None:
    """Where the words before `end` begin that are the unit of the number before them; None where they are none."""
    following = tokens[end] if end < len(tokens) else None
    if following is None or following.kind not in ("op", "eq", "about", "close"):
        return None
    start = end
    while start > 0 and tokens[start - 1].kind == "word":
        start -= 1
    words = {token.text.casefold() for token in tokens[start:end]}
    fits = end - start <= MOST_UNIT_WORDS and not words & NO_UNITS
    return start if fits and start > 0 and tokens[start - 1].kind in ("num", "pct", "close", "square") else None


def _is_of(tokens: Sequence[Token], place: int) -> bool:
    """Whether the token is the "of" in "20% of 50" or "1/2 of 30"."""
    return (
        tokens[place].kind == "word"
        and tokens[place].text.casefold() == "of"
        and place + 1 < len(tokens)
        and tokens[place + 1].kind in ("num", "cur", "open")
        and _is_share(tokens, place - 1)
    )


def _is_share(tokens: Sequence[Token], place: int) -> bool:
    if place < 0:
        return False
    kinds = [token.kind for token in tokens[max(0, place - 2) : place + 1]]
    ratio = kinds == ["num", "op", "num"] and tokens[place - 1].text == "/"
    return tokens[place].kind == "pct" or ratio or tokens[place].text.casefold() in ("half", "third", "quarter")


def _closes_number(tokens: Sequence[Token], place: int) -> bool:
    return tokens[place].kind == "num" or (
        tokens[place].kind == "word"
        and place > 0
        and tokens[place - 1].kind in ("num", "word")
        and any(token.kind == "num" for token in tokens[max(0, place - 2) : place])
    )


def _unmatched(tokens: Sequence[Token]) -> int:
    """Brackets at the start that are closed nowhere: "(5 + 3 = 8)"."""
    depth = sum((token.kind == "open") - (token.kind == "close") for token in tokens)
    leading = next((n for n, token in enumerate(tokens) if token.kind != "open"), len(tokens))
    return min(depth, leading)


def _right_of(tokens: Sequence[Token], start: int) -> Side | None:
    """The side that begins at `start`: as far to the right as its tokens go on."""
    about = False
    while start < len(tokens) and tokens[start].kind == "word" and tokens[start].text.casefold() in _SKIPPED | _ABOUT:
        about = about or tokens[start].text.casefold() in _ABOUT
        start += 1
    end, depth = start, 0
    while end < len(tokens):
        if end - start > _MOST_TOKENS:
            return None
        token = tokens[end]
        if token.kind == "close":
            if depth == 0:
                break
            depth -= 1
        elif token.kind == "open":
            depth += 1
        elif token.kind not in _PARTS and not _is_of(tokens, end):
            last = end
            while last < len(tokens) and tokens[last].kind == "word":
                last += 1
            if token.kind != "word" or last == end or _units_before(tokens, last) != end:
                break
            if tokens[last].kind == "close" and depth == 0:
                break
            end = last
            continue
        end += 1
    after = tokens[end] if end < len(tokens) else None
    if end > start and tokens[end - 1].kind == "op":  # "= 8 - so ..." is a dash, "= 8 - x" an unknown
        if after is not None and after.kind in ("word", "bad") and len(after.text) == 1:
            return None
        end -= 1
    if end > start and tokens[end - 1].kind == "cur" and tokens[end - 2].kind != "num":
        end -= 1
    if after is not None and after.kind == "bad":
        return None
    unit = ""
    if after is not None and after.kind == "word" and end > start and after.start - tokens[end - 1].end <= 1:
        unit = after.text.casefold()
        if unit in _OTHER_NUMBER:
            return None
        if unit == "and" and end + 1 < len(tokens) and tokens[end + 1].text.casefold() in ("a", "one", "half"):
            return None  # "3 and a half"
        unit = "" if unit in NO_UNITS else unit
    return _side(tokens, start, end, unit, about)


def _side(tokens: Sequence[Token], start: int, end: int, unit: str = "", about: bool = False) -> Side | None:
    """What `tokens[start:end]` come to; None where that is not understood."""
    part = tokens[start:end]
    if not part or not any(token.kind == "num" for token in part):
        return None
    source: list[str] = []
    named, words = [unit] if unit else list[str](), list[str]()
    numbers: list[str] = []
    for place, token in enumerate(part):
        if token.kind == "word" and not _is_of(tokens, start + place):
            words.append(token.text.casefold())
            continue
        if words:
            named.append(" ".join(words))
            words = []
        written = _written(part, place, source)
        if written is None:
            return None
        if token.kind == "num":
            numbers.append(token.text)
        if token.kind == "cur":
            named.append(CURRENCIES.get(token.text.lstrip("\\").upper(), "money"))
        source.append(written)
    if words:
        named.append(" ".join(words))
    if any(_LETTER.fullmatch(name) for name in named) and _has_bare_term(part, unit):
        return None  # "2 x + 3"
    text = re.sub(r"(\d+)&(\d+/\d+)", r"(\1+\2)", "".join(source))
    value = _value(text)
    if value is None:
        return None
    operators = [token.text for token in part if token.kind == "op"]
    calculates = any(token.kind in ("square", "root") for token in part) or bool(operators[text.startswith("-") :])
    return Side(
        value,
        text,
        frozenset(map(unit_name, named)),
        _value(numbers[0].replace(",", "")),
        len(numbers[-1].partition(".")[2]),
        calculates or "*" in text,
        "/" in operators or "sqrt" in text or "." in text,
        any(token.kind == "pct" for token in part),
        sum(token.kind == "pct" for token in part) == sum(token.kind == "num" for token in part),
        any(sign in "+-" for sign in operators),
        about,
        part[0].start,
        part[-1].end,
    )


def _has_bare_term(part: Sequence[Token], unit: str) -> bool:
    """Whether one part of a sum is a number alone and another has a word behind it."""
    terms = [False]
    for place, token in enumerate(part):
        if token.kind == "op" and token.text in "+-" and place:
            terms.append(False)
        terms[-1] = terms[-1] or token.kind in ("word", "cur")
    terms[-1] = terms[-1] or bool(unit)
    return any(terms) and not all(terms)


def _written(part: Sequence[Token], place: int, source: Sequence[str]) -> str | None:
    """The token as Python writes it; None where nothing is meant that is understood."""
    token, last = part[place], source[-1] if source else ""
    after = part[place + 1] if place + 1 < len(part) else None
    if token.kind == "num":
        digits = token.text.replace(",", "")
        if len(digits) > _MOST_DIGITS:
            return None
        if last[-1:].isdigit() or last.endswith(")"):  # "3 1/2" is a mixed number
            mixed = last.isdigit() and after is not None and after.text == "/" and place + 2 < len(part)
            return f"&{_plain(digits)}" if mixed else None
        root = bool(last.endswith("sqrt"))
        return f"({_plain(digits)})" if root else _plain(digits)
    if token.kind == "open":
        touching = place > 0 and part[place - 1].end == token.start
        return ("*(" if touching else None) if last[-1:].isdigit() or last.endswith(")") else "("
    simple = {"close": ")", "pct": "#", "cur": "", "root": "sqrt", "word": "*"}
    if token.kind == "square":
        return "**2" if token.text == "\u00b2" else "**3"
    if token.kind == "op":
        return token.text
    return simple[token.kind]


def _plain(digits: str) -> str:
    return digits.lstrip("0") if digits.lstrip("0")[:1].isdigit() else f"0{digits.lstrip('0')}"


# ---- values

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@lru_cache(maxsize=1 << 12)
def _value(text: str) -> Value | None:
    try:
        if text.isdecimal():
            return Fraction(text)
        text = re.sub(r"([\d.]+)#", r"(\1/100)", text).replace("#", "/100")
        value = _evaluate(ast.parse(text, mode="eval").body)
        return value if abs(float(value)) < _LARGEST else None
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Value:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "sqrt"
        and len(node.args) == 1
    ):
        return _root(_evaluate(node.args[0]))
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow):
            if abs(float(right)) > _MOST_EXPONENT or abs(float(left)) > _LARGEST:
                raise OverflowError
            power = left**right if right == int(right) else float(left) ** float(right)
            if isinstance(power, complex):
                raise ValueError
            return power
        if type(node.op) in _BINARY:
            result: Value = _BINARY[type(node.op)](left, right)
            return result
    raise ValueError("not understood")


def _root(value: Value) -> Value:
    if value < 0:
        raise ValueError
    if isinstance(value, Fraction):
        over, under = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if over * over == value.numerator and under * under == value.denominator:
            return Fraction(over, under)
    return math.sqrt(value)

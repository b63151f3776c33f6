"""One detail of a statement replaced by another that excludes it: "six" by "eight", "Monday" by "Friday", "after" by
"before"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from embervlm.words.english import ARTICLES, RESULT_WORDS, TOKEN, VACUOUS, is_number, stem, strip_numbering
from embervlm.words.numbers import NUMBER_WORDS, ORDINALS, in_digits
from embervlm.words.opposites import EXCLUDES, NO_ALTERNATIVES, Alternatives

_TOKEN = re.compile(rf"\d+:\d+|{TOKEN.pattern}")
"""A time is one detail."""
_ADVERBS = {*RESULT_WORDS, *"only also just still then even too now exactly about and but".split()}
_MOST_TOKENS = 80
"""A longer text is not one statement, and comparing two of them takes the product of their lengths."""
_MOST_REPLACED = 0.4
_MOST_WORDS = 2
"""That one detail is told in: "soaking wet"."""
_BETWEEN = re.compile(r"\s*,?\s*(?:(?:and|or)\s+)?", re.IGNORECASE)
"""Between two parts of a list; a blank alone is not."""
_ONE_OF_OTHERS = frozenset(word for pair in EXCLUDES for word in pair)


def replaced_details(
    text: str, known: str, *, names: bool = True, alternatives: Alternatives = NO_ALTERNATIVES
) -> list[tuple[str, str]] | None:
    """Details of `text` and what `known` says in their place, where nothing else differs; None where more does.

    Details are numbers, opposites, `alternatives`, lists of these and, with `names`, names inside a sentence. What
    stands before any other word of substance is what the statement is about, not a detail of it: "Carp need 3" does
    not deny "Trout need 7". A list in another order is the same list.
    """
    ours, theirs = (_with_lists(each, _tokens(each), alternatives) for each in (text, known))
    if max(len(ours), len(theirs)) > _MOST_TOKENS:
        return None
    found: list[tuple[str, str]] = []
    same, about = 0, False
    matcher = SequenceMatcher(None, [each.compared for each in ours], [each.compared for each in theirs], False)
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        mine, other = ours[a:a_end], theirs[b:b_end]
        if kind == "equal":
            for one, two in zip(mine, other):
                if one.text == two.text:
                    same += max(1, len(one.parts))
                    about = about or one.text not in VACUOUS
                elif about and (not one.parts or _other_list(one.parts, two.parts, alternatives)):
                    found.append((one.written, two.written))
                else:
                    return None
        elif {each.text for each in (*mine, *other)} <= _ADVERBS:
            continue
        elif kind != "replace" or not about or max(map(len, map(_without_articles, (mine, other)))) > _MOST_WORDS:
            return None
        elif pair := _excluding(mine, other, names, alternatives):
            found.append(pair)
        else:
            return None
    return found if len(found) <= _MOST_REPLACED * (same + len(found)) else None


class _Token(NamedTuple):
    written: str
    text: str
    """What is compared: a number word as its number, the parts of a list in the order of the alphabet."""
    is_name: bool
    """Has a capital letter though no sentence begins with it."""
    span: tuple[int, int]
    parts: tuple[str, ...] = ()
    """Of a list."""

    @property
    def is_number(self) -> bool:
        return is_number(self.text) or self.text in NUMBER_WORDS | ORDINALS

    @property
    def compared(self) -> str:
        """One number stands for all others, and one list, so that they are compared in their order."""
        return "," if self.parts else "0" if is_number(self.text) else self.text


def _without_articles(tokens: Sequence[_Token]) -> list[_Token]:
    return [token for token in tokens if token.text not in ARTICLES]


def _excluding(
    mine: Sequence[_Token], other: Sequence[_Token], names: bool, alternatives: Alternatives
) -> tuple[str, str] | None:
    """What of two passages, the one in the place of the other, cannot both be true."""
    one, two = (" ".join(token.text for token in _without_articles(each)) for each in (mine, other))
    if alternatives.exclude(one, two):
        return one, two
    return next(((x.written, y.written) for x in mine for y in other if _exclude(x, y, names)), None)


def _other_list(ours: Sequence[str], theirs: Sequence[str], alternatives: Alternatives) -> bool:
    """Whether two lists cannot both be true: their parts are of one kind, or some exclude parts of the other list."""

    def excluded(one: str, other: str) -> bool:
        return frozenset((one, other)) in EXCLUDES or alternatives.exclude(one, other)

    one_kind = all(excluded(*pair) for pair in combinations({*ours, *theirs}, 2))
    return one_kind or any(excluded(a, b) for a in set(ours) - set(theirs) for b in set(theirs) - set(ours))


def _exclude(one: _Token, other: _Token, names: bool) -> bool:
    if (one.is_number and other.is_number) or (names and one.is_name and other.is_name):
        return True
    pairs = {frozenset((one.text, other.text)), frozenset((stem(one.text), stem(other.text)))}
    return not EXCLUDES.isdisjoint(pairs)


@lru_cache(maxsize=1 << 14)
def _tokens(text: str) -> tuple[_Token, ...]:
    text = strip_numbering(text)
    out = []
    for match in _TOKEN.finditer(text):
        before = text[: match.start()].rstrip()
        begins = not before or before[-1] in ".!?:"
        word = match[0].casefold().replace("\u2019", "'")
        out.append(_Token(word, in_digits(word), match[0][0].isupper() and not begins, match.span()))
    return tuple(out)


def _with_lists(text: str, tokens: Sequence[_Token], alternatives: Alternatives) -> list[_Token]:
    """`tokens` of `text`, of which those of a list ("red, green and blue") are one."""
    text = strip_numbering(text)
    out: list[_Token] = []
    parts: list[_Token] = []

    def close() -> None:
        if len(parts) > 1:
            names, span = tuple(sorted(part.text for part in parts)), (parts[0].span[0], parts[-1].span[1])
            out.append(_Token(text[slice(*span)].casefold(), ", ".join(names), False, span, names))
        else:
            out.extend(parts)
        parts.clear()

    for place, token in enumerate(tokens):
        joins = parts and token.text in ("and", "or") and place + 1 < len(tokens)
        if joins and _is_part(tokens[place + 1], alternatives):
            continue
        if parts and not _joined(text[parts[-1].span[1] : token.span[0]]):
            close()
        if _is_part(token, alternatives):
            parts.append(token)
        else:
            close()
            out.append(token)
    close()
    return out


def _joined(between: str) -> bool:
    return bool(between.strip()) and _BETWEEN.fullmatch(between) is not None


def _is_part(token: _Token, alternatives: Alternatives) -> bool:
    """Whether `token` can be a part of a list: a word that excludes others. Numbers keep their order."""
    return token.text in _ONE_OF_OTHERS or token.text in alternatives

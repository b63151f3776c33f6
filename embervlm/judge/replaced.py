"""One detail of a statement replaced by another that excludes it: "six" by "eight", "Monday" by "Friday", "after" by
"before"."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

from embervlm.words.english import RESULT_WORDS, TOKEN, VACUOUS, is_number, stem, strip_numbering
from embervlm.words.numbers import NUMBER_WORDS, ORDINALS
from embervlm.words.opposites import EXCLUDES

_TOKEN = re.compile(rf"\d+:\d+|{TOKEN.pattern}")
"""A time is one detail."""
_ADVERBS = {*RESULT_WORDS, *"only also just still then even too now exactly about and but".split()}
_MOST_TOKENS = 80
"""A longer text is not one statement, and comparing two of them takes the product of their lengths."""
_MOST_REPLACED = 0.4
_MOST_WORDS = 2
"""That one detail is told in: "soaking wet"."""


def replaced_details(text: str, known: str, *, names: bool = True) -> list[tuple[str, str]] | None:
    """Details of `text` and what `known` says in their place, where nothing else differs; None where more does.

    Details are numbers, opposites and, with `names`, names inside a sentence. What stands before any other word of
    substance is what the statement is about, not a detail of it: "Carp need 3" does not deny "Trout need 7".
    """
    ours, theirs = _tokens(text), _tokens(known)
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
                    same += 1
                    about = about or one.text not in VACUOUS
                elif about:
                    found.append((one.text, two.text))
                else:
                    return None
        elif {each.text for each in (*mine, *other)} <= _ADVERBS:
            continue
        elif kind != "replace" or not about or max(len(mine), len(other)) > _MOST_WORDS:
            return None
        elif pair := next(((x, y) for x in mine for y in other if _exclude(x, y, names)), None):
            found.append((pair[0].text, pair[1].text))
        else:
            return None
    return found if len(found) <= _MOST_REPLACED * (same + len(found)) else None


class _Token(NamedTuple):
    text: str
    is_name: bool
    """Has a capital letter though no sentence begins with it."""

    @property
    def is_number(self) -> bool:
        return is_number(self.text) or self.text in NUMBER_WORDS | ORDINALS

    @property
    def compared(self) -> str:
        """One number stands for all others, so that numbers are compared in their order."""
        return "0" if is_number(self.text) else self.text


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
        out.append(_Token(match[0].casefold().replace("\u2019", "'"), match[0][0].isupper() and not begins))
    return tuple(out)

"""Words that exclude each other, which vectors of their company take for synonyms: "left" and "right"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import combinations

_OPPOSITES = """
    before/after earlier/later early/late more/less most/least many/few above/below over/under up/down on/off
    in/out inside/outside left/right front/back top/bottom north/south east/west northern/southern eastern/western
    fewer/more first/last always/never all/none hot/cold warm/cool warmer/cooler warmer/colder hotter/colder
    wet/dry high/low higher/lower long/short longer/shorter large/small larger/smaller big/small bigger/smaller
    wide/narrow thick/thin deep/shallow heavy/light heavier/lighter fast/slow faster/slower strong/weak
    stronger/weaker full/empty open/closed open/shut old/new old/young hard/soft hard/easy near/far rough/smooth
    steep/flat loud/quiet bright/dark clean/dirty cheap/expensive cheaper/dearer rich/poor good/bad better/worse
    best/worst safe/dangerous true/false right/wrong same/different rise/fall rises/falls rising/falling
    increase/decrease gain/lose win/lose wins/loses buy/sell begin/end start/stop add/remove push/pull pushes/pulls
    float/sink floats/sinks freeze/melt freezes/melts day/night morning/evening yes/no with/without
"""
_CLASSES = (
    "spring summer autumn winter",
    "north east south west",
    "morning noon afternoon evening night",
    "red orange yellow green blue purple pink brown black white grey",
    "red orange yellow green blue purple pink brown black white gray",
    "solid liquid gas",
    "breakfast lunch dinner",
)
"""Of each, no two hold of one thing at one time."""
EXCLUDES = frozenset(frozenset(pair.split("/")) for pair in _OPPOSITES.split()) | {
    frozenset(pair) for words in _CLASSES for pair in combinations(words.split(), 2)
}
"""Pairs of words."""

MAX_ALTERNATIVE_WORDS = 2


class Alternatives:
    """What cannot both be true in one data set: two answers to one and the same question.

    Where "What is it?" is answered "cat" in one record and "dog" in another, a cat is no dog. Answers that stand
    together in one answer do not exclude each other, nor do those of different questions ("dog", "animal").
    """

    def __init__(self, asked: Iterable[tuple[str, Collection[str]]] = ()) -> None:
        """
        Args:
            asked: a question and the names of its answer, for each record.
        """
        answers: defaultdict[str, set[str]] = defaultdict(set)
        self._together: set[frozenset[str]] = set()
        for question, found in asked:
            names = [name for text in found if (name := " ".join(text.casefold().split()))]
            if len(names) == 1 and len(names[0]) > 1 and len(names[0].split()) <= MAX_ALTERNATIVE_WORDS:
                answers[" ".join(question.casefold().split())] |= set(names)
            self._together |= {frozenset(pair) for pair in combinations(names, 2)}
        self._questions: defaultdict[str, set[int]] = defaultdict(set)
        for number, names_of_one in enumerate(answers.values()):
            for name in names_of_one if len(names_of_one) > 1 else ():
                self._questions[name].add(number)

    def __contains__(self, name: str) -> bool:
        return name in self._questions

    def exclude(self, one: str, other: str) -> bool:
        """Whether two texts in lower case are different answers to one question."""
        if one == other or one not in self._questions or other not in self._questions:
            return False
        return not self._questions[one].isdisjoint(self._questions[other]) and {one, other} not in self._together


NO_ALTERNATIVES = Alternatives()

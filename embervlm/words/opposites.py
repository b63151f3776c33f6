"""Words that exclude each other, which vectors of their company take for synonyms: "left" and "right"."""

from __future__ import annotations

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
    "red orange yellow green blue purple brown black white grey",
    "solid liquid gas",
    "breakfast lunch dinner",
)
"""Of each, no two hold of one thing at one time."""
EXCLUDES = frozenset(frozenset(pair.split("/")) for pair in _OPPOSITES.split()) | {
    frozenset(pair) for words in _CLASSES for pair in combinations(words.split(), 2)
}
"""Pairs of words."""

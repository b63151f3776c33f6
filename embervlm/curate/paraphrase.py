"""Rule-based paraphrase: the same claims in other words.

What changes are connectives and the order of clauses ("C because P": "Since P, C"), the order of premises that are one
claim each, an opening phrase, and a few words with a safe synonym. Names and values of the data set stay as they are,
and "name is value" stays together, which the claim reader and the validator's negatives look for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial

from embervlm.words.claims import ClaimReader
from embervlm.words.english import MEANING_WORDS, REASON_WORDS, RESULT_WORDS, STOP_WORDS, any_of, sentences

Wording = Callable[[random.Random], str]

CHANGE_SHARE = 0.75
"""Share of the sentences with another wording for which one is drawn."""

OPENERS = (
    "Note that {}",
    "Observe that {}",
    "We know that {}",
    "It is clear that {}",
    "Here, {}",
    "In this case, {}",
    "Consider that {}",
    "Keep in mind that {}",
)
RESULTS = ("This means that {}", "It follows that {}", "As a result, {}", "Consequently, {}", "We conclude that {}")
"""In place of "So" at a sentence's start."""
FROM_PREMISE = (
    "{P}, so {c}",
    "{P}, which means that {c}",
    "{P}. It follows that {c}",
    "Because {p}, {c}",
    "Since {p}, {c}",
    "Given that {p}, {c}",
)
"""Premise and consequence, a capital letter where a text opens the sentence. The premise always comes first: a model
that writes from left to right would otherwise learn to guess the consequence and to justify it afterwards."""
SYNONYMS = {
    "requires": ("needs", "calls for"),
    "require": ("need", "call for"),
    "difficult": ("hard",),
    "rapidly": ("quickly",),
    "utilize": ("use",),
    "utilizes": ("uses",),
    "assist": ("help",),
    "assists": ("helps",),
    "obtain": ("get",),
    "approximately": ("about", "roughly"),
    "numerous": ("many",),
    "entire": ("whole",),
    "examine": ("inspect",),
    "analyze": ("examine", "study"),
    "evaluate": ("assess", "judge"),
    "assess": ("evaluate", "judge"),
    "identify": ("determine", "establish"),
    "determine": ("establish", "find out"),
    "select": ("choose", "pick"),
    "choose": ("select", "pick"),
    "located": ("situated",),
    "larger": ("bigger",),
    "possess": ("have",),
    "demonstrates": ("shows",),
    "indicates": ("shows",),
    "contains": ("holds",),
    "several": ("a number of",),
}
"""Word -> words that may stand in its place whatever the sentence; not the other way round."""

_CONSEQUENCE = (
    re.compile(r"(?P<p>.+?)(?:,|;) (?:so|therefore|thus|hence|which means that) (?P<c>.+)"),
    re.compile(r"(?P<c>.+?),? because (?!of\b)(?P<p>.+)"),
    re.compile(r"(?:Because|Given that) (?P<p>[^,]+), (?P<c>.+)"),  # not Since, which may speak of time
)
_CLAIMS_WITH_VERDICT = re.compile(r"(?P<p>[^:]+): (?P<c>[^:]+)")
_RESULT = re.compile(rf"{any_of(*RESULT_WORDS)},? (?P<c>.+)", re.IGNORECASE)
_CONNECTIVE = re.compile(any_of(*RESULT_WORDS, *REASON_WORDS, *MEANING_WORDS), re.IGNORECASE)
_STATEMENT = re.compile(r"\b(?:is|are|was|were|has|have|can|cannot|must|will|should|does|do)\b")
_SUBJECT = re.compile(
    r"(?:the|a|an|this|these|those|it|they|he|she|we|you|there|each|every|all|both|some|no|any|its|their|his|her|our) ",
    re.IGNORECASE,
)
"""How a clause of its own begins, and no command or fragment."""
_BULLET = re.compile(r"\s*[-*\u2022]\s+")
_WORD = re.compile(r"[A-Za-z]+")
_PLAIN_WORD = re.compile(r"(?<!\b[Aa] )(?<!\b[Aa]n )\b[A-Za-z]+\b(?! that\b| to\b)")
"""A word that no article and no clause is tied to."""
_MARKS = re.compile(r"[\"()\[\]{}?]")


class RuleParaphraser:
    """Draws other wordings of steps; the names and values of `reader` stay."""

    def __init__(self, reader: ClaimReader) -> None:
        self._reader = reader
        phrases = [text for name, values in reader.key for text in (name, *values)]
        self._protected = {word.casefold() for phrase in phrases for word in _WORD.findall(phrase)}
        self._names = tuple(name for name, _ in reader.key)
        self._common = {word for phrase in phrases for word in _WORD.findall(phrase) if word.islower()} | STOP_WORDS
        self._synonyms = {
            word: free
            for word, others in SYNONYMS.items()
            if word not in self._protected
            and (free := [other for other in others if self._protected.isdisjoint(other.split())])
        }
        self._options = lru_cache(maxsize=1 << 14)(self._parse)

    def rewrite(self, step: str, rng: random.Random, keep: Collection[str] = ()) -> str:
        """`step` in other words; unchanged where nothing fits. The lower-case words in `keep` have no synonyms."""
        lines = []
        for line in step.split("\n"):
            bullet = _BULLET.match(line)
            start = bullet.end() if bullet else 0
            found = sentences(line[start:])
            lines.append(line[:start] + " ".join(self._sentence(sentence, rng, keep) for sentence in found))
        return "\n".join(lines)

    def _sentence(self, sentence: str, rng: random.Random, keep: Collection[str]) -> str:
        wordings = self._options(sentence)
        if wordings and rng.random() < CHANGE_SHARE:
            sentence = rng.choice(wordings)(rng)
        return _PLAIN_WORD.sub(lambda match: self._synonym(match[0], rng, keep), sentence)

    def _synonym(self, word: str, rng: random.Random, keep: Collection[str]) -> str:
        found = self._synonyms.get(word.lower())
        if found is None or word.lower() in keep or rng.random() < 0.5:
            return word
        other = rng.choice(found)
        return _capital(other) if word[0].isupper() else other

    def _parse(self, sentence: str) -> list[Wording]:
        """Ways to word `sentence` anew."""
        text, end = (sentence[:-1], sentence[-1]) if sentence[-1:] in (".", "!") else (sentence, "")
        if _MARKS.search(text) or end == "!":
            return []
        if result := _RESULT.fullmatch(text):
            clause = result["c"]
            if _CONNECTIVE.search(clause) or not self._is_clause(clause):
                return []
            return [_fixed(form.format(clause) + end) for form in RESULTS]
        for pattern in _CONSEQUENCE:
            if match := pattern.fullmatch(text):
                return self._from_premise(match["p"], match["c"], end, FROM_PREMISE)
        verdict = _CLAIMS_WITH_VERDICT.fullmatch(text)
        if verdict and self._reader.read(verdict["p"]) and self._reader.read(verdict["c"]):
            return self._from_premise(verdict["p"], verdict["c"], end, ("{P}: {c}", *FROM_PREMISE))
        inside = self._inside(text)
        if inside is not None and self._is_clause(text) and _STATEMENT.search(text) and not _CONNECTIVE.search(text):
            return [_fixed(form.format(inside) + end) for form in OPENERS]
        return []

    def _from_premise(self, premise: str, consequence: str, end: str, forms: Sequence[str]) -> list[Wording]:
        if _CONNECTIVE.search(premise) or _CONNECTIVE.search(consequence) or not self._is_clause(consequence):
            return []
        items = premise.split(", ")
        if not all(len(self._reader.read(item)) == 1 and self._inside(item) for item in items):
            items = [premise]  # premises change places only where each is one claim
        lowered = [self._inside(item) for item in items]
        if (after := self._inside(consequence)) is None:
            return []
        if None in lowered:  # a word that may be a name opens the premise, so that stays in front
            forms = [form for form in forms if "{p}" not in form]
        clauses = [low if low is not None else item for low, item in zip(lowered, items, strict=True)]

        def draw(form: str, rng: random.Random) -> str:
            order = rng.sample(clauses, len(clauses))
            front = _listed(order, rng.choice((", ", " and ")))
            return form.format(P=_capital(front), p=_listed(order, " and "), c=after) + end

        return [partial(draw, form) for form in forms]

    def _is_clause(self, text: str) -> bool:
        return _SUBJECT.match(text) is not None or bool(self._reader.read(text))

    def _inside(self, text: str) -> str | None:
        """`text` as it reads inside a sentence; None where its first word may be a name."""
        first = _WORD.match(text)
        if first is None:
            return None
        word = first[0]
        if word.islower() or any(text.startswith(name) for name in self._names):
            return text
        if word in ("A", "An") or (word.lower() in self._common and word[1:].islower()):
            return word.lower() + text[len(word) :]
        return None


def _fixed(text: str) -> Wording:
    return lambda rng: text


def _listed(items: Sequence[str], last: str) -> str:
    return last.join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

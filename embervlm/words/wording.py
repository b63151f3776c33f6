"""Texts as weighted words: clauses, negations, what one text says of another. Free of any subject.

Words are compared by stem and by small word vectors that ship with the package: `word_vectors.npz` holds what
all-MiniLM-L6-v2 (Apache-2.0) says of each word, reduced by `benchmarks/distil_word_vectors.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from itertools import combinations
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embervlm.words.english import (
    CONNECTIVES,
    RESULT,
    SUPPOSES,
    TOKEN,
    VACUOUS,
    any_of,
    is_negation,
    is_number,
    sentences,
    stem,
    strip_numbering,
)
from embervlm.words.numbers import NUMBER_WORDS, ORDINALS, in_digits
from embervlm.words.opposites import EXCLUDES

Array = NDArray[np.float32]

UNKNOWN_COSINE, SAME_COSINE = 0.45, 0.85
"""Cosine of word vectors at which words begin to be alike, and at which they mean the same."""
SYNONYM = 0.9
"""Likeness of two different words at `SAME_COSINE`."""
MIN_SAME_SUBJECT = 0.3
"""Likeness of two clauses' first words, from which on they may speak of one thing."""

_NAME = re.compile(r"(?<=[\w,;)] )([A-Z][^\W\d_]+)")
_CLAUSE_BREAK = re.compile(
    rf"(?<=[.!?;:])\s+|,\s+(?=\S)|\s+(?={any_of(*CONNECTIVES, 'which')})"
    r"|\s+that\s+(?=no\b)|\s+and\s+(?=(?:the|a|an|it|they|this|that|these|those|there|he|she|we|so|is|are|was|were"
    r"|do|does|did|can|cannot|has|have|had|will|must|may)\b)",
    re.IGNORECASE,
)
_OPENING_ANSWER = re.compile(r"^\s*(?:conclusion:\s*|the answer is\s+|so\s+)*(?:yes|no)\s*(?=[,.;!]|$)", re.IGNORECASE)
_DENIAL = re.compile(
    r"\bit (?:is|was) (?:(?:not|never) (?:true|so|correct|the case)|untrue|false|incorrect|wrong) that\s+"
    r"(?:(?:so|but|and|because|therefore)\b,?\s*)?",
    re.IGNORECASE,
)
_NO_DENIAL = re.compile(r"\b(?:no|not) (?:more|less|fewer|later|sooner|longer|only|just|merely)\b", re.IGNORECASE)
_PREFIX = re.compile(r"^(?:un|in|im|ir|dis|non)(?=\w{4})")


def ramp(value: Any, low: float, high: float) -> Any:
    """0 up to `low`, 1 from `high` on, a straight line between; of a number or an array."""
    return np.clip((value - low) / (high - low), 0, 1)


@dataclass(frozen=True)
class Clause:
    """One statement of a text."""

    words: tuple[str, ...]
    """Stems of its content words in order, without negations."""
    negated: bool
    is_result: bool
    """Opens with "so", "therefore" and the like."""
    supposed: bool
    """Stands in a sentence with "if", "may", "or" and the like, and so is not stated."""


@lru_cache(maxsize=1 << 15)
def clauses_of(text: str) -> tuple[Clause, ...]:
    """Statements of `text`. Of a part without a content word a "so" and a denial are kept, for the next one."""
    out: list[Clause] = []
    for sentence in sentences(strip_numbering(text)):
        supposed = SUPPOSES.search(sentence) is not None
        result, denied = False, 0
        sentence = _DENIAL.sub("not ", _NO_DENIAL.sub("", _OPENING_ANSWER.sub("", sentence)))
        for part in _CLAUSE_BREAK.split(sentence):
            result = result or RESULT.match(part) is not None
            negations, words = denied, []
            for token in TOKEN.findall(part.casefold().replace("\u2019", "'")):
                if is_negation(token):
                    negations += 1
                elif token not in VACUOUS:
                    negated, word = _stem_of(token)
                    negations += negated
                    words.append(word)
            if words:
                out.append(Clause(tuple(words), negations % 2 == 1, result, supposed))
                result, negations = False, 0
            # "It is not true that if ..."; in "it is not the one, although ..." nothing that follows is denied
            denied = negations if part.strip() == "not" else 0
    return tuple(out)


@lru_cache(maxsize=1 << 15)
def names_of(text: str) -> frozenset[str]:
    """Stems of the words that have a capital letter inside a sentence: Monday is not Tuesday, however alike."""
    return frozenset(_stem_of(match[1].casefold())[1] for match in _NAME.finditer(text))


@lru_cache(maxsize=1 << 16)
def _stem_of(token: str) -> tuple[bool, str]:
    """Whether a prefix turns the word around ("unsuited"), and its stem; of a number word, the number."""
    token = in_digits(token)
    if prefix := _PREFIX.match(token):
        rest = token[prefix.end() :]
        vectors = word_vectors()
        if vectors.cosine(token, rest) >= 0.6:
            return True, stem(rest)
    return False, stem(token)


_NUMBER_STEMS = frozenset(map(stem, NUMBER_WORDS | ORDINALS))
_EXCLUDED_STEMS = {tuple(sorted(map(stem, pair))) for pair in EXCLUDES}
_HAS_OPPOSITE = {word for pair in _EXCLUDED_STEMS for word in pair}


class WordVectors:
    """Unit vectors of common English words, in order of frequency."""

    def __init__(self, words: Sequence[str], vectors: NDArray[np.int8]) -> None:
        self._index: dict[str, int] = {}
        for place, word in enumerate(words):
            self._index[word] = place
        for place, word in enumerate(words):
            self._index.setdefault(stem(word), place)
        found = vectors.astype(np.float32)
        self._vectors = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
        self._num = len(words)

    def rows(self, words: Sequence[str]) -> Array:
        """`[word, dimension]`; zeros for what is not known."""
        places = [self._index.get(word, -1) for word in words]
        found = self._vectors[places]
        found[[place < 0 for place in places]] = 0
        return found

    def cosine(self, a: str, b: str) -> float:
        if a not in self._index or b not in self._index:
            return 0.0
        return float(self._vectors[self._index[a]] @ self._vectors[self._index[b]])

    def rarity(self, word: str) -> float:
        """From 0.3 for the most common word to 1 for one that is not known; a number is 0.8."""
        if is_number(word):
            return 0.8
        place = self._index.get(word)
        return 1.0 if place is None else max(0.3, log(2 + place) / log(2 + self._num))


@lru_cache(maxsize=1)
def word_vectors() -> WordVectors:
    with (files("embervlm.words") / "word_vectors.npz").open("rb") as file, np.load(file) as data:
        return WordVectors(str(data["words"]).split(), data["vectors"])


class Rarity:
    """How much a word tells: rarity in English, and where chains were given, in those too."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        counts, total = Counter[str](), 0
        for text in texts:
            total += 1
            counts.update({word for clause in clauses_of(text) for word in clause.words})
        self._seen: Mapping[str, float] = (
            {word: log((1 + total) / count) / log(1 + total) for word, count in counts.items()} if total > 1 else {}
        )
        self._known: dict[str, float] = {}

    def __call__(self, word: str) -> float:
        found = self._known.get(word)
        if found is None:
            general = word_vectors().rarity(word)
            found = general * (0.3 + 0.7 * self._seen.get(word, 1.0)) if self._seen else general
            self._known[word] = found
        return found


class Reading:
    """Several texts of one chain, their clauses and words compared with each other.

    `texts[i]` has the clauses `clauses[span[i]]`; all matrices are computed once.
    """

    def __init__(self, texts: Sequence[str], rarity: Rarity) -> None:
        self.texts = list(texts)
        of_text = [clauses_of(text) for text in texts]
        self.clauses = [clause for clauses in of_text for clause in clauses]
        ends = np.cumsum([0, *(len(clauses) for clauses in of_text)])
        self.spans = [range(int(start), int(end)) for start, end in zip(ends, ends[1:])]
        self.words = list(dict.fromkeys(word for clause in self.clauses for word in clause.words))
        self._place = {word: place for place, word in enumerate(self.words)}
        self.weights = np.array([rarity(word) for word in self.words], dtype=np.float32)
        english = word_vectors().rarity
        self.english_weights = np.array([english(word) for word in self.words], dtype=np.float32)
        """The same, whatever was fitted."""
        self.places = [[self._place[word] for word in clause.words] for clause in self.clauses]
        self.text_places = [sorted({place for number in span for place in self.places[number]}) for span in self.spans]

    @cached_property
    def opposites(self) -> list[tuple[int, int]]:
        """Pairs of words that exclude each other."""
        places = [place for place, word in enumerate(self.words) if word in _HAS_OPPOSITE]
        return [
            (a, b)
            for a, b in combinations(places, 2)
            if tuple(sorted((self.words[a], self.words[b]))) in _EXCLUDED_STEMS
        ]

    @cached_property
    def alike(self) -> Array:
        """`[word, word]` likeness in [0, 1]; 1 for the same stem.

        A number is like itself alone, and of names a name is; opposites are not alike."""
        vectors = word_vectors().rows(self.words)
        cosine = vectors @ vectors.T
        out = np.clip((cosine - UNKNOWN_COSINE) / (SAME_COSINE - UNKNOWN_COSINE), 0, 1) * SYNONYM
        names = frozenset[str]().union(*(names_of(text) for text in self.texts))
        numbers = [place for place, word in enumerate(self.words) if is_number(word) or word in _NUMBER_STEMS]
        named = [place for place, word in enumerate(self.words) if word in names]
        out[numbers, :] = 0
        out[:, numbers] = 0
        out[np.ix_(named, named)] = 0
        for a, b in self.opposites:
            out[a, b] = out[b, a] = 0
        np.fill_diagonal(out, 1)
        return out.astype(np.float32)  # type: ignore[no-any-return]

    def _of_others(self, groups: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """For groups of words, `[a, b]`: each has a number, a name or one of two opposites that the other has not."""
        stands = np.zeros((len(groups), len(self.words)), dtype=np.float32)
        for row, places in enumerate(groups):
            stands[row, places] = 1
        names = frozenset[str]().union(*(names_of(text) for text in self.texts))
        numbers = np.array([is_number(word) or word in _NUMBER_STEMS for word in self.words], dtype=bool)
        named = np.array([word in names for word in self.words], dtype=bool)
        out = np.zeros((len(groups), len(groups)), dtype=bool)
        for kind in filter(np.any, (numbers, named)):
            own = (stands * kind) @ (1 - stands).T > 0
            out |= own & own.T
        for a, b in self.opposites:
            one, other = stands[:, a] > stands[:, b], stands[:, b] > stands[:, a]
            out |= one[:, None] & other | other[:, None] & one
        return out

    @cached_property
    def of_others(self) -> NDArray[np.bool_]:
        """`[clause, clause]`: whether they speak of different things: "figure 2 is not ..." denies nothing of figure 3,
        nor does what is said of the star deny anything of the circle: neither has a word for the other's first."""
        _, _, best = self._said_by(self.places)
        first = [places[0] for places in self.places]
        unsaid = best[first] < MIN_SAME_SUBJECT
        return self._of_others(self.places) | (unsaid & unsaid.T)

    @cached_property
    def texts_of_others(self) -> NDArray[np.bool_]:
        """The same of whole texts."""
        return self._of_others(self.text_places)

    def _said_by(self, groups: Sequence[Sequence[int]]) -> tuple[Array, Array, Array]:
        """For groups of words: `[a, b]` share of b that a says, its least said word, and `[word, group]`."""
        size, filled = len(groups), [number for number, group in enumerate(groups) if group]
        best = np.zeros((len(self.words), size), dtype=np.float32)
        share, least = np.zeros((size, size), dtype=np.float32), np.zeros((size, size), dtype=np.float32)
        if filled:
            flat = [place for number in filled for place in groups[number]]
            starts = np.cumsum([0, *(len(groups[number]) for number in filled[:-1])])
            best[:, filled] = np.maximum.reduceat(self.alike[:, flat], starts, axis=1)
            said = best[flat]
            weights = self.weights[flat]
            total = np.add.reduceat(weights, starts)
            share[:, filled] = (np.add.reduceat(said * weights[:, None], starts, axis=0) / total[:, None]).T
            least[:, filled] = np.minimum.reduceat(said, starts, axis=0).T
        return share, least, best

    @cached_property
    def clause_cover(self) -> tuple[Array, Array]:
        """`[a, b]`: how much of clause b clause a says, and how well b's least said word is said."""
        share, least, _ = self._said_by(self.places)
        return share, least

    @cached_property
    def text_cover(self) -> tuple[Array, Array, Array]:
        """The same of whole texts, and `[word, text]` how well the text says the word."""
        return self._said_by(self.text_places)

    @cached_property
    def text_words_shared(self) -> Array:
        """`[a, b]`: share of text b's words that stand in text a themselves, synonyms aside."""
        return self._shared(self.text_places)

    @cached_property
    def clause_words_shared(self) -> Array:
        """The same of clauses."""
        return self._shared(self.places)

    def _shared(self, groups: Sequence[Sequence[int]]) -> Array:
        stands = np.zeros((len(groups), len(self.words)), dtype=np.float32)
        for row, places in enumerate(groups):
            stands[row, places] = 1
        weighed = stands * self.weights
        return (stands @ weighed.T) / np.maximum(weighed.sum(axis=1), 1e-9)  # type: ignore[no-any-return]

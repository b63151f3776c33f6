"""How well the order of steps reads: what each needs comes before it.

Two scorers are added up. One is general and knows English: a thing is introduced late in a step and taken up early in
the next ("given before new", Halliday 1967; "a box" before "the box"), results of sums before their use, "therefore"
never first, the question's words first and the answer's last, neighbours that speak of the same things. The other is
learned: which words and claims come in an earlier step than which others in the training chains. Where the gold chain
is known, its order counts as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from embervlm.words.claims import ClaimReader, content_words, is_conclusion
from embervlm.words.english import (
    DEFINITE,
    INDEFINITE,
    MEANING_WORDS,
    POINTS_BACK,
    REASON_WORDS,
    RESULT,
    RESULT_WORDS,
    TOKEN,
    VACUOUS,
    any_of,
    is_number,
    stem,
    strip_numbering,
)
from embervlm.words.numbers import in_digits
from embervlm.words.wording import Rarity

NUM_PERMUTATIONS = 120
MAX_STEPS = 64
"""Steps of a chain whose order is looked at; in a longer one, the first."""
_MAX_FEATURES = 2000
_SMOOTHING = 0.5
_TIE = 1e-9
Array = NDArray[np.float64]

WEIGHTS = {
    "given_new": 1.0,
    "result_used": 2.0,
    "indefinite_first": 1.0,
    "question_first": 1.0,
    "answer_last": 1.5,
    "points_back": 2.0,
    "neighbours": 1.0,
    "result_late": 0.5,
}
"""Of the general scorer. Chosen on training chains of other data sets; see docs/evaluation.md."""
LEARNED_WEIGHT = 0.5
KNOWN_WEIGHT = 2.0
"""Of the order in the gold chain, where there is one."""

_TOKEN = re.compile(rf"{TOKEN.pattern}|=")
_TOTAL = re.compile(any_of("total", "altogether", "overall", "in all", "must", "finally"), re.IGNORECASE)
_CONSEQUENCE = re.compile(rf"[,;.:]?\s*{any_of(*RESULT_WORDS, *MEANING_WORDS, 'meaning')}|=|->", re.IGNORECASE)
_REASON = re.compile(any_of(*REASON_WORDS, "as"), re.IGNORECASE)


@dataclass(frozen=True)
class StepShape:
    """What a step introduces and takes up."""

    first: Mapping[str, float]
    """Word -> place of its first use, from 0 at the start to 1 at the end; what follows "so" lies in (0.6, 1]."""
    last: Mapping[str, float]
    definite: frozenset[str]
    indefinite: frozenset[str]
    numbers: frozenset[str]
    results: frozenset[str]
    """Numbers right after an equals sign."""
    points_back: bool
    concludes: bool
    is_result: bool


@lru_cache(maxsize=1 << 15)
def shape_of(step: str) -> StepShape:
    text = strip_numbering(step)
    cut = len(text)
    consequences = list(_CONSEQUENCE.finditer(text))
    if consequences and consequences[-1].start() > 0:
        cut = consequences[-1].start()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    definite, indefinite, numbers, results = set(), set(), set(), set()
    before = ""
    flipped = cut == len(text) and (reason := _REASON.search(text)) is not None and reason.start() > 0
    pivot = reason.start() if flipped and reason else cut
    for match in _TOKEN.finditer(text):
        token = match[0].casefold()
        if token == "=":
            before = "="
            continue
        if is_number(token):
            number = in_digits(token.rstrip("."))
            numbers.add(number)
            if before == "=":
                results.add(number)
            word = number
        elif token in VACUOUS:
            if token in DEFINITE or token in INDEFINITE:
                before = token
            continue
        else:
            word = stem(token)
            if before in DEFINITE:
                definite.add(word)
            elif before in INDEFINITE:
                indefinite.add(word)
        at = match.start()
        if flipped:  # "C because P": the premise, at the end, is what is given
            place = 0.6 + 0.4 * at / max(pivot, 1) if at < pivot else 0.6 * (at - pivot) / max(len(text) - pivot, 1)
        elif cut < len(text):
            place = 0.6 * at / max(cut, 1) if at < cut else 0.6 + 0.4 * (at - cut) / max(len(text) - cut, 1)
        else:
            place = at / max(len(text), 1)
        first.setdefault(word, place)
        last[word] = max(place, last.get(word, 0.0))
        before = ""
    return StepShape(
        first,
        last,
        frozenset(definite),
        frozenset(indefinite),
        frozenset(numbers),
        frozenset(results),
        POINTS_BACK.match(text) is not None,
        is_conclusion(step),
        bool(RESULT.search(text) or _TOTAL.search(text)),
    )


@dataclass(frozen=True)
class OrderEvidence:
    """Sums of these over an order say how well it reads."""

    pairs: Array
    """`[step, step]`: evidence that the row's step comes anywhere before the column's; antisymmetric."""
    neighbours: Array
    """`[step, step]`: evidence that the column's step comes right after the row's."""
    first: Array
    """`[step]`: evidence that the step is the first."""

    def total(self, orders: NDArray[np.int64]) -> Array:
        """One number for each of `orders`, `[order, position]`."""
        rows, columns = _upper(orders.shape[1])
        out = self.first[orders[:, 0]] + self.neighbours[orders[:, :-1], orders[:, 1:]].sum(axis=1)
        for start in range(0, len(rows), 4096):  # a long chain has many pairs
            i, j = rows[start : start + 4096], columns[start : start + 4096]
            out = out + self.pairs[orders[:, i], orders[:, j]].sum(axis=1)
        return out  # type: ignore[no-any-return]


def general_features(
    steps: Sequence[str], *, question: str = "", answer: str = "", rarity: Rarity | None = None
) -> dict[str, OrderEvidence]:
    """Each feature of the general scorer by itself, unweighted."""
    rarity = rarity or Rarity()
    shapes = [shape_of(step) for step in steps]
    size = len(steps)
    asked = frozenset(shape_of(question).first) if question else frozenset()
    answered = frozenset(shape_of(answer).first) if answer else frozenset()
    column = {word: place for place, word in enumerate(dict.fromkeys(word for shape in shapes for word in shape.first))}
    rare = np.array([rarity(word) for word in column]) if column else np.zeros(0)
    present, middle = np.zeros((size, len(column))), np.zeros((size, len(column)))
    results, numbers, definite, indefinite = (np.zeros((size, len(column))) for _ in range(4))
    for row, shape in enumerate(shapes):
        for word, place in shape.first.items():
            present[row, column[word]] = 1
            middle[row, column[word]] = (place + shape.last[word]) / 2
        for table, words in (
            (results, shape.results),
            (numbers, shape.numbers - shape.results),
            (definite, shape.definite),
            (indefinite, shape.indefinite),
        ):
            table[row, [column[word] for word in words]] = 1
    weights = np.maximum(present @ rare, 1e-6)
    new = np.array([word not in asked for word in column], dtype=float)
    given = (middle * rare * new) @ present.T
    asks = (present * rare) @ (1 - new) / weights
    answers = (present * rare) @ np.array([float(word in answered) for word in column]) / weights
    answers = answers + 4.0 * np.array([float(shape.concludes) for shape in shapes])
    late = np.array([float(shape.is_result) for shape in shapes])
    zero, none = np.zeros((size, size)), np.zeros(size)

    def before(values: Array) -> OrderEvidence:
        return OrderEvidence(values - values.T, zero, none)

    return {
        "given_new": before(given),
        "result_used": before(results @ numbers.T),
        "indefinite_first": before(indefinite @ definite.T),
        "question_first": before(np.tile(asks[:, None], size)),
        "answer_last": before(np.tile(answers[None, :], (size, 1))),
        "result_late": before(np.tile(late[None, :], (size, 1))),
        "points_back": OrderEvidence(zero, zero, -np.array([float(shape.points_back) for shape in shapes])),
        "neighbours": OrderEvidence(zero, (present * rare) @ present.T / np.sqrt(np.outer(weights, weights)), none),
    }


class OrderScorer:
    """The general scorer, and pairwise precedence learned from chains.

    learned: log-odds of (a, b) = log((#a before b + 0.5) / (#b before a + 0.5)) over pairs of steps of the training
    chains, for words and claimed names.
    """

    def __init__(
        self,
        features: Mapping[str, int] | None = None,
        log_odds: Array | None = None,
        reader: ClaimReader | None = None,
        rarity: Rarity | None = None,
    ) -> None:
        self._features = features or {}
        self._log_odds = log_odds
        """`[feature, feature]`, antisymmetric; None where nothing was learned."""
        self._reader = reader or ClaimReader.of({})
        self._rarity = rarity or Rarity()

    @classmethod
    def fit(
        cls,
        chains: Iterable[Sequence[str]],
        domains: Mapping[str, Collection[str]] | None = None,
        rarity: Rarity | None = None,
    ) -> OrderScorer:
        """Learn from training chains, never from those to be scored.

        Args:
            domains: fact name -> values, so that claimed names of several words count as one; optional.
        """
        reader = ClaimReader.of(domains or {})
        named = [[_features(step, reader) for step in chain] for chain in chains]
        counts = Counter(feature for chain in named for step in chain for feature in step)
        common = sorted(counts, key=lambda feature: (-counts[feature], feature))[:_MAX_FEATURES]
        index = {feature: position for position, feature in enumerate(common)}
        before = np.zeros((len(index), len(index)))
        for chain in named:
            ids, present = _indicators(chain, index)
            seen_before = np.cumsum(present, axis=0) - present
            before[np.ix_(ids, ids)] += seen_before.T @ present
        log_odds = np.log(before + _SMOOTHING) - np.log(before.T + _SMOOTHING)
        return cls(index, log_odds, reader, rarity)

    def learned_pairs(self, steps: Sequence[str]) -> Array:
        """`[step, step]`: mean log-odds that the row's step comes before the column's; antisymmetric."""
        if self._log_odds is None:
            return np.zeros((len(steps), len(steps)))
        ids, present = _indicators([_features(step, self._reader) for step in steps], self._features)
        share = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
        return share @ self._log_odds[np.ix_(ids, ids)] @ share.T  # type: ignore[no-any-return]

    def evidence(
        self, steps: Sequence[str], *, question: str = "", answer: str = "", known: Array | None = None
    ) -> OrderEvidence:
        general = general_features(steps, question=question, answer=answer, rarity=self._rarity)
        weighed = [(WEIGHTS[name], part) for name, part in general.items()]
        pairs = sum(weight * part.pairs for weight, part in weighed) + LEARNED_WEIGHT * self.learned_pairs(steps)
        return OrderEvidence(
            pairs if known is None else pairs + KNOWN_WEIGHT * known[: len(steps), : len(steps)],  # type: ignore[arg-type]
            sum(weight * part.neighbours for weight, part in weighed),  # type: ignore[arg-type]
            sum(weight * part.first for weight, part in weighed),  # type: ignore[arg-type]
        )

    def order_score(
        self, steps: Sequence[str], *, question: str = "", answer: str = "", known: Array | None = None
    ) -> float:
        """Share of other orders that read worse than the given one; a tie is not worse.

        Up to 5 steps: all other orders. More: every swap of two neighbours, and swaps of other steps and random orders,
        fixed for each number of steps. 0 for fewer than two steps.
        Args:
            known: `[step, step]` from -1 to 1, how sure the row's step is known to come before the column's.
        """
        steps = steps[:MAX_STEPS]
        if len(steps) < 2:
            return 0.0
        totals = self.evidence(steps, question=question, answer=answer, known=known).total(_orders(len(steps)))
        return float(np.mean(totals[1:] < totals[0] - _TIE))


def _features(step: str, reader: ClaimReader) -> frozenset[str]:
    return frozenset(content_words(step)) | {f"claim:{claim.name}" for claim in reader.read(step)}


def _indicators(
    steps: Sequence[frozenset[str]], index: Mapping[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Known features of a chain, and `[step, feature]` which step has which."""
    names = sorted({feature for step in steps for feature in step if feature in index})
    column = {name: position for position, name in enumerate(names)}
    present = np.zeros((len(steps), len(names)))
    for row, step in enumerate(steps):
        for feature in step:
            if feature in column:
                present[row, column[feature]] = 1
    return np.array([index[name] for name in names], dtype=np.int64), present


@lru_cache(maxsize=256)
def _orders(num_steps: int) -> NDArray[np.int64]:
    """`[order, position]`: the given order, then other ones, each once, the same for every chain of that length."""
    given = tuple(range(num_steps))
    found = dict.fromkeys([given])
    if factorial(min(num_steps, 10)) <= NUM_PERMUTATIONS:
        found.update(dict.fromkeys(permutations(given)))
        return np.array(list(found))
    rng = np.random.default_rng(num_steps)
    swaps = list(combinations(given, 2))
    near = [pair for pair in swaps if pair[1] == pair[0] + 1]
    far = [pair for pair in swaps if pair[1] > pair[0] + 1]
    chosen = near + [far[int(place)] for place in rng.permutation(len(far))[: NUM_PERMUTATIONS // 2]]
    for i, j in chosen:
        order = list(given)
        order[i], order[j] = order[j], order[i]
        found[tuple(order)] = None
    while len(found) <= max(NUM_PERMUTATIONS, len(chosen) + NUM_PERMUTATIONS // 4):
        found[tuple(int(i) for i in rng.permutation(num_steps))] = None
    return np.array(list(found))


@lru_cache(maxsize=256)
def _upper(num_steps: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(num_steps, k=1)

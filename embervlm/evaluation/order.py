"""How usual an order of steps is, learned from training chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from math import factorial

import numpy as np
from numpy.typing import NDArray

from embervlm.data.claims import ClaimReader, content_words

NUM_PERMUTATIONS = 20
_MAX_FEATURES = 2000
_SMOOTHING = 0.5
_TIE = 1e-9


class OrderScorer:
    """Pairwise precedence: which words and claimed names come in an earlier step than which others.

    log-odds of (a, b) = log((#a before b + 0.5) / (#b before a + 0.5)) over pairs of steps of the training chains.
    """

    def __init__(self, features: Mapping[str, int], log_odds: NDArray[np.float64], reader: ClaimReader) -> None:
        self._features = features
        self._log_odds = log_odds
        """`[feature, feature]`, antisymmetric."""
        self._reader = reader

    @classmethod
    def fit(cls, chains: Iterable[Sequence[str]], domains: Mapping[str, Collection[str]] | None = None) -> OrderScorer:
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
        return cls(index, log_odds, reader)

    def pair_scores(self, steps: Sequence[str]) -> NDArray[np.float64]:
        """`[step, step]`: mean log-odds that the row's step comes before the column's; antisymmetric."""
        ids, present = _indicators([_features(step, self._reader) for step in steps], self._features)
        share = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
        scores: NDArray[np.float64] = share @ self._log_odds[np.ix_(ids, ids)] @ share.T
        return scores

    def order_score(self, steps: Sequence[str]) -> float:
        """Share of up to 20 fixed random reorderings that are less usual than the given order; a tie is not less.

        0 for fewer than two steps, and for steps of which training knows nothing.
        """
        if len(steps) < 2:
            return 0.0
        pairs = self.pair_scores(steps)
        orders = _permutations(len(steps))
        reordered = pairs[orders[:, :, None], orders[:, None, :]]
        rows, columns = _upper(len(steps))
        totals = reordered[:, rows, columns].sum(axis=1)
        return float(np.mean(totals < pairs[rows, columns].sum() - _TIE))


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
def _permutations(num_steps: int) -> NDArray[np.int64]:
    """`[permutation, position]`: distinct seeded reorderings of `num_steps` steps, the given order not among them."""
    rng = np.random.default_rng(num_steps)
    wanted = min(NUM_PERMUTATIONS, factorial(min(num_steps, 10)) - 1)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        order = tuple(int(i) for i in rng.permutation(num_steps))
        if order != tuple(range(num_steps)):
            found[order] = None
    return np.array(list(found))


@lru_cache(maxsize=256)
def _upper(num_steps: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(num_steps, k=1)

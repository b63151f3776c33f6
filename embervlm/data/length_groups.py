"""Texts of like length together, so that little of what a model computes is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

READ_COST, JUDGE_COST = 80, 160
"""What one more pass of the language model, or of the step validator, costs besides its tokens, in tokens: measured
with the quickstart's model on a CPU. Larger models have dearer tokens, so that more groups would pay there."""


class LengthGroup(NamedTuple):
    """Rows that are read together."""

    rows: list[int]
    length: int
    """Tokens of the longest of them."""
    sees: bool = True
    """Whether any of them has a picture before it."""


def length_groups(
    lengths: Sequence[int], sees: Sequence[bool] | None = None, *, most: int, cost: int = READ_COST
) -> list[LengthGroup]:
    """All rows in at most `most` groups, so that the fewest tokens are computed.

    Args:
        lengths: tokens of each row.
        sees: whether a row has a picture; rows that have none are read without one where that is possible.
        cost: what a group costs besides its tokens, in tokens.
    """
    seeing = [row for row in range(len(lengths)) if sees is None or sees[row]]
    blind = [row for row in range(len(lengths)) if sees is not None and not sees[row]]
    if not seeing or not blind or most < 2:
        return _split(range(len(lengths)), lengths, most, bool(seeing), cost)
    return [*_split(seeing, lengths, most - 1, True, cost), *_split(blind, lengths, 1, False, cost)]


def _split(rows: Sequence[int], lengths: Sequence[int], most: int, sees: bool, cost: int) -> list[LengthGroup]:
    order = sorted(rows, key=lambda row: lengths[row])
    sizes = [lengths[row] for row in order]
    # costs[n][end]: fewest tokens for the shortest `end` rows in n groups, and where the last of these begins
    costs: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * len(sizes)]
    for _ in range(min(most, len(sizes))):
        fewer = costs[-1]
        costs.append([(float("inf"), 0)])
        for end in range(1, len(sizes) + 1):
            split = ((fewer[start][0] + (end - start) * sizes[end - 1] + cost, start) for start in range(end))
            costs[-1].append(min(split))
    number = min(range(1, len(costs)), key=lambda count: costs[count][-1])
    groups, end = [], len(sizes)
    while end:
        start = costs[number][end][1]
        groups.append(LengthGroup(sorted(order[start:end]), sizes[end - 1], sees))
        number, end = number - 1, start
    return groups

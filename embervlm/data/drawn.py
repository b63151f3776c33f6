"""Chains that the model drew itself in phase 3, as training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embervlm.data.samples import Sample


@dataclass(frozen=True, kw_only=True)
class DrawnChain(Sample):
    """A chain with what the policy loss needs to know of each of its scored tokens."""

    log_probs: tuple[float, ...]
    """Natural logarithm of the probability with which each token was drawn."""
    closed: tuple[tuple[bool, bool], ...]
    """Whether a further step, and whether a conclusion, could not be drawn there."""
    advantage: float
    token_weight: float = 1.0
    """What each of its tokens counts in the loss."""
    token_count: float = 1.0
    """What each of its tokens adds to the divisor of the loss."""
    reference: tuple[float, ...] | None = None
    """`log_probs` by the model that the phase started with."""

    def __post_init__(self) -> None:
        assert len(self.log_probs) == len(self.closed) == len(self.target) - self.num_given


def policy_targets(samples: Sequence[Sample], scored: Sequence[int]) -> dict[str, Tensor]:
    """What the policy loss compares with, of the drawn chains among `samples`.

    `policy_index` `[tokens]` says which of the scored tokens of the batch are theirs; the others have a value for each
    of these.

    Args:
        scored: number of scored tokens of each of `samples`.
    """
    index: list[int] = []
    drawn: list[DrawnChain] = []
    begin = 0
    for sample, count in zip(samples, scored):
        if isinstance(sample, DrawnChain):
            index.extend(range(begin, begin + count))
            drawn.append(sample)
        begin += count
    return {
        "policy_index": torch.tensor(index, dtype=torch.long),
        "policy_closed": torch.tensor([c for s in drawn for c in s.closed], dtype=torch.bool).view(-1, 2),
        "policy_old": torch.tensor([p for s in drawn for p in s.log_probs]),
        "policy_advantage": torch.tensor([s.advantage for s in drawn for _ in s.log_probs]),
        "policy_weight": torch.tensor([s.token_weight for s in drawn for _ in s.log_probs]),
        "policy_reference": torch.tensor([p for s in drawn for p in s.reference or ()]),
    }


def policy_counts(samples: Sequence[Sample]) -> dict[str, float]:
    """Divisor of each policy term for the drawn chains among `samples`."""
    drawn = [sample for sample in samples if isinstance(sample, DrawnChain)]
    tokens = float(sum(len(sample.log_probs) for sample in drawn))
    divisor = sum(sample.token_count * len(sample.log_probs) for sample in drawn)
    counts = {"policy": divisor, "entropy": tokens, "clipped": tokens, "drift": tokens}
    return {**counts, "kl": divisor} if any(sample.reference is not None for sample in drawn) else counts

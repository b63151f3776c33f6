"""Knowledge about a world before any record is read. General code uses only the domain of its run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from embervlm.data.records import ReasoningRecord


@dataclass(frozen=True, kw_only=True)
class EditedChain:
    """The beginning of a chain whose last step says something else than follows, and the answer that it leads to."""

    steps: tuple[str, ...]
    answer: tuple[str, ...]


def _nothing_follows(record: ReasoningRecord, rng: random.Random) -> EditedChain | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A world that records are about. Everything may be empty: then all comes from the data."""

    name: str
    candidates: tuple[str, ...] = ()
    """What an answer is chosen from where its record has no `metadata.candidates`; none: such an answer is open."""
    glossary: tuple[str, ...] = ()
    """Sentences that say what follows from what, for Stage 3 and the tokenizer."""
    plant_mistake: Callable[[ReasoningRecord, random.Random], EditedChain | None] = _nothing_follows
    """A record's chain with one derived fact changed, and what follows from that; None where this is not known."""


NO_DOMAIN = Domain(name="none")
"""The domain of a user's own data."""

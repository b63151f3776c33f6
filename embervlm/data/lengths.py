"""How long the texts of records may be: one rule for training, `embervlm data validate` and `filter`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.samples import Samples
from embervlm.data.store import has_field

_PARTS = {"reasoning": ("chain and answer", "reasoning"), "caption": ("caption", "metadata.caption")}
"""Form of a sample -> what stands behind the question, and its field."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a record is held against, in tokens."""

    max_reasoning_length: int
    """Of chain and answer together."""
    positions: int | None = None
    """That the language model reads: picture, question and whatever follows. None: any number."""
    num_visual_tokens: int = 0

    @property
    def room(self) -> int | None:
        """What the picture leaves for text."""
        return None if self.positions is None else self.positions - self.num_visual_tokens


@dataclass(frozen=True)
class TooLong:
    """A sample that is too long."""

    row: int
    """Of the records."""
    field: str
    what: str
    fix: str


def too_long(form: str, rows: np.ndarray, sizes: np.ndarray, limits: Limits) -> Iterator[TooLong]:
    """Each text that is longer than `limits` allow.

    Args:
        rows: the record of each text.
        sizes: tokens of the question and of what follows, `[texts, 2]`.
    """
    chain = (sizes[:, 1] > limits.max_reasoning_length) & (form == "reasoning")
    whole = sizes.sum(1) > (np.inf if limits.room is None else limits.room)
    part, field = _PARTS.get(form, ("answer", "answer"))
    for place in np.flatnonzero(chain | whole):
        row, (question, target) = int(rows[place]), sizes[place].tolist()
        if chain[place]:
            what = f"{target:,} tokens with its answer, more than the {limits.max_reasoning_length:,} of "
            yield TooLong(row, field, f"{what}--max_reasoning_length", "shorten the chain or raise the limit")
        if whole[place]:
            what = (
                f"{limits.num_visual_tokens + question + target:,} tokens in all ({limits.num_visual_tokens:,} of the "
                f"picture, {question:,} of the question, {target:,} of the {part}), and the language model reads "
                f"{limits.positions:,}"
            )
            name = "instruction" if question >= target else field
            yield TooLong(row, name, what, "shorten it, or choose a model with more positions")


def refuse_too_long(asked: Iterable[tuple[Sequence[ReasoningRecord], Samples]], limits: Limits) -> None:
    """DataError with every record that is too long in any form that it is `asked` in.

    Augmented records are passed over: nobody wrote them, their origin is there, and training leaves them out.
    """
    problems: dict[tuple[str, str], str] = {}  # one for each record and field: the first form says enough
    for records, samples in asked:
        augmented = has_field(records, "augmentation")
        for found in too_long(samples.form, samples.rows, samples.sizes, limits):
            if not augmented[found.row]:
                name = records[found.row].record_id
                problems.setdefault((name, found.field), f"record {name}: {found.field}: {found.what}; {found.fix}")
    if problems:
        raise DataError.of(list(problems.values()))

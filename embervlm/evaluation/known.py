"""Fits what tells known questions from others (`embervlm.model.known`), and leaves it in the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from embervlm import run_dir
from embervlm.data.images import PictureCache
from embervlm.data.records import ReasoningRecord
from embervlm.evaluation.batches import chunks, see
from embervlm.model.embervlm import EmberVLM
from embervlm.model.known import Known, known_path

NUM_READ = 20_000
"""The most training records that are read for it."""
NUM_PICTURES, NUM_QUESTIONS, NUM_VAL = 512, 1000, 200
"""The most pictures and wordings of them that are taken, and val records beside which they are measured."""
MIN_VAL = 20
"""With fewer val records what is usual would be noise."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class KnownData:
    """Of the data that a checkpoint was trained on, what is to be known of them."""

    pictures: list[ReasoningRecord]
    """A training record for each picture."""
    questions: list[str]
    val: list[ReasoningRecord]
    with_picture_share: float

    @classmethod
    def of(cls, train: Sequence[ReasoningRecord], val: Sequence[ReasoningRecord]) -> KnownData | None:
        """Evenly spaced parts; None where there is too little."""
        if not train or len(val) < MIN_VAL:
            return None
        train = _some(train, NUM_READ)
        by_picture = {record.image: record for record in train if record.image}
        wordings = list(dict.fromkeys(record.instruction for record in train))
        return cls(
            _some(list(by_picture.values()), NUM_PICTURES),
            _some(wordings, NUM_QUESTIONS),
            _some(val, NUM_VAL),
            sum(record.image is not None for record in train) / len(train),
        )


def fit_known(model: EmberVLM, data: KnownData) -> Known:
    """What `data` look like to `model`."""
    seen = [record for record in data.val if record.image]
    paths = [record.image for record in (*data.pictures, *seen) if record.image]
    pictures = PictureCache(paths, model.config.image_size, fill=model.config.fill)

    def look(records: Sequence[ReasoningRecord]) -> torch.Tensor:
        parts = [see(model, pictures, part)[0].float().cpu() for part in chunks(records)]
        return torch.cat(parts) if parts else torch.zeros(0, model.num_visual_tokens, model.language_model.hidden_size)

    val_questions = [record.instruction for record in data.val]
    return Known.fit(look(data.pictures), look(seen), data.questions, val_questions, data.with_picture_share)


def keep_known(model: EmberVLM, checkpoint: Path, data: KnownData | None, *, of_training: bool) -> None:
    """Fit and save it, where there is enough; a warning if the checkpoint cannot be written.

    Args:
        of_training: whether these are surely the data of the training; those that a user gives may be others, and
            replace nothing.
    """
    if data is None or (not of_training and known_path(checkpoint).exists()):
        return
    try:
        fit_known(model, data).save(checkpoint)
    except run_dir.WriteError as error:
        print(f"warning: nothing was saved in the checkpoint: {error}", file=sys.stderr)


def _some(items: Sequence[Item], most: int) -> list[Item]:
    """At most that many, evenly spaced."""
    return list(items[:: -(-len(items) // most)]) if items else []

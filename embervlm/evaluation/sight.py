"""Whether a model looks at the picture: how likely the gold chains are behind their own picture and behind another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embervlm.data.dataset import encode_reasoning
from embervlm.data.images import PictureCache
from embervlm.data.records import ReasoningRecord
from embervlm.evaluation.batches import alike, see, text_log_probs
from embervlm.model.embervlm import EmberVLM

NUM_RECORDS = 64
BLIND = (
    "the model does not look at the picture. It needs one of these: boxes and captions in the records, more "
    "epochs of Stage 3, or a pretrained vision encoder (`vision` of the model preset)"
)


@dataclass(frozen=True)
class Sight:
    """The result of reading the chains of some records twice."""

    num_records: int
    own_is_likelier: float
    """Share of the chains that are likelier behind their own picture than behind another; 0.5 by chance."""
    gain: float
    """Nats by which their own picture makes them likelier, on average."""

    @property
    def looks(self) -> bool:
        """Whether the share is above chance by more than two standard errors."""
        return self.own_is_likelier > 0.5 + 2 * math.sqrt(0.25 / self.num_records)

    def __str__(self) -> str:
        found = (
            f"with the right picture {self.own_is_likelier:.0%} of {self.num_records} chains are likelier than with "
            f"another (chance: 50%), by {self.gain:.1f} nats on average"
        )
        return found if self.looks else f"{found}: {BLIND}"


def other_pictures(records: Sequence[ReasoningRecord], seed: int = 0) -> list[int | None]:
    """For each record the place of one with another picture, about which something else is said; None: there is none.

    One that asks the same is taken where there is any, so that only the picture tells the two apart.
    """
    rng, out = random.Random(seed), list[int | None]()
    for record in records:
        others = [
            place
            for place, other in enumerate(records)
            if other.image not in (None, record.image) and other.steps != record.steps
        ]
        same = [place for place in others if records[place].instruction == record.instruction]
        out.append(rng.choice(same or others) if others else None)
    return out


@torch.inference_mode()
def sight(model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord]) -> Sight | None:
    """None where there are no two pictures to compare."""
    shown = [record for record in records if record.image is not None and record.steps][:NUM_RECORDS]
    pairs = [(place, other) for place, other in enumerate(other_pictures(shown)) if other is not None]
    if not pairs:
        return None
    was_training = model.training
    samples = encode_reasoning(shown, model.tokenizer, model.grid)
    visual, seen = see(model, pictures, shown)
    gains = np.zeros(len(pairs))
    for sign, side in ((1.0, 0), (-1.0, 1)):
        rows = [
            (pair[side], [*samples[pair[0]].prompt, *samples[pair[0]].target], len(samples[pair[0]].prompt))
            for pair in pairs
        ]
        for batch in alike(len(text) for _, text, _ in rows):
            found = text_log_probs(model, visual, seen, [rows[row] for row in batch])
            gains[list(batch)] += sign * np.asarray(found)
    model.train(was_training)
    return Sight(len(pairs), float((gains > 0).mean()), float(gains.mean()))

"""Whether a model looks at the picture: how likely the gold chains are behind their own picture and behind another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embervlm.data.dataset import encode_captions, encode_direct, encode_reasoning, having_chains
from embervlm.data.images import PictureCache
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid, Sample
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.evaluation.batches import alike, see, text_log_probs
from embervlm.model.embervlm import EmberVLM

NUM_RECORDS = 128
Form = Callable[[Sequence[ReasoningRecord], ReasoningTokenizer, Grid], list[Sample]]
"""Makes texts of records; the last argument is the grid of visual tokens."""
BLIND = (
    "the model does not look at the picture. It needs one of these: boxes and captions in the records, more "
    "epochs of Stage 3, or a pretrained vision encoder (`vision` of the model preset)"
)


def encode_chains(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer, grid: Grid) -> list[Sample]:
    """The chains of Stage 4, with their answers."""
    return list(having_chains(records, encode_reasoning(records, tokenizer, grid)))


def encode_stage3(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer, grid: Grid) -> list[Sample]:
    """The texts of Stage 3: direct answers and captions."""
    return [*encode_direct(records, tokenizer), *encode_captions(records, tokenizer)]


@dataclass(frozen=True)
class Sight:
    """The result of reading texts about pictures twice."""

    num_texts: int
    """0 where no two records show different pictures."""
    own_is_likelier: float
    """Share of the chains that are likelier behind their own picture than behind another; 0.5 by chance."""
    gain: float
    """Nats by which their own picture makes them likelier, on average."""
    loss: float = math.nan
    """Nats per token of all texts behind their own picture, if they have one."""

    @property
    def looks(self) -> bool:
        """Whether the share is above chance by more than two standard errors; True where there is nothing to see."""
        return not self.num_texts or self.own_is_likelier > 0.5 + 2 * math.sqrt(0.25 / self.num_texts)

    def __str__(self) -> str:
        found = (
            f"with the right picture {self.own_is_likelier:.0%} of {self.num_texts} texts are likelier than with "
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
        same = [place for place in others if records[place].asked == record.asked]
        out.append(rng.choice(same or others) if others else None)
    return out


@torch.inference_mode()
def sight(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord], form: Form = encode_chains
) -> Sight | None:
    """What the texts that `form` makes of some of `records` cost behind their pictures; None where there are none."""
    if not len(records):
        return None
    shown = records[:: -(-len(records) // NUM_RECORDS)]  # neighbours are often about one picture
    others = other_pictures(shown)
    was_training = model.training
    visual, seen = see(model, pictures, shown)
    samples = form(shown, model.tokenizer, model.grid)
    rows = [(sample.record, sample) for sample in samples]
    rows += [(other, s) for s in samples if (other := others[s.record]) is not None]
    found = np.zeros(len(rows))
    for batch in alike(len(sample) for _, sample in rows):
        texts = [(place, [*s.prompt, *s.target], len(s.prompt)) for place, s in map(rows.__getitem__, batch)]
        found[list(batch)] = text_log_probs(model, visual, seen, texts)
    model.train(was_training)
    num_tokens = sum(len(sample.target) for sample in samples)
    own = found[: len(samples)][[others[sample.record] is not None for sample in samples]]
    gains = own - found[len(samples) :]
    return Sight(
        num_texts=len(gains),
        own_is_likelier=float((gains > 0).mean()) if len(gains) else 0.5,
        gain=float(gains.mean()) if len(gains) else 0.0,
        loss=-float(found[: len(samples)].sum()) / num_tokens,
    )

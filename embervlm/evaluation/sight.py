"""Whether a model looks at the picture: its answers, and how likely gold texts are, with it and another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from embervlm.data.dataset import encode_captions, encode_direct, encode_reasoning, having_chains
from embervlm.data.images import PictureCache
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid, Sample
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.evaluation.batches import alike, answer, chunks, see, text_log_probs
from embervlm.judge.metrics import is_right
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.progress import progress_bar

Item = TypeVar("Item")
NUM_RECORDS = 128
FEWEST_TEXTS = 5
"""Of fewer, all that are likelier behind their own picture are still what chance explains."""
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
        """Whether the share is above chance by more than two standard errors; True where there is nothing to see, and
        where the texts are too few to tell."""
        return self.num_texts < FEWEST_TEXTS or self.own_is_likelier > 0.5 + 2 * math.sqrt(0.25 / self.num_texts)

    def __str__(self) -> str:
        found = (
            f"with the right picture {self.own_is_likelier:.0%} of {self.num_texts} texts are likelier than with "
            f"another (chance: 50%), by {self.gain:.1f} nats on average"
        )
        if self.num_texts < FEWEST_TEXTS:
            return f"{found}; too few to tell whether the model looks at the picture"
        return found if self.looks else f"{found}: {BLIND}"


@dataclass(frozen=True)
class AnsweredTwice:
    """The result of asking each question with its own picture and with another."""

    num_questions: int
    own_accuracy: float
    other_accuracy: float
    num_only_own: int
    """Questions answered right with their own picture alone."""
    num_only_other: int
    """Questions answered right with the other picture alone."""

    @property
    def looks(self) -> bool:
        """Whether the own picture gives more right answers than chance explains: two standard errors of the difference
        of paired answers (McNemar 1947)."""
        return self.num_only_own - self.num_only_other > 2 * math.sqrt(self.num_only_own + self.num_only_other)

    def __str__(self) -> str:
        found = (
            f"of {self.num_questions} questions {self.own_accuracy:.0%} are answered right with the right picture, "
            f"{self.other_accuracy:.0%} with another"
        )
        if self.num_only_own <= self.num_only_other:
            return f"{found}: the answers do not depend on the picture yet"
        return found if self.looks else f"{found}, which may be chance"


def other_pictures(records: Sequence[ReasoningRecord], seed: int = 0) -> list[int | None]:
    """For each record the place of one with another picture, about which something else is said; None where there is
    none, and of a record without a picture.

    One that asks the same is taken where there is any, so that only the picture tells the two apart.
    """
    rng, out = random.Random(seed), list[int | None]()
    for record in records:
        others = [
            place
            for place, other in enumerate(records if record.image is not None else ())
            if other.image not in (None, record.image) and (other.steps, other.answer) != (record.steps, record.answer)
        ]
        same = [place for place in others if records[place].asked == record.asked]
        out.append(rng.choice(same or others) if others else None)
    return out


def _some(records: Sequence[ReasoningRecord], most: int) -> Sequence[ReasoningRecord]:
    """At most so many, from all over `records`, since neighbours are often about one picture."""
    return records[:: max(1, math.ceil(len(records) / most))]


def _shown(parts: Sequence[Sequence[Item]], what: str, progress: bool) -> Iterable[Sequence[Item]]:
    """`parts` with a bar, where they take long: a large model on a CPU reads for minutes."""
    shown: Iterable[Sequence[Item]] = progress_bar(parts, desc=what, unit="part", delay=2, disable=not progress)
    return shown


@torch.inference_mode()
def sight(
    model: EmberVLM,
    pictures: PictureCache,
    records: Sequence[ReasoningRecord],
    form: Form = encode_chains,
    *,
    progress: bool = False,
) -> Sight | None:
    """What the texts that `form` makes of some of `records` cost behind their pictures; None where there are none."""
    shown = _some(records, NUM_RECORDS)
    samples = form(shown, model.tokenizer, model.grid) if shown else []
    if not samples:
        return None
    others = other_pictures(shown)
    was_training = model.training
    visual, seen = see(model, pictures, shown)
    rows = [(sample.record, sample) for sample in samples]
    rows += [(other, s) for s in samples if (other := others[s.record]) is not None]
    found = np.zeros(len(rows))
    for batch in _shown(alike(len(sample) for _, sample in rows), "reading with another picture", progress):
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


def answer_twice(
    model: EmberVLM,
    pictures: PictureCache,
    records: Sequence[ReasoningRecord],
    decoding: Decoding,
    most: int,
    *,
    progress: bool = False,
) -> AnsweredTwice | None:
    """Ask at most so many of `records` with their pictures and others; None where no two show different pictures."""
    shown = _some(records, most)
    own, other = [], []
    for record, place in zip(shown, other_pictures(shown)):
        if place is not None:
            own.append(record)
            other.append(replace(record, image=shown[place].image))
    if not own:
        return None
    was_training = model.training
    asked = [*own, *other]
    parts = _shown(chunks(asked), "answering with another picture", progress)
    found = [result for part in parts for result in answer(model, pictures, part, decoding)]
    model.train(was_training)
    right = [is_right(result["answer_set"], record) for result, record in zip(found, asked)]
    pairs = list(zip(right, right[len(own) :]))
    return AnsweredTwice(
        num_questions=len(own),
        own_accuracy=sum(right[: len(own)]) / len(own),
        other_accuracy=sum(right[len(own) :]) / len(own),
        num_only_own=sum(mine and not others for mine, others in pairs),
        num_only_other=sum(others and not mine for mine, others in pairs),
    )

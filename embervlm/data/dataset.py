"""Records as token ids, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.tokenizer import CONCLUSION, DIRECT_PROMPT, ReasoningTokenizer

REASONING, DIRECT, CAPTION, EDITED = "reasoning", "direct", "caption", "edited"
CAPTION_PROMPT = "Describe the picture."
PICTURE_DRAWS = 8
"""Pictures drawn for one that shows other facts."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record in one form, as ids. All positions count from the start of the text."""

    record: int
    """Index into the records; -1 for a text that belongs to none."""
    form: str
    """`reasoning`, `direct`, `caption`, or `edited`: a chain about other facts than the picture shows."""
    prompt: list[int]
    target: list[int]
    """What is scored: chain and answer, answer alone, or caption."""
    num_given: int = 0
    """Tokens at the target's start that are not scored."""
    picture_of: int | None = None
    """Index of the record whose picture stands before the text; None is `record`'s own."""
    answer_position: int | None = None
    """Where the answer head reads: the token that opens the conclusion."""
    step_spans: tuple[tuple[int, int], ...] = ()
    """First and one-past-last position of each step's text, the conclusion last."""
    attend: tuple[tuple[int, Tensor], ...] = ()
    """(step, bool mask over the visual tokens): what a step's words look at."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def step_texts(record: ReasoningRecord) -> tuple[list[str], str | None]:
    """Steps without the conclusion, and the conclusion's text without its heading."""
    steps = list(record.steps)
    if steps and steps[-1].startswith(CONCLUSION):
        return steps[:-1], steps[-1].removeprefix(CONCLUSION)
    return steps, None


def boxes_to_mask(boxes: Sequence[Sequence[float]], grid: int) -> Tensor:
    """Visual tokens that any of `boxes` (left, top, right, bottom in [0, 1]) covers, `[grid * grid]` bool, by rows."""
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows = slice(int(top * grid), max(int(top * grid) + 1, int(np.ceil(bottom * grid))))
        columns = slice(int(left * grid), max(int(left * grid) + 1, int(np.ceil(right * grid))))
        mask[rows, columns] = True
    return mask.flatten()


def encode_reasoning(
    records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer, grid: int, max_length: int
) -> list[Sample]:
    """Every record with its chain. DataError lists all records whose chain is longer than `max_length` tokens.

    An augmented record that is too long is left out instead: nobody wrote it, and its origin is there.
    """
    texts = [step_texts(record) for record in records]
    # a space in front, so that a word is the same token at a step's start as within
    flat = [
        " " + text for steps, conclusion in texts for text in (*steps, *([] if conclusion is None else [conclusion]))
    ]
    encoded = iter(tokenizer.encode_many(flat))
    prompts = tokenizer.encode_many([record.instruction for record in records])
    answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in records])
    samples, problems = [], []
    for index, (record, (steps, conclusion)) in enumerate(zip(records, texts)):
        step_ids = [next(encoded) for _ in steps]
        conclusion_ids = None if conclusion is None else next(encoded)
        chain = tokenizer.chain_ids(step_ids, conclusion_ids)
        target = [*chain, tokenizer.ids["<|answer_start|>"], *answers[index], tokenizer.ids["<|answer_end|>"]]
        if len(target) > max_length and "augmentation" in record.metadata:
            continue
        if len(target) > max_length:
            problems.append(
                f"record {record.record_id}: reasoning: {len(target)} tokens with its answer, more than the "
                f"{max_length} of --max_reasoning_length; shorten the chain or raise the limit"
            )
            continue
        prompt = prompts[index]
        position, spans = len(prompt) + 1, []
        for ids in (*step_ids, *([] if conclusion_ids is None else [conclusion_ids])):
            spans.append((position + 1, position + 1 + len(ids)))
            position += 1 + len(ids)
        opens = spans[-1][0] - 1 if conclusion_ids is not None else len(prompt) + len(chain) - 1
        samples.append(Sample(
            record=index, form=REASONING, prompt=prompt, target=target, answer_position=opens,
            step_spans=tuple(spans), attend=_attention_targets(record.metadata, grid, len(spans)),
        ))  # fmt: skip
    if problems:
        raise DataError.of(problems)
    return samples


def known_boxes(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ground-truth boxes of a record: `{"kind", "box"}`, mostly with `label`; other spellings are not ours."""
    boxes = metadata.get("boxes")
    if not isinstance(boxes, (list, tuple)):
        return []
    return [box for box in boxes if isinstance(box, Mapping) and {"kind", "box"} <= set(box)]


def _attention_targets(metadata: Mapping[str, Any], grid: int, num_steps: int) -> tuple[tuple[int, Tensor], ...]:
    """From `boxes` and `seen` of the metadata, where a record has them."""
    by_kind: dict[str, list[Sequence[float]]] = {}
    for box in known_boxes(metadata):
        by_kind.setdefault(box["kind"], []).append(box["box"])
    out = []
    for step, kinds in enumerate((metadata.get("seen") or ())[:num_steps]):
        boxes = [box for kind in kinds for box in by_kind.get(kind, ())]
        if boxes:
            out.append((step, boxes_to_mask(boxes, grid)))
    return tuple(out)


def num_fact_steps(record: ReasoningRecord) -> int:
    """Steps from a chain's start until every fact that it reads off the picture is stated; 0 where that is not known.

    A later step that names a fact again can take it from the text.
    """
    seen = record.metadata.get("seen") or ()
    if len(seen) != len(record.steps):
        return 0
    stated: set[str] = set()
    last = 0
    for number, facts in enumerate(seen, 1):
        last = last if stated.issuperset(facts) else number
        stated.update(facts)
    return last


def edit_facts(records: Sequence[ReasoningRecord], samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Each chain behind the picture of another record of the same question: its facts are not what the picture shows.

    The steps that state facts are given and not scored, so that nobody learns to misread a picture. All that follows,
    the answer head's answer too, is that of the stated facts. Where it is not known which steps state facts, or no
    other picture was asked about, there is nothing to edit.
    """
    rng = random.Random(f"edited facts:{seed}")
    asked: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for sample in samples:
        if records[sample.record].image:
            asked[question_key(records[sample.record])].append(sample.record)
    out = []
    for sample in samples:
        record = records[sample.record]
        same_question = asked[question_key(record)]
        drawn = [rng.choice(same_question) for _ in range(PICTURE_DRAWS if same_question else 0)]
        other = next((index for index in drawn if scene_key(records[index]) != scene_key(record)), None)
        if (num_given := num_fact_steps(record)) and other is not None:
            end = sample.step_spans[num_given - 1][1] - len(sample.prompt)
            out.append(replace(
                sample, form=EDITED, num_given=end, picture_of=other, step_spans=(), attend=(),
            ))  # fmt: skip
    return out


def question_key(record: ReasoningRecord) -> tuple[Any, ...]:
    """Equal for records that ask the same with the same candidates."""
    return (record.instruction, *(record.metadata.get("candidates") or ()))


def scene_key(record: ReasoningRecord) -> Any:
    """Equal for pictures of equal facts, where those are known, else for the same picture."""
    return record.metadata.get("scene") or record.image


def encode_direct(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> list[Sample]:
    """Every record as question and answer, without a chain."""
    prompts = tokenizer.encode_many([record.instruction + DIRECT_PROMPT for record in records])
    answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in records])
    return [
        Sample(record=index, form=DIRECT, prompt=prompt, target=[*answer, tokenizer.end_of_text])
        for index, (prompt, answer) in enumerate(zip(prompts, answers))
    ]


def encode_captions(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> list[Sample]:
    """A caption for every picture that has one."""
    captioned: dict[str, int] = {}
    for index, record in enumerate(records):
        if record.image and record.metadata.get("caption"):
            captioned.setdefault(record.image, index)
    prompt = tokenizer.encode(CAPTION_PROMPT)
    captions = tokenizer.encode_many([" " + records[index].metadata["caption"] for index in captioned.values()])
    return [
        Sample(record=index, form=CAPTION, prompt=prompt, target=[*ids, tokenizer.end_of_text])
        for index, ids in zip(captioned.values(), captions)
    ]


def encode_glossary(
    lines: Sequence[str], tokenizer: ReasoningTokenizer, *, lines_per_text: int = 4, repeats: int = 8, seed: int = 0
) -> list[Sample]:
    """Texts without a picture, each of a few `lines` in random order; every line comes `repeats` times."""
    rng = random.Random(f"glossary:{seed}")
    order = [line for _ in range(repeats) for line in rng.sample(list(lines), len(lines))]
    texts = [" ".join(order[start : start + lines_per_text]) for start in range(0, len(order), lines_per_text)]
    start = [tokenizer.end_of_text]
    return [
        Sample(record=-1, form=CAPTION, prompt=start, target=[*ids, tokenizer.end_of_text])
        for ids in tokenizer.encode_many(texts)
    ]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which samples make up each global batch of an epoch: the same for every number of ranks.

    The main samples (of `epochs`, where given) all come once; of each mixed-in list as many as `mix` asks for, another
    part of it every epoch.
    Batches are of like length, so that little is padding (sorted within `window` batches), and in random order.
    """

    main: Sequence[Sample]
    mixed: Sequence[tuple[Sequence[Sample], float]] = ()
    """(samples, how many per main sample)."""
    epochs: Sequence[Sequence[int]] = ()
    """For each epoch the places in `main` that it trains on, the last for all that follow; () trains on all."""
    global_batch: int
    """Main samples per optimizer step over all ranks and micro-batches."""
    seed: int
    window: int = 16
    _orders: dict[int, list[list[Sample]]] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that trains on all."""
        return -(-len(self.main) // self.global_batch)

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self._places(epoch)) // self.global_batch)

    def _places(self, epoch: int) -> Sequence[int]:
        return self.epochs[min(epoch, len(self.epochs) - 1)] if self.epochs else range(len(self.main))

    def num_steps(self, num_epochs: int) -> int:
        """Steps of the first `num_epochs`."""
        return sum(map(self._steps_in, range(num_epochs)))

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of optimizer step `step`, and the step within it, all counted from 0."""
        epoch = 0
        while epoch < len(self.epochs) - 1 and step >= self._steps_in(epoch):
            step -= self._steps_in(epoch)
            epoch += 1
        more, index = divmod(step, self._steps_in(epoch))
        return epoch + more, index

    def digest(self) -> str:
        """Changes with whatever the order of the samples depends on, apart from the global batch."""
        parts = [(ratio, [(sample.record, sample.form, len(sample)) for sample in samples])
                 for samples, ratio in ((self.main, 1.0), *self.mixed)]  # fmt: skip
        return hashlib.blake2b(repr((self.seed, self.window, self.epochs, parts)).encode(), digest_size=16).hexdigest()

    def batch(self, step: int) -> list[Sample]:
        """Samples of optimizer step `step`, counted from 0 over all epochs. It seeks: no step before it is replayed."""
        epoch, index = self.locate(step)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._plan(epoch)
        return self._orders[epoch][index]

    def _plan(self, epoch: int) -> list[list[Sample]]:
        rng = random.Random(f"epoch:{self.seed}:{epoch}")
        order = list(self._places(epoch))
        rng.shuffle(order)
        span = self.window * self.global_batch
        for start in range(0, len(order), span):
            order[start : start + span] = sorted(order[start : start + span], key=lambda i: len(self.main[i]))
        batches = [
            [self.main[i] for i in order[start : start + self.global_batch]]
            for start in range(0, len(order), self.global_batch)
        ]
        rng.shuffle(batches)
        for number, (samples, ratio) in enumerate(self.mixed):
            self._mix_in(batches, samples, ratio, random.Random(f"mix:{self.seed}:{epoch}:{number}"))
        return batches

    @staticmethod
    def _mix_in(batches: list[list[Sample]], samples: Sequence[Sample], ratio: float, rng: random.Random) -> None:
        if not samples or not ratio:
            return
        order: list[int] = []
        for batch in batches:
            for _ in range(round(len(batch) * ratio)):
                if not order:
                    order = list(range(len(samples)))
                    rng.shuffle(order)
                batch.append(samples[order.pop()])

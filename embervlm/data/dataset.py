"""Records as token ids, and the order in which training sees them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.store import RecordView, picture_hashes, rows_with, save_array
from embervlm.data.tokenizer import CONCLUSION, DIRECT_PROMPT, ReasoningTokenizer
from embervlm.progress import progress_bar

REASONING, DIRECT, CAPTION = "reasoning", "direct", "caption"
CAPTION_PROMPT = "Describe the picture."
REMEMBERED_SAMPLES = 4096
"""Encoded samples that are kept; encoding one anew costs about 200 microseconds."""
ENCODED_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record in one form, as ids. All positions count from the start of the text."""

    record: int
    """Index into the records; -1 for a text that belongs to none."""
    form: str
    """`reasoning`, `direct` or `caption`."""
    prompt: list[int]
    target: list[int]
    """What is scored: chain and answer, answer alone, or caption."""
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


class Samples(Sequence[Sample]):
    """Records in one form, encoded when they are asked for."""

    def __init__(
        self, rows: np.ndarray, encode: Callable[[Sequence[int]], list[Sample]], sizes_file: Path | None = None
    ) -> None:
        """`rows`: record of each sample; `encode`: rows -> samples; `sizes_file`: where `sizes` are kept."""
        self.rows = rows
        self._encode, self._sizes_file = encode, sizes_file
        self._one = lru_cache(maxsize=REMEMBERED_SAMPLES)(lambda index: encode([int(rows[index])])[0])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._one(index % len(self))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of prompt and target of every sample, `[samples, 2]` int32; one pass over all, where not kept."""
        if self._sizes_file is not None and self._sizes_file.exists():
            return np.load(self._sizes_file)
        sizes = np.zeros((len(self), 2), np.int32)
        with progress_bar(total=len(self), desc="count tokens", unit="record", delay=2) as bar:
            for start in range(0, len(self), ENCODED_TOGETHER):
                found = self._encode(self.rows[start : start + ENCODED_TOGETHER].tolist())
                sizes[start : start + len(found)] = [(len(sample.prompt), len(sample.target)) for sample in found]
                bar.update(len(found))
        if self._sizes_file is not None:
            save_array(self._sizes_file, sizes)
        return sizes


def _sizes_file(records: Sequence[ReasoningRecord], form: str, tokenizer: ReasoningTokenizer) -> Path | None:
    return records.file(f"tokens-{form}", tokenizer.digest()) if isinstance(records, RecordView) else None


def encode_reasoning(
    records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer, grid: int, max_length: int
) -> Samples:
    """Every record with its chain. DataError lists all records whose chain is longer than `max_length` tokens."""
    samples = Samples(
        np.arange(len(records), dtype=np.int32),
        lambda rows: _encode_reasoning(records, rows, tokenizer, grid),
        _sizes_file(records, REASONING, tokenizer),
    )
    lengths = samples.sizes[:, 1]
    problems = [
        f"record {records[int(index)].record_id}: reasoning: {lengths[index]} tokens with its answer, more than the "
        f"{max_length} of --max_reasoning_length; shorten the chain or raise the limit"
        for index in np.flatnonzero(lengths > max_length)
    ]
    if problems:
        raise DataError.of(problems)
    return samples


def _encode_reasoning(
    every: Sequence[ReasoningRecord], rows: Sequence[int], tokenizer: ReasoningTokenizer, grid: int
) -> list[Sample]:
    records = [every[row] for row in rows]
    texts = [step_texts(record) for record in records]
    # a space in front, so that a word is the same token at a step's start as within
    flat = [
        " " + text for steps, conclusion in texts for text in (*steps, *([] if conclusion is None else [conclusion]))
    ]
    encoded = iter(tokenizer.encode_many(flat))
    prompts = tokenizer.encode_many([record.instruction for record in records])
    answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in records])
    samples = []
    for row, record, (steps, conclusion), prompt, answer in zip(rows, records, texts, prompts, answers):
        step_ids = [next(encoded) for _ in steps]
        conclusion_ids = None if conclusion is None else next(encoded)
        chain = tokenizer.chain_ids(step_ids, conclusion_ids)
        target = [*chain, tokenizer.ids["<|answer_start|>"], *answer, tokenizer.ids["<|answer_end|>"]]
        position, spans = len(prompt) + 1, []
        for ids in (*step_ids, *([] if conclusion_ids is None else [conclusion_ids])):
            spans.append((position + 1, position + 1 + len(ids)))
            position += 1 + len(ids)
        opens = spans[-1][0] - 1 if conclusion_ids is not None else len(prompt) + len(chain) - 1
        samples.append(Sample(
            record=row, form=REASONING, prompt=prompt, target=target, answer_position=opens,
            step_spans=tuple(spans), attend=_attention_targets(record.metadata, grid, len(spans)),
        ))  # fmt: skip
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


def encode_direct(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """Every record as question and answer, without a chain."""

    def encode(rows: Sequence[int]) -> list[Sample]:
        some = [records[row] for row in rows]
        prompts = tokenizer.encode_many([record.instruction + DIRECT_PROMPT for record in some])
        answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in some])
        return [
            Sample(record=row, form=DIRECT, prompt=prompt, target=[*answer, tokenizer.end_of_text])
            for row, prompt, answer in zip(rows, prompts, answers)
        ]

    return Samples(np.arange(len(records), dtype=np.int32), encode, _sizes_file(records, DIRECT, tokenizer))


def encode_captions(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """A caption for every picture that has one."""
    rows, pictures = rows_with(records, "caption"), picture_hashes(records)
    rows = rows[pictures[rows] != 0]
    rows = rows[np.sort(np.unique(pictures[rows], return_index=True)[1])]
    prompt = tokenizer.encode(CAPTION_PROMPT)

    def encode(rows: Sequence[int]) -> list[Sample]:
        captions = tokenizer.encode_many([" " + records[row].metadata["caption"] for row in rows])
        return [
            Sample(record=row, form=CAPTION, prompt=prompt, target=[*ids, tokenizer.end_of_text])
            for row, ids in zip(rows, captions)
        ]

    return Samples(rows, encode)


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
class GlobalBatch(Sequence[Sample]):
    """The samples of one optimizer step; each is encoded only where it is asked for, on the rank that trains on it."""

    sources: tuple[Sequence[Sample], ...] = field(repr=False, compare=False)
    picks: tuple[tuple[int, int], ...]
    """(which source, which of its samples)."""

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.sources[source][i] for source, i in self.picks[index]]
        source, i = self.picks[index]
        return self.sources[source][i]


@dataclass(frozen=True)
class _Epoch:
    """Indices of an epoch's samples: main ones in the order of the batches, and those mixed in behind one another."""

    order: np.ndarray
    batches: np.ndarray
    mixed: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which samples make up each global batch of an epoch: the same for every number of ranks.

    The main samples all come once; of each mixed-in list as many as `mix` asks for, another part of it every epoch.
    Batches are of like length, so that little is padding (sorted within `window` batches), and in random order.
    """

    main: Sequence[Sample]
    mixed: Sequence[tuple[Sequence[Sample], float]] = ()
    """(samples, how many for each sample that is in the batch already: main ones, and those of the lists before)."""
    global_batch: int
    """Main samples per optimizer step over all ranks and micro-batches."""
    seed: int
    window: int = 16
    _epochs: dict[int, _Epoch] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.main) // self.global_batch)

    def with_global_batch(self, global_batch: int) -> EpochPlan:
        return replace(self, global_batch=global_batch, _epochs={})

    def batch(self, step: int) -> GlobalBatch:
        """Samples of optimizer step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self._plan(epoch)
        plan = self._epochs[epoch]
        start = int(plan.batches[index]) * self.global_batch
        picks = [(0, int(i)) for i in plan.order[start : start + self.global_batch]]
        last_came = bool((plan.batches[:index] == self.steps_per_epoch - 1).any())
        counts = [self._num_mixed(size) for size in (self.global_batch, self._last_size, len(picks))]
        for number, (order, in_full, in_last, here) in enumerate(zip(plan.mixed, *counts), start=1):
            first = in_full * (index - last_came) + in_last * last_came
            picks += [(number, int(i)) for i in order[first : first + here]]
        return GlobalBatch(sources=(self.main, *(samples for samples, _ in self.mixed)), picks=tuple(picks))

    def _plan(self, epoch: int) -> _Epoch:
        rng = random.Random(f"epoch:{self.seed}:{epoch}")
        lengths = self._lengths
        order = np.frombuffer(_shuffled(len(self.main), rng), np.int32).copy()
        span = self.window * self.global_batch
        for start in range(0, len(order), span):
            part = order[start : start + span]
            order[start : start + span] = part[np.argsort(lengths[part], kind="stable")]
        batches = np.frombuffer(_shuffled(self.steps_per_epoch, rng), np.int32)
        mixed = []
        in_full, in_last = self._num_mixed(self.global_batch), self._num_mixed(self._last_size)
        for number, (samples, _) in enumerate(self.mixed):
            count = in_full[number] * (self.steps_per_epoch - 1) + in_last[number]
            drawn = random.Random(f"mix:{self.seed}:{epoch}:{number}")
            rounds = [
                np.frombuffer(_shuffled(len(samples), drawn), np.int32)[::-1]
                for _ in range(-(-count // max(1, len(samples))))
            ]
            mixed.append(np.concatenate([*rounds, np.empty(0, np.int32)])[:count])
        return _Epoch(order, batches, mixed)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each main sample."""
        if isinstance(self.main, Samples):
            return self.main.sizes.sum(1, dtype=np.int32)
        return np.array([len(sample) for sample in self.main])

    @property
    def _last_size(self) -> int:
        """Main samples in the batch that holds the rest."""
        return len(self.main) - (self.steps_per_epoch - 1) * self.global_batch

    def _num_mixed(self, size: int) -> list[int]:
        """How many of each mixed-in list go beside `size` main samples."""
        counts = []
        for samples, ratio in self.mixed:
            counts.append(round(size * ratio) if len(samples) else 0)
            size += counts[-1]
        return counts


def _shuffled(count: int, rng: random.Random) -> array[int]:
    order = array("i", range(count))
    rng.shuffle(order)
    return order

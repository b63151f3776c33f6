"""Records as token ids, and the order in which training sees them."""

from __future__ import annotations

import hashlib
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

from embervlm.data.lengths import Limits, refuse_too_long, too_long
from embervlm.data.records import ReasoningRecord
from embervlm.data.splits import text_hash
from embervlm.data.store import RecordView, has_field, picture_hashes, save_array
from embervlm.data.tokenizer import CONCLUSION, DIRECT_PROMPT, ReasoningTokenizer
from embervlm.progress import progress_bar

REASONING, DIRECT, CAPTION, EDITED = "reasoning", "direct", "caption", "edited"
CAPTION_PROMPT = "Describe the picture."
REMEMBERED_SAMPLES = 8192
"""Encoded samples that are kept, about 6 KB each; encoding one of 1 KB of text anew takes about 0.5 ms."""
ENCODED_TOGETHER = 256
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
    """(step, bool mask over the visual tokens): what a step's words look at, one entry for each thing."""

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
        self, form: str, rows: np.ndarray, encode: Callable[[Sequence[int]], list[Sample]], sizes_file: Path | None
    ) -> None:
        """
        Args:
            rows: the record of each sample.
            encode: rows -> samples.
            sizes_file: where `sizes` are kept; None keeps them in memory.
        """
        self.form, self.rows = form, rows
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

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of prompt and target of every sample, `[samples, 2]` int32; one pass over all, where not kept."""
        return self._counts[:, :2]

    @property
    def num_steps(self) -> np.ndarray:
        """Steps of every sample's chain, the conclusion included, `[samples]` int32; counted and kept with `sizes`."""
        return self._counts[:, 2]

    @property
    def _counts(self) -> np.ndarray:
        if self._sizes_file is None:
            return self._counted
        if not self._sizes_file.exists():
            save_array(self._sizes_file, self._count())
        sizes: np.ndarray = np.load(self._sizes_file, mmap_mode="r")  # anew: pages that were read count as our memory
        return sizes

    @cached_property
    def _counted(self) -> np.ndarray:
        return self._count()

    def _count(self) -> np.ndarray:
        sizes = np.zeros((len(self), 3), np.int32)
        all_remembered = len(self) <= REMEMBERED_SAMPLES
        with progress_bar(total=len(self), desc="count tokens", unit="record", delay=2) as bar:
            for start in range(0, len(self), ENCODED_TOGETHER):
                part = slice(start, start + ENCODED_TOGETHER)
                found = self[part] if all_remembered else self._encode(self.rows[part].tolist())
                sizes[part] = [(len(s.prompt), len(s.target), len(s.step_spans)) for s in found]
                bar.update(len(found))
        return sizes

    def of_record(self, row: int) -> Sample:
        """The sample of record `row`; `rows` ascends."""
        return self[int(np.searchsorted(self.rows, row))]

    def without(self, left_out: np.ndarray) -> Samples:
        """Those that are not marked in `left_out`."""
        fewer = Samples(self.form, self.rows[~left_out], self._encode, None)
        fewer._counted = self._counts[~left_out]
        return fewer


def _sizes_file(records: Sequence[ReasoningRecord], form: str, tokenizer: ReasoningTokenizer) -> Path | None:
    return records.file(f"lengths-{form}", tokenizer.digest()) if isinstance(records, RecordView) else None


def _every_row(records: Sequence[ReasoningRecord]) -> np.ndarray:
    return np.arange(len(records), dtype=np.int32)


def encode_reasoning(
    records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer, grid: int, max_length: int | None = None, *,
    limits: Limits | None = None,
) -> Samples:  # fmt: skip
    """Every record with its chain. DataError lists all that are longer than `max_length`, or than `limits`, allow.

    An augmented record that is too long is left out instead.
    """
    samples = Samples(
        REASONING, _every_row(records), lambda rows: _encode_chains(records, rows, tokenizer, grid),
        _sizes_file(records, REASONING, tokenizer),
    )  # fmt: skip
    if limits is None and max_length is None:
        return samples
    limits = limits or Limits(max_reasoning_length=max_length or 0)
    refuse_too_long([(records, samples)], limits)
    left_out = np.zeros(len(samples), bool)
    left_out[[found.row for found in too_long(REASONING, samples.rows, samples.sizes, limits)]] = True
    return samples.without(left_out) if left_out.any() else samples


def _encode_chains(
    records: Sequence[ReasoningRecord], rows: Sequence[int], tokenizer: ReasoningTokenizer, grid: int
) -> list[Sample]:
    some = [records[row] for row in rows]
    texts = [step_texts(record) for record in some]
    # a space in front, so that a word is the same token at a step's start as within
    flat = [
        " " + text for steps, conclusion in texts for text in (*steps, *([] if conclusion is None else [conclusion]))
    ]
    encoded = iter(tokenizer.encode_many(flat))
    prompts = tokenizer.encode_many([record.instruction for record in some])
    answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in some])
    samples = []
    for row, record, (steps, conclusion), prompt, answer in zip(rows, some, texts, prompts, answers, strict=True):
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


def _mostly_covered(boxes: Sequence[Sequence[float]], grid: int) -> Tensor:
    """Visual tokens of which one of `boxes` covers more than half, `[grid * grid]` bool."""
    edges = torch.arange(grid + 1) / grid

    def covered(first: float, last: float) -> Tensor:
        return (edges[1:].clamp_max(last) - edges[:-1].clamp_min(first)).clamp_min(0) * grid

    shares = [covered(top, bottom)[:, None] * covered(left, right) for left, top, right, bottom in boxes]
    return (torch.stack(shares) > 0.5).any(0).flatten()


def _attention_targets(metadata: Mapping[str, Any], grid: int, num_steps: int) -> tuple[tuple[int, Tensor], ...]:
    """From `boxes` and `seen` of the metadata, where a record has them: an entry for each step and thing that it reads.

    A visual token that a smaller thing mostly covers belongs to that one: nobody sees a place by looking at the load.
    """
    by_kind: dict[str, list[Sequence[float]]] = {}
    for box in known_boxes(metadata):
        by_kind.setdefault(box["kind"], []).append(box["box"])
    seen = (metadata.get("seen") or ())[:num_steps]
    masks = {kind: boxes_to_mask(boxes, grid) for kind, boxes in by_kind.items()}
    covered = {kind: _mostly_covered(boxes, grid) for kind, boxes in by_kind.items()}
    own = {}
    for kind, mask in masks.items():
        left = mask.clone()
        for other in masks:
            if masks[other].sum() < mask.sum():
                left &= ~covered[other]
        own[kind] = left if left.any() else mask
    return tuple((step, own[kind]) for step, kinds in enumerate(seen) for kind in dict.fromkeys(kinds) if kind in own)


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


def edit_facts(records: Sequence[ReasoningRecord], samples: Samples, seed: int) -> Samples:
    """Each chain behind the picture of another record of the same question: its facts are not what the picture shows.

    The steps that state facts are given and not scored, so that nobody learns to misread a picture. All that follows,
    the answer head's answer too, is that of the stated facts. Where it is not known which steps state facts, or no
    other picture was asked about, there is nothing to edit.
    """
    rng = random.Random(f"edited facts:{seed}")
    pictured = samples.rows[picture_hashes(records)[samples.rows] != 0]
    questions = np.fromiter((_question_hash(records[row]) for row in pictured.tolist()), np.uint64, len(pictured))
    order = np.argsort(questions, kind="stable")  # those of one question stand together, in their order
    questions, pictured = questions[order], pictured[order]
    found, others = array("i"), array("i")
    for row in samples.rows.tolist() if len(pictured) else ():
        record = records[row]
        question = np.uint64(_question_hash(record))
        first, last = (int(np.searchsorted(questions, question, side)) for side in ("left", "right"))
        drawn = [int(pictured[rng.randrange(first, last)]) for _ in range(PICTURE_DRAWS if first < last else 0)]
        other = next((index for index in drawn if scene_key(records[index]) != scene_key(record)), None)
        if num_fact_steps(record) and other is not None:
            found.append(row)
            others.append(other)
    rows, pictures = np.array(found, np.int32), np.array(others, np.int32)

    def encode(some: Sequence[int]) -> list[Sample]:
        places = np.searchsorted(rows, some)
        return [
            _edited(samples.of_record(row), num_fact_steps(records[row]), int(picture_of))
            for row, picture_of in zip(some, pictures[places])
        ]

    return Samples(EDITED, rows, encode, None)


def _edited(sample: Sample, num_given_steps: int, picture_of: int) -> Sample:
    end = sample.step_spans[num_given_steps - 1][1] - len(sample.prompt)
    return replace(sample, form=EDITED, num_given=end, picture_of=picture_of, step_spans=(), attend=())


def question_key(record: ReasoningRecord) -> tuple[Any, ...]:
    """Equal for records that ask the same with the same candidates."""
    return (record.instruction, *(record.metadata.get("candidates") or ()))


def _question_hash(record: ReasoningRecord) -> int:
    return text_hash("\0".join(question_key(record)))


def scene_key(record: ReasoningRecord) -> Any:
    """Equal for pictures of equal facts, where those are known, else for the same picture."""
    return record.metadata.get("scene") or record.image


def encode_direct(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """Every record as question and answer, without a chain."""

    def encode(rows: Sequence[int]) -> list[Sample]:
        some = [records[row] for row in rows]
        prompts = tokenizer.encode_many([record.instruction + DIRECT_PROMPT for record in some])
        answers = tokenizer.encode_many([" " + ", ".join(record.answer) for record in some])
        return [
            Sample(record=row, form=DIRECT, prompt=prompt, target=[*answer, tokenizer.end_of_text])
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    return Samples(DIRECT, _every_row(records), encode, _sizes_file(records, DIRECT, tokenizer))


def encode_captions(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """A caption for every picture that has one."""
    pictures = picture_hashes(records)
    rows = np.flatnonzero(has_field(records, "caption") & (pictures != 0)).astype(np.int32)
    rows = rows[np.sort(np.unique(pictures[rows], return_index=True)[1])]
    prompt = tokenizer.encode(CAPTION_PROMPT)

    def encode(rows: Sequence[int]) -> list[Sample]:
        captions = tokenizer.encode_many([" " + records[row].metadata["caption"] for row in rows])
        return [
            Sample(record=row, form=CAPTION, prompt=prompt, target=[*ids, tokenizer.end_of_text])
            for row, ids in zip(rows, captions, strict=True)
        ]

    return Samples(CAPTION, rows, encode, _sizes_file(records, CAPTION, tokenizer))


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
    """Indices of an epoch's samples."""

    order: np.ndarray
    """Main ones, a batch behind the other."""
    batches: np.ndarray
    """The order in which these batches are trained on."""
    mixed: list[np.ndarray]
    """Those of each mixed-in list, in the order of training."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which samples make up each global batch of an epoch: the same for every number of ranks.

    The main samples (of `epochs`, where given) all come once; of each mixed-in list as many as `mix` asks for, another
    part of it every epoch.
    Batches are of like length, so that little is padding (sorted within `window` batches), and in random order.
    """

    main: Sequence[Sample]
    mixed: Sequence[tuple[Sequence[Sample], float]] = ()
    """(samples, how many for each sample that is in the batch already: main ones, and those of the lists before)."""
    epochs: Sequence[Sequence[int] | np.ndarray] = ()
    """For each epoch the places in `main` that it trains on, the last for all that follow; () trains on all."""
    global_batch: int
    """Main samples per optimizer step over all ranks and micro-batches."""
    seed: int
    window: int = 16
    _epochs: dict[int, _Epoch] = field(default_factory=dict)

    def with_global_batch(self, global_batch: int) -> EpochPlan:
        return replace(self, global_batch=global_batch, _epochs={})

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that trains on all."""
        return -(-len(self.main) // self.global_batch)

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self._places(epoch)) // self.global_batch)

    def _places(self, epoch: int) -> Sequence[int] | np.ndarray:
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
        digest = hashlib.blake2b(repr((self.seed, self.window)).encode(), digest_size=16)
        for places in self.epochs:
            digest.update(repr(len(places)).encode())
            digest.update(np.asarray(places, np.int32).tobytes())
        for samples, ratio in ((self.main, 1.0), *self.mixed):
            form = samples.form if isinstance(samples, Samples) else [sample.form for sample in samples]
            rows = samples.rows if isinstance(samples, Samples) else [sample.record for sample in samples]
            digest.update(repr((ratio, len(samples), form)).encode())
            digest.update(np.asarray(rows, np.int32).tobytes())
        digest.update(self._lengths.tobytes())
        return digest.hexdigest()

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each main sample."""
        if isinstance(self.main, Samples):
            return self.main.sizes.sum(1, dtype=np.int32)
        return np.array([len(sample) for sample in self.main], np.int32)

    def batch(self, step: int) -> GlobalBatch:
        """Samples of optimizer step `step`, counted from 0 over all epochs. It seeks: no step before it is replayed."""
        epoch, index = self.locate(step)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self._plan(epoch)
        plan = self._epochs[epoch]
        last = len(plan.batches) - 1
        start = int(plan.batches[index]) * self.global_batch
        picks = [(0, int(i)) for i in plan.order[start : start + self.global_batch]]
        last_came = bool((plan.batches[:index] == last).any())  # the one batch that may be shorter
        in_full, in_last, here = map(
            self._num_mixed, (self.global_batch, len(plan.order) - last * self.global_batch, len(picks))
        )
        for number, indices in enumerate(plan.mixed):
            first = in_full[number] * (index - last_came) + in_last[number] * last_came
            picks += [(number + 1, int(i)) for i in indices[first : first + here[number]]]
        return GlobalBatch(sources=(self.main, *(samples for samples, _ in self.mixed)), picks=tuple(picks))

    def _plan(self, epoch: int) -> _Epoch:
        rng = random.Random(f"epoch:{self.seed}:{epoch}")
        order = _shuffled(self._places(epoch), rng)
        span = self.window * self.global_batch
        for start in range(0, len(order), span):
            part = order[start : start + span]
            part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = _shuffled(range(self._steps_in(epoch)), rng)
        last = len(batches) - 1
        counts = zip(*map(self._num_mixed, (self.global_batch, len(order) - last * self.global_batch)))
        mixed = []
        for number, ((samples, _), (in_full, in_last)) in enumerate(zip(self.mixed, counts)):
            count = in_full * last + in_last
            drawn = random.Random(f"mix:{self.seed}:{epoch}:{number}")
            rounds = [_shuffled(range(len(samples)), drawn)[::-1] for _ in range(-(-count // max(1, len(samples))))]
            mixed.append(np.concatenate([*rounds, np.empty(0, np.int32)])[:count])
        return _Epoch(order, batches, mixed)

    def _num_mixed(self, size: int) -> list[int]:
        """How many of each mixed-in list go beside `size` main samples."""
        counts = []
        for samples, ratio in self.mixed:
            counts.append(round(size * ratio) if len(samples) else 0)
            size += counts[-1]
        return counts


def _shuffled(values: Sequence[int] | np.ndarray, rng: random.Random) -> np.ndarray:
    order = array("i")
    order.frombytes(np.asarray(values, np.int32).tobytes())
    rng.shuffle(order)
    return np.frombuffer(order, np.int32)

"""Samples -> the tensors of one micro-batch. Everything that can be counted is counted here, on the host."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm.data.drawn import DrawnChain, policy_counts, policy_targets
from embervlm.data.images import PictureCache
from embervlm.data.length_groups import JUDGE_COST, length_groups
from embervlm.data.moved import moved
from embervlm.data.negatives import MAX_PAIR_TOKENS, PAIR_SEGMENTS, PairMaker, StepPair, fit_pair
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import (
    CAPTION,
    DIRECT,
    DRAWN,
    EDITED,
    REASONING,
    Grid,
    Sample,
    boxes_in_square,
    boxes_to_mask,
    known_boxes,
    reads_a_box,
)
from embervlm.data.store import with_fields
from embervlm.data.tokenizer import ReasoningTokenizer

TERM_OF_FORM = {REASONING: "reasoning", DIRECT: "direct", CAPTION: "direct", EDITED: "reasoning", DRAWN: "policy"}
CONTRAST_RATIO = 0.5
"""Share of the chains that are contrasted where no boxes are known: each of them is read twice."""
CONTRAST_TRIES = 8
"""Records looked at for a picture that a chain does not fit; where all of them are about the same, it has none."""
OWN_MISTAKES_RATIO = 0.5
"""Of the records whose steps the validator is asked about: share with the model's own mistake, not a planted one."""


@dataclass(kw_only=True)
class Batch:
    """One micro-batch.

    Every batch of a phase runs the same parts of the model, with weight 0 where it has nothing for one of them:
    sharded engines match gradients up by the order in which they arrive, which must be alike on all processes.

    Attributes:
        inputs: Keyword arguments of `EmberVLM.forward`.
        targets: What the losses compare with.
        counts: Loss term -> number of scored things (tokens, answers, pairs, ...) in it.
        picture_index: `[batch]` int64, row of each record's picture, -1 for none.
        record_ids: For error messages.
    """

    inputs: dict[str, Any]
    targets: dict[str, Tensor]
    counts: dict[str, float]
    picture_index: Tensor
    record_ids: list[str] = field(default_factory=list)
    muted: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest text: positions of the whole batch count on from row to row."""
        return int(self.inputs["input_ids"].shape[1])

    def mute(self) -> None:
        """Let the batch run, and its sums and counts be zero."""
        self.counts = dict.fromkeys(self.counts, 0.0)
        self.muted = True

    def to(self, device: torch.device) -> Batch:
        return self._with(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in memory from which a GPU reads beside its work."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: change(value) if isinstance(value, Tensor) else value for key, value in values.items()}

        return replace(self, inputs=changed(self.inputs), targets=changed(self.targets))


class Collator:
    """Builds micro-batches; what is drawn at random depends on seed, step and place in the global batch alone."""

    def __init__(
        self,
        records: Sequence[ReasoningRecord],
        tokenizer: ReasoningTokenizer,
        pictures: PictureCache,
        *,
        seed: int,
        image_size: int,
        pair_maker: PairMaker | None = None,
        pair_records_ratio: float = 1.0,
        dense_labels: DenseLabels | None = None,
        grounding: bool = False,
        use_reasoning: bool = True,
        max_pair_tokens: int = MAX_PAIR_TOKENS,
        most_groups: int = 1,
        policy: bool = False,
        picture_shift: float = 0.0,
    ) -> None:
        """
        Args:
            most_groups: parts of a micro-batch, of texts of like length, that the model may read one after the other.
            policy: there are drawn chains among the samples.
            picture_shift: see `PhaseConfig`.
        """
        self.most_groups = most_groups
        self.records, self.tokenizer, self.pictures = records, tokenizer, pictures
        self.seed, self.image_size = seed, image_size
        self.pair_maker, self.dense_labels = pair_maker, dense_labels
        self.pair_records_ratio, self.max_pair_tokens = pair_records_ratio, max_pair_tokens
        self.grounding, self.use_reasoning, self.policy = grounding, use_reasoning, policy
        self.has_boxes = any(known_boxes(record.metadata) for record in with_fields(records, "boxes"))
        self.grounds = grounding and any(reads_a_box(record.metadata) for record in with_fields(records, "boxes"))
        """Whether attention to what steps read is supervised; chains are contrasted with other pictures where not."""
        self.picture_shift = 0.0 if self.has_boxes else picture_shift
        self._names = lru_cache(maxsize=256)(self._encoded_names)

    def __call__(
        self,
        samples: Sequence[Sample],
        *,
        step: int,
        places: Sequence[int] | None = None,
        teacher_forcing: float = 1.0,
        load_pictures: bool = True,
    ) -> Batch:
        """`places` are those of `samples` in their global batch; 0, 1, ... where left out."""
        places = range(len(samples)) if places is None else places
        rngs = [random.Random(f"{self.seed}:{step}:{place}") for place in places]
        rows = self.picture_rows(samples)
        contrasted = self._contrasted(samples, rows, step, places)
        rows += [picture for _, picture in contrasted]
        texts = [[*sample.prompt, *sample.target] for sample in (*samples, *(samples[row] for row, _ in contrasted))]
        length = max(map(len, texts))
        inputs: dict[str, Any] = {
            "input_ids": padded(texts, 0),
            "text_mask": torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None],
            "image_mask": torch.tensor([row >= 0 for row in rows]),
            "use_reasoning": self.use_reasoning,
        }
        if self.most_groups > 1:
            inputs["groups"] = length_groups([*map(len, texts)], [row >= 0 for row in rows], most=self.most_groups)
        if load_pictures:
            inputs["pictures"], inputs["picture_rows"] = self.pictures_at(rows, step)
        batch = Batch(
            inputs=inputs,
            targets={},
            counts={},
            picture_index=torch.tensor(rows),
            record_ids=[self.records[s.record].record_id if s.record >= 0 else "glossary" for s in samples],
        )
        self._score_tokens(batch, samples, texts)
        if self.use_reasoning:
            self._ask_answer_head(batch, samples)
            self._ask_validator(batch, samples, rngs)
            if self.grounds:
                self._ground(batch, samples)
            self._sample_inputs(batch, samples, rngs, teacher_forcing)
            if self.grounding and not self.grounds:
                self._contrast(batch, [row for row, _ in contrasted], texts)
        if self.dense_labels is not None:
            self._dense(batch, samples)
        return batch

    def picture_rows(self, samples: Sequence[Sample]) -> list[int]:
        """Each sample's picture by its place among `pictures`; -1 for none."""
        return [self._row(sample) for sample in samples]

    def _row(self, sample: Sample) -> int:
        record = sample.record if sample.picture_of is None else sample.picture_of
        image = self.records[record].image if record >= 0 else None
        return self.pictures.index(image) if image is not None else -1

    def pictures_at(self, rows: Sequence[int], step: int | None = None) -> tuple[Tensor, Tensor]:
        """The pictures in `rows`, each once, and which of them every row has: any, where it has none.

        With `step` as that one trains on them, shifted.
        """
        found = list(dict.fromkeys(row for row in rows if row >= 0))
        out = torch.zeros(max(1, len(found)), self.image_size, self.image_size, 3, dtype=torch.uint8)
        for place, row in enumerate(found):
            picture = np.array(self.pictures.array[row])
            if self.picture_shift and step is not None:
                picture = moved(picture, self.picture_shift, random.Random(f"{self.seed}:{step}:picture {row}"))
            out[place] = torch.from_numpy(picture)
        place_of = {row: place for place, row in enumerate(found)}
        return out, torch.tensor([place_of.get(row, 0) for row in rows])

    def _score_tokens(self, batch: Batch, samples: Sequence[Sample], texts: list[list[int]]) -> None:
        index: list[int] = []
        labels: list[int] = []
        direct: list[bool] = []
        scored: list[int] = []
        for row, (sample, text) in enumerate(zip(samples, texts)):
            start = max(1, len(sample.prompt) + sample.num_given)
            index.extend(range(row * batch.length + start - 1, row * batch.length + len(text) - 1))
            labels.extend(text[start:])
            direct.extend([TERM_OF_FORM[sample.form] == "direct"] * (len(text) - start))
            scored.append(len(text) - start)
        batch.inputs["score_index"] = torch.tensor(index)
        batch.targets["labels"] = torch.tensor(labels)
        batch.targets["direct"] = torch.tensor(direct)
        batch.counts["direct"] = float(sum(direct))
        batch.counts["reasoning"] = float(len(direct) - sum(direct))
        if self.policy:
            batch.targets |= policy_targets(samples, scored)
            batch.counts |= policy_counts(samples)
            drawn = [count for sample, count in zip(samples, scored) if isinstance(sample, DrawnChain)]
            batch.counts["reasoning"] -= sum(drawn)

    def _ask_answer_head(self, batch: Batch, samples: Sequence[Sample]) -> None:
        asked = [
            (row, s)
            for row, s in enumerate(samples)
            if s.answer_position is not None and self.records[s.record].candidates  # else an open answer
        ]
        batch.counts["answer"] = 0.0
        unasked = not asked
        asked = asked or [(0, samples[0])]  # every process runs every part; see `Batch`
        own = [("nothing",) if unasked else self.records[s.record].candidates for _, s in asked]
        if any(names != own[0] for names in own):
            ids = [self._names(names) for names in own]
            most, longest = (max(found.shape[side] for found in ids) for side in (0, 1))
            candidate_ids = torch.full((len(ids), most, longest), -1)
            for place, found in enumerate(ids):
                candidate_ids[place, : found.shape[0], : found.shape[1]] = found
        else:
            candidate_ids, most = self._names(own[0]), len(own[0])
        right = torch.zeros(len(asked), most)
        real = torch.zeros(len(asked), most)
        for place, ((_, sample), names) in enumerate(zip(asked, own)):
            if unasked:
                break
            answer = self.records[sample.record].answer
            right[place, : len(names)] = torch.tensor([float(name in answer) for name in names])
            real[place, : len(names)] = 1
        batch.inputs["answer_index"] = torch.tensor([row * batch.length + (s.answer_position or 0) for row, s in asked])
        batch.inputs["candidate_ids"] = candidate_ids
        batch.targets["answers"], batch.targets["answers_real"] = right, real
        batch.counts["answer"] = float(real.sum())

    def _encoded_names(self, names: tuple[str, ...]) -> Tensor:
        """Ids of candidates, padded with -1."""
        return padded(self.tokenizer.encode_many(names), -1)

    def _ask_validator(self, batch: Batch, samples: Sequence[Sample], rngs: Sequence[random.Random]) -> None:
        batch.counts["consistency"] = 0.0
        if self.pair_maker is None:
            return
        pairs: list[tuple[int, StepPair]] = []
        own: list[tuple[int, list[tuple[int, int, int]]]] = []
        for row, (sample, rng) in enumerate(zip(samples, rngs)):
            if not sample.step_spans or rng.random() >= self.pair_records_ratio:
                continue
            drawn = self.pair_maker.pairs(sample, rng)
            if rng.random() < OWN_MISTAKES_RATIO and (
                places := self.pair_maker.value_places(sample, self.max_pair_tokens)
            ):
                own.append((row, places))
                drawn = drawn[:1]
            pairs += [(row, pair) for pair in drawn]
        batch.counts["consistency"] = float(len(pairs) + len(own))
        batch.targets["valid_weight"] = torch.ones(len(pairs))
        if not pairs:
            pairs = [(0, StepPair(kind="valid", previous=[], step=samples[0].prompt))]
            batch.targets["valid_weight"] = torch.zeros(1)
        texts = [(samples[row].prompt, pair.previous, pair.step) for row, pair in pairs]
        batch.inputs |= validator_inputs(texts, self.max_pair_tokens)
        if self.most_groups > 1:
            sizes = batch.inputs["pair_mask"].sum(1).tolist()
            groups = length_groups(sizes, most=self.most_groups, cost=JUDGE_COST)
            batch.inputs["pair_groups"] = groups if len(groups) > 1 else None
        batch.inputs["pair_record"] = torch.tensor([row for row, _ in pairs])
        batch.targets["valid"] = torch.tensor([float(pair.valid) for _, pair in pairs])
        if self.pair_maker.knows_facts:
            self._ask_of_own(batch, own, samples)

    @staticmethod
    def _ask_of_own(
        batch: Batch, own: Sequence[tuple[int, list[tuple[int, int, int]]]], samples: Sequence[Sample]
    ) -> None:
        """The chains whose likeliest mistakes the validator is asked about, behind the pairs."""
        scored_from = [max(1, len(sample.prompt) + sample.num_given) for sample in samples]
        scored = [len(sample) - start for sample, start in zip(samples, scored_from)]
        first = [sum(scored[:row]) - scored_from[row] for row in range(len(samples))]
        weight = float(bool(own))
        own = own or [(0, [(scored_from[0], scored_from[0], scored_from[0] + 1)])]  # every process runs every part
        most = max(len(places) for _, places in own)
        batch.inputs["own_record"] = torch.tensor([row for row, _ in own])
        batch.inputs["own_length"] = max(end for _, places in own for _, _, end in places)
        batch.inputs["own_prompt"] = torch.tensor([len(samples[row].prompt) for row, _ in own])
        batch.inputs["own_places"] = torch.tensor(
            [[(first[row] + at, at, start, end) for at, start, end in (places * most)[:most]] for row, places in own]
        )
        batch.targets["valid"] = torch.cat([batch.targets["valid"], torch.zeros(len(own))])
        batch.targets["valid_weight"] = torch.cat([batch.targets["valid_weight"], torch.full((len(own),), weight)])

    def _contrasted(
        self, samples: Sequence[Sample], rows: Sequence[int], step: int, places: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Where no step is known to read a box: chains to read a second time, behind the picture of another record.

        Which one depends on seed, step and place alone, not on what else is in the micro-batch. It is one that the
        chain does not fit: another file, about which a record says something else.
        """
        if not self.use_reasoning or not self.grounding or self.grounds:
            return []
        out = []
        for number, (sample, row, place) in enumerate(zip(samples, rows, places)):
            if row < 0 or sample.form != REASONING:
                continue
            rng = random.Random(f"{self.seed}:{step}:{place}:contrast")
            if rng.random() >= CONTRAST_RATIO:
                continue
            for other in (rng.randrange(len(self.records)) for _ in range(CONTRAST_TRIES)):
                record = self.records[other]
                if record.image is not None and record.steps != self.records[sample.record].steps:
                    if (picture := self.pictures.index(record.image)) != row:
                        out.append((number, picture))
                        break
        return out

    @staticmethod
    def _contrast(batch: Batch, chains: Sequence[int], texts: list[list[int]]) -> None:
        """Score the last rows as well, which repeat `chains` behind other pictures.

        `contrast_own` tells of each token there which scored token it repeats, `contrast_lengths` how many a chain has.
        """
        scored = batch.inputs["score_index"]
        own = [(scored // batch.length == row).nonzero().squeeze(1) for row in chains]
        begin = len(texts) - len(chains)
        again = [
            scored[places] + (begin + number - row) * batch.length
            for number, (row, places) in enumerate(zip(chains, own))
        ]
        batch.targets["contrast_own"] = torch.cat([*own, scored[:0]])
        batch.targets["contrast_lengths"] = torch.tensor([len(places) for places in own], dtype=torch.long)
        batch.targets["labels"] = torch.cat(
            [batch.targets["labels"], batch.targets["labels"][batch.targets["contrast_own"]]]
        )
        batch.inputs["score_index"] = torch.cat([scored, *again])
        batch.inputs["repeated"] = torch.tensor(chains, dtype=torch.long)
        batch.counts["multimodal"] = float(len(chains))

    def _ground(self, batch: Batch, samples: Sequence[Sample]) -> None:
        """Tokens whose attention is supervised, where the data know boxes."""
        index: list[int] = []
        masks: list[Tensor] = []
        for row, sample in enumerate(samples):
            for step, mask in sample.attend:
                start, end = sample.step_spans[step]
                index.extend(range(row * batch.length + start, row * batch.length + end))
                masks.append(mask.expand(end - start, -1))
        batch.counts["multimodal"] = float(len(index))
        batch.inputs["ground_index"] = torch.tensor(index or [0])
        # an empty mask counts nothing
        batch.targets["ground"] = torch.cat(masks) if masks else torch.zeros(1, 1, dtype=torch.bool)

    @staticmethod
    def _sample_inputs(
        batch: Batch, samples: Sequence[Sample], rngs: Sequence[random.Random], teacher_forcing: float
    ) -> None:
        if teacher_forcing >= 1:
            return
        chosen = []
        for row, (sample, rng) in enumerate(zip(samples, rngs)):
            if sample.step_spans:
                positions = np.concatenate([np.arange(start, end) for start, end in sample.step_spans])
                draws = np.random.default_rng(rng.getrandbits(64)).random(len(positions))
                chosen.append(row * batch.length + positions[draws >= teacher_forcing])
        index = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        batch.inputs["sampled_index"] = torch.from_numpy(index)

    def _dense(self, batch: Batch, samples: Sequence[Sample]) -> None:
        assert self.dense_labels is not None
        labels = [self.dense_labels.of(self.records[s.record] if s.record >= 0 else None) for s in samples]
        batch.targets["dense"] = torch.stack(labels)
        batch.counts["dense"] = float((batch.targets["dense"] >= 0).sum())


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """`[rows, longest]` int64: each row, and `fill` behind it."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def validator_inputs(
    texts: Sequence[tuple[list[int], list[int], list[int]]], limit: int = MAX_PAIR_TOKENS
) -> dict[str, Tensor]:
    """`pair_ids`, `pair_segments`, `pair_mask` of (question, previous steps, step), each given as ids.

    What is longer than `limit` is cut as `fit_pair` does it.
    """
    rows, segments = [], []
    for question, previous, step in (fit_pair(*text, limit) for text in texts):
        rows.append([*question, *previous, *step])
        parts = (("question", question), ("previous", previous), ("step", step))
        segments.append([PAIR_SEGMENTS.index(name) for name, ids in parts for _ in ids])
    ids = padded(rows, 0)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"pair_ids": ids, "pair_segments": padded(segments, 0), "pair_mask": mask}


class DenseLabels:
    """What is in each patch, from the boxes of the ground truth: one class per kind of thing and patch.

    Stage 3 learns to see from it; captions alone leave a small model blind.
    """

    def __init__(self, records: Sequence[ReasoningRecord], grid: Grid, padded_size: int | None = None) -> None:
        found: dict[str, set[str]] = {}
        for record in with_fields(records, "boxes"):
            for box in known_boxes(record.metadata):
                if "label" in box and box["kind"] in (record.metadata.get("scene") or {}):
                    found.setdefault(box["kind"], set()).add(box["label"])
        self.classes = {kind: sorted(labels) for kind, labels in sorted(found.items())}
        """Kind -> labels; class 0 is 'not here', class 1 + i the i-th label."""
        self.grid, self._padded_size = grid, padded_size
        self._nothing = torch.full((grid.size, len(self.classes)), -1)

    @property
    def sizes(self) -> list[int]:
        return [1 + len(labels) for labels in self.classes.values()]

    def of(self, record: ReasoningRecord | None) -> Tensor:
        """`[grid.size, kinds]` int64; -1 is not scored (no ground truth)."""
        boxes = boxes_in_square(record, self._padded_size) if record is not None else []
        return self._draw(boxes) if boxes else self._nothing

    def _draw(self, boxes: Sequence[Mapping[str, Any]]) -> Tensor:
        out = torch.zeros_like(self._nothing)
        kinds = list(self.classes)
        for box in boxes:
            if box.get("label") in self.classes.get(box["kind"], ()):
                value = 1 + self.classes[box["kind"]].index(box["label"])
                out[boxes_to_mask([box["box"]], self.grid), kinds.index(box["kind"])] = value
        return out

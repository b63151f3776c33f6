"""Samples -> the tensors of one micro-batch. Everything that can be counted is counted here, on the host."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm.data.dataset import CAPTION, DIRECT, EDITED, REASONING, Sample, boxes_to_mask, known_boxes
from embervlm.data.images import PictureCache
from embervlm.data.negatives import MAX_PAIR_TOKENS, PAIR_SEGMENTS, PairMaker, StepPair, fit_pair
from embervlm.data.records import ReasoningRecord
from embervlm.data.store import with_fields
from embervlm.data.tokenizer import ReasoningTokenizer

TERM_OF_FORM = {REASONING: "reasoning", DIRECT: "direct", CAPTION: "direct", EDITED: "reasoning"}


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

    def mute(self) -> None:
        """Let the batch run, and its sums and counts be zero."""
        self.counts = dict.fromkeys(self.counts, 0.0)
        self.muted = True

    def to(self, device: torch.device) -> Batch:
        def move(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }

        return Batch(
            inputs=move(self.inputs), targets=move(self.targets), counts=self.counts,
            picture_index=self.picture_index, record_ids=self.record_ids, muted=self.muted,
        )  # fmt: skip


class Collator:
    """Builds micro-batches; what is drawn at random depends on seed, step and place in the global batch alone."""

    def __init__(
        self,
        records: Sequence[ReasoningRecord],
        tokenizer: ReasoningTokenizer,
        pictures: PictureCache,
        *,
        candidates: Sequence[str],
        seed: int,
        image_size: int,
        pair_maker: PairMaker | None = None,
        pair_records_ratio: float = 1.0,
        dense_labels: DenseLabels | None = None,
        grounding: bool = False,
        use_reasoning: bool = True,
        max_pair_tokens: int = MAX_PAIR_TOKENS,
    ) -> None:
        self.records, self.tokenizer, self.pictures = records, tokenizer, pictures
        self.candidates, self.seed, self.image_size = list(candidates), seed, image_size
        self.pair_maker, self.dense_labels = pair_maker, dense_labels
        self.pair_records_ratio, self.max_pair_tokens = pair_records_ratio, max_pair_tokens
        self.grounding, self.use_reasoning = grounding, use_reasoning
        self._has_boxes = any(known_boxes(record.metadata) for record in with_fields(records, "boxes"))
        self._candidates = self._pad(tokenizer.encode_many(self.candidates), -1) if self.candidates else None

    def __call__(
        self, samples: Sequence[Sample], *, step: int, places: Sequence[int] | None = None,
        teacher_forcing: float = 1.0, load_pictures: bool = True,
    ) -> Batch:  # fmt: skip
        """`places` are those of `samples` in their global batch; 0, 1, ... where left out."""
        places = range(len(samples)) if places is None else places
        rngs = [random.Random(f"{self.seed}:{step}:{place}") for place in places]
        texts = [[*sample.prompt, *sample.target] for sample in samples]
        length = max(map(len, texts))
        rows = [self._row(sample) for sample in samples]
        inputs: dict[str, Any] = {
            "input_ids": self._pad(texts, 0),
            "text_mask": torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None],
            "image_mask": torch.tensor([row >= 0 for row in rows]),
            "use_reasoning": self.use_reasoning,
        }
        if load_pictures:
            inputs["pictures"] = self._pictures(rows)
        targets: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        self._score_tokens(samples, texts, length, inputs, targets, counts)
        if self.use_reasoning:
            self._ask_answer_head(samples, length, inputs, targets, counts)
            self._ask_validator(samples, rngs, inputs, targets, counts)
            if self.grounding:
                self._ground(samples, rows, length, inputs, targets, counts)
            self._sample_inputs(samples, rngs, length, teacher_forcing, inputs)
        if self.dense_labels is not None:
            self._dense(samples, targets, counts)
        return Batch(
            inputs=inputs, targets=targets, counts=counts, picture_index=torch.tensor(rows),
            record_ids=[self.records[s.record].record_id if s.record >= 0 else "glossary" for s in samples],
        )  # fmt: skip

    def _metadata(self, sample: Sample) -> Mapping[str, Any]:
        return self.records[sample.record].metadata if sample.record >= 0 else {}

    def _row(self, sample: Sample) -> int:
        record = sample.record if sample.picture_of is None else sample.picture_of
        image = self.records[record].image if record >= 0 else None
        return self.pictures.index(image) if image is not None else -1

    def _pictures(self, rows: Sequence[int]) -> Tensor:
        out = torch.zeros(len(rows), self.image_size, self.image_size, 3, dtype=torch.uint8)
        for place, row in enumerate(rows):
            if row >= 0:
                out[place] = torch.from_numpy(np.array(self.pictures.array[row]))
        return out

    def _score_tokens(
        self, samples: Sequence[Sample], texts: list[list[int]], length: int, inputs: dict[str, Any],
        targets: dict[str, Tensor], counts: dict[str, float],
    ) -> None:  # fmt: skip
        index: list[int] = []
        labels: list[int] = []
        direct: list[bool] = []
        for row, (sample, text) in enumerate(zip(samples, texts)):
            start = max(1, len(sample.prompt) + sample.num_given)
            index.extend(range(row * length + start - 1, row * length + len(text) - 1))
            labels.extend(text[start:])
            direct.extend([TERM_OF_FORM[sample.form] == "direct"] * (len(text) - start))
        inputs["score_index"] = torch.tensor(index)
        targets["labels"] = torch.tensor(labels)
        targets["direct"] = torch.tensor(direct)
        counts["direct"] = float(sum(direct))
        counts["reasoning"] = float(len(direct) - sum(direct))

    def _ask_answer_head(
        self, samples: Sequence[Sample], length: int, inputs: dict[str, Any], targets: dict[str, Tensor],
        counts: dict[str, float],
    ) -> None:  # fmt: skip
        asked = [(row, s) for row, s in enumerate(samples) if s.answer_position is not None]
        counts["answer"] = 0.0
        unasked = not asked
        asked = asked or [(0, samples[0])]  # every process runs every part; see `Batch`
        own = [tuple(self._metadata(s).get("candidates") or self.candidates) for _, s in asked]
        if any(names != own[0] for names in own):
            ids = [self.tokenizer.encode_many(names) for names in own]
            most, longest = max(map(len, ids)), max(len(name) for names in ids for name in names)
            candidate_ids = torch.full((len(ids), most, longest), -1)
            for place, encoded_names in enumerate(ids):
                for number, encoded in enumerate(encoded_names):
                    candidate_ids[place, number, : len(encoded)] = torch.tensor(encoded)
        elif list(own[0]) == self.candidates and self._candidates is not None:
            candidate_ids, most = self._candidates, len(self.candidates)
        else:
            candidate_ids, most = self._pad(self.tokenizer.encode_many(own[0]), -1), len(own[0])
        right = torch.zeros(len(asked), most)
        real = torch.zeros(len(asked), most)
        for place, ((_, sample), names) in enumerate(zip(asked, own)):
            if unasked:
                break
            answer = self.records[sample.record].answer
            right[place, : len(names)] = torch.tensor([float(name in answer) for name in names])
            real[place, : len(names)] = 1
        inputs["answer_index"] = torch.tensor([row * length + (s.answer_position or 0) for row, s in asked])
        inputs["candidate_ids"] = candidate_ids
        targets["answers"], targets["answers_real"] = right, real
        counts["answer"] = float(real.sum())

    def _ask_validator(
        self, samples: Sequence[Sample], rngs: Sequence[random.Random], inputs: dict[str, Any],
        targets: dict[str, Tensor], counts: dict[str, float],
    ) -> None:  # fmt: skip
        counts["consistency"] = 0.0
        if self.pair_maker is None:
            return
        pairs = [
            (row, pair)
            for row, (sample, rng) in enumerate(zip(samples, rngs))
            if sample.step_spans and rng.random() < self.pair_records_ratio
            for pair in self.pair_maker.pairs(sample, rng)
        ]
        counts["consistency"] = float(len(pairs))
        targets["valid_weight"] = torch.ones(len(pairs))
        if not pairs:
            pairs = [(0, StepPair(kind="valid", previous=[], step=samples[0].prompt))]
            targets["valid_weight"] = torch.zeros(1)
        texts = [(samples[row].prompt, pair.previous, pair.step) for row, pair in pairs]
        inputs |= validator_inputs(texts, self.max_pair_tokens)
        inputs["pair_record"] = torch.tensor([row for row, _ in pairs])
        targets["valid"] = torch.tensor([float(pair.valid) for _, pair in pairs])

    def _ground(
        self, samples: Sequence[Sample], rows: Sequence[int], length: int, inputs: dict[str, Any],
        targets: dict[str, Tensor], counts: dict[str, float],
    ) -> None:  # fmt: skip
        """Tokens whose attention is supervised where the data know boxes, otherwise the rows to contrast."""
        if not self._has_boxes:
            chains = torch.tensor([row >= 0 and sample.form == REASONING for row, sample in zip(rows, samples)])
            inputs["want_pooled"] = True
            targets["contrast"] = chains
            counts["multimodal"] = float(chains.sum()) if chains.sum() > 1 else 0.0
            return
        index: list[int] = []
        masks: list[Tensor] = []
        for row, sample in enumerate(samples):
            for step, mask in sample.attend:
                start, end = sample.step_spans[step]
                index.extend(range(row * length + start, row * length + end))
                masks.append(mask.expand(end - start, -1))
        counts["multimodal"] = float(len(index))
        inputs["ground_index"] = torch.tensor(index or [0])
        # an empty mask counts nothing
        targets["ground"] = torch.cat(masks) if masks else torch.zeros(1, 1, dtype=torch.bool)

    @staticmethod
    def _sample_inputs(
        samples: Sequence[Sample], rngs: Sequence[random.Random], length: int, teacher_forcing: float,
        inputs: dict[str, Any],
    ) -> None:  # fmt: skip
        if teacher_forcing >= 1:
            return
        chosen = []
        for row, (sample, rng) in enumerate(zip(samples, rngs)):
            if sample.step_spans:
                positions = np.concatenate([np.arange(start, end) for start, end in sample.step_spans])
                draws = np.random.default_rng(rng.getrandbits(64)).random(len(positions))
                chosen.append(row * length + positions[draws >= teacher_forcing])
        index = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        inputs["sampled_index"] = torch.from_numpy(index)

    def _dense(self, samples: Sequence[Sample], targets: dict[str, Tensor], counts: dict[str, float]) -> None:
        assert self.dense_labels is not None
        labels = [
            self.dense_labels.of(self.records[s.record].metadata if s.record >= 0 else {}) for s in samples
        ]  # fmt: skip
        targets["dense"] = torch.stack(labels)
        counts["dense"] = float((targets["dense"] >= 0).sum())

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def validator_inputs(
    texts: Sequence[tuple[list[int], list[int], list[int]]], limit: int = MAX_PAIR_TOKENS
) -> dict[str, Tensor]:
    """`pair_ids`, `pair_segments`, `pair_mask` of (question, previous steps, step), each given as ids.

    What is longer than `limit` is cut as `fit_pair` does it.
    """
    rows, segments = [], []
    names = PAIR_SEGMENTS
    for question, previous, step in (fit_pair(*text, limit) for text in texts):
        rows.append([*question, *previous, *step])
        segments.append(
            [names.index("question")] * len(question)
            + [names.index("previous")] * len(previous)
            + [names.index("step")] * len(step)
        )
    length = max(map(len, rows))
    return {
        "pair_ids": torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]),
        "pair_segments": torch.tensor([[*row, *[0] * (length - len(row))] for row in segments]),
        "pair_mask": torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None],
    }


class DenseLabels:
    """What is in each patch, from the boxes of the ground truth: one class per kind of thing and patch.

    Stage 3 learns to see from it; captions alone leave a small model blind.
    """

    def __init__(self, records: Sequence[ReasoningRecord], grid: int) -> None:
        found: dict[str, set[str]] = {}
        for record in with_fields(records, "boxes"):
            for box in known_boxes(record.metadata):
                if "label" in box and box["kind"] in (record.metadata.get("scene") or {}):
                    found.setdefault(box["kind"], set()).add(box["label"])
        self.classes = {kind: sorted(labels) for kind, labels in sorted(found.items())}
        """Kind -> labels; class 0 is 'not here', class 1 + i the i-th label."""
        self.grid = grid
        self._nothing = torch.full((grid * grid, len(self.classes)), -1)

    @property
    def sizes(self) -> list[int]:
        return [1 + len(labels) for labels in self.classes.values()]

    def of(self, metadata: Mapping[str, Any]) -> Tensor:
        """`[num_visual_tokens, kinds]` int64; -1 is not scored (no ground truth)."""
        boxes = known_boxes(metadata)
        return self._draw(boxes) if boxes else self._nothing

    def _draw(self, boxes: Sequence[Mapping[str, Any]]) -> Tensor:
        out = torch.zeros_like(self._nothing)
        kinds = list(self.classes)
        for box in boxes:
            if box.get("label") in self.classes.get(box["kind"], ()):
                value = 1 + self.classes[box["kind"]].index(box["label"])
                out[boxes_to_mask([box["box"]], self.grid), kinds.index(box["kind"])] = value
        return out

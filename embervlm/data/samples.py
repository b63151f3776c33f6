"""A record in one of its forms, as ids, and where its steps look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm.boxes import Grid, covered
from embervlm.data.images import padded_area
from embervlm.data.lazy import Lazy
from embervlm.data.records import ReasoningRecord
from embervlm.data.store import kept_array
from embervlm.data.tokenizer import CONCLUSION
from embervlm.progress import progress_bar

REASONING, DIRECT, CAPTION, EDITED = "reasoning", "direct", "caption", "edited"
ASKED, DRAWN = "asked", "drawn"


REMEMBERED_SAMPLES = 8192
"""Encoded samples that are kept, about 6 KB each; encoding one of 1 KB of text anew takes about 0.5 ms."""


ENCODED_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record in one form, as ids. All positions count from the start of the text."""

    record: int
    """Index into the records; -1 for a text that belongs to none."""
    form: str
    """`reasoning`, `direct`, `caption`, or `edited`: a chain about other facts than the picture shows. In phase 3 also
    `asked`, a question alone, and `drawn`, a chain of the model's own."""
    prompt: list[int]
    target: list[int]
    """The scored text: chain and answer, only the answer, or caption."""
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


def boxes_to_mask(boxes: Sequence[Sequence[float]], grid: Grid) -> Tensor:
    """Visual tokens that any of `boxes` (left, top, right, bottom in [0, 1]) covers, `[rows * columns]` bool."""
    # numpy, because torch takes ten times as long for something as small
    return torch.from_numpy(covered(boxes, grid))


class Samples(Lazy[Sample]):
    """Records in one form, encoded when they are used."""

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

    def item(self, place: int) -> Sample:
        return self._one(place)

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
        return self._counted if self._sizes_file is None else kept_array(self._sizes_file, self._count)

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


def known_boxes(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ground-truth boxes of a record: `{"kind", "box"}`, mostly with `label`; other spellings are not ours."""
    boxes = metadata.get("boxes")
    if not isinstance(boxes, (list, tuple)):
        return []
    return [box for box in boxes if isinstance(box, Mapping) and {"kind", "box"} <= set(box)]


def reads_a_box(metadata: Mapping[str, Any]) -> bool:
    """Whether a step is known to read off the picture what has a box."""
    seen = {kind for kinds in metadata.get("seen") or () for kind in kinds}
    return any(box["kind"] in seen for box in known_boxes(metadata))


def _mostly_covered(boxes: Sequence[Sequence[float]], grid: Grid) -> np.ndarray:
    """Visual tokens of which one of `boxes` covers more than half, `[rows * columns]` bool."""

    def covered(first: float, last: float, count: int) -> np.ndarray:
        edges = np.arange(count + 1) / count
        return np.maximum(np.minimum(edges[1:], last) - np.maximum(edges[:-1], first), 0) * count

    mask = np.zeros(grid, bool)
    for left, top, right, bottom in boxes:
        mask |= np.outer(covered(top, bottom, grid.rows), covered(left, right, grid.columns)) > 0.5
    return mask.ravel()


def boxes_in_square(record: ReasoningRecord, padded_size: int | None) -> list[Mapping[str, Any]]:
    """The known boxes as the model sees the picture: in the square that it is padded to, if it is."""
    boxes = known_boxes(record.metadata)
    if padded_size is None or record.image is None or not boxes:
        return boxes
    left, top, right, bottom = padded_area(record.image, padded_size)
    axes = [(left, right - left), (top, bottom - top)] * 2
    return [{**box, "box": [start + side * value for (start, side), value in zip(axes, box["box"])]} for box in boxes]


def _attention_targets(
    record: ReasoningRecord, grid: Grid, num_steps: int, padded_size: int | None
) -> tuple[tuple[int, Tensor], ...]:
    """From `boxes` and `seen` of the metadata, where a record has them: an entry for each step and thing that it reads.

    A visual token that a smaller thing mostly covers belongs to that one: nobody sees a place by looking at the load.
    """
    by_kind: dict[str, list[Sequence[float]]] = {}
    for box in boxes_in_square(record, padded_size):
        by_kind.setdefault(box["kind"], []).append(box["box"])
    seen = (record.metadata.get("seen") or ())[:num_steps]
    masks = {kind: covered(boxes, grid) for kind, boxes in by_kind.items()}
    sizes = {kind: int(mask.sum()) for kind, mask in masks.items()}
    mostly = {kind: _mostly_covered(boxes, grid) for kind, boxes in by_kind.items()}
    own = {}
    for kind, mask in masks.items():
        left = mask.copy()
        for other in masks:
            if sizes[other] < sizes[kind]:
                left &= ~mostly[other]
        own[kind] = torch.from_numpy(left if left.any() else mask)
    return tuple((step, own[kind]) for step, kinds in enumerate(seen) for kind in dict.fromkeys(kinds) if kind in own)

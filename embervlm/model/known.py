"""Is a question one of those that the model was trained on? Its words, and its picture, beside those of training.

Fitted on a run's own records without any example of what is off. An evaluation does it and leaves the file in the
checkpoint; see `embervlm.evaluation.known`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embervlm import run_dir
from embervlm.errors import UserError

NUM_CHARACTERS, NUM_COLUMNS = 4, 1 << 16
"""Questions are compared by their groups of 4 characters, each in one of 65,536 columns."""
BANK_TOKENS = 4096
"""Visual tokens of training pictures that are kept."""
UNLIKE = 999.0
"""The odds against what is unlike all of training: its `known` is 0.001."""
FEW = 0.01
"""A kind of record that is a smaller share of the training data counts as unknown."""
UNUSUAL = 0.8
"""Quantile of the wordings of training from which on they are unusual."""
UNLIKE_QUESTION = "The question is unlike those that the model was trained on."
UNLIKE_PICTURE = "The picture is unlike those that the model was trained on."
NO_PICTURE = "There is no picture, and the questions that the model was trained on had one."
NO_PICTURE_WANTED = "There is a picture, and the questions that the model was trained on had none."
Verdict = tuple[float, str]
"""How well a question is known, in [0, 1], and the sentence that says what is least known of it."""
NAMES = ("bank", "centre", "spread", "indptr", "columns", "counts", "scales", "with_picture_share")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the training data look like. Its tensors are on the CPU, whatever the model's device."""

    bank: Tensor
    """`[tokens, hidden]` float16, visual tokens of training pictures, standardised; none where there was no picture."""
    centre: Tensor
    """`[hidden]` float32, mean of the visual tokens; `spread` is their standard deviation."""
    spread: Tensor
    indptr: Tensor
    """Distinct training questions as a sparse matrix in CSR form: `[questions + 1]`, and for each group of characters
    its column and its number in the question."""
    columns: Tensor
    counts: Tensor
    scales: Tensor
    """`[3, 3]` float64: the distances of pictures, of questions, and the evenness of pictures, up to which `known` is
    1, where it is 0.5 (the limit), and where it is 0.001. Files of before have no evenness."""
    with_picture_share: Tensor
    """`[1]`, share of the training records that have a picture."""

    @classmethod
    def fit(
        cls,
        pictures: Tensor,
        val_pictures: Tensor,
        questions: Sequence[str],
        val_questions: Sequence[str],
        with_picture_share: float,
    ) -> Known:
        """From training data, and from val data for the distances that are usual.

        19 val records in 20 are as near as is usual. One val picture in a hundred is beyond the limit, and none is more
        even than its limit: an empty picture, whose every token is one of some training picture's. A question
        may go half-way from the more unusual wordings of training (each measured against the others) to a text that
        has nothing in common with them: not from the most unusual ones, since among many questions of one form the only
        one of another form is as far from them as any text.

        Args:
            pictures: `[pictures, num_visual_tokens, hidden]`, projected; `val_pictures` likewise; either may be empty.
            questions: distinct wordings.
        """
        if not len(val_pictures):  # then nothing says how far is usual
            pictures = pictures[:0]
        tokens = pictures.flatten(0, 1).float().cpu()
        centre, spread = torch.zeros(tokens.shape[-1]), torch.ones(tokens.shape[-1])
        if len(tokens):
            centre, spread = tokens.mean(0), tokens.std(0).clamp_min(1e-6)
        some = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:BANK_TOKENS]
        groups = [_groups(text) for text in questions]
        found = cls(
            bank=((tokens[some] - centre) / spread).half(),
            centre=centre,
            spread=spread,
            indptr=torch.tensor(np.cumsum([0, *map(len, groups)])),
            columns=torch.tensor([column for one in groups for column in one], dtype=torch.int32),
            counts=torch.tensor([count for one in groups for count in one.values()], dtype=torch.int32),
            scales=torch.zeros(3, 3, dtype=torch.float64),
            with_picture_share=torch.tensor([with_picture_share], dtype=torch.float64),
        )
        if len(tokens):
            far = np.array(found.picture_distances(val_pictures))
            median, usual, limit = np.quantile(far, [0.5, 0.95, 0.99])
            found.scales[0] = torch.tensor([usual, limit, limit + (limit - median)])
            even = np.array(found.evenness(val_pictures))
            median, usual, limit = np.quantile(even, [0.5, 0.95, 1.0])
            found.scales[2] = torch.tensor([usual, limit, limit + (limit - median)])
        others = found._similarities(found._matrix)
        np.fill_diagonal(others, 0)
        unusual = float(np.quantile(1 - others.max(1), UNUSUAL)) if len(questions) > 1 else 0.5
        usual, limit = np.quantile(found.question_distances(val_questions), [0.95, 0.99])
        found.scales[1] = torch.tensor([usual, max((min(unusual, 0.8) + 1) / 2, limit), 1.0])
        return found

    def of(
        self, visual: Tensor, image_mask: Tensor, questions: Sequence[str], last: Sequence[str] | None = None
    ) -> list[Verdict]:
        """A verdict on each question.

        Args:
            visual: `[batch, num_visual_tokens, hidden]`, projected.
            image_mask: `[batch]` bool, which have a picture.
            last: of follow-ups, which `questions` have behind the questions before, their own words. Unless both
                together are as training had them, these have to be known too: few strange words make a long known
                question no strange one.
        """
        words = [self._known(1, far) for far in self.question_distances(questions)]
        if last is not None:
            own = [self._known(1, far) for far in self.question_distances(last)]
            words = [both if both == 1 else min(both, alone) for both, alone in zip(words, own, strict=True)]
        pictures = [1.0] * len(questions)
        if len(self.bank):
            pictures = [self._known(0, far) for far in self.picture_distances(visual)]
            if len(self.scales) > 2:
                pictures = [min(near, self._known(2, even)) for near, even in zip(pictures, self.evenness(visual))]
        share = float(self.with_picture_share)
        out = []
        for known, picture, has_one in zip(words, pictures, image_mask.tolist(), strict=True):
            found = [(known, UNLIKE_QUESTION)]
            if has_one:
                found.append((min(1.0, share / (2 * FEW)), NO_PICTURE_WANTED))
                found.append((picture, UNLIKE_PICTURE))
            else:
                found.append((min(1.0, (1 - share) / (2 * FEW)), NO_PICTURE))
            out.append(min(found))
        return out

    def picture_distances(self, visual: Tensor) -> list[float]:
        """For each picture the mean over its tokens of the distance to the nearest training token."""
        bank, lengths, centre, spread = self._on(visual.device)
        tokens = (visual.float() - centre) / spread
        # |t - b|^2 = |t|^2 + (|b|^2 - 2 t b); picture by picture, for memory's sake
        nearest = torch.stack([torch.addmm(lengths, one, bank, alpha=-2).amin(1) for one in tokens])
        return (nearest + tokens.square().sum(-1)).clamp_min(0).sqrt().mean(1).tolist()  # type: ignore[no-any-return]

    def evenness(self, visual: Tensor) -> list[float]:
        """For each picture how alike its tokens are: the negative logarithm of their mean deviation, standardised."""
        _, _, centre, spread = self._on(visual.device)
        tokens = (visual.float() - centre) / spread
        return (-tokens.std(1, correction=0).mean(-1).clamp_min(1e-6).log()).tolist()  # type: ignore[no-any-return]

    def question_distances(self, questions: Sequence[str]) -> list[float]:
        """1 - cosine to the nearest training question, in [0, 1]; groups of characters weighed by how rare they are
        (tf-idf, Manning et al. 2008, section 6.4)."""
        groups = [_groups(text) for text in questions]
        indptr = np.cumsum([0, *map(len, groups)])
        columns = np.array([column for one in groups for column in one], dtype=np.int32)
        counts = np.array([count for one in groups for count in one.values()], dtype=np.int32)
        return [float(far) for far in 1 - self._similarities(self._weighed(indptr, columns, counts)).max(1)]

    def save(self, checkpoint: Path) -> None:
        """Write the file. `WriteError` if this fails; the old one stays."""
        from safetensors.torch import save

        path = known_path(checkpoint)
        with run_dir.naming_unwritten(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".tmp-{path.name}")
            part.write_bytes(save({name: getattr(self, name).contiguous() for name in NAMES}))
            part.replace(path)

    def _known(self, row: int, far: float) -> float:
        usual, limit, unlike = self.scales[row].tolist()
        if far <= limit:
            return 1 - 0.5 * max(0.0, far - usual) / max(limit - usual, 1e-6)
        beyond = (far - limit) / max(unlike - limit, 0.02 * limit, 1e-6)
        return float(1 / (1 + UNLIKE ** min(beyond, 100.0)))

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The bank, transposed, the squared lengths of its tokens, centre and spread."""
        if device not in self._copies:
            bank = self.bank.float()
            parts = (bank.T.contiguous(), bank.square().sum(1), self.centre, self.spread)
            self._copies[device] = tuple(part.to(device) for part in parts)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    @cached_property
    def _rarity(self) -> np.ndarray:
        """Weight of each column: 1 where every question has it."""
        num = len(self.indptr) - 1
        having = np.bincount(self.columns.numpy(), minlength=NUM_COLUMNS)
        return np.log((1 + num) / (1 + having)) + 1  # type: ignore[no-any-return]

    @cached_property
    def _matrix(self) -> Any:
        return self._weighed(self.indptr.numpy(), self.columns.numpy(), self.counts.numpy())

    def _weighed(self, indptr: np.ndarray, columns: np.ndarray, counts: np.ndarray) -> Any:
        """Sparse rows of length 1."""
        from scipy.sparse import csr_array

        values = (1 + np.log(counts)) * self._rarity[columns]
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        lengths = np.sqrt(np.bincount(rows, values**2, minlength=len(indptr) - 1))
        return csr_array((values / lengths[rows], columns, indptr), shape=(len(indptr) - 1, NUM_COLUMNS))

    def _similarities(self, rows: Any) -> np.ndarray:
        """`[rows, questions]`, in [0, 1]."""
        return (rows @ self._matrix.T).toarray()  # type: ignore[no-any-return]


def known_path(checkpoint: str | Path) -> Path:
    """Path of what the last evaluation of a checkpoint found its training data to look like."""
    return Path(checkpoint) / run_dir.EVALS / "known.safetensors"


def read_known(checkpoint: str | Path) -> Known | None:
    """What a checkpoint's training data look like; None if no evaluation has fitted it. UserError if damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = known_path(checkpoint)
    if not path.exists():
        return None
    try:
        tensors = load(path.read_bytes())
        return Known(**{name: tensors[name] for name in NAMES})
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:200]}); delete it and evaluate again") from error


def settled(
    results: Sequence[dict[str, Any]], found: Sequence[Verdict] | None, min_known: float
) -> list[dict[str, Any]]:
    """The results as a user gets them: `known`, `why`, and an `answer` that is None where there is none to trust.

    `confidence` is multiplied by `known`. `answer_set` and `text` stay as they were written.

    Args:
        found: of `Known.of`; None where it was not fitted, so that `known` is None and no question is refused.
    """
    out = []
    for place, result in enumerate(results):
        result = {**result, "known": None, "why": _no_answer(result)}
        if found is not None:
            result["known"], why = found[place]
            result["confidence"] *= result["known"]
            if result["known"] < min_known:
                result["why"] = why
        if result["why"] is not None:
            result["answer"] = None
        out.append(result)
    return out


def _no_answer(result: Mapping[str, Any]) -> str | None:
    """Why a result has no answer; None where it has one."""
    if result["answer_set"]:
        return None
    if result["cut_off"]:
        limit = {"steps": "max_reasoning_steps", "tokens": "max_new_tokens"}[result["cut_off"]]
        return f"The text was cut off by {limit} before it came to an answer."
    if result["text"]:
        return f'The model wrote "{result["text"][:80]}", which is none of its answers.'
    return "The model wrote no answer."


def _groups(text: str) -> Counter[int]:
    """Column -> number of the groups of characters in `text`, upper and lower case alike."""
    text = f" {' '.join(text.lower().split())} "
    starts = range(max(1, len(text) - NUM_CHARACTERS + 1))
    return Counter(zlib.crc32(text[at : at + NUM_CHARACTERS].encode(errors="replace")) % NUM_COLUMNS for at in starts)

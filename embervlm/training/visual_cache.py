"""Visual tokens of a frozen vision encoder, computed once per picture."""

from __future__ import annotations

import torch
from torch import Tensor

from embervlm.data.collate import Batch
from embervlm.data.images import PictureCache
from embervlm.model.embervlm import EmberVLM
from embervlm.progress import progress_bar
from embervlm.world import World

MAX_BYTES = 4 << 30
"""Above this size, the pictures are encoded again at every step."""


class VisualCache:
    """Projected visual tokens of every picture, on the CPU."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    @classmethod
    def build(cls, model: EmberVLM, pictures: PictureCache, world: World, chunk: int = 128) -> VisualCache | None:
        """Each process encodes its share of the pictures; None without pictures, or if the tokens would not fit.

        Call before wrapping.
        """
        shape = (len(pictures.array), model.num_visual_tokens, model.language_model.hidden_size)
        if not 0 < 4 * shape[0] * shape[1] * shape[2] <= MAX_BYTES:
            return None
        tokens = torch.zeros(shape)
        model.to(world.device).eval()
        with torch.no_grad():
            mine = range(world.rank * chunk, shape[0], world.size * chunk)
            quiet = world.rank > 0
            for start in progress_bar(mine, desc=f"pictures, {chunk} at a time", unit="part", delay=2, disable=quiet):
                block = torch.from_numpy(pictures.array[start : start + chunk].copy()).to(world.device)
                tokens[start : start + chunk] = model.see(model.normalise(block)).float().cpu()
        if world.size > 1:
            tokens = world.sum(tokens.to(world.device)).cpu()
        return cls(tokens)

    def fill(self, batch: Batch, dtype: torch.dtype) -> None:
        """Put the visual tokens into the batch's inputs; zeros for records without a picture."""
        batch.inputs["visual"] = self.tokens(batch.picture_index).to(dtype)

    def tokens(self, rows: Tensor) -> Tensor:
        """Visual tokens of the pictures at `rows`; zeros for -1, which is none."""
        return self._tokens.index_select(0, rows.clamp_min(0)) * (rows >= 0)[:, None, None]

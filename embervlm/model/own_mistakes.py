"""The model's own mistakes, for its step validator to learn from.

Mistakes that somebody plants surprise the model, and a validator learns to look for surprise. The model's own do not:
it makes them where it hesitates. So in each chain the place is found where it leans most towards another value than the
known one, and the validator is asked about that step as the model would have gone on with its own value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from embervlm.data.negatives import MAX_PAIR_TOKENS, PAIR_SEGMENTS
from embervlm.model.inputs import Inputs


@torch.no_grad()
def own_mistakes(
    predict: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    vocab_size: int,
    visual: Tensor,
    batch: Inputs,
    token_logits: Tensor,
) -> dict[str, Tensor]:
    """The pairs of `Inputs`: of each chain in `batch.own_record` the likeliest mistake.

    Args:
        predict: `EmberVLMNetwork.with_own_predictions`.
        vocab_size: Tokens that are text; those of Stage 4 behind them are no mistake.
        token_logits: `[scored, vocab]`.
    """
    record, prompt, places = batch.own_record, batch.own_prompt, batch.own_places
    assert record is not None and prompt is not None and places is not None
    row, column, start, end = places.unbind(-1)
    gold = batch.input_ids[record[:, None], column]
    scores = token_logits.index_select(0, row.flatten()).float()
    of_gold = scores.log_softmax(-1).gather(1, gold.view(-1, 1)).view(gold.shape)
    likeliest_wrong = of_gold.argmin(1)
    others = scores.scatter(1, gold.view(-1, 1), -torch.inf)[:, :vocab_size].view(*gold.shape, -1)
    chain = torch.arange(len(record), device=record.device)
    wrong = others[chain, likeliest_wrong].argmax(-1)
    column, start, end = (values[chain, likeliest_wrong][:, None] for values in (column, start, end))

    length = min(batch.own_length or MAX_PAIR_TOKENS, MAX_PAIR_TOKENS)
    ids = batch.input_ids.index_select(0, record)[:, :length]
    columns = torch.arange(ids.shape[1], device=record.device)
    mask = columns < end
    ids = ids.scatter(1, column, wrong[:, None])
    follow = ((columns > column) & mask).flatten().nonzero().squeeze(1)
    seen, sees = visual.index_select(0, record), batch.image_mask.index_select(0, record)
    ids = predict(seen, sees, ids, mask, follow)  # as it would have gone on
    segments = torch.full_like(ids, PAIR_SEGMENTS.index("previous"))
    segments = segments.masked_fill(columns < prompt[:, None], PAIR_SEGMENTS.index("question"))
    segments = segments.masked_fill((columns >= start) & mask, PAIR_SEGMENTS.index("step"))
    return {"pair_ids": ids, "pair_segments": segments, "pair_mask": mask, "pair_record": record}


def together(pairs: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both sets of pairs as one."""
    length = max(pairs["pair_ids"].shape[1], more["pair_ids"].shape[1])
    out = {}
    for name, values in pairs.items():
        both = (values, more[name])
        out[name] = torch.cat([F.pad(v, (0, length - v.shape[1])) if v.dim() == 2 else v for v in both])
    return out

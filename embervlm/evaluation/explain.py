"""The attention of a chain and the scores of the model's own step validator: shown, never a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embervlm.data.collate import padded, validator_inputs
from embervlm.data.images import Area
from embervlm.data.negatives import PAIR_SEGMENTS, fit_pair
from embervlm.data.samples import Grid, boxes_to_mask
from embervlm.model.judging import judge_texts, step_probabilities
from embervlm.model.network import EmberVLMNetwork


@torch.inference_mode()
def explain_chains(
    model: EmberVLMNetwork,
    visual: Tensor,
    seen: Tensor,
    instructions: Sequence[str],
    chains: Sequence[Sequence[str]],
    *,
    judged: bool = True,
) -> list[dict[str, Any]]:
    """For each chain `attention` (`{"grid", "steps"}`, or None without a picture) and, if `judged`, `validator_scores`.

    A chain that is longer in its usual tokens than the language model reads has no attention.

    The chains are read once. Attention is the reasoning head's last layer, the one that learns to look, averaged over
    its heads and the step's tokens; the share that goes past the picture is left out, so that a step sums to 1.
    Args:
        visual, seen: As `see` gives them, one row for each chain.
    """
    prompts = model.tokenizer.prompts(instructions)
    steps = [model.tokenizer.step_ids(chain) for chain in chains]
    start = model.tokenizer.ids["<|reasoning_start|>"]
    rows = [[*prompt, start, *(t for step in own for t in step)] for prompt, own in zip(prompts, steps)]
    unread = [place for place, row in enumerate(rows) if model.text_room is not None and len(row) > model.text_room]
    for place in unread:
        rows[place], steps[place] = rows[place][:1], []
    input_ids = padded(rows, 0).to(visual.device)
    lengths = torch.tensor([len(row) for row in rows], device=visual.device)
    text_mask = torch.arange(input_ids.shape[1], device=visual.device) < lengths[:, None]
    hidden = model.read(visual, seen, input_ids, text_mask)
    hidden, attention = model.refine(hidden, input_ids, visual, seen, want_attention=True)
    assert attention is not None
    out: list[dict[str, Any]] = []
    for row, own in enumerate(steps):
        spans, at = [], len(prompts[row]) + 1
        for ids in own:
            spans.append((at, at + len(ids)))
            at += len(ids)
        looked = _looked(attention[row], spans, model.grid) if bool(seen[row]) else None
        out.append({"attention": looked})
        if judged:
            out[-1]["validator_scores"] = _validator_scores(
                model, visual[row : row + 1], seen[row : row + 1], prompts[row], own, spans, hidden[row], input_ids[row]
            )
    for place in unread:
        out[place]["attention"] = None
        if not judged:
            continue
        one = slice(place, place + 1)
        scores = step_probabilities(model, visual[one], seen[one], instructions[place], chains[place])
        out[place]["validator_scores"] = [round(score, 4) for score in scores]
    return out


def without_padding(attention: Mapping[str, Any], area: Area) -> dict[str, Any]:
    """The attention on the picture itself, which takes up `area` of its padded square, in rows and columns of its own.

    A visual token that reaches over the picture's edge counts with the share of it that is inside.
    """
    grid = Grid(*attention["grid"])
    down = _overlaps(area[1], area[3], grid.rows)
    across = _overlaps(area[0], area[2], grid.columns)
    steps = []
    for shares in attention["steps"]:
        inside = down @ np.reshape(shares, grid) @ across.T
        steps.append([round(float(value), 4) for value in (inside / max(inside.sum(), 1e-12)).flatten()])
    return {"grid": [len(down), len(across)], "steps": steps}


def _overlaps(first: float, last: float, count: int) -> np.ndarray:
    """`[parts, count]`: of `count` equal parts of [0, 1], the share that lies in each of about as large ones between
    `first` and `last`."""
    own = np.linspace(first, last, 1 + max(1, round((last - first) * count)))
    edges = np.arange(count + 1) / count
    return np.clip(np.minimum(own[1:, None], edges[1:]) - np.maximum(own[:-1, None], edges[:-1]), 0, None) * count


def looked_at(sample: Mapping[str, Any], seen: Sequence[Sequence[str]]) -> list[dict[str, list[float]]] | None:
    """For each step and each thing that it reads: the share of attention in the thing's box, and what the box covers.

    None without attention or boxes, or where the chain has not the steps of the gold one, for which `seen` says what
    each reads.
    """
    attention, boxes = sample["attention"], sample["boxes"] or ()
    if not attention or not boxes or len(seen) != len(attention["steps"]):
        return None
    out = []
    for shares, kinds in zip(attention["steps"], seen):
        step = {}
        for kind in kinds:
            if own := [box["box"] for box in boxes if box["kind"] == kind]:
                inside = boxes_to_mask(own, Grid(*attention["grid"])).numpy()
                step[kind] = [round(float(np.array(shares)[inside].sum()), 4), round(float(inside.mean()), 4)]
        out.append(step)
    return out


def attention_by_thing(chains: Sequence[Sequence[Mapping[str, Sequence[float]]] | None]) -> dict[str, dict[str, Any]]:
    """Kind of thing -> `num` of the steps that read it, mean `share` of their attention in its box, and `chance`: the
    box's mean share of the picture. `chains`: what `looked_at` gave.
    """
    found: dict[str, list[Sequence[float]]] = {}
    for chain in chains:
        for step in chain or ():
            for kind, values in step.items():
                found.setdefault(kind, []).append(values)
    return {
        kind: {"num": len(values), "share": float(share), "chance": float(chance)}
        for kind, values in sorted(found.items())
        for share, chance in [np.mean(values, axis=0)]
    }


def _looked(attention: Tensor, spans: Sequence[tuple[int, int]], grid: Grid) -> dict[str, Any]:
    steps = []
    for start, end in spans:
        mean = attention[min(start + 1, end - 1) : end, : grid.size].double().mean(0)
        steps.append([round(value, 4) for value in (mean / mean.sum().clamp_min(1e-12)).tolist()])
    return {"grid": list(grid), "steps": steps}


def _validator_scores(
    model: EmberVLMNetwork,
    visual: Tensor,
    seen: Tensor,
    prompt: list[int],
    steps: list[list[int]],
    spans: Sequence[tuple[int, int]],
    hidden: Tensor,
    ids: Tensor,
) -> list[float]:
    """The step validator's probability of each step.

    It reads states of question, steps before and step. These are the beginning of the chain's own states, unless
    something had to be cut off; such steps are read again.
    """
    if not steps:
        return []
    scores: list[float | None] = [None] * len(steps)
    begun, limit = ids[len(prompt) :].tolist(), model.max_pair_tokens
    texts = [(prompt, begun[: start - len(prompt)], step) for (start, _), step in zip(spans, steps)]
    whole = [index for index, text in enumerate(texts) if fit_pair(*text, limit) == text]
    if whole:
        pairs = {k: v.to(ids.device) for k, v in validator_inputs([texts[index] for index in whole], limit).items()}
        segments, mask = pairs["pair_segments"], pairs["pair_mask"]
        (first, _), (batch, last) = spans[0], segments.shape
        logits = model.token_logits(hidden[first - 1 : last - 1]).float()
        surprise = F.pad(F.cross_entropy(logits, ids[first:last], reduction="none"), (first, 0))
        found = model.reasoning_module.step_validator(
            visual.expand(batch, -1, -1),
            seen.expand(batch),
            hidden[:last].expand(batch, -1, -1),
            surprise * (segments == PAIR_SEGMENTS.index("step")),
            segments,
            mask,
        )
        for index, score in zip(whole, found.sigmoid().tolist()):
            scores[index] = score
    if cut := [index for index in range(len(steps)) if scores[index] is None]:
        some = [texts[index] for index in cut]
        found = judge_texts(model, visual.expand(len(cut), -1, -1), seen.expand(len(cut)), some)
        for index, score in zip(cut, found.sigmoid().tolist()):
            scores[index] = score
    return [round(score, 4) for score in scores if score is not None]

"""Drawing chains to train on: what the decoder writes, with the probability of every token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import results_of
from embervlm.model.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One chain as it was drawn."""

    ids: tuple[int, ...]
    """Behind the token that opens the reasoning."""
    log_probs: tuple[float, ...]
    closed: tuple[tuple[bool, bool], ...]
    result: dict[str, Any]
    """What `generate_with_reasoning` gives of it."""


@torch.inference_mode()
def draw(
    model: EmberVLM,
    visual: Tensor,
    image_mask: Tensor,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    decoding: Decoding,
    keys: Sequence[str],
) -> list[list[Drawn]]:
    """`decoding.num_chains` chains for each prompt. The model has to be in eval mode.

    Args:
        visual: `[prompts, num_visual_tokens, hidden]`; read once for all chains of a prompt, as is the prompt.
        choices: the candidates of each prompt's answer.
        keys: what the random numbers of each prompt's chains are made of, besides the chain's place among them: not of
            what is drawn beside them.
    """
    start = model.tokenizer.ids["<|reasoning_start|>"]
    with torch.autocast(visual.device.type, enabled=False):
        opened = [[*prompt, start] for prompt in prompts]
        writer = Writer(model, visual.to(model.visual_dtype), image_mask, opened, decoding, keep_log_probs=True)
        number = decoding.num_chains
        for place, row in enumerate(writer.everyone):
            row.random = random.Random(f"{keys[place // number]} {place % number}")
        writer.run()
        results = results_of(writer, [()] * len(prompts), choices)
    drawn = [
        Drawn(ids=tuple(row.ids), log_probs=tuple(row.log_probs), closed=tuple(row.closed), result=result)
        for row, result in zip(writer.everyone, results, strict=True)
    ]
    return [drawn[begin : begin + number] for begin in range(0, len(drawn), number)]


@torch.no_grad()
def log_probs_under(
    model: EmberVLM,
    visual: Tensor,
    image_mask: Tensor,
    prompt: Sequence[int],
    chains: Sequence[Drawn],
    temperature: float,
) -> list[tuple[float, ...]]:
    """The log-probabilities of the chains of one prompt by another model, read as training reads them."""
    ids = model.tokenizer.ids
    texts = [[*prompt, ids["<|reasoning_start|>"], *chain.ids] for chain in chains]
    length, first = max(map(len, texts)), len(prompt) + 1
    input_ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=visual.device)
    lengths = torch.tensor([len(text) for text in texts], device=visual.device)
    index = [row * length + at for row, text in enumerate(texts) for at in range(first - 1, len(text) - 1)]
    out = model(
        input_ids=input_ids,
        text_mask=torch.arange(length, device=visual.device) < lengths[:, None],
        image_mask=image_mask.expand(len(texts)),
        visual=visual.expand(len(texts), -1, -1),
        score_index=torch.tensor(index, device=visual.device),
    )
    scores = out.token_logits.float() / temperature
    closed = torch.zeros_like(scores, dtype=torch.bool)
    closed[:, [ids["<|step|>"], ids["<|conclusion|>"]]] = torch.tensor(
        [c for chain in chains for c in chain.closed], device=visual.device
    )
    labels = torch.tensor([token for chain in chains for token in chain.ids], device=visual.device)
    found = scores.masked_fill(closed, -torch.inf).log_softmax(-1).gather(1, labels[:, None])[:, 0].tolist()
    taken = iter(found)
    return [tuple(next(taken) for _ in chain.ids) for chain in chains]

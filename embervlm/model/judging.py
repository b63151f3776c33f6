"""What the model's own step validator says of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embervlm.data.collate import validator_inputs
from embervlm.model.network import EmberVLMNetwork


@torch.inference_mode()
def step_probabilities(
    model: EmberVLMNetwork, visual: Tensor, seen: Tensor, question: str, steps: Sequence[str]
) -> list[float]:
    """The step validator's probability that each step follows, in [0, 1]; `visual` and `seen` are of one picture."""
    if not steps:
        return []
    (prompt,), ids = model.tokenizer.prompts([question]), model.tokenizer.step_ids(steps)
    start = model.tokenizer.ids["<|reasoning_start|>"]
    previous = [[start, *(t for step in ids[:i] for t in step)] for i in range(len(ids))]
    texts = [(prompt, before, step) for before, step in zip(previous, ids)]
    logits = judge_texts(model, visual.expand(len(ids), -1, -1), seen.expand(len(ids)), texts)
    return logits.sigmoid().tolist()  # type: ignore[no-any-return]


def judge_texts(
    model: EmberVLMNetwork, visual: Tensor, seen: Tensor, texts: Sequence[tuple[list[int], list[int], list[int]]]
) -> Tensor:
    """The step validator's logits `[texts]`; a text is the ids of a question, of the steps before, and of the step."""
    inputs = validator_inputs(texts, model.max_pair_tokens)
    return model.judge_steps(visual, seen, **{name: value.to(visual.device) for name, value in inputs.items()})

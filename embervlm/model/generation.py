"""Writing chains and answers: batched, with a key-value cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embervlm.config import ConfigError
from embervlm.data.images import load_image
from embervlm.data.tokenizer import DIRECT_PROMPT, ReasoningTokenizer
from embervlm.model.confidence import set_confidence, written_confidence
from embervlm.model.decoding import Decoding, OnToken
from embervlm.model.known import Verdict, settled
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.voting import vote
from embervlm.model.writer import Row, Writer
from embervlm.words.chain_text import parse_answer


@torch.inference_mode()
def generate_answers(
    model: EmberVLMNetwork,
    images: Sequence[Any],
    instructions: Sequence[str],
    decoding: Decoding,
    on_token: OnToken | None = None,
) -> list[dict[str, Any]]:
    """One result per pair of picture and instruction; see `EmberVLM.generate_with_reasoning`."""
    if len(images) != len(instructions):
        raise ConfigError(f"{len(images)} pictures for {len(instructions)} instructions")
    check_length(model, instructions, decoding)
    if empty := [index for index, text in enumerate(instructions) if not text.strip()]:
        raise ConfigError(f"instruction {empty[0]} is empty; write a question or a task")
    with model.in_eval_mode():
        visual, seen = look(model, images)
        results = generate_from_visual(model, visual, seen, instructions, decoding, on_token=on_token)
    return settled(results, known_of(model, visual, seen, instructions, decoding), decoding.min_known)


def known_of(
    model: EmberVLMNetwork,
    visual: Tensor,
    seen: Tensor,
    questions: Sequence[str],
    decoding: Decoding,
    last: Sequence[str] | None = None,
) -> list[Verdict] | None:
    """What `settled` takes; None of a model that was never evaluated, and of a text that is only continued.

    Args:
        last: see `Known.of`.
    """
    return None if model.known is None or decoding.form == "text" else model.known.of(visual, seen, questions, last)


def check_length(model: EmberVLMNetwork, instructions: Sequence[str], decoding: Decoding) -> None:
    """ConfigError where picture, instruction and `max_new_tokens` are longer than the model's position table.

    Without `max_new_tokens` as much is written as there is room for; see `Writer`.
    """
    limit = model.language_model.max_positions
    if limit is None or decoding.max_new_tokens is None:
        return
    for index, prompt in enumerate(model.tokenizer.prompts(instructions)):
        length = model.num_visual_tokens + len(prompt) + decoding.max_new_tokens + 8
        if length > limit:
            raise ConfigError(
                f"instruction {index}: with the picture and {decoding.max_new_tokens} new tokens it has {length} "
                f"tokens, but the language model reads {limit}; shorten it or lower max_new_tokens"
            )


def look(model: EmberVLMNetwork, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Visual tokens of `images`, where None is no picture, and `[batch]` bool: which have one."""
    size = model.config.image_size
    pictures = torch.zeros(len(images), size, size, 3, dtype=torch.uint8)
    for index, image in enumerate(images):
        if image is not None:
            pictures[index] = torch.from_numpy(load_image(image, size=size, fill=model.config.fill).copy())
    return model.see_pictures(pictures), torch.tensor([image is not None for image in images], device=model.device)


@torch.inference_mode()
def generate_from_visual(
    model: EmberVLMNetwork,
    visual: Tensor,
    image_mask: Tensor,
    instructions: Sequence[str],
    decoding: Decoding,
    own_candidates: Sequence[Sequence[str] | None] = (),
    begun: Sequence[Sequence[int]] = (),
    on_token: OnToken | None = None,
) -> list[dict[str, Any]]:
    """The same from visual tokens `[batch, num_visual_tokens, hidden]`, in the precision of the weights, whatever
    `torch.autocast` says.

    Args:
        own_candidates: for each instruction the answers to choose among: none for an answer in free words, None for
            those of `decoding`.
        begun: for each instruction the ids of a chain, behind its start, that the model continues; the results'
            steps begin with it.
        on_token: hears of every token as it is written; what it raises ends the writing. With `num_chains` the texts
            of the first question come first.
    """
    tokenizer = model.tokenizer
    default = decoding.candidates or tuple(model.config.candidates)
    choices = [default if own is None else tuple(own) for own in own_candidates] or [default] * len(instructions)
    begun = begun or [()] * len(instructions)
    if decoding.reasoning:
        prompts = chain_prompts(tokenizer, instructions, begun)
    elif decoding.form == "direct":
        prompts = tokenizer.prompts([text + DIRECT_PROMPT for text in instructions])
    else:
        prompts = tokenizer.encode_many(instructions)
    with torch.autocast(visual.device.type, enabled=False):  # a step works on the weights as they are
        writer = Writer(model, visual.to(model.visual_dtype), image_mask, prompts, decoding, on_token)
        writer.run()
        results = results_of(writer, begun, choices)
    if decoding.num_chains == 1:
        return results
    return vote(model, visual, image_mask, instructions, results, weigh=decoding.weigh_votes and decoding.reasoning)


@torch.inference_mode()
def continue_ids(
    model: EmberVLMNetwork, visual: Tensor, image_mask: Tensor, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[list[int]]:
    """Prompts of ids, each with what the model writes behind it, in the order of the chains drawn for each."""
    start = [model.tokenizer.ids["<|reasoning_start|>"]] if decoding.reasoning else []
    with torch.autocast(visual.device.type, enabled=False):
        begun = [[*prompt, *start] for prompt in prompts]
        writer = Writer(model, visual.to(model.visual_dtype), image_mask, begun, decoding)
        writer.run()
    return [[*prompt, *row.ids] for prompt, row in zip(writer.for_each_chain(begun), writer.everyone)]


def chain_prompts(
    tokenizer: ReasoningTokenizer, instructions: Sequence[str], begun: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The ids that stand before what the model writes of a chain; `begun`: see `generate_from_visual`."""
    start = tokenizer.ids["<|reasoning_start|>"]
    return [[*prompt, start, *ids] for prompt, ids in zip(tokenizer.prompts(instructions), begun)]


def results_of(
    writer: Writer, begun: Sequence[Sequence[int]], choices: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """One result per text of a writer that is at its end; `begun` and `choices` of each question."""
    begun, choices = writer.for_each_chain(begun), writer.for_each_chain(choices)
    head = writer.head_probabilities(choices)
    return [
        _result(writer.model, row, ids, candidates, probabilities, writer.decoding)
        for row, ids, candidates, probabilities in zip(writer.everyone, begun, choices, head)
    ]


def _result(
    model: EmberVLMNetwork,
    row: Row,
    begun: Sequence[int],
    candidates: Sequence[str],
    head: Sequence[float] | None,
    decoding: Decoding,
) -> dict[str, Any]:
    """The parsed result of a written text, with the model's confidence. `head`: the answer head's probabilities."""
    tokenizer = model.tokenizer
    steps: list[str] = []
    if decoding.reasoning:
        steps, text = tokenizer.parse_generated([*begun, *row.ids])
    else:
        end = row.ids.index(tokenizer.end_of_text) if tokenizer.end_of_text in row.ids else len(row.ids)
        text = tokenizer.decode(row.ids[:end]).strip()
    answer = parse_answer(text or "", candidates) if candidates else tuple(filter(None, [text]))
    written = math.exp(row.answer_log_prob) if text else 0.0
    result: dict[str, Any] = {
        "reasoning_steps": steps,
        "answer": ", ".join(answer) if answer else (text or ""),
        "answer_set": list(answer),
        "text": text or "",
        "confidence": written if candidates else written_confidence(written, model.written_scale),
        "written_probability": written,
        "num_tokens": len(row.ids),
        "cut_off": row.cut_off,
    }
    if head is not None and candidates:
        result["head_probabilities"] = found = dict(zip(candidates, head))
        result["head_answer"] = [name for name, p in found.items() if p > 0.5] or [
            max(found, key=lambda name: found[name])
        ]
        if answer:
            result["confidence"] = set_confidence(found, answer, model.confidence_temperature)
    return result

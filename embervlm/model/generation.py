"""Writing chains and answers: batched, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from embervlm.config import ConfigError
from embervlm.data.chain_text import parse_answer
from embervlm.data.images import load_image
from embervlm.data.tokenizer import DIRECT_PROMPT

if TYPE_CHECKING:
    from embervlm.model.embervlm import EmberVLM


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is chosen."""

    max_reasoning_steps: int = 10
    """Most steps of a chain, its conclusion included."""
    max_new_tokens: int = 384
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int = 0
    form: str = "reasoning"
    """`reasoning`: chain and answer; `direct`: the answer alone; `text`: go on from the instruction as it stands."""
    candidates: tuple[str, ...] = ()
    """Answers to choose among; empty means those of the model's config."""

    def __post_init__(self) -> None:
        if self.max_reasoning_steps < 1 or self.max_new_tokens < 1:
            raise ConfigError("max_reasoning_steps and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must be at least 0 and top_p in (0, 1]")
        if self.form not in ("reasoning", "direct", "text"):
            raise ConfigError(f"form: {self.form!r} is not reasoning, direct or text")

    @property
    def reasoning(self) -> bool:
        return self.form == "reasoning"


def pictures_tensor(model: EmberVLM, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """`[batch, size, size, 3]` uint8 and `[batch]` bool, black and False where there is no picture."""
    size = model.config.image_size
    pictures = torch.zeros(len(images), size, size, 3, dtype=torch.uint8)
    for index, image in enumerate(images):
        if image is not None:
            pictures[index] = torch.from_numpy(load_image(image, size=size).copy())
    return pictures, torch.tensor([image is not None for image in images])


@torch.inference_mode()
def generate_answers(
    model: EmberVLM, images: Sequence[Any], instructions: Sequence[str], decoding: Decoding
) -> list[dict[str, Any]]:
    """One result per pair of picture and instruction; see `EmberVLM.generate_with_reasoning`."""
    if len(images) != len(instructions):
        raise ConfigError(f"{len(images)} pictures for {len(instructions)} instructions")
    check_length(model, instructions, decoding)
    if empty := [index for index, text in enumerate(instructions) if not text.strip()]:
        raise ConfigError(f"instruction {empty[0]} is empty; say what the robots should do")
    device = model.projection.norm.weight.device
    pictures, image_mask = pictures_tensor(model, images)
    was_training = model.training
    model.eval()
    try:
        visual = model.see(model.normalise(pictures.to(device)))
        return generate_from_visual(model, visual, image_mask.to(device), instructions, decoding)
    finally:
        model.train(was_training)


def check_length(model: EmberVLM, instructions: Sequence[str], decoding: Decoding) -> None:
    """ConfigError where picture, instruction and answer are longer than the language model's position table."""
    limit = getattr(model.language_model.backbone.config, "max_position_embeddings", None)
    if limit is None or model.tokenizer is None:
        return
    for index, text in enumerate(instructions):
        length = model.num_visual_tokens + len(model.tokenizer.encode(text)) + decoding.max_new_tokens + 8
        if length > limit:
            raise ConfigError(
                f"instruction {index}: with the picture and {decoding.max_new_tokens} new tokens it has {length} "
                f"tokens, the language model reads {limit}; shorten it or lower max_new_tokens"
            )


@torch.inference_mode()
def generate_from_visual(
    model: EmberVLM, visual: Tensor, image_mask: Tensor, instructions: Sequence[str], decoding: Decoding,
    own_candidates: Sequence[Sequence[str]] = (), begun: Sequence[Sequence[int]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The same from visual tokens `[batch, num_visual_tokens, hidden]`.

    Args:
        own_candidates: for each instruction the answers to choose among; where empty, those of `decoding`.
        begun: for each instruction the ids of a chain, behind its start, that the model goes on from; the results'
            steps begin with it.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer; attach_tokenizer() first")
    default = decoding.candidates or tuple(model.config.candidates)
    choices = [tuple(own) or default for own in own_candidates] or [default] * len(instructions)
    if decoding.reasoning:
        begun = begun or [()] * len(instructions)
        start = tokenizer.ids["<|reasoning_start|>"]
        prompts = [[*tokenizer.encode(text), start, *ids] for text, ids in zip(instructions, begun)]
    else:
        suffix = DIRECT_PROMPT if decoding.form == "direct" else ""
        prompts = [tokenizer.encode(text + suffix) for text in instructions]
    writer = _Writer(model, visual, image_mask, prompts, decoding)
    generated, log_probs = writer.run()
    head = writer.head_probabilities(choices)
    results = []
    for row, ids in enumerate(generated):
        if decoding.reasoning:
            steps, text = tokenizer.parse_generated([*begun[row], *ids])
        else:
            end = ids.index(tokenizer.end_of_text) if tokenizer.end_of_text in ids else len(ids)
            steps, text = [], tokenizer.decode(ids[:end]).strip()
        candidates = choices[row]
        answer = parse_answer(text or "", candidates)
        result: dict[str, Any] = {
            "reasoning_steps": steps,
            "answer": ", ".join(answer) if answer else (text or ""),
            "answer_set": list(answer),
            "text": text or "",
            "confidence": float(torch.tensor(log_probs[row]).exp()),
            "num_tokens": len(ids),
        }
        if head is not None:
            result["head_probabilities"] = dict(zip(candidates, head[row]))
            chosen = [name for name, p in zip(candidates, head[row]) if p > 0.5]
            result["head_answer"] = chosen or [candidates[max(range(len(candidates)), key=lambda i: head[row][i])]]
            if answer:  # how sure the answer head is of just this set
                likely = [p if name in answer else 1 - p for name, p in zip(candidates, head[row])]
                result["confidence"] = float(torch.tensor(likely).prod())
        results.append(result)
    return results


class _Writer:
    """One batch being written. Sequences are padded on the left of the text, behind the visual tokens."""

    def __init__(
        self, model: EmberVLM, visual: Tensor, image_mask: Tensor, prompts: list[list[int]], decoding: Decoding
    ) -> None:
        assert model.tokenizer is not None
        self.model, self.visual, self.image_mask, self.decoding = model, visual, image_mask, decoding
        self.ids = model.tokenizer.ids
        self.end_ids = torch.tensor(
            [self.ids["<|answer_end|>"], model.tokenizer.end_of_text], device=visual.device
        )  # fmt: skip
        longest = max(map(len, prompts))
        self.input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=visual.device)
        lengths = torch.tensor([len(p) for p in prompts], device=visual.device)
        self.text_mask = torch.arange(longest, device=visual.device) >= longest - lengths[:, None]
        self.language_cache, self.head_cache = DynamicCache(), DynamicCache()
        self.conclusion_state: Tensor | None = None
        self.use_head = decoding.reasoning or model.config.stage != 3
        self.generator = torch.Generator(visual.device).manual_seed(decoding.seed)

    def run(self) -> tuple[list[list[int]], list[float]]:
        """Generated ids without padding, and the log-probability of each row's answer part."""
        batch, device = self.input_ids.shape[0], self.input_ids.device
        hidden = self.model.read(self.visual, self.image_mask, self.input_ids, self.text_mask, self.language_cache)
        length = self.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        head_mask = causal & self.text_mask[:, None, None, :]
        head_mask = head_mask | torch.eye(length, dtype=torch.bool, device=device)  # a padded row must see something
        hidden = self._refine(hidden, self.input_ids, head_mask)[:, -1:]
        positions = self.image_mask.long() * self.visual.shape[1] + self.text_mask.sum(1)
        num_visual = self.visual.shape[1]
        room = self.decoding.max_new_tokens
        mask = torch.cat([self.image_mask[:, None].expand(-1, num_visual), self.text_mask], dim=1)
        mask = torch.cat([mask, mask.new_ones(batch, room)], dim=1)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        in_answer = torch.full_like(done, not self.decoding.reasoning)
        concluded = (self.input_ids == self.ids["<|conclusion|>"]).any(1)  # a prompt may hold a chain's beginning
        num_steps = (self.input_ids == self.ids["<|step|>"]).sum(1)
        out = torch.full((batch, room), -1, dtype=torch.long, device=device)
        answer_log_prob = torch.zeros(batch, device=device)
        self.conclusion_state = hidden[:, 0].clone()
        for index in range(room):
            scores = self.model.token_logits(hidden[:, 0]).float()
            full = concluded | (num_steps >= self.decoding.max_reasoning_steps - 1)
            scores[:, self.ids["<|step|>"]].masked_fill_(full, -torch.inf)
            scores[:, self.ids["<|conclusion|>"]].masked_fill_(concluded, -torch.inf)
            token = self._choose(scores)
            log_prob = scores.log_softmax(-1).gather(1, token[:, None])[:, 0]
            answer_log_prob += torch.where(in_answer & ~done, log_prob, 0.0)
            out[:, index] = torch.where(done, -1, token)
            in_answer |= token == self.ids["<|answer_start|>"]
            num_steps += token == self.ids["<|step|>"]
            done |= torch.isin(token, self.end_ids)
            if index % 8 == 7 and bool(done.all()):  # asking every step would wait for the device every step
                break
            step_ids = token[:, None]
            seen = num_visual + length + index + 1
            embeds = self.model.embed(step_ids).to(self.visual.dtype)
            hidden = self.model.language_model(embeds, mask[:, :seen].long(), positions[:, None], self.language_cache)
            hidden = self._refine(hidden, step_ids, mask[:, None, None, num_visual:seen])
            ends = token == self.ids["<|reasoning_end|>"]  # where the answer head reads a chain without conclusion
            concludes = ((token == self.ids["<|conclusion|>"]) | ends) & ~done & ~concluded
            concluded |= concludes
            self.conclusion_state = torch.where(concludes[:, None], hidden[:, 0], self.conclusion_state)
            positions = positions + 1
        rows = [[token for token in row if token >= 0] for row in out.tolist()]
        return rows, answer_log_prob.tolist()

    def head_probabilities(self, choices: Sequence[Sequence[str]]) -> list[list[float]] | None:
        """The answer head's probability of each candidate of each row, from the chain before its conclusion."""
        if not all(choices) or not self.use_head or self.conclusion_state is None:
            return None
        assert self.model.tokenizer is not None
        most = max(map(len, choices))
        encoded = [
            ids
            for names in choices
            for ids in [*self.model.tokenizer.encode_many(list(names)), *[[]] * (most - len(names))]
        ]
        ids = candidate_ids(encoded).view(len(choices), most, -1).to(self.visual.device)
        logits = self.model.reasoning_module.answer_head(
            self.conclusion_state, self.visual, self.image_mask, self.model.candidate_embeddings(ids)
        )
        return [row[: len(names)] for row, names in zip(logits.sigmoid().tolist(), choices)]

    def _refine(self, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        if not self.use_head:
            return hidden
        return self.model.refine(
            hidden, input_ids, self.visual, self.image_mask, text_mask=mask, cache=self.head_cache
        )[0]

    def _choose(self, scores: Tensor) -> Tensor:
        if self.decoding.temperature == 0:
            return scores.argmax(-1)
        probabilities = (scores / self.decoding.temperature).softmax(-1)
        if self.decoding.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered > self.decoding.top_p
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


def candidate_ids(encoded: Sequence[Sequence[int]]) -> Tensor:
    """`[candidates, longest]` int64, padded with -1."""
    longest = max(map(len, encoded))
    return torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in encoded])

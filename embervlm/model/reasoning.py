"""What Stage 4 adds to the backbone: reasoning head, step validator, answer head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from embervlm.data.negatives import MAX_PAIR_TOKENS, PAIR_SEGMENTS
from embervlm.data.tokenizer import SPECIAL_TOKENS
from embervlm.model.config import EmberVLMConfig
from embervlm.model.layers import Block


class ReasoningModule(nn.Module):
    """The three parts together; its weights alone are `reasoning_module.bin`."""

    def __init__(self, config: EmberVLMConfig, hidden_size: int, num_visual_tokens: int) -> None:
        super().__init__()
        self.reasoning_head = ReasoningHead(config, hidden_size)
        self.step_validator = StepValidator(config, hidden_size, num_visual_tokens)
        self.answer_head = AnswerHead(hidden_size)


class ReasoningHead(nn.Module):
    """Two-layer transformer decoder over the language model's hidden states, looking at the visual tokens.

    Its output is added to the hidden states before the language model's own output embedding; the last projection
    starts at zero, so that an untrained head changes nothing. It also owns the embeddings of the tokens that Stage 4
    adds: they enter here and at the output, so that they learn while the language model is frozen.
    """

    def __init__(self, config: EmberVLMConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.reasoning_width
        self.token_embedding = nn.Embedding(len(SPECIAL_TOKENS), hidden_size)
        self.input = nn.Linear(hidden_size, width)
        self.visual_input = nn.Linear(hidden_size, width)
        self.nothing_seen = nn.Parameter(torch.zeros(1, 1, width))
        self.layers: Any = nn.ModuleList(
            Block(width, config.reasoning_ffn, config.reasoning_heads, cross=True)
            for _ in range(config.reasoning_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.reset_output()

    def reset_output(self) -> None:
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        hidden: Tensor,
        visual: Tensor,
        visual_mask: Tensor,
        text_mask: Tensor | None = None,
        cache: Cache | None = None,
        want_attention: bool = False,
        looked: Looked | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Refined hidden states, and where asked the last layer's attention to the picture.

        Args:
            hidden: `[batch, length, hidden]` of the text positions.
            visual: `[batch, num_visual_tokens, hidden]`, projected.
            visual_mask: `[batch]` bool, False for a record without a picture.
            text_mask: `[batch, 1, length, keys]` bool, or what is added to attention scores; None means causal without
                padding to the left.
            cache: Key-value cache of the head's layers.
            want_attention: Also return `[batch, length, num_visual_tokens]`, averaged over heads.
            looked: What `look` gave for the pictures, to be used for many tokens.
        """
        states = self.input(hidden)
        looked = looked or self.look(visual, visual_mask)
        attention = None
        causal = text_mask is None and hidden.shape[1] > 1  # a single token may look at all that is cached
        for index, layer in enumerate(self.layers):
            normed = layer.self_norm(states)
            key, value = layer.self_attention.keys_values(normed)
            if cache is not None:
                key, value = cache.update(key, value, index)
            states = states + layer.self_attention(normed, key, value, text_mask, is_causal=causal)
            normed = layer.cross_norm(states)
            key, value = looked.keys_values[index]
            if want_attention and index == len(self.layers) - 1:
                attention = layer.cross_attention.weights(normed, key, looked.visible)[:, :, 1:]
            states = states + layer.cross_attention(normed, key, value, looked.visible)
            states = states + layer.ffn(layer.ffn_norm(states))
        return hidden + self.output(self.norm(states)), attention

    def look(self, visual: Tensor, visual_mask: Tensor, everyone_sees: bool = False) -> Looked:
        """Keys and values of the pictures for every layer.

        Args:
            everyone_sees: every record has a picture, so that no mask is needed.
        """
        batch, num_visual = visual.shape[:2]
        seen = self.visual_input(visual)
        seen = torch.cat([self.nothing_seen.expand(batch, 1, -1).to(seen.dtype), seen], dim=1)
        visible = None
        if not everyone_sees:
            visible = visual_mask[:, None].expand(batch, num_visual)
            visible = torch.cat([torch.ones_like(visible[:, :1]), visible], dim=1)[:, None, None, :]
        return Looked([layer.cross_attention.keys_values(seen) for layer in self.layers], visible)


@dataclass(frozen=True)
class Looked:
    """What a head's cross-attention needs of the pictures; the same for every token of a text."""

    keys_values: list[tuple[Tensor, Tensor]]
    """For each layer."""
    visible: Tensor | None
    """`[batch, 1, 1, 1 + num_visual_tokens]` bool; None where every record has a picture."""

    def packed(self) -> Looked:
        """In one piece each, which attention reads faster token for token."""
        return Looked([(key.contiguous(), value.contiguous()) for key, value in self.keys_values], self.visible)

    @classmethod
    def together(cls, parts: Sequence[Looked]) -> Looked:
        """The rows of all `parts`."""
        pairs = [
            (torch.cat([key for key, _ in of_layer]), torch.cat([value for _, value in of_layer]))
            for of_layer in zip(*(part.keys_values for part in parts))
        ]
        if all(part.visible is None for part in parts):
            return cls(pairs, None)
        rows = [(part.visible, part.keys_values[0][0]) for part in parts]
        everything = [
            key.new_ones((len(key), 1, 1, key.shape[2]), dtype=torch.bool) if visible is None else visible
            for visible, key in rows
        ]
        return cls(pairs, torch.cat(everything))

    def rows(self, kept: Tensor) -> Looked:
        """Of these rows of the batch."""
        pairs = [(key[kept], value[kept]) for key, value in self.keys_values]
        return Looked(pairs, None if self.visible is None else self.visible[kept])


class StepValidator(nn.Module):
    """Binary classifier: is `step` a valid next step after `previous`, for this picture and question?

    It reads all four: a validator that sees only the two steps accepts fluent chains of another picture. Of the text it
    reads the states of the model that reasons, and how surprising each token of the step is to it: what contradicts the
    picture or the steps before is mostly what this model would not have said.
    """

    MAX_LENGTH = MAX_PAIR_TOKENS
    SEGMENTS = PAIR_SEGMENTS
    SMALLEST_SURPRISE = 0.01
    """In nats. The validator reads surprise by its order of magnitude from here on: what the model says of itself while
    it hesitates lies below one nat, what somebody plants far above."""

    def __init__(self, config: EmberVLMConfig, hidden_size: int, num_visual_tokens: int) -> None:
        super().__init__()
        width = config.validator_width
        self.input = nn.Linear(hidden_size, width)
        self.surprise = nn.Linear(1, width)
        self.surprise_by_magnitude = config.surprise_by_magnitude
        self.segment = nn.Embedding(len(self.SEGMENTS), width)
        self.position = nn.Embedding(self.MAX_LENGTH, width)
        self.visual_position = nn.Embedding(num_visual_tokens, width)
        self.layers: Any = nn.ModuleList(
            Block(width, config.validator_ffn, config.validator_heads, cross=False)
            for _ in range(config.validator_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.score = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(
        self, visual: Tensor, visual_mask: Tensor, text: Tensor, surprise: Tensor, segments: Tensor, mask: Tensor
    ) -> Tensor:
        """Logits `[pairs]`; positive means valid.

        Args:
            visual: `[pairs, num_visual_tokens, hidden]`, projected.
            visual_mask: `[pairs]` bool.
            text: `[pairs, length, hidden]` states of question, previous steps and step.
            surprise: `[pairs, length]`, `-log p` of each token of the step in nats, 0 elsewhere.
            segments: `[pairs, length]` int64, index into `SEGMENTS`.
            mask: `[pairs, length]` bool, False at padding.
        """
        pairs, num_visual = visual.shape[:2]
        if text.shape[1] > self.MAX_LENGTH:
            raise ValueError(f"question and steps have {text.shape[1]} tokens; the validator reads {self.MAX_LENGTH}")
        states = torch.cat([visual, text], dim=1)
        visual_segment = segments.new_zeros(pairs, num_visual)
        kinds = torch.cat([visual_segment, segments], dim=1)
        places = torch.arange(text.shape[1], device=text.device)
        seen = torch.arange(num_visual, device=text.device)
        where = torch.cat([self.visual_position(seen), self.position(places)])
        states = self.input(states) + self.segment(kinds) + where
        if self.surprise_by_magnitude:
            surprise = torch.log1p(surprise / self.SMALLEST_SURPRISE)
        unexpected = self.surprise(surprise.to(states.dtype)[..., None])
        states = states + torch.cat([torch.zeros_like(states[:, :num_visual]), unexpected], dim=1)
        visible = torch.cat([visual_mask[:, None].expand(pairs, num_visual), mask], dim=1)[:, None, None, :]
        for layer in self.layers:
            normed = layer.self_norm(states)
            states = states + layer.self_attention(normed, *layer.self_attention.keys_values(normed), visible)
            states = states + layer.ffn(layer.ffn_norm(states))
        of_step = (kinds == self.SEGMENTS.index("step")) & visible[:, 0, 0]
        weight = of_step.to(states.dtype)[..., None]
        pooled = (self.norm(states) * weight).sum(1) / weight.sum(1).clamp_min(1)
        return self.score(pooled).squeeze(-1).float()


class AnswerHead(nn.Module):
    """Scores any list of candidate answers from the chain before its conclusion and the picture.

    A linear projection into the space of the language model's token embeddings; several candidates may be right.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * hidden_size, hidden_size)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor, visual: Tensor, visual_mask: Tensor, candidates: Tensor) -> Tensor:
        """Logits `[batch, candidates]`; the probability of each being right is their sigmoid.

        Args:
            state: `[batch, hidden]` where the conclusion starts.
            visual: `[batch, num_visual_tokens, hidden]`, projected.
            visual_mask: `[batch]` bool.
            candidates: `[batch, candidates, hidden]` or `[candidates, hidden]`: mean token embedding of each answer.
        """
        seen = visual.mean(1) * visual_mask[:, None].to(visual.dtype)
        query = self.project(torch.cat([state, seen], dim=-1))
        unit = candidates / candidates.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        if unit.dim() == 2:
            return (query @ unit.T + self.bias).float()
        return (torch.einsum("bh,bch->bc", query, unit) + self.bias).float()

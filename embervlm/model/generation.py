"""Writing chains and answers: batched, with a key-value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from embervlm.config import ConfigError
from embervlm.data.collate import padded
from embervlm.data.images import load_image
from embervlm.data.record_fields import MAX_STEPS
from embervlm.data.tokenizer import DIRECT_PROMPT
from embervlm.model.cache import keep_rows, roomy_cache
from embervlm.model.config import EmberVLMConfig
from embervlm.model.decode import head_step, language_step
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.voting import set_confidence, vote
from embervlm.words.chain_text import parse_answer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is chosen."""

    max_reasoning_steps: int | None = None
    """Maximum number of steps, including the conclusion; None is the maximum of the training data, plus a margin."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; None as for the steps."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that together have this probability (nucleus sampling, Holtzman et al. 2020)."""
    seed: int = 0
    """Of the draws."""
    form: str = "reasoning"
    """`reasoning`: chain and answer; `direct`: only the answer; `text`: continue the instruction unchanged."""
    candidates: tuple[str, ...] = ()
    """Answers to choose among; empty means those of the model's config."""
    num_chains: int = 1
    """Chains that are drawn for each question, whose answers vote (self-consistency, Wang et al. 2023). Above 1, a
    temperature of 0 is one of 0.7."""
    weigh_votes: bool = False
    """Whether a vote counts as much as the step validator believes its chain: the mean probability of its steps."""

    def __post_init__(self) -> None:
        for name in ("max_reasoning_steps", "max_new_tokens", "num_chains"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name}: {limit} is less than 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must be at least 0 and top_p in (0, 1]")
        if self.form not in ("reasoning", "direct", "text"):
            raise ConfigError(f"form: {self.form!r} is not reasoning, direct or text")
        if self.num_chains > 1 and self.temperature == 0:  # all of them would be the same
            object.__setattr__(self, "temperature", VOTING_TEMPERATURE)

    @property
    def reasoning(self) -> bool:
        return self.form == "reasoning"

    def for_model(self, config: EmberVLMConfig) -> Decoding:
        """The same with every limit set: a given one stays, the others are those of the model."""
        longest = config.longest_answer_tokens if self.form == "direct" else config.longest_chain_tokens
        return replace(
            self,
            max_reasoning_steps=self.max_reasoning_steps or _with_margin(config.longest_chain_steps, 2, UNKNOWN_STEPS),
            max_new_tokens=self.max_new_tokens or _with_margin(longest, 16, UNKNOWN_TOKENS),
        )


VOTING_TEMPERATURE = 0.7
"""The temperature at which chains are drawn to vote, where none is given (Wang et al. 2023, section 3.1)."""
OnToken = Callable[[int, int], None]
"""Called with each token as it is written: its text's place in the batch, and the token's id."""
UNKNOWN_STEPS, UNKNOWN_TOKENS = MAX_STEPS + 1, 512
"""Limits where a checkpoint does not say what its training data needed."""


def _with_margin(longest: int | None, least: int, unknown: int) -> int:
    return unknown if longest is None else longest + max(least, longest // 4)


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
        return generate_from_visual(model, *look(model, images), instructions, decoding, on_token=on_token)


def check_length(model: EmberVLMNetwork, instructions: Sequence[str], decoding: Decoding) -> None:
    """ConfigError where picture, instruction and `max_new_tokens` are longer than the model's position table.

    Without `max_new_tokens` as much is written as there is room for; see `_Writer`.
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
        start = tokenizer.ids["<|reasoning_start|>"]
        prompts = [[*prompt, start, *ids] for prompt, ids in zip(tokenizer.prompts(instructions), begun)]
    elif decoding.form == "direct":
        prompts = tokenizer.prompts([text + DIRECT_PROMPT for text in instructions])
    else:
        prompts = tokenizer.encode_many(instructions)
    with torch.autocast(visual.device.type, enabled=False):  # a step works on the weights as they are
        writer = _Writer(model, visual.to(model.visual_dtype), image_mask, prompts, decoding, on_token)
        writer.run()
        head = writer.head_probabilities(writer.for_each_chain(choices))
    results = [
        _result(model, row, ids, candidates, probabilities, decoding)
        for row, ids, candidates, probabilities in zip(
            writer.everyone, writer.for_each_chain(begun), writer.for_each_chain(choices), head
        )
    ]
    if decoding.num_chains == 1:
        return results
    return vote(model, visual, image_mask, instructions, results, weigh=decoding.weigh_votes and decoding.reasoning)


def _result(
    model: EmberVLMNetwork,
    row: _Row,
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
    result: dict[str, Any] = {
        "reasoning_steps": steps,
        "answer": ", ".join(answer) if answer else (text or ""),
        "answer_set": list(answer),
        "text": text or "",
        "confidence": math.exp(row.answer_log_prob) if text else 0.0,
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


@dataclass(slots=True)
class _Row:
    """One text being written."""

    place: int
    """In the batch that was asked for."""
    num_steps: int
    concluded: bool
    in_answer: bool
    room: int
    """Tokens that it may have."""
    ids: list[int] = field(default_factory=list)
    answer_log_prob: float = 0.0
    done: bool = False
    cut_off: str | None = None
    """Which limit cut it off, `steps` or `tokens`: it was about to begin one more step, or had not come to its end."""


class _Writer:
    """One batch being written. Sequences are padded on the left of the text, behind the visual tokens.

    What a token means is followed in Python, row by row: that waits for the device once a token, and costs less than
    the dozens of small tensor operations it would take there. Rows that are done leave the batch in groups.
    """

    def __init__(
        self,
        model: EmberVLMNetwork,
        visual: Tensor,
        image_mask: Tensor,
        prompts: list[list[int]],
        decoding: Decoding,
        on_token: OnToken | None = None,
    ) -> None:
        self.model, self.visual, self.image_mask, self.on_token = model, visual, image_mask, on_token
        self.decoding = decoding.for_model(model.config)
        self.most_steps, most_tokens = self.decoding.max_reasoning_steps or 1, self.decoding.max_new_tokens or 1
        self.limit = limit = model.language_model.max_positions
        self.ids, self.base = model.tokenizer.ids, model.tokenizer.base_vocab_size
        self.end_ids = (self.ids["<|answer_end|>"], model.tokenizer.end_of_text)
        longest = max(map(len, prompts))
        self.input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=visual.device)
        lengths = torch.tensor([len(p) for p in prompts], device=visual.device)
        self.text_mask = torch.arange(longest, device=visual.device) >= longest - lengths[:, None]
        self.generator = torch.Generator(visual.device).manual_seed(decoding.seed)
        step, conclusion = self.ids["<|step|>"], self.ids["<|conclusion|>"]
        self.everyone = [  # a prompt may hold a chain's beginning
            _Row(place, prompt.count(step), conclusion in prompt, not decoding.reasoning, most_tokens)
            for place, prompt in enumerate(self.for_each_chain(prompts))
        ]
        for row, prompt in zip(self.everyone, self.for_each_chain(prompts)):
            length = visual.shape[1] + len(prompt)
            row.room = most_tokens if limit is None else min(most_tokens, limit - length)
            if row.room < 1:
                raise ConfigError(
                    f"instruction {row.place}: with the picture it has {length} tokens, but the language model reads "
                    f"{limit} and has no room for an answer; shorten it"
                )
        self.rows = list(self.everyone)
        self.room = max(row.room for row in self.everyone)
        room = visual.shape[1] + longest + self.room
        self.language_cache, self.head_cache = roomy_cache(room), roomy_cache(room)
        use_head = decoding.reasoning or model.config.stage != 3
        head = model.reasoning_module.reasoning_head
        self.looked = head.look(visual, image_mask, bool(image_mask.all())).packed() if use_head else None
        self.conclusion_state: Tensor | None = None

    def run(self) -> None:
        """Write every row to its end."""
        hidden = self._read_prompts()
        if self.decoding.num_chains > 1:
            hidden = self._multiply(hidden)
        self.conclusion_state = hidden.clone()
        num_visual, room = self.visual.shape[1], self.room
        positions = (self.image_mask.long() * num_visual + self.text_mask.sum(1))[:, None]
        mask = torch.cat([self.image_mask[:, None].expand(-1, num_visual), self.text_mask], dim=1)
        seen = mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
        padded = not bool(mask.all())
        go_on = language_step(self.model.language_model, mask.shape[1])
        refine = head_step(self.model.reasoning_module.reasoning_head)
        hidden_keys = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        for _ in range(room + 1):  # the last time, whatever is not done is cut off
            tokens, concluding, is_text = self._write(hidden)
            alive = [place for place, row in enumerate(self.rows) if not row.done]
            if not alive:
                break
            if 4 * len(alive) <= 3 * len(self.rows):
                kept = torch.tensor(alive, device=hidden.device)
                tokens, positions, mask, hidden_keys = (t[kept] for t in (tokens, positions, mask, hidden_keys))
                self._keep(alive, kept)
            seen += 1
            embeds = (self.model.language_model.embed if is_text else self.model.embed)(tokens)
            # copied: attention on a GPU reads it in words of 16 bytes, and a slice need not begin at one
            unseen = hidden_keys[:, None, None, :seen].clone() if padded else None
            hidden = go_on(embeds.to(hidden.dtype), mask[:, :seen], unseen, positions, self.language_cache)
            if self.looked is not None:
                hidden = hidden if is_text else self.model.enter(hidden, tokens)
                unseen = None if unseen is None else unseen[..., num_visual:].clone()
                hidden = refine(hidden, unseen, self.head_cache, self.looked)
            for row in concluding:
                self.conclusion_state[row.place] = hidden[self.rows.index(row)]
            positions = positions + 1
            if self.limit is not None:  # of rows that are done and not yet left out
                positions = positions.clamp_max(self.limit - 1)

    def head_probabilities(self, choices: Sequence[Sequence[str]]) -> Sequence[list[float] | None]:
        """The answer head's probability of each candidate of each row, from the chain before its conclusion."""
        if not any(choices) or self.looked is None or self.conclusion_state is None:
            return [None] * len(choices)
        most = max(map(len, choices))
        encoded = [
            ids
            for names in choices
            for ids in [*self.model.tokenizer.encode_many(list(names)), *[[]] * (most - len(names))]
        ]
        ids = padded(encoded, -1).view(len(choices), most, -1).to(self.visual.device)
        logits = self.model.reasoning_module.answer_head(
            self.conclusion_state, self.visual, self.image_mask, self.model.candidate_embeddings(ids)
        )
        return [row[: len(names)] for row, names in zip(logits.double().sigmoid().tolist(), choices)]

    def _read_prompts(self) -> Tensor:
        """State of each prompt's last token, `[batch, hidden]`."""
        hidden = self.model.read(self.visual, self.image_mask, self.input_ids, self.text_mask, self.language_cache)
        if self.looked is not None:
            length, device = self.input_ids.shape[1], hidden.device
            mask = torch.ones(length, length, dtype=torch.bool, device=device).tril() & self.text_mask[:, None, None]
            mask = mask | torch.eye(length, dtype=torch.bool, device=device)  # a padded row must see something
            hidden, _ = self.model.refine(
                hidden,
                self.input_ids,
                self.visual,
                self.image_mask,
                looked=self.looked,
                text_mask=mask,
                cache=self.head_cache,
            )
        return hidden[:, -1]

    def for_each_chain(self, of_questions: Sequence[T]) -> list[T]:
        """Whatever there is for each question, once for each of its chains."""
        return [one for one in of_questions for _ in range(self.decoding.num_chains)]

    def _multiply(self, hidden: Tensor) -> Tensor:
        """As many rows for each question as it gets chains: picture and prompt have been read once."""
        rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(self.decoding.num_chains)
        self.visual, self.image_mask, self.text_mask = self.visual[rows], self.image_mask[rows], self.text_mask[rows]
        keep_rows(self.language_cache, rows)
        if self.looked is not None:
            keep_rows(self.head_cache, rows)
            self.looked = self.looked.rows(rows)
        return hidden[rows]

    def _write(self, hidden: Tensor) -> tuple[Tensor, list[_Row], bool]:
        """The next token of each row, the rows that conclude with it, and whether all tokens are text."""
        base, added = self.model.token_scores(hidden)
        if full := [p for p, row in enumerate(self.rows) if row.concluded or row.num_steps >= self.most_steps - 1]:
            self._note_cut_steps(base, added, [p for p in full if not self.rows[p].concluded])
            added[full, self.ids["<|step|>"] - self.base] = -torch.inf
        if over := [place for place, row in enumerate(self.rows) if row.concluded]:
            added[over, self.ids["<|conclusion|>"] - self.base] = -torch.inf
        tokens = self._choose(base, added)
        if answering := [place for place, row in enumerate(self.rows) if row.in_answer and not row.done]:
            scores = torch.cat([base[answering], added[answering]], dim=-1).float()
            found = scores.log_softmax(-1).gather(1, tokens[answering, None])[:, 0].tolist()
            for place, log_prob in zip(answering, found):
                self.rows[place].answer_log_prob += log_prob
        concluding, is_text = [], True
        for row, token in zip(self.rows, tokens.tolist()):
            if token >= self.base:
                is_text = False
            if len(row.ids) >= row.room and not row.done:
                row.done, row.cut_off = True, row.cut_off or "tokens"
            if row.done:
                continue
            row.ids.append(token)
            if self.on_token is not None:
                self.on_token(row.place, token)
            if token == self.ids["<|step|>"]:
                row.num_steps += 1
            elif token in (self.ids["<|conclusion|>"], self.ids["<|reasoning_end|>"]) and not row.concluded:
                concluding.append(row)  # the answer head reads here, at the end where a chain has no conclusion
                row.concluded = True
            elif token == self.ids["<|answer_start|>"]:
                row.in_answer = True
            elif token in self.end_ids:
                row.done = True
        return tokens, concluding, is_text

    def _note_cut_steps(self, base: Tensor, added: Tensor, full: Sequence[int]) -> None:
        """Mark the rows at `full`, which have all their steps, where one more step is the likeliest to come."""
        if not full:
            return
        step = added[full, self.ids["<|step|>"] - self.base]
        wanted = (step > base[full].amax(-1)) & (step >= added[full].amax(-1))
        for place, more in zip(full, wanted.tolist()):
            if more and not self.rows[place].done:
                self.rows[place].cut_off = self.rows[place].cut_off or "steps"

    def _keep(self, alive: Sequence[int], kept: Tensor) -> None:
        self.rows = [self.rows[place] for place in alive]
        keep_rows(self.language_cache, kept)
        if self.looked is not None:
            keep_rows(self.head_cache, kept)
            self.looked = self.looked.rows(kept)

    def _choose(self, base: Tensor, added: Tensor) -> Tensor:
        if self.decoding.temperature == 0:
            best, token = base.max(-1)
            best_added, special = added.max(-1)
            return torch.where(best_added > best, special + self.base, token)
        probabilities = (torch.cat([base, added], dim=-1).float() / self.decoding.temperature).softmax(-1)
        if self.decoding.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered > self.decoding.top_p
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

"""Tokens of a batch of texts, one after another, with a key-value cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import Cache

from embervlm.config import ConfigError
from embervlm.data.collate import padded
from embervlm.model.cache import Part, joined, keep_rows, left_padded, roomy_cache
from embervlm.model.decode import HeadStep, Step, head_step, language_step
from embervlm.model.decoding import Decoding, OnToken
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.reasoning import Looked

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Row:
    """One text being written."""

    place: int
    """In the batch that was asked for."""
    decoding: Decoding
    random: random.Random
    """Of this text alone, so that it does not depend on what is written beside it."""
    num_steps: int
    concluded: bool
    in_answer: bool
    room: int
    """Tokens that it may have."""
    on_token: OnToken | None = None
    ids: list[int] = field(default_factory=list)
    answer_log_probs: list[float] = field(default_factory=list)
    """Of each token of the answer, and of the one that ends it."""
    log_probs: list[float] = field(default_factory=list)
    """Of every token at the temperature of the draws, where the writer was asked to keep them."""
    closed: list[tuple[bool, bool]] = field(default_factory=list)
    """With them: whether a further step, and whether a conclusion, could not be written there."""
    conclusion_state: Tensor | None = None
    """`[hidden]`, where the answer head reads."""
    done: bool = False
    cut_off: str | None = None
    """Which limit cut it off, `steps` or `tokens`: it was about to begin one more step, or had not come to its end."""

    @property
    def answer_log_prob(self) -> float:
        return sum(self.answer_log_probs)

    @property
    def most_steps(self) -> int:
        return self.decoding.max_reasoning_steps or 1

    @property
    def is_full(self) -> bool:
        """Whether no further step may begin."""
        return self.concluded or self.num_steps >= self.most_steps - 1


class Writer:
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
        keep_log_probs: bool = False,
    ) -> None:
        self.keep_log_probs = keep_log_probs
        self.model, self.visual, self.image_mask = model, visual, image_mask
        self.decoding = decoding = decoding.for_model(model.config)
        most_tokens = decoding.max_new_tokens or 1
        self.limit = limit = model.language_model.max_positions
        self.ids, self.base = model.tokenizer.ids, model.tokenizer.base_vocab_size
        self.end_ids = (self.ids["<|answer_end|>"], model.tokenizer.end_of_text)
        longest = max(map(len, prompts))
        self.input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=visual.device)
        lengths = torch.tensor([len(p) for p in prompts], device=visual.device)
        self.text_mask = torch.arange(longest, device=visual.device) >= longest - lengths[:, None]
        step, conclusion = self.ids["<|step|>"], self.ids["<|conclusion|>"]
        self.everyone = [
            Row(
                place=place,
                decoding=decoding,
                random=random.Random(f"{decoding.seed} {place}"),
                num_steps=prompt.count(step),  # a prompt may hold a chain's beginning
                concluded=conclusion in prompt,
                in_answer=not decoding.reasoning,
                room=most_tokens,
                on_token=on_token,
            )
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
        room = visual.shape[1] + longest + max(row.room for row in self.everyone)
        self.language_cache, self.head_cache = roomy_cache(room), roomy_cache(room)
        use_head = decoding.reasoning or model.config.stage != 3
        head = model.reasoning_module.reasoning_head
        self.looked = head.look(visual, image_mask, bool(image_mask.all())).packed() if use_head else None
        self.steps: tuple[Step, HeadStep] | None = None

    def run(self) -> None:
        """Write every row to its end."""
        self.begin()
        while self.advance():
            pass

    def begin(self) -> None:
        """Read the prompts."""
        self.hidden = self._read_prompts()
        if self.decoding.num_chains > 1:
            self._multiply()
        for row, state in zip(self.rows, self.hidden):
            row.conclusion_state = state
        num_visual = self.visual.shape[1]
        self.positions = (self.image_mask.long() * num_visual + self.text_mask.sum(1))[:, None]
        seen = self.image_mask[:, None].expand(-1, num_visual)
        self.see_keys(torch.cat([seen, self.text_mask], dim=1), self.text_mask)

    def see_keys(self, language: Tensor, head: Tensor) -> None:
        """What each row may look at in the caches as they are now, bool `[rows, cached]`; and of all to come."""
        room = max(row.room - len(row.ids) for row in self.rows)
        masks = [torch.cat([mask, mask.new_ones(len(mask), room)], dim=1) for mask in (language, head)]
        self.mask, self.seen, self.head_seen = masks[0], language.shape[1], head.shape[1]
        self.padded = not bool(self.mask.all())
        self.language_keys, self.head_keys = (
            torch.zeros(mask.shape, dtype=self.hidden.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
            for mask in masks
        )

    def advance(self) -> bool:
        """Write one more token of each row; False when all are at their end."""
        tokens, concluding, is_text = self._write(self.hidden)
        alive = [place for place, row in enumerate(self.rows) if not row.done]
        if not alive:
            return False
        if 4 * len(alive) <= 3 * len(self.rows):
            tokens = tokens[self.keep(alive)]
        if self.steps is None:
            head = self.model.reasoning_module.reasoning_head
            self.steps = language_step(self.model.language_model, self.mask.shape[1]), head_step(head)
        go_on, refine = self.steps
        self.seen, self.head_seen = self.seen + 1, self.head_seen + 1
        embeds = (self.model.language_model.embed if is_text else self.model.embed)(tokens)
        # copied: attention on a GPU reads it in words of 16 bytes, and a slice need not begin at one
        unseen = self.language_keys[:, None, None, : self.seen].clone() if self.padded else None
        mask, dtype = self.mask[:, : self.seen], self.hidden.dtype
        hidden = go_on(embeds.to(dtype), mask, unseen, self.positions, self.language_cache)
        if self.looked is not None:
            hidden = hidden if is_text else self.model.enter(hidden, tokens)
            unseen = self.head_keys[:, None, None, : self.head_seen].clone() if self.padded else None
            hidden = refine(hidden, unseen, self.head_cache, self.looked)
        for row in concluding:
            row.conclusion_state = hidden[self.rows.index(row)]
        self.hidden, self.positions = hidden, self.positions + 1
        if self.limit is not None:  # of rows that are done and not yet left out
            self.positions = self.positions.clamp_max(self.limit - 1)
        return True

    def head_probabilities(self, choices: Sequence[Sequence[str]]) -> Sequence[list[float] | None]:
        """The answer head's probability of each candidate of each row, from the chain before its conclusion."""
        states = [row.conclusion_state for row in self.everyone if row.conclusion_state is not None]
        if not any(choices) or self.looked is None:
            return [None] * len(choices)
        most = max(map(len, choices))
        encoded = [
            ids
            for names in choices
            for ids in [*self.model.tokenizer.encode_many(list(names)), *[[]] * (most - len(names))]
        ]
        ids = padded(encoded, -1).view(len(choices), most, -1).to(self.visual.device)
        logits = self.model.reasoning_module.answer_head(
            torch.stack(states), self.visual, self.image_mask, self.model.candidate_embeddings(ids)
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

    def _multiply(self) -> None:
        """As many rows for each question as it gets chains: picture and prompt have been read once."""
        rows = torch.arange(len(self.hidden), device=self.hidden.device).repeat_interleave(self.decoding.num_chains)
        self.hidden, self.visual = self.hidden[rows], self.visual[rows]
        self.image_mask, self.text_mask = self.image_mask[rows], self.text_mask[rows]
        keep_rows(self.language_cache, rows)
        if self.looked is not None:
            keep_rows(self.head_cache, rows)
            self.looked = self.looked.rows(rows)

    def _write(self, hidden: Tensor) -> tuple[Tensor, list[Row], bool]:
        """The next token of each row, the rows that conclude with it, and whether all tokens are text."""
        base, added = self.model.token_scores(hidden)
        if full := [p for p, row in enumerate(self.rows) if row.is_full]:
            self._note_cut_steps(base, added, [p for p in full if not self.rows[p].concluded])
            added[full, self.ids["<|step|>"] - self.base] = -torch.inf
        if over := [place for place, row in enumerate(self.rows) if row.concluded]:
            added[over, self.ids["<|conclusion|>"] - self.base] = -torch.inf
        tokens = self._choose(base, added)
        if answering := [place for place, row in enumerate(self.rows) if row.in_answer and not row.done]:
            scores = torch.cat([base[answering], added[answering]], dim=-1).float()
            found = scores.log_softmax(-1).gather(1, tokens[answering, None])[:, 0].tolist()
            for place, log_prob in zip(answering, found):
                self.rows[place].answer_log_probs.append(log_prob)
        log_probs = self._log_probs(base, added, tokens) if self.keep_log_probs else []
        concluding, is_text = [], True
        for place, (row, token) in enumerate(zip(self.rows, tokens.tolist())):
            if token >= self.base:
                is_text = False
            if len(row.ids) >= row.room and not row.done:
                row.done, row.cut_off = True, row.cut_off or "tokens"
            if row.done:
                continue
            row.ids.append(token)
            if log_probs:
                row.log_probs.append(log_probs[place])
                row.closed.append((row.is_full, row.concluded))
            if row.on_token is not None:
                row.on_token(row.place, token)
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

    def _log_probs(self, base: Tensor, added: Tensor, tokens: Tensor) -> list[float]:
        """Of each row's token, at the writer's temperature; of the nucleus nothing is known here."""
        scores = torch.cat([base, added], dim=-1).float() / (self.decoding.temperature or 1.0)
        return scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()  # type: ignore[no-any-return]

    def _note_cut_steps(self, base: Tensor, added: Tensor, full: Sequence[int]) -> None:
        """Mark the rows at `full`, which have all their steps, where one more step is the likeliest to come."""
        if not full:
            return
        step = added[full, self.ids["<|step|>"] - self.base]
        wanted = (step > base[full].amax(-1)) & (step >= added[full].amax(-1))
        for place, more in zip(full, wanted.tolist()):
            if more and not self.rows[place].done:
                self.rows[place].cut_off = self.rows[place].cut_off or "steps"

    def join(self, others: Sequence[Writer]) -> None:
        """Leave out rows that are done, and take over those of `others`, which have begun with the same model; their
        results stay with them."""
        writers = [self, *others]
        alive = [[place for place, row in enumerate(writer.rows) if not row.done] for writer in writers]
        kept = [
            None if len(some) == len(writer.rows) else torch.tensor(some, device=self.hidden.device)
            for some, writer in zip(alive, writers)
        ]

        def of(writer: Writer, name: str) -> Tensor:
            rows, whole = kept[writers.index(writer)], getattr(writer, name)
            return whole if rows is None else whole[rows]

        language = [of(writer, "mask")[:, : writer.seen] for writer in writers]
        head = [of(writer, "head_keys")[:, : writer.head_seen] == 0 for writer in writers]
        self.hidden = torch.cat([of(writer, "hidden") for writer in writers])
        self.positions = torch.cat([of(writer, "positions") for writer in writers])
        self.rows = [writer.rows[place] for some, writer in zip(alive, writers) for place in some]
        room = max(row.room - len(row.ids) for row in self.rows)

        def together(masks: list[Tensor], caches: list[Cache]) -> tuple[Tensor, Cache]:
            begins = [int(mask.any(0).long().argmax()) for mask in masks]  # what no row left looks at is dropped
            mask = left_padded([mask[:, begin:] for mask, begin in zip(masks, begins)])
            parts = [Part(cache=c, rows=rows, begin=begin) for c, rows, begin in zip(caches, kept, begins)]
            return mask, joined(parts, mask.shape[1] + room)

        language_mask, self.language_cache = together(language, [writer.language_cache for writer in writers])
        head_mask, self.head_cache = together(head, [writer.head_cache for writer in writers])
        looked = [writer.looked for writer in writers]
        self.looked = Looked.together(
            [one if rows is None else one.rows(rows) for one, rows in zip(looked, kept) if one is not None]
        )
        self.see_keys(language_mask, head_mask)
        self.steps = None

    def keep(self, alive: Sequence[int]) -> Tensor:
        """Leave out all rows but those at these places, which are given back as a tensor."""
        kept = torch.tensor(alive, device=self.hidden.device)
        self.rows = [self.rows[place] for place in alive]
        for name in ("hidden", "positions", "mask", "language_keys", "head_keys"):
            setattr(self, name, getattr(self, name)[kept])
        keep_rows(self.language_cache, kept)
        if self.looked is not None:
            keep_rows(self.head_cache, kept)
            self.looked = self.looked.rows(kept)
        return kept

    def _choose(self, base: Tensor, added: Tensor) -> Tensor:
        best, token = base.max(-1)
        best_added, special = added.max(-1)
        tokens = torch.where(best_added > best, special + self.base, token)
        if drawn := [place for place, row in enumerate(self.rows) if row.decoding.temperature]:
            tokens[drawn] = draw(torch.cat([base[drawn], added[drawn]], dim=-1), [self.rows[p] for p in drawn])
        return tokens


def draw(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token of each row by its own temperature, nucleus and random numbers, from scores `[rows, vocabulary]`."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    temperature, top_p = column([row.decoding.temperature for row in rows]), [row.decoding.top_p for row in rows]
    probabilities = (scores / temperature).softmax(-1)
    if min(top_p) < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered > column(top_p)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
    reached = probabilities.cumsum(-1)
    points = column([row.random.random() for row in rows]) * reached[:, -1:]
    return torch.searchsorted(reached, points, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)

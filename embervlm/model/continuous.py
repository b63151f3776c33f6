"""Chains of several askers, written together: a text joins the others between two of their tokens.

What a text becomes depends on none of the others, beyond the rounding of sums over batches of another size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embervlm.model.decoding import Decoding, OnToken
from embervlm.model.generation import chain_prompts, known_of, look, results_of
from embervlm.model.interactive import still_holds
from embervlm.model.known import Verdict, settled
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.voting import vote
from embervlm.model.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, whose `decoding.num_chains` chains are being written."""

    question: str
    decoding: Decoding
    kept_steps: list[str]
    """Of the reasoning before; the chains begin with them."""
    begun: list[int]
    """Their ids."""
    num_prompt_tokens: int
    """Picture, question and the steps that were kept."""
    known: list[Verdict] | None
    """See `known_of`."""
    writer: Writer
    visual: Tensor
    seen: Tensor

    @property
    def done(self) -> bool:
        return all(row.done for row in self.writer.everyone)

    def give_up(self) -> None:
        """Write no more of it."""
        for row in self.writer.everyone:
            row.done = True

    def results(self, elect: bool = False) -> list[dict[str, Any]]:
        """What `generate_with_reasoning` gives, of each chain, with the `answer_tokens`: text and natural logarithm
        of the probability of each. With `elect` the one chain whose answer has the most votes, without those."""
        model, rows = self.writer.model, self.writer.everyone
        results = results_of(self.writer, [self.begun], [tuple(model.config.candidates)])
        if elect:
            return self._settled(vote(model, self.visual, self.seen, [self.question], results, weigh=False))
        start = model.tokenizer.ids["<|answer_start|>"]
        for result, row in zip(results, rows):
            ids = row.ids[row.ids.index(start) + 1 :] if start in row.ids else []
            tokens = [(model.tokenizer.decode([token]), p) for token, p in zip(ids, row.answer_log_probs)]
            result["answer_tokens"] = [(text, p) for text, p in tokens if text]
            result["num_answer_tokens"] = len(ids)
        return self._settled(results)

    def _settled(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = None if self.known is None else self.known * len(results)
        return settled(results, known, self.decoding.min_known)


@torch.inference_mode()
def begin(
    model: EmberVLMNetwork,
    image: Any,
    question: str,
    decoding: Decoding,
    previous: Sequence[str] = (),
    on_token: OnToken | None = None,
    last: str | None = None,
) -> Asked:
    """Read picture and question; `Together` writes the rest. The model has to be in eval mode.

    Args:
        image: As for `generate_with_reasoning`.
        previous: Steps of the reasoning before, of a follow-up; see `EmberVLM.reason`.
        on_token: See `generate_from_visual`.
        last: Of a follow-up, its own words, with which `question` ends.

    Raises:
        ConfigError: picture and question are longer than what the language model reads.
    """
    visual, seen = look(model, [image])
    kept = still_holds(model, visual, seen, question, previous) if previous else []
    begun = [token for ids in model.tokenizer.step_ids(kept) for token in ids]
    prompts = chain_prompts(model.tokenizer, [question], [begun])
    writer = Writer(model, visual.to(model.visual_dtype), seen, prompts, decoding, on_token)
    writer.begin()
    return Asked(
        question=question,
        decoding=decoding,
        kept_steps=kept,
        begun=begun,
        known=known_of(model, visual, seen, [question], decoding, None if last is None else [last]),
        num_prompt_tokens=len(prompts[0]) + (visual.shape[1] if image is not None else 0),
        writer=writer,
        visual=visual,
        seen=seen,
    )


class Together:
    """The texts that are being written."""

    def __init__(self) -> None:
        self._writer: Writer | None = None

    @property
    def num_rows(self) -> int:
        return 0 if self._writer is None else sum(not row.done for row in self._writer.rows)

    @torch.inference_mode()
    def add(self, asked: Sequence[Asked]) -> None:
        writers = [one.writer for one in asked]
        if self.num_rows == 0 and writers:
            self._writer = writers.pop(0)
        if self._writer is not None and writers:
            self._writer.join(writers)

    @torch.inference_mode()
    def advance(self) -> None:
        """Write one more token of each."""
        if self._writer is not None and not self._writer.advance():
            self._writer = None

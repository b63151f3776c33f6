"""What a server answers, in OpenAI's form, and from where in a result each part of it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from embervlm.model.continuous import Asked
from embervlm.model.streaming import CONCLUSION, Piece
from embervlm.words.chain_text import CONCLUSION as CONCLUSION_HEADER
from embervlm.words.chain_text import format_reasoning


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any] = []


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class Delta(BaseModel):
    """A part of an answer, or the whole."""

    role: Literal["assistant"] | None = None
    reasoning_content: str | None = None
    content: str | None = None
    refusal: str | None = None


class Attention(BaseModel):
    """Where in the picture the model looked while it read its chain."""

    grid: tuple[int, int]
    """Rows and columns that lie over the picture."""
    steps: list[list[float]]
    """Of each step, the conclusion last: the share of its attention in each cell, row by row; they sum to 1."""


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: Logprobs | None = None
    confidence: float | None = None
    """How sure the model is of exactly this answer, in [0, 1]."""
    known: float | None = None
    """How well a model that has been evaluated knows such questions and pictures, in [0, 1]."""
    answer_set: list[str] | None = None
    """The names in the answer; of a refused one too, as the model wrote it."""
    votes: dict[str, float] | None = None
    attention: Attention | None = None
    """Where it was asked for and there is a picture; null for a chain longer than the model reads at once."""


class WholeChoice(Choice):
    message: Delta


class PartOfChoice(Choice):
    delta: Delta


class ReasoningTokens(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: ReasoningTokens


class Head(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class Completion(Head):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[WholeChoice]


class Chunk(Head):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[PartOfChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "stopping"]


def choice_fields(index: int, result: Mapping[str, Any], want_logprobs: bool) -> dict[str, Any]:
    """What a choice says beside its text."""
    tokens = result.get("answer_tokens")
    logprobs = None
    if want_logprobs and tokens is not None:
        found = [TokenLogprob(token=text, logprob=p, bytes=list(text.encode())) for text, p in tokens]
        logprobs = Logprobs(content=found)
    return {
        "index": index,
        "finish_reason": "length" if result["cut_off"] else "stop",
        "logprobs": logprobs,
        "confidence": result["confidence"],
        "known": result.get("known"),
        "answer_set": result["answer_set"],
        "votes": result.get("votes"),
        "attention": result.get("attention"),
    }


def answer_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    """The answer, or the sentence that says why there is none."""
    return {"content": result["answer"], "refusal": result["why"]}


def whole_choice(index: int, result: Mapping[str, Any], want_logprobs: bool) -> WholeChoice:
    message = Delta(
        role="assistant", reasoning_content=format_reasoning(result["reasoning_steps"]), **answer_fields(result)
    )
    return WholeChoice(message=message, **choice_fields(index, result, want_logprobs))


def piece_text(piece: Piece) -> str:
    """As it stands in `format_reasoning` of the whole chain."""
    if not piece.begins:
        return piece.text
    header = CONCLUSION_HEADER if piece.section == CONCLUSION else f"Step {piece.number}: "
    return ("\n" if piece.number > 1 else "") + header + piece.text


def usage_of(asked: Asked, results: Sequence[Mapping[str, Any]]) -> Usage:
    written = sum(len(row.ids) for row in asked.writer.everyone)
    answers = sum(result.get("num_answer_tokens", 0) for result in results)
    return Usage(
        prompt_tokens=asked.num_prompt_tokens,
        completion_tokens=written,
        total_tokens=asked.num_prompt_tokens + written,
        completion_tokens_details=ReasoningTokens(reasoning_tokens=written - answers),
    )

"""The requests that a client may send: OpenAI's chat completions, as far as the model has a use for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from embervlm.data.record_fields import MAX_PICTURES, MAX_STEPS
from embervlm.errors import UserError
from embervlm.serve.settings import MAX_CHOICES
from embervlm.words.chain_text import parse_reasoning_text

MAX_MESSAGES = 64
MAX_PREVIOUS_STEPS = 20
"""Each is judged again after a new question."""


class Strict(BaseModel):
    """An unknown field is an error: it would ask for something that the answer does not follow."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Text(Strict):
    type: Literal["text"]
    text: str


class Address(Strict):
    url: Annotated[str, Field(description="data:image/png;base64,... or, where the server allows it, http(s)")]
    detail: Literal["auto", "low", "high"] | None = None


class Picture(Strict):
    type: Literal["image_url"]
    image_url: Address


Part = Annotated[Text | Picture, Field(discriminator="type")]


class Message(Strict):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part] | None = None
    reasoning_content: Annotated[
        str | None, Field(description="of an assistant's turn: its steps, with which a follow-up begins")
    ] = None
    name: str | None = None
    refusal: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(Strict):
    """A question, with its picture."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    temperature: Annotated[
        float | None, Field(ge=0, le=2, description="default: 0; with n or num_chains above 1, 0.7")
    ] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    max_reasoning_steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS + 1)] = None
    num_chains: Annotated[
        int | None, Field(ge=1, le=MAX_CHOICES, description="chains whose answers vote; the elected one is given")
    ] = None
    min_known: Annotated[
        float, Field(ge=0, le=1, description="least `known` of a question that gets an answer; 0 answers all")
    ] = 0.5
    attention: Annotated[
        bool, Field(description="where in the picture each step looked; reading the chain again takes a moment")
    ] = False
    logprobs: Annotated[bool | None, Field(description="of the answer's tokens")] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    user: str | None = None
    store: Literal[False] | None = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What of the messages the model reads."""

    question: str
    """All questions, one behind another."""
    last: str | None
    """The last of them, where there are several."""
    pictures: list[str]
    """Addresses of the last turn that has pictures."""
    previous: tuple[str, ...]
    """Steps of the last answer."""


def conversation(messages: list[Message], max_characters: int) -> Conversation:
    """Raises UserError where the model could not read it as it is meant."""
    questions: list[str] = []
    pictures: list[str] = []
    previous: tuple[str, ...] = ()
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        parts = [Text(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
        text = " ".join(part.text.strip() for part in parts if isinstance(part, Text)).strip()
        seen = [part.image_url.url for part in parts if isinstance(part, Picture)]
        if message.role in ("system", "developer"):
            if text or seen:
                raise UserError(f"{where}: this model reads no {message.role} message; write it into the question")
        elif message.role == "assistant":
            if seen:
                raise UserError(f"{where}: only a user's message may have a picture")
            previous = parse_reasoning_text(message.reasoning_content or "")
            if len(previous) > MAX_PREVIOUS_STEPS:
                raise UserError(f"{where}: {len(previous)} steps; give at most {MAX_PREVIOUS_STEPS}")
        else:
            if not text:
                raise UserError(f"{where}: no text; write a question or a task")
            if len(seen) > MAX_PICTURES:
                raise UserError(f"{where}: {len(seen)} pictures; give at most {MAX_PICTURES}")
            questions.append(text)
            pictures = seen or pictures
    if messages[-1].role != "user":
        raise UserError("messages: the last one is not a user's; end with a question")
    question = " ".join(questions)
    if (length := len(question) + sum(map(len, previous))) > max_characters:
        raise UserError(f"messages: {length} characters of text; give at most {max_characters}")
    last = questions[-1] if len(questions) > 1 else None
    return Conversation(question=question, last=last, pictures=pictures, previous=previous)

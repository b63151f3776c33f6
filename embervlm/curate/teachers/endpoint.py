"""A teacher behind an OpenAI-compatible endpoint: its settings, its costs, and one request to it."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.curate.teachers.answers import Reply, answer_schema, messages
from embervlm.curate.teachers.collection import Question
from embervlm.data.records import DataError

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
SENT_AS_IT_IS = ("image/jpeg", "image/png", "image/webp")
MALFORMED_TRIES = 3
"""Requests for one answer whose body is not what the protocol says."""
CHARACTERS_PER_TOKEN = 4
"""For the budget, where a server does not say how many tokens it has counted."""
_REPLACEMENTS = {"response_format": None, "temperature": None, "max_tokens": "max_completion_tokens"}
"""Fields that some servers refuse -> what is sent instead (None: nothing)."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """The teacher, how it is asked, and how much it may cost."""

    teacher_model: str
    """The model's name at the endpoint."""
    base_url: str | None = None
    """Up to and with `/v1`; None uses OPENAI_BASE_URL."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None uses OPENAI_API_KEY, or no key if that is not set."""
    sees_pictures: bool = False
    """Send the picture; otherwise the facts of the scene go as text."""
    concurrency: int = 16
    """Requests in flight."""
    attempts: int = 3
    """Maximum number of answers requested until one is accepted."""
    samples_per_record: int = 1
    """Chains wanted for each question."""
    max_answer_tokens: int = 4096
    """Longest answer in tokens, including the thinking."""
    temperature: float | None = None
    """None uses the endpoint's default."""
    request_timeout_s: float = 600.0
    """Longest time without data from the endpoint before a request counts as failed."""
    max_retries: int = 6
    """Repetitions of a failed request (429, 5xx, time-out, cut connection), with growing pauses or as Retry-After."""
    max_tokens_total: int | None = None
    """Maximum number of tokens, including earlier runs; no request starts that could exceed it."""
    max_usd_total: float | None = None
    """The same in dollars; needs both prices."""
    usd_per_million_input: float = 0.0
    """Price of a million tokens that the teacher reads."""
    usd_per_million_output: float = 0.0
    """Price of a million tokens that it writes."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "samples_per_record", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("max_retries", "usd_per_million_input", "usd_per_million_output", "temperature"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 0")
        for name in ("request_timeout_s", "max_tokens_total", "max_usd_total"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.max_usd_total is not None and not self.usd_per_million_input + self.usd_per_million_output:
            raise ConfigError("--max_usd_total: needs --usd_per_million_input and --usd_per_million_output")

    def url(self) -> str:
        url = self.base_url or os.environ.get(URL_VARIABLE, "")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--teacher_model {self.teacher_model}: is a model behind an endpoint, but --teacher_base_url "
                f"{url or '(none)'} is not an address; give one, such as http://localhost:8000/v1. "
                "The built-in teacher is called rules"
            )
        return url

    def key(self) -> str:
        """The key, or the empty string for an endpoint that asks for none."""
        name = self.api_key_env or KEY_VARIABLE
        key = os.environ.get(name, "").strip()
        if not key and self.api_key_env:
            raise ConfigError(f"--teacher_api_key_env {name}: this environment variable is not set; export the key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"{name}: contains characters that are not allowed in a key; export it again")
        return key

    def usd(self, usage: Mapping[str, int]) -> float:
        """What `prompt_tokens` and `completion_tokens` cost."""
        price = usage.get("prompt_tokens", 0) * self.usd_per_million_input
        return (price + usage.get("completion_tokens", 0) * self.usd_per_million_output) / 1_000_000


class Unanswered(Exception):
    """A request that was given up, with nothing to pay; the message has no secrets."""


class Endpoint:
    """Sends one request after the other, and remembers which fields the server refuses."""

    def __init__(self, config: EndpointConfig, tell: Callable[[str], None]) -> None:
        """`tell` is called with what a user should know. Call it within a running event loop."""
        from httpx2 import Limits, Timeout
        from openai import AsyncOpenAI, DefaultAioHttpClient

        self.config, self._tell, self._key = config, tell, config.key()
        self._unsupported: set[str] = set()
        timeout = Timeout(config.request_timeout_s, pool=None)  # a worker may wait long for its turn
        self.client = AsyncOpenAI(
            base_url=config.url(),
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=config.max_retries,
            http_client=DefaultAioHttpClient(timeout=timeout, limits=Limits(max_connections=config.concurrency)),
        )

    async def ask(self, question: Question) -> tuple[Reply, dict[str, int]]:
        """The teacher's reply and the tokens it took.

        Raises:
            Unanswered: nothing usable came, in spite of the client's retries.
            ConfigError: no request of this run can succeed.
        """
        from httpx2 import Response
        from openai import APIConnectionError, APIError, APIStatusError, OpenAIError

        picture = None
        if self.config.sees_pictures and question.record.image is not None:
            picture = await asyncio.to_thread(picture_url, question.record.image)
        request = self._request(question, picture)
        last = ""
        for _ in range(MALFORMED_TRIES + len(_REPLACEMENTS)):
            sent = self._without_unsupported(request)
            try:
                # Not chat.completions.create(): its typed copies of request and answer cost more than all the rest.
                response = await self.client.post("/chat/completions", body=sent, cast_to=Response)
                return self._read_completion(response.json(), sent)
            except (ValueError, _Malformed) as error:
                last = self._redact(f"not the protocol's JSON: {error}")
            except APIStatusError as error:
                message = self._redact(f"{error.status_code} {error.message}")
                if error.status_code in (401, 402, 403, 404):
                    raise ConfigError(
                        f"--teacher_model {self.config.teacher_model}: the endpoint refused: {message[:300]}; "
                        f"check the key, the model's name and the address"
                    ) from None
                if not self._drop_unsupported(error, sent):
                    raise Unanswered(message[:300]) from None
                last = message
            except APIConnectionError as error:
                raise Unanswered(self._redact(f"{error.message} {error.__cause__ or ''}")[:300]) from None
            except (APIError, OpenAIError) as error:
                last = self._redact(str(error))
        raise Unanswered(last[:300])

    def _request(self, question: Question, picture: str | None) -> dict[str, Any]:
        schema = {"name": "record", "strict": True, "schema": answer_schema(question.record.candidates)}
        request = {
            "model": self.config.teacher_model,
            "messages": messages(question, picture),
            "max_tokens": self.config.max_answer_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        return request

    def _without_unsupported(self, request: dict[str, Any]) -> dict[str, Any]:
        sent = {}
        for name, value in request.items():
            if name not in self._unsupported:
                sent[name] = value
            elif (other := _REPLACEMENTS[name]) is not None:
                sent[other] = value
        return sent

    def _drop_unsupported(self, error: Any, sent: dict[str, Any]) -> bool:
        """Whether the server refuses a field that can be left out; it then is, for the rest of the run."""
        if error.status_code not in (400, 422):
            return False
        named = {name for name in _REPLACEMENTS if name in str(error.body) + error.message}
        if not named or not named & sent.keys():
            return False
        for name in named - self._unsupported:
            self._tell(f"the endpoint does not accept {name}; sending requests without it")
        self._unsupported |= named
        return True

    def _read_completion(self, completion: Any, sent: dict[str, Any]) -> tuple[Reply, dict[str, int]]:
        try:
            choice = completion["choices"][0]
            message = choice["message"]
            texts = {name: message.get(name) for name in ("content", "reasoning_content", "reasoning")}
        except (AttributeError, IndexError, KeyError, TypeError):
            raise _Malformed("there is no choices[0].message") from None
        texts = {name: self._redact(text) for name, text in texts.items() if isinstance(text, str)}
        reply = Reply(
            content=texts.get("content", ""),
            cut_off=choice.get("finish_reason") == "length",
            thinking=texts.get("reasoning_content") or texts.get("reasoning") or "",
        )
        usage = completion.get("usage") or {}
        names = ("prompt_tokens", "completion_tokens")
        counts = {name: usage[name] for name in names if isinstance(usage.get(name), int)}
        if len(counts) < len(names):  # not said, so estimated
            asked = sum(len(str(part["content"])) for part in sent["messages"])
            said = len(reply.content) + len(reply.thinking)
            counts = {"prompt_tokens": asked // CHARACTERS_PER_TOKEN, "completion_tokens": said // CHARACTERS_PER_TOKEN}
        return reply, counts

    def _redact(self, text: str) -> str:
        """`text` without the key, should a server or a library have put it there."""
        return text.replace(self._key, "[key]") if self._key else text


class _Malformed(Exception):
    """A reply that parses, but is not a chat completion."""


def picture_url(path: str) -> str:
    """The picture as a data URL; formats that endpoints do not read are sent as PNG. DataError where it is none."""
    kind = mimetypes.guess_type(path)[0]
    if kind in SENT_AS_IT_IS:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore the picture, or drop its records") from error
    else:
        from io import BytesIO

        from PIL import Image

        from embervlm.data.images import load_image

        kind, buffer = "image/png", BytesIO()
        Image.fromarray(load_image(path)).save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

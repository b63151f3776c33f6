"""A teacher behind an OpenAI-compatible endpoint: many questions at once, within a budget, losing nothing paid for."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.curate.teachers.answers import Rejected, Reply, answer_schema, messages, read_reply, scene_text
from embervlm.curate.teachers.collection import Answer, Collection, Question
from embervlm.data.records import DataError
from embervlm.progress import progress_bar

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
SENT_AS_IT_IS = ("image/jpeg", "image/png", "image/webp")
MALFORMED_TRIES = 3
"""Requests for one answer whose body is not what the protocol says."""
MIN_FAILURES = 8
"""Requests in a row, at least, that fail before the endpoint is taken to be down."""
CHARACTERS_PER_TOKEN = 4
"""For the budget, where a server does not say how many tokens it has counted."""
_REPLACEMENTS = {"response_format": None, "temperature": None, "max_tokens": "max_completion_tokens"}
"""Fields that some servers refuse -> what is sent instead (None: nothing)."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Which teacher is asked, how, and how much it may cost."""

    teacher_model: str
    """The model's name at the endpoint."""
    base_url: str | None = None
    """Up to and with `/v1`; None takes it from OPENAI_BASE_URL."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None takes OPENAI_API_KEY, or no key where that is not set."""
    sees_pictures: bool = False
    """Send the picture; otherwise the facts of the scene go as text."""
    concurrency: int = 16
    """Requests in flight."""
    attempts: int = 3
    """Answers asked for until one is accepted."""
    samples_per_record: int = 1
    """Chains wanted for each question."""
    max_answer_tokens: int = 4096
    """Longest answer, thinking included."""
    temperature: float | None = None
    """None leaves it to the endpoint."""
    request_timeout_s: float = 600.0
    """Longest silence of the endpoint before a request counts as failed."""
    max_retries: int = 6
    """Repetitions of a failed request (429, 5xx, time-out, cut connection), with growing pauses or as Retry-After."""
    max_tokens_total: int | None = None
    """No request starts that would go beyond this many tokens, those of earlier runs included."""
    max_usd_total: float | None = None
    """The same in dollars; needs both prices."""
    usd_per_million_input: float = 0.0
    usd_per_million_output: float = 0.0

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
                f"--teacher_model {self.teacher_model}: is a model behind an endpoint, and --teacher_base_url "
                f"{url or '(none)'} is none; give its address, such as http://localhost:8000/v1. "
                "The embedded teacher is called rules"
            )
        return url

    def key(self) -> str:
        """The key, or the empty string for an endpoint that asks for none."""
        name = self.api_key_env or KEY_VARIABLE
        key = os.environ.get(name, "").strip()
        if not key and self.api_key_env:
            raise ConfigError(f"--teacher_api_key_env {name}: this environment variable is not set; export the key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"{name}: holds characters that no key has; export it again")
        return key

    def usd(self, usage: Mapping[str, int]) -> float:
        """What `prompt_tokens` and `completion_tokens` cost."""
        price = usage.get("prompt_tokens", 0) * self.usd_per_million_input
        return (price + usage.get("completion_tokens", 0) * self.usd_per_million_output) / 1_000_000


class _Unanswered(Exception):
    """A request that was given up, with nothing to pay; the message has no secrets."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    num_accepted: int
    unanswered: dict[str, str]
    """Id of a question that got no answer -> why."""
    stopped: str
    """Why it ended before all questions were through; empty where they are."""


def ask_endpoint(
    config: EndpointConfig, questions: Sequence[Question], collection: Collection, *, num_samples: int
) -> Outcome:
    """Ask `questions` until `num_samples` answers are accepted in all; every answer is in `collection` at once.

    Raises:
        ConfigError: the endpoint refuses everything, or a question has a picture of which it can be told nothing.
        DataError: the answers cannot be written.
    """
    check_pictures(config, questions)
    run = _Run(config, questions, collection, num_samples)
    asyncio.run(run.main())
    if run.error is not None:
        raise run.error
    return Outcome(len(collection.accepted), run.unanswered, run.stopped)


def check_pictures(config: EndpointConfig, questions: Sequence[Question]) -> None:
    """DataError where a teacher that sees no pictures would have to guess."""
    if not config.sees_pictures:
        blind = [q.record for q in questions if q.record.image is not None and scene_text(q.record) is None]
        if blind:
            raise DataError.of(
                [
                    f"record {record.record_id}: has a picture, and metadata has neither scene nor facts to tell a "
                    "teacher that does not see it; use --teacher_sees_pictures, or add metadata.scene"
                    for record in blind
                ]
            )


class _Run:
    """One run's state. Everything happens on one event loop, so plain attributes are safe."""

    def __init__(
        self, config: EndpointConfig, questions: Sequence[Question], collection: Collection, num_samples: int
    ) -> None:
        self.config, self.collection, self.num_samples = config, collection, num_samples
        self.unanswered: dict[str, str] = {}
        self.stopped = ""
        self.error: ConfigError | DataError | None = None
        self._jobs = self._open_jobs(questions)
        self._num_jobs = len(questions) * config.samples_per_record
        self._num_given_up = 0
        self._in_flight = 0
        self._failures_in_a_row = 0
        self._unsupported: set[str] = set()
        self._workers: list[asyncio.Task[None]] = []
        self._pending: list[Answer] = []
        self._writing = asyncio.Lock()
        self._key = config.key()

    def _open_jobs(self, questions: Sequence[Question]) -> Iterator[tuple[Question, int]]:
        """What is left to ask: every question once before any twice."""
        for sample in range(self.config.samples_per_record):
            for question in questions:
                key = f"{question.key}:{sample}"
                if key in self.collection.accepted:
                    continue
                if self.collection.num_rejected[key] >= self.config.attempts:
                    self._num_given_up += 1
                    continue
                yield question, sample

    async def main(self) -> None:
        from httpx2 import Limits, Timeout
        from openai import AsyncOpenAI, DefaultAioHttpClient

        config = self.config
        timeout = Timeout(config.request_timeout_s, pool=None)  # a worker may wait long for its turn
        http_client = DefaultAioHttpClient(timeout=timeout, limits=Limits(max_connections=config.concurrency))
        self._client = AsyncOpenAI(
            base_url=config.url(),
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=config.max_retries,
            http_client=http_client,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread
                loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        self._bar = progress_bar(
            total=min(self.num_samples, self._num_jobs),
            initial=len(self.collection.accepted),
            desc="answers",
            unit="record",
            miniters=0,
        )
        self._show()
        try:
            async with self._client:
                if self._budgets and not self.collection.largest:  # nobody knows yet what an answer costs
                    await self._work(once=True)
                # The connections limit the requests in flight; the workers beyond them stand in for those that wait
                # for the disk or pause before they ask again.
                num_workers = config.concurrency + config.concurrency // 4
                self._workers = [asyncio.create_task(self._work()) for _ in range(num_workers)]
                for result in await asyncio.gather(*self._workers, return_exceptions=True):
                    if isinstance(result, Exception):  # a fault of ours: everything that came in is on disk
                        raise result
        finally:
            self._bar.close()

    def _on_signal(self, name: str) -> None:
        """The first lets the requests in flight come in, since they are paid for; the second does not."""
        if self.stopped.startswith("SIG"):
            for worker in self._workers:
                worker.cancel()
        self.stopped = f"{name}; a second one does not wait for the answers in flight"

    # ---- one worker

    async def _work(self, *, once: bool = False) -> None:
        while (job := self._next_job()) is not None:
            self._in_flight += 1
            try:
                await self._answer(*job)
                self._failures_in_a_row = 0
            except _Unanswered as error:
                self.unanswered[job[0].record.record_id] = str(error)
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= max(MIN_FAILURES, self.config.concurrency):
                    self._fail(
                        ConfigError(
                            f"--teacher_model {self.config.teacher_model}: the endpoint failed "
                            f"{self._failures_in_a_row} times in a row, last: {error}; what was "
                            "answered is kept, the same command goes on"
                        )
                    )
            except (ConfigError, DataError) as error:
                self._fail(error)
            except Exception:
                self.stopped = self.stopped or "error"
                raise
            finally:
                self._in_flight -= 1
                self._show()
            if once:
                return

    def _fail(self, error: ConfigError | DataError) -> None:
        """Stop asking; the answers in flight still come in."""
        self.error = self.error or error
        self.stopped = self.stopped or "error"

    def _next_job(self) -> tuple[Question, int] | None:
        if self.stopped or len(self.collection.accepted) + self._in_flight >= self.num_samples:
            return None
        if self._over_budget(self._in_flight + 1):
            return None
        return next(self._jobs, None)

    @property
    def _budgets(self) -> bool:
        return self.config.max_tokens_total is not None or self.config.max_usd_total is not None

    def _over_budget(self, in_flight: int) -> bool:
        """Whether `in_flight` more answers, each as dear as the dearest so far, go beyond the budget."""
        for spent, largest, limit, name in zip(
            self._cost(self.collection.usage),
            self._cost(self.collection.largest),
            (self.config.max_tokens_total, self.config.max_usd_total),
            ("max_tokens_total", "max_usd_total"),
        ):
            if limit is not None and (spent >= limit or spent + in_flight * largest > limit):
                if in_flight == 1:  # else the answers in flight may turn out cheaper
                    self.stopped = self.stopped or f"--{name} {limit:,}: {spent:,.6g} are spent"
                return True
        return False

    def _cost(self, usage: Mapping[str, int]) -> tuple[int, float]:
        """Tokens and dollars."""
        return sum(usage.values()), self.config.usd(usage)

    async def _answer(self, question: Question, sample: int) -> None:
        """Ask until an answer is accepted or the attempts are used up, each answer on disk before the next request."""
        key = f"{question.key}:{sample}"
        while self.collection.num_rejected[key] < self.config.attempts:
            reply, usage = await self._ask(question)
            details: dict[str, Any] = {
                "id": question.record.record_id,
                "usage": usage,
                "text": reply.content,
                "thinking": reply.thinking,
            }
            try:
                record = read_reply(reply, question, sample, teacher_model=self.config.teacher_model)
                if not self.collection.is_new_chain(key, record.steps):
                    raise Rejected("repeated: the question has this chain already")
            except Rejected as error:
                details |= {"instruction": question.record.instruction, "gold_answer": list(question.record.answer)}
                await self._keep(Answer(key=key, reason=str(error), details=details))
            else:
                return await self._keep(Answer(key=key, record=record, details=details))
            if self.stopped or self._over_budget(self._in_flight):
                return
        self._num_given_up += 1

    async def _keep(self, answer: Answer) -> None:
        """Return once `answer` is on disk. Answers that come in while the disk is busy are written together."""
        self._pending.append(answer)
        async with self._writing:
            if self._pending:  # else another worker has written it
                batch, self._pending = self._pending, []
                self.collection.count(await asyncio.to_thread(self.collection.put_on_disk, batch))

    def _show(self) -> None:
        collection = self.collection
        tokens, usd = self._cost(self.collection.usage)
        accepted = len(collection.accepted)
        self._bar.total = max(accepted, min(self.num_samples, self._num_jobs - self._num_given_up))
        shown = {"rejected": collection.total_rejected, "tokens": f"{tokens:,}", "cost": f"${usd:.4f}"}
        self._bar.set_postfix({**shown, "unanswered": len(self.unanswered)}, refresh=False)
        self._bar.update(accepted - self._bar.n)

    # ---- one request

    async def _ask(self, question: Question) -> tuple[Reply, dict[str, int]]:
        """The teacher's reply and the tokens it took.

        Raises:
            _Unanswered: nothing usable came, in spite of the client's retries.
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
                response = await self._client.post("/chat/completions", body=sent, cast_to=Response)
                return self._read_completion(response.json(), sent)
            except (ValueError, _Malformed) as error:
                last = self._redact(f"not the protocol's JSON: {error}")
            except APIStatusError as error:
                message = self._redact(f"{error.status_code} {error.message}")
                if error.status_code in (401, 402, 403, 404):
                    raise ConfigError(
                        f"--teacher_model {self.config.teacher_model}: the endpoint refuses: {message[:300]}; "
                        f"check the key, the model's name and the address"
                    ) from None
                if not self._drop_unsupported(error, sent):
                    raise _Unanswered(message[:300]) from None
                last = message
            except APIConnectionError as error:
                raise _Unanswered(self._redact(f"{error.message} {error.__cause__ or ''}")[:300]) from None
            except (APIError, OpenAIError) as error:
                last = self._redact(str(error))
        raise _Unanswered(last[:300])

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
            self._bar.write(f"the endpoint does not take {name}; it is asked without")
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
            raise DataError(f"{path}: {error.strerror}; put the picture back, or drop its records") from error
    else:
        from io import BytesIO

        from PIL import Image

        from embervlm.data.images import load_image

        kind, buffer = "image/png", BytesIO()
        Image.fromarray(load_image(path)).save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

"""The application: routes, and how a request becomes a job and a job an answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from embervlm.errors import UserError
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.streaming import Piece
from embervlm.serve.http import RETRY, Gate, error_reply
from embervlm.serve.messages import ChatRequest, conversation
from embervlm.serve.metrics import Metrics
from embervlm.serve.pictures import Pictures
from embervlm.serve.replies import (
    Chunk,
    Completion,
    Delta,
    ErrorReply,
    Health,
    Model,
    ModelList,
    PartOfChoice,
    answer_fields,
    choice_fields,
    piece_text,
    usage_of,
    whole_choice,
)
from embervlm.serve.settings import STOP_S, ServeSettings
from embervlm.serve.worker import Busy, Job, Stopped, Worker
from embervlm.version import __version__
from embervlm.words.chain_text import format_reasoning

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
PATHS = frozenset({*PAGE_FILES, "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json"})
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "something in the request is wrong",
        401: "no or another key",
        404: "no such model",
        413: "the request is too large",
        429: "too many requests wait",
        500: "a fault of the server",
        503: "the server is stopping, or out of memory for requests",
        504: "not answered in time",
    }.items()
}
log = logging.getLogger("embervlm.serve")


class Gone(Exception):
    """The client has left."""


class Server:
    """What the routes share."""

    def __init__(self, model: EmberVLM, settings: ServeSettings) -> None:
        self.settings, self.metrics, self.started = settings, Metrics(), int(time.time())
        self.worker = Worker(model, self.metrics, max_rows=settings.max_rows, max_waiting=settings.max_waiting)
        self.pool = ThreadPoolExecutor(2, "picture")
        self.pictures = Pictures(settings, model.config.image_size, model.config.fill, self.pool)

    async def job_of(self, asked: ChatRequest) -> Job:
        """Raises UserError for what the client can fix, and HTTPException for another model's name."""
        settings = self.settings
        if asked.model != settings.model_name:
            raise HTTPException(404, f"model {asked.model!r} is not here; this is {settings.model_name!r}")
        if (asked.n or 1) > 1 and (asked.num_chains or 1) > 1:
            raise UserError("n and num_chains: give one of them; chains that vote make one choice")
        if asked.logprobs and (asked.num_chains or 1) > 1:
            raise UserError("logprobs: the answer of several chains has none; leave out num_chains")
        talk = conversation(asked.messages, settings.max_question_characters)
        tokens = [asked.max_tokens, asked.max_completion_tokens, settings.max_new_tokens]
        ceiling = min(limit for limit in tokens if limit is not None)
        asked_for_tokens = asked.max_tokens or asked.max_completion_tokens
        num_rows = asked.n or asked.num_chains or 1
        if num_rows > 1 and asked.temperature == 0:
            raise UserError("temperature: at 0 all chains would be the same; raise it, or leave it out for 0.7")
        decoding = Decoding(
            max_reasoning_steps=asked.max_reasoning_steps,
            max_new_tokens=ceiling if asked_for_tokens else None,
            temperature=asked.temperature or 0.0,
            top_p=asked.top_p or 1.0,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            num_chains=num_rows,
            min_known=asked.min_known,
        )
        picture = await asyncio.wait_for(self.pictures.load(talk.pictures), settings.timeout_s)
        return Job(
            question=talk.question,
            last=talk.last,
            picture=picture,
            previous=talk.previous,
            decoding=decoding,
            elect=(asked.num_chains or 1) > 1,
            stream=asked.stream,
            attention=asked.attention,
            loop=asyncio.get_running_loop(),
        )

    async def news(self, job: Job, request: Request) -> AsyncGenerator[None, None]:
        """Yields whenever there is something new, the last time when the job is over.

        Raises:
            TimeoutError, Gone, or what the worker says is wrong.
        """
        self.worker.submit(job)
        gone = asyncio.ensure_future(_left(request))
        gone.add_done_callback(lambda _: job.news.set())
        try:
            over = False
            while not over:
                left_s = self.settings.timeout_s - (time.monotonic() - job.begun_s)
                await asyncio.wait_for(job.news.wait(), max(left_s, 0))
                if gone.done():
                    raise Gone
                job.news.clear()
                over = job.over  # before the pieces are read: none comes later
                if job.error is not None:
                    raise job.error
                yield
            self.metrics.whole_s.observe(time.monotonic() - job.begun_s)
        finally:
            job.given_up = not job.over
            if job.given_up:
                self.metrics.left.inc()
            gone.cancel()

    async def whole(self, job: Job, asked: ChatRequest, request: Request) -> Completion:
        async for _ in self.news(job, request):
            pass
        assert job.results is not None and job.asked is not None
        choices = [whole_choice(i, result, bool(asked.logprobs)) for i, result in enumerate(job.results)]
        return Completion(**self.head(), choices=choices, usage=usage_of(job.asked, job.results))

    async def stream(self, job: Job, asked: ChatRequest, request: Request) -> AsyncIterator[str]:
        """Server-sent events. An error that comes after the first is an event too."""
        head = self.head()
        num_choices = 1 if job.elect else job.num_rows

        def event(choices: list[PartOfChoice]) -> str:
            return f"data: {Chunk(**head, choices=choices).model_dump_json(exclude_none=True)}\n\n"

        try:
            yield event([PartOfChoice(index=i, delta=Delta(role="assistant")) for i in range(num_choices)])
            async with aclosing(self.news(job, request)) as news:  # so that a row is given up at once
                async for _ in news:
                    if texts := taken(job.pieces):
                        parts = [(i, Delta(reasoning_content=text)) for i, text in texts.items()]
                        yield event([PartOfChoice(index=i, delta=delta) for i, delta in parts])
            assert job.results is not None and job.asked is not None
            for index, result in enumerate(job.results):
                last = Delta(**answer_fields(result))
                if job.elect:
                    last.reasoning_content = format_reasoning(result["reasoning_steps"])
                yield event([PartOfChoice(delta=last, **choice_fields(index, result, bool(asked.logprobs)))])
            if asked.stream_options is not None and asked.stream_options.include_usage:
                usage = usage_of(job.asked, job.results)
                yield f"data: {Chunk(**head, choices=[], usage=usage).model_dump_json(exclude_none=True)}\n\n"
        except Gone:
            return
        except Exception as error:
            yield f"data: {bytes(reply_to(error).body).decode()}\n\n"
        yield "data: [DONE]\n\n"

    def head(self) -> dict[str, Any]:
        name = self.settings.model_name
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def taken(pieces: deque[Piece]) -> dict[int, str]:
    """The text of each choice in `pieces`, which are then empty."""
    texts: dict[int, str] = {}
    while pieces:
        piece = pieces.popleft()
        texts[piece.place] = texts.get(piece.place, "") + piece_text(piece)
    return texts


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def reply_to(error: BaseException) -> JSONResponse:
    """The answer to a request that failed with `error`."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return error_reply(400, f"{where or 'body'}: {first['msg']}", where or None)
    if isinstance(error, HTTPException):
        return error_reply(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, UserError):
        return error_reply(400, str(error))
    if isinstance(error, Busy):
        return error_reply(429, str(error), headers=RETRY)
    if isinstance(error, Stopped):
        return error_reply(503, str(error), headers=RETRY)
    if isinstance(error, asyncio.TimeoutError):
        return error_reply(504, "not answered in time; ask for less, or when less is going on")
    return error_reply(500, "a fault of the server; its log says more")


def build_app(model: EmberVLM, settings: ServeSettings, key: str | None = None) -> FastAPI:
    """The application for a Stage 4 model; clients have to send `key` if it is given."""
    server = Server(model, settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await asyncio.to_thread(server.worker.stop, STOP_S)
        server.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="EmberVLM", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=settings, key=key, metrics=server.metrics, paths=PATHS)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(UserError)
    @app.exception_handler(Busy)
    @app.exception_handler(Stopped)
    @app.exception_handler(asyncio.TimeoutError)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return reply_to(error)

    @app.post("/v1/chat/completions", response_model=Completion, responses=ERRORS)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """The chain and the answer to a question; with `stream` as server-sent events."""
        job = await server.job_of(asked)
        if asked.stream:
            events = server.stream(job, asked, request)
            return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        with suppress(Gone):
            return as_json(await server.whole(job, asked, request))
        return Response(status_code=499)  # nobody reads it

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        one = Model(id=settings.model_name, created=server.started, owned_by="embervlm")
        return ModelList(data=[one])

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Any:
        """503 when the model is not there to answer."""
        alive = server.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    add_page(app, {path: (PAGE / name).read_text(encoding="utf-8") for path, name in PAGE_FILES.items()}, settings)
    return app


def as_json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


def add_page(app: FastAPI, texts: Mapping[str, str], settings: ServeSettings) -> None:
    """The page at `/` and what it needs."""
    for path, text in texts.items():
        media_type = MEDIA_TYPES[Path(PAGE_FILES[path]).suffix]
        body = text.replace("MODEL_NAME", settings.model_name)

        async def file(body: str = body, media_type: str = media_type) -> Response:
            return Response(body, media_type=media_type, headers=PAGE_HEADERS)

        app.add_api_route(path, file, include_in_schema=False)

"""What stands between a connection and the application: time, size and key."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from embervlm.serve.metrics import Metrics
from embervlm.serve.settings import HEAD_TIMEOUT_S, MAX_BODIES_BYTES, ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}
"""What is still on its way is not read."""


def error_reply(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status, headers)


def limited_protocol(max_connections: int, request_s: float) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP/1.1, for clients that hang: it drops a connection that sends no whole head within
    `HEAD_TIMEOUT_S`, or has sent or read too little after `request_s`."""

    class LimitedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _timed: object = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
            else:
                self._limit(HEAD_TIMEOUT_S)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._limit(request_s)
            elif before is not None and before.response_complete and self._timed is not before:
                self._timed = before  # the head of one more request has begun
                self._limit(HEAD_TIMEOUT_S)

        def on_response_complete(self) -> None:
            before = self.cycle
            super().on_response_complete()
            if self.cycle is before and self._timer is not None:
                self._timer.cancel()  # from here on uvicorn's own time for a connection that is kept

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _limit(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    return LimitedProtocol


class Gate:
    """Middleware that asks for the key, counts bytes as they come, and counts answers.

    Args:
        key: None where none is asked for.
        paths: Those that are counted by name.
    """

    def __init__(
        self, app: Any, *, settings: ServeSettings, key: str | None, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, paths
        self.key = None if key is None else key.encode()
        self.held_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        mine = 0

        async def read() -> Message:
            nonlocal mine
            message = await receive()
            more = len(message.get("body", b""))
            mine, self.held_bytes = mine + more, self.held_bytes + more
            if mine > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large(), CLOSE)
            if self.held_bytes > MAX_BODIES_BYTES:
                raise HTTPException(503, "too many large requests at once; try again later", {**CLOSE, **RETRY})
            return message

        async def write(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        refused = self._refusal({name: value for name, value in scope["headers"]}, scope["path"])
        try:
            await (refused or self.app)(scope, read, write)
        finally:
            self.held_bytes -= mine

    def _refusal(self, headers: dict[bytes, bytes], path: str) -> JSONResponse | None:
        if self.key is not None and path.startswith(("/v1/", "/metrics")):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self.key) and scheme.lower() == b"bearer"):
                told = {"WWW-Authenticate": "Bearer", **CLOSE}
                return error_reply(401, "no or another key; send Authorization: Bearer KEY", headers=told)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.settings.max_body_bytes:
            return error_reply(413, self._too_large(), headers=CLOSE)
        return None

    def _too_large(self) -> str:
        return f"the request has more than {self.settings.max_body_bytes:,} bytes; send a smaller picture"

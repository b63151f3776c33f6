"""A server in a thread of the test's own process, for tests of the port."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn
from PIL import Image

from embervlm.serve.app import build_app
from embervlm.serve.http import limited_protocol
from embervlm.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"


@contextmanager
def serving(model: Any, key: str | None = None, *, request_s: float = 60, **settings: Any) -> Iterator[httpx2.Client]:
    """A client of a server with these settings."""
    app = build_app(model, ServeSettings(**settings), key)
    protocol = limited_protocol(2000, request_s)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, ws="none", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(format: str = "PNG", size: tuple[int, int] = (40, 30), color: str = "teal") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, format)
    return out.getvalue()


def body(question: str = "Which robots are suited?", url: str | None = None, **options: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if url is not None:
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"model": "embervlm", "messages": [{"role": "user", "content": parts}], "max_tokens": 40, **options}


def metric(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def until(condition: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""An OpenAI-compatible server on loopback that answers, or misbehaves, as a script says.

`python tests/scripted_teacher.py --delay_s 0.2 --fault_rate 0.05` runs one in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Act:
    """What the server does with one request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """None: a chat completion with `content`."""
    content: str = ""
    thinking: str | None = None
    finish_reason: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 50})
    delay_s: float = 0.0
    cut: str = ""
    """`before` closes the connection instead of an answer, `within` in the middle of it."""

    def payload(self, model: str) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.content or "scripted", "type": "scripted"}}).encode()
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        value: dict[str, Any] = {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "finish_reason": self.finish_reason, "message": message}],
        }
        if self.usage is not None:
            usage = {**self.usage, "total_tokens": sum(self.usage.values())}
            value["usage"] = usage
        return json.dumps(value).encode()


def chain(robots: str | list[str], **fields: Any) -> str:
    """A good structured answer, but for `fields`."""
    answers = [robots] if isinstance(robots, str) else robots
    return json.dumps(
        {
            "steps": [
                {"type": "problem_analysis", "text": "The task needs a robot that fits the place."},
                {"type": "solution_selection", "text": f"Suited here: {' and '.join(answers)}."},
            ],
            "conclusion": f"{', '.join(answers)}.",
            "answer": answers,
            "confidence": 0.9,
            **fields,
        }
    )


class ScriptedTeacher:
    """The server. `script` gets the request's body and its number (from 0) and says what to do.

    Attributes:
        requests: Body, headers and time of every request so far.
        in_flight: For each of them how many, itself included, waited for their answers when it came.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Act]) -> None:
        self.script = script
        self.requests: list[tuple[dict[str, Any], dict[str, str], float]] = []
        self.port = 0
        self.in_flight: list[int] = []
        self._waiting = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self, port: int = 0) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")[1:]
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                act = self.script(body, len(self.requests))
                self.requests.append((body, headers, time.monotonic()))
                self._waiting += 1
                self.in_flight.append(self._waiting)
                await asyncio.sleep(act.delay_s)
                self._waiting -= 1
                payload = act.payload(body["model"])
                extra = "".join(f"{name}: {value}\r\n" for name, value in act.headers.items())
                answer = (
                    f"HTTP/1.1 {act.status} Scripted\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(payload)}\r\n{extra}\r\n"
                ).encode() + payload
                if act.cut:
                    writer.write(b"" if act.cut == "before" else answer[: len(answer) // 2])
                    await writer.drain()
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextlib.contextmanager
def serving(script: Callable[[dict[str, Any], int], Act]) -> Iterator[ScriptedTeacher]:
    """A server in a thread of this process."""
    teacher, loop, ready = ScriptedTeacher(script), asyncio.new_event_loop(), threading.Event()
    done = asyncio.Event()

    async def main() -> None:
        server = await teacher.start()
        ready.set()
        await done.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield teacher
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(timeout=5)


FAULTS = (
    Act(status=429, headers={"Retry-After": "0.2"}),
    Act(status=500),
    Act(cut="before"),
    Act(cut="within", content="x"),
    Act(body=b'{"choices": [{"mess'),
)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Every answer is Drone.")
    parser.add_argument("--delay_s", type=float, default=0.2)
    parser.add_argument("--fault_rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    def script(body: dict[str, Any], number: int) -> Act:
        if rng.random() < args.fault_rate:
            return rng.choice(FAULTS)
        return Act(content=chain("Drone"), delay_s=args.delay_s)

    teacher = ScriptedTeacher(script)
    server = await teacher.start()
    print(teacher.url, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

"""Throughput and time to first token of `embervlm serve`, and its memory under good and bad requests.

    python benchmarks/serving.py CHECKPOINT RECORDS [--clients 1 8 32] [--seconds 20] [--minutes 10] [--json FILE]

RECORDS is the data set of the checkpoint, such as outputs/quickstart/data/reasoning_data.json: its pictures and
questions are asked. Each client asks again as soon as it has its answer. Time to first token is what a client sees,
from sending to the first text. Clients and server share the machine. With `--minutes`, 16 clients ask while 4 others
send what a server has to refuse or drop; the memory is that of the server process, each tenth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"


@contextmanager
def server(checkpoint: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server of its own."""
    argv = [sys.executable, "-m", "embervlm.cli", "serve", "--checkpoint", str(checkpoint), "--port", "0", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split(" ")[0], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def questions(records: Path) -> list[dict[str, Any]]:
    """Messages of records with their pictures, in a fixed mixed order."""
    found = json.loads(records.read_text(encoding="utf-8"))
    chosen = random.Random(0).sample(found, min(200, len(found)))
    return [asked(record["instruction"], (records.parent / record["image"]).read_bytes()) for record in chosen]


def asked(question: str, picture: bytes, **options: Any) -> dict[str, Any]:
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    options = {"stream": True, "stream_options": {"include_usage": True}, **options}
    return {"model": "embervlm", "messages": [{"role": "user", "content": parts}], **options}


async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first text, and number of tokens."""
    began, first, tokens, finished = time.perf_counter(), None, 0, False
    async with session.post(CHAT, json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {await reply.text()}")
        async for line in reply.content:
            if first is None and b"_content" in line:
                first = time.perf_counter() - began
            finished |= b'"finish_reason":"' in line
            if b'"usage":' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    if first is None or not finished:
        raise RuntimeError("the stream ended before the answer")
    return first, tokens


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


async def measure(address: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    found: list[tuple[float, int]] = []
    failures: Counter[str] = Counter()
    turn = itertools.cycle(bodies)
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() - began < seconds:
            try:
                found.append(await ask(session, next(turn)))
            except Exception as error:
                failures[str(error)[:80] or type(error).__name__] += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    took = time.perf_counter() - began
    first = [one for one, _ in found]
    return {
        "clients": clients,
        "requests": len(found),
        "requests_per_s": len(found) / took,
        "tokens_per_s": sum(tokens for _, tokens in found) / took,
        "first_token_ms_p50": 1000 * statistics.median(first),
        "first_token_ms_p95": 1000 * percentile(first, 0.95),
        "failures": sum(failures.values()),
        "messages": dict(failures),
    }


# -- good and bad requests ----------------------------------------------------------------------------------------


def bomb_png() -> bytes:
    """60,000 x 60,000 grey pixels in 3.5 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(60_001)) for _ in range(6_000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bad_bodies(good: dict[str, Any]) -> list[tuple[str, bytes]]:
    whole = io.BytesIO()
    Image.effect_noise((600, 600), 80).convert("RGB").save(whole, "JPEG")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"
    pictures = {"a bomb": bomb_png(), "an SVG": svg, "half a JPEG": whole.getvalue()[: len(whole.getvalue()) // 2]}
    out = [(name, json.dumps(asked("Fly?", picture)).encode()) for name, picture in pictures.items()]
    out += [("no JSON", b'{"model": "embervlm", "messages": [')]
    out += [("a long question", json.dumps(asked("word " * 10_000, pictures["an SVG"])).encode())]
    out += [("12 MB", json.dumps(asked("Fly?", bytes(9_000_000))).encode())]
    out += [("another model", json.dumps({**good, "model": "gpt"}).encode())]
    return out


async def misbehave(address: str, good: dict[str, Any], bad: list[tuple[str, bytes]], found: Counter[str]) -> None:
    """One bad request after another: what has to be refused, and clients that leave or hang."""
    host, _, port = address.removeprefix("http://").partition(":")
    rng = random.Random()
    async with aiohttp.ClientSession(address) as session:
        while True:
            name, body = rng.choice([*bad, ("leaves", b""), ("hangs", b"")])
            with suppress(aiohttp.ClientError, OSError):
                if name == "leaves":
                    async with session.post(CHAT, json=good) as reply:
                        await reply.content.readline()
                    found["leaves"] += 1
                elif name == "hangs":
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
                    await asyncio.sleep(rng.random())
                    writer.close()
                    found["hangs"] += 1
                else:
                    async with session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as reply:
                        found[f"{name}: {reply.status}"] += 1
            await asyncio.sleep(0.05)


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


async def mixed(address: str, pid: int, bodies: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    found: Counter[str] = Counter()
    bad = bad_bodies(bodies[0])
    others = [asyncio.create_task(misbehave(address, bodies[0], bad, found)) for _ in range(4)]
    memory = []
    rounds = []
    for _ in range(10):
        rounds.append(await measure(address, bodies, 16, seconds / 10))
        memory.append(round(resident_mb(pid), 1))
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return {
        "minutes": seconds / 60,
        "good_requests": sum(one["requests"] for one in rounds),
        "good_failures": sum(one["failures"] for one in rounds),
        "messages": [one["messages"] for one in rounds if one["messages"]],
        "bad_requests": dict(sorted(found.items())),
        "resident_mb": memory,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20, help="for each number of clients")
    parser.add_argument("--minutes", type=float, default=0, help="of good and bad requests mixed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    bodies = questions(args.records)
    out: dict[str, Any] = {}
    with server(args.checkpoint) as (address, pid):
        asyncio.run(measure(address, bodies, 2, 2))  # warm
        out["load"] = [asyncio.run(measure(address, bodies, clients, args.seconds)) for clients in args.clients]
        print("clients  requests/s  tokens/s  first token p50  p95      failures")
        for one in out["load"]:
            print(
                f"{one['clients']:7d}  {one['requests_per_s']:10.1f}  {one['tokens_per_s']:8.0f}  "
                f"{one['first_token_ms_p50']:12.0f} ms  {one['first_token_ms_p95']:4.0f} ms  {one['failures']:8d}"
            )
            for message, times in one["messages"].items():
                print(f"         {times} x {message}")
        if args.minutes:
            out["mixed"] = asyncio.run(mixed(address, pid, bodies, 60 * args.minutes))
            print(json.dumps(out["mixed"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()

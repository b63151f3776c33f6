"""The port: what it answers, what it refuses, and that the others go on."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from conftest import enliven, make_tiny
from served import CHAT, body, data_url, metric, picture, serving, until

from embervlm.evaluation.explain import explain_chains, without_padding
from embervlm.model.generation import look
from embervlm.serve.pictures import Pictures
from embervlm.serve.settings import ServeSettings
from embervlm.words.chain_text import format_reasoning


@pytest.fixture(scope="module")
def model(tiny_settings, tokenizer):
    return enliven(make_tiny(tiny_settings, tokenizer))


@pytest.fixture(scope="module")
def port(model):
    with serving(model, max_body_bytes=400_000, max_pixels=1_000_000) as client:
        yield client


def events(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(found, index=0):
    """The parts of one choice put together, and its last event."""
    parts = [choice for event in found for choice in event["choices"] if choice["index"] == index]
    whole = {name: "".join(p["delta"].get(name) or "" for p in parts) for name in ("reasoning_content", "content")}
    return whole, parts[-1]


# -- what it answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_attention_is_that_of_an_evaluation_and_comes_only_where_asked_for(model, port, records, stream):
    file = open(records[0].image, "rb").read()
    asked = body(records[0].instruction, data_url(file, "image/jpeg"), stream=stream)

    def choice(**options):
        reply = port.post(CHAT, json=asked | options)
        return joined(events(reply))[1] if stream else reply.json()["choices"][0]

    assert choice().get("attention") is None
    told = choice(attention=True)["attention"]
    given = model.generate_with_reasoning(records[0].image, records[0].instruction, max_new_tokens=40)
    steps = given["reasoning_steps"]
    about = explain_chains(model, *look(model, [records[0].image]), [records[0].instruction], [steps])[0]["attention"]
    assert told["grid"] == about["grid"] and len(told["steps"]) == len(steps) > 0
    assert np.allclose(told["steps"], about["steps"], atol=1e-3)
    without = port.post(CHAT, json=body(attention=True)).json()
    assert without["choices"][0]["attention"] is None, "there is no picture"


def test_attention_lies_on_the_picture_as_it_was_sent_not_on_its_padding():
    with ThreadPoolExecutor(1) as pool:
        wide = asyncio.run(Pictures(ServeSettings(), 16, (0, 0, 0), pool).load([data_url(picture(size=(40, 20)))]))
        whole = asyncio.run(Pictures(ServeSettings(), 16, None, pool).load([data_url(picture(size=(40, 20)))]))
    assert wide.area == (0, 0.25, 1, 0.75) and whole.area is None
    assert without_padding({"grid": [4, 4], "steps": [[1 / 16] * 16]}, wide.area) == {
        "grid": [2, 4],
        "steps": [[0.125] * 8],
    }


def test_an_answer_is_that_of_the_model_itself(model, port, records):
    file = open(records[0].image, "rb").read()
    reply = port.post(CHAT, json=body(records[0].instruction, data_url(file, "image/jpeg"))).json()
    given = model.generate_with_reasoning(records[0].image, records[0].instruction, max_new_tokens=40)
    (choice,) = reply["choices"]
    assert choice["message"]["reasoning_content"] == format_reasoning(given["reasoning_steps"])
    assert (choice["message"]["content"], choice["message"]["refusal"]) == (given["answer"], given["why"])
    assert choice["answer_set"] == given["answer_set"]
    assert choice["confidence"] == pytest.approx(given["confidence"], abs=1e-4)
    assert choice["finish_reason"] == ("length" if given["cut_off"] else "stop")
    usage = reply["usage"]
    assert usage["completion_tokens"] == given["num_tokens"] and usage["prompt_tokens"] > model.num_visual_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_is_the_whole_answer_in_parts(port):
    asked = body("Fly where?", data_url(picture()), n=8, seed=5, temperature=1.5, logprobs=True)
    whole = port.post(CHAT, json=asked).json()
    reply = port.post(CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = events(reply)
    assert found[-1]["usage"] == whole["usage"] and found[-1]["choices"] == []
    assert len({event["id"] for event in found}) == 1
    for choice in whole["choices"]:
        told, last = joined(found, choice["index"])
        assert told["reasoning_content"] == choice["message"]["reasoning_content"]
        assert told["content"] == (choice["message"]["content"] or "")
        assert last["finish_reason"] == choice["finish_reason"] and last["confidence"] == choice["confidence"]
    texts = {choice["message"]["reasoning_content"] for choice in whole["choices"]}
    assert len(texts) > 2 and max(map(len, texts)) > 20


def test_chains_that_vote_make_one_choice(port):
    asked = body("Fly where?", num_chains=5, seed=1)
    (choice,) = port.post(CHAT, json=asked).json()["choices"]
    told, _ = joined(events(port.post(CHAT, json={**asked, "stream": True})))
    assert choice["votes"] is not None and told["reasoning_content"] == choice["message"]["reasoning_content"]


def test_a_follow_up_is_what_reason_gives(model, port):
    steps = ["It is high.", "So it flies."]
    messages = [
        {"role": "user", "content": "Fly?"},
        {"role": "assistant", "content": "Drone", "reasoning_content": format_reasoning(steps)},
        {"role": "user", "content": "And in the rain?"},
    ]
    reply = port.post(CHAT, json={"model": "embervlm", "messages": messages, "max_tokens": 30}).json()
    first = model.generate_reasoning(None, "Fly?", max_new_tokens=4)
    before = type(first)(question="Fly?", steps=steps, answer="Drone", answer_set=["Drone"], confidence=1.0)
    given = model.reason(None, "And in the rain?", before, max_new_tokens=30)
    assert reply["choices"][0]["message"]["reasoning_content"] == format_reasoning(given["reasoning_steps"])


@pytest.mark.slow
def test_32_clients_at_once_get_what_each_gets_alone(port):
    def request(n):
        url = data_url(picture(color=f"#{8 * n:02x}4060")) if n % 3 else None
        return body("Fly. " * (1 + n % 4), url, seed=n, temperature=1.2 * (n % 2), max_tokens=25)

    def ask(one):
        reply = port.post(CHAT, json=one)
        assert reply.status_code == 200
        return reply.json()["choices"][0]["message"]

    asked = [request(n) for n in range(32)]
    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, asked))
    assert together == alone and len({message["reasoning_content"] for message in alone}) > 5


def test_models_health_and_metrics_are_told(port):
    assert [one["id"] for one in port.get("/v1/models").json()["data"]] == ["embervlm"]
    assert port.get("/health").json() == {"status": "ok"}
    before = metric(port, "embervlm_generated_tokens_total")
    used = port.post(CHAT, json=body()).json()["usage"]["completion_tokens"]
    assert metric(port, "embervlm_generated_tokens_total") == before + used
    assert metric(port, "embervlm_first_token_seconds_count") > 0 and metric(port, "embervlm_rows") == 0
    port.get("/no/such/place")
    assert 'path="other",status="404"' in port.get("/metrics").text


# -- what it refuses ----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """20,000 x 20,000 pixels in 40 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(2_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def changed(**message):
    return {"model": "embervlm", "messages": [{"role": "user", "content": "Fly?"} | message]}


SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>"
WRONG = {
    "messages: List should have at least 1 item": {"model": "embervlm", "messages": []},
    "model: Field required": {"messages": [{"role": "user", "content": "Fly?"}]},
    "tools: Extra inputs are not permitted": body(tools=[]),
    "n: Input should be less than or equal to 16": body(n=17),
    "temperature: Input should be a finite number": json.dumps(body(temperature=float("nan"))),
    "messages[0]: this model reads no system message": changed(role="system"),
    "messages[0]: no text; write a question": body("  "),
    "the last one is not a user's": changed(role="assistant"),
    "80000 characters of text; give at most 8000": body("x" * 80_000),
    "the language model reads 1024": body("\u20ac\u00e9\u4e2d" * 800),
    "at 0 all chains would be the same": body(n=2, temperature=0),
    "give one of them": body(n=2, num_chains=2),
    "picture 1: not a picture; send PNG": body(url=data_url(SVG, "image/svg+xml")),
    "picture 1: too many pixels; give at most 1,000,000": body(url=data_url(bomb())),
    "picture: not readable as a picture": body(url=data_url(picture("JPEG", (400, 400))[:2000])),
    "its data URL is not base64": body(url="data:image/png;base64,%%%"),
    "no comma in its data URL": body(url="data:image/png"),
    "give a data URL": body(url="file:///etc/passwd"),
    "pictures are not fetched from example.com": body(url="https://example.com/a.png"),
    "pictures are not fetched from an empty host": body(url="http:///a.png"),
    "picture 1: not an address": body(url="http://[::1/a.png"),
    "17 pictures; give at most 16": changed(
        content=[{"type": "text", "text": "Fly?"}]
        + [{"type": "image_url", "image_url": {"url": data_url(picture())}}] * 17
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_request_gets_status_400_and_a_sentence(port, message):
    asked = WRONG[message]
    content = asked if isinstance(asked, str) else json.dumps(asked)
    reply = port.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_malformed_json_another_model_and_another_method_are_refused(port):
    headers = {"Content-Type": "application/json"}
    for content in (b'{"model": ', b"\xff\xfe", b"[" * 50_000, b"null", b""):
        reply = port.post(CHAT, content=content, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"]["message"], content[:9]
    assert port.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"}).status_code == 400
    reply = port.post(CHAT, json={**body(), "model": "gpt-5"})
    assert reply.status_code == 404 and "model 'gpt-5' is not here; this is 'embervlm'" in reply.text
    assert port.get(CHAT).status_code == 405 and port.get("/docs").status_code == 404


def test_a_body_that_is_too_large_gets_413_whether_it_says_so_or_not(port):
    reply = port.post(CHAT, content=b" " * 500_000)
    assert reply.status_code == 413 and "400,000 bytes" in reply.json()["error"]["message"]
    reply = port.post(CHAT, content=(b" " * 1000 for _ in range(500)), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413 and reply.headers["connection"] == "close"
    with socket.create_connection((port.base_url.host, port.base_url.port)) as wire:  # 1 GB, which nobody reads
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert wire.recv(100).startswith(b"HTTP/1.1 413")


def test_a_key_is_asked_for(model):
    with serving(model, key="right") as client:
        assert client.post(CHAT, json=body()).status_code == 401
        for header in ("Bearer wrong", "Bearer", "Basic right", "right", "Bearer r\u00efght".encode()):
            reply = client.get("/v1/models", headers={"Authorization": header})
            assert reply.status_code == 401 and "Bearer KEY" in reply.json()["error"]["message"]
        assert client.get("/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200


# -- clients that hang, leave, or are many --------------------------------------------------------------------------


@pytest.fixture
def endless(model, monkeypatch):
    """A request that is written to the last token of its room."""
    monkeypatch.setattr(model.tokenizer, "end_of_text", -1)
    monkeypatch.setitem(model.tokenizer.ids, "<|answer_end|>", -1)
    return body("Fly?", max_tokens=900, temperature=2.0, seed=1)


def test_who_leaves_in_mid_stream_gives_up_its_row(model, endless):
    with serving(model, max_rows=1) as client:
        with client.stream("POST", CHAT, json={**endless, "stream": True}) as reply:
            parts = reply.iter_bytes()
            next(parts)
            until(lambda: metric(client, "embervlm_rows") == 1)
        until(lambda: metric(client, "embervlm_requests_given_up_total") == 1)
        written = metric(client, "embervlm_generated_tokens_total")
        assert written < 900 and client.post(CHAT, json=body(max_tokens=5)).status_code == 200


def test_a_full_queue_says_so_and_one_that_waits_too_long_is_told(model, endless):
    with serving(model, max_rows=1, max_waiting=1, timeout_s=1.5) as client, ThreadPoolExecutor(8) as pool:
        replies = [found.result() for found in [pool.submit(client.post, CHAT, json=endless) for _ in range(8)]]
        statuses = sorted(reply.status_code for reply in replies)
        assert set(statuses) <= {200, 429, 504} and statuses.count(429) >= 4
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error" and refused.headers["retry-after"] == "1"
        until(lambda: metric(client, "embervlm_rows") == 0)
        assert client.post(CHAT, json=body(max_tokens=5)).status_code == 200


def test_whoever_takes_too_long_gets_504_or_an_event(model, endless):
    endless["n"] = 16
    with serving(model, timeout_s=0.2) as client:
        assert client.post(CHAT, json=endless).status_code == 504
        last = events(client.post(CHAT, json={**endless, "stream": True}))[-1]
        assert "not answered in time" in last["error"]["message"]
        until(lambda: metric(client, "embervlm_rows") == 0)


def test_a_picture_that_takes_too_long_to_decode_gets_504(model):
    large = picture("PNG", (6000, 6000))
    with serving(model, timeout_s=0.02) as client:
        reply = client.post(CHAT, json=body(url=data_url(large)))
        assert reply.status_code == 504 and "not answered in time" in reply.text


@pytest.mark.slow
def test_connections_that_hang_are_dropped_and_the_others_go_on(model, monkeypatch):
    monkeypatch.setattr("embervlm.serve.http.HEAD_TIMEOUT_S", 4.0)  # long enough for a request on a busy machine
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    begun = [b"", b"GET / HT", head, head + b"Content-Length: 900\r\n\r\n{", b"\x16\x03\x01\x02\x00\x01"]
    with serving(model, request_s=5.0) as client:
        wires = []
        for number in range(400):
            wires.append(socket.create_connection((client.base_url.host, client.base_url.port)))
            wires[-1].sendall(begun[number % len(begun)])
        assert client.post(CHAT, json=body(max_tokens=5)).status_code == 200
        for wire in wires:
            wire.settimeout(20)
            try:
                while wire.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            wire.close()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as kept:
            kept.settimeout(20)
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in kept.recv(1000)
            kept.sendall(b"GET /hea")  # the second request of a connection hangs
            with pytest.raises(ConnectionResetError):
                while kept.recv(1000):
                    pass
                raise ConnectionResetError
        assert client.get("/health").status_code == 200


# -- pictures from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere():
    """`host:port` of a server of pictures."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.wfile.write(bytes(500_000) if self.path == "/large" else picture())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_picture_is_fetched_only_from_a_host_that_is_named(model, elsewhere):
    number = elsewhere.partition(":")[2]

    def ask(client, url):
        reply = client.post(CHAT, json=body("Fly?", url, max_tokens=20))
        return reply.json()["error"]["message"] if reply.is_error else reply.json()["choices"]

    with serving(model, picture_hosts=(elsewhere,), max_body_bytes=400_000) as client:
        assert ask(client, f"http://{elsewhere}/picture") == ask(client, data_url(picture()))
        assert "status 302; redirects are not followed" in ask(client, f"http://{elsewhere}/moved")
        assert "more than 400,000 bytes" in ask(client, f"http://{elsewhere}/large")
        assert "not fetched from localhost" in ask(client, f"http://localhost:{number}/picture")
        assert "not fetched from 127.0.0.1" in ask(client, "http://127.0.0.1:1/picture")
        assert "has a password in it" in ask(client, f"http://me:you@{elsewhere}/picture")
    with serving(model, picture_hosts=("localhost",)) as client:  # its address is private, and not named
        assert "localhost is in a private network" in ask(client, f"http://localhost:{number}/picture")
    with serving(model, picture_hosts=("localhost", "127.0.0.1", "::1")) as client:
        assert isinstance(ask(client, f"http://localhost:{number}/picture"), list)


# -- what the model does not know -------------------------------------------------------------------------------------


def test_a_question_that_the_model_does_not_know_is_refused_with_a_sentence(model, port, records, monkeypatch):
    class Stranger:
        def of(self, visual, seen, questions, last=None):
            heard.append(last)
            return [(0.1, "It is unlike all.") for _ in questions]

    heard = []
    monkeypatch.setattr(model, "known", Stranger())
    (choice,) = port.post(CHAT, json=body(n=None)).json()["choices"]
    assert choice["message"]["content"] is None and "It is unlike all." in choice["message"]["refusal"]
    assert choice["known"] == 0.1
    told = events(port.post(CHAT, json=body(stream=True)))[-1]["choices"][0]
    assert told["delta"]["refusal"] == choice["message"]["refusal"] and "content" not in told["delta"]
    (choice,) = port.post(CHAT, json=body(min_known=0)).json()["choices"]
    assert "It is unlike all." not in (choice["message"]["refusal"] or "")
    turns = [{"role": "user", "content": "Fly?"}, {"role": "assistant", "content": "No."}]
    turns.append({"role": "user", "content": "Who wrote Hamlet?"})
    assert port.post(CHAT, json=body() | {"messages": turns}).is_success
    assert heard[0] is None and heard[-1] == ["Who wrote Hamlet?"], "a follow-up has to be known by itself"

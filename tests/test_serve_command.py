"""`embervlm serve` as users start it, and the official client of OpenAI."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import enliven, make_tiny
from served import data_url, picture
from training_helpers import REPOSITORY

from embervlm.cli import main

QUESTION = [
    {"type": "text", "text": "Which robots are suited?"},
    {"type": "image_url", "image_url": {"url": data_url(picture())}},
]
ASKED = {"model": "small", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}


@pytest.fixture(scope="module")
def checkpoint(tiny_settings, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    enliven(make_tiny(tiny_settings, tokenizer)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_official_client_talks_to_it_and_a_signal_ends_it_after_its_answers(checkpoint, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    argv = ["serve", "--checkpoint", checkpoint, "--port", "0", "--model_name", "small"]
    server = subprocess.Popen(
        [sys.executable, "-m", "embervlm.cli", *map(str, argv), "--api_key_file", str(tmp_path / "key")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        address = server.stdout.readline().split(" ")[0]
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(openai.AuthenticationError, match="send Authorization"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert [model.id for model in client.models.list()] == ["small"]
        whole = client.chat.completions.create(**ASKED, n=3, seed=1, temperature=1.2, logprobs=True)
        assert len(whole.choices) == 3 and whole.usage.completion_tokens > 10
        told = {0: "", 1: "", 2: ""}
        for event in client.chat.completions.create(**ASKED, n=3, seed=1, temperature=1.2, stream=True):
            for choice in event.choices:
                told[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
        assert told == {choice.index: choice.message.reasoning_content for choice in whole.choices}
        with pytest.raises(openai.BadRequestError, match="this model reads no system message"):
            client.chat.completions.create(**{**ASKED, "messages": [{"role": "system", "content": "Be kind."}]})
        with ThreadPoolExecutor(1) as pool:
            stream = client.chat.completions.create(**ASKED, stream=True)
            first = next(stream)
            rest = pool.submit(list, stream)
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
            assert [first, *rest.result()][-1].choices[0].finish_reason in ("stop", "length")
        assert server.stdout.read() == "stopped\n"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "203.0.113.1"], "203.0.113.1:8000: Cannot assign.*; give another --host or --port"),
        (["--port", "70000"], "port in .0, 65535."),
        (["--max_rows", "0"], "max_rows: 0 is not above 0"),
        (["--picture_hosts", "https://example.com/"], "is not a host; write it without https:// and path"),
        (["--api_key_file", "missing"], "missing: not readable"),
        (["--checkpoint", "missing"], "missing"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_a_line(checkpoint, flags, message, monkeypatch):
    argv = flags if "--checkpoint" in flags else ["--checkpoint", str(checkpoint), *flags]
    with pytest.raises(SystemExit, match=message):
        main(["serve", "--port", "0", *argv] if "--port" not in flags and "--host" not in flags else ["serve", *argv])


def test_an_empty_key_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("EMBERVLM_API_KEY", " \n")
    with pytest.raises(SystemExit, match="EMBERVLM_API_KEY: has no key"):
        main(["serve", "--checkpoint", str(checkpoint), "--port", "0"])

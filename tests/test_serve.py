"""The teacher client against `transformers serve`: the real protocol, with a model that knows nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from embervlm.cli import main

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
START_S = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a language model of 50,000 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from embervlm.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("teacher") / "tiny-teacher"
    tokenizer = train_tokenizer(["Which robots are suited? Drone, Humanoid."], 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(model),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
    ]
    log = model.parent / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        for _ in range(START_S):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def test_answers_come_in_with_their_tokens_and_are_rejected_with_a_reason(model, address, tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps([{"input": f"Film roof {n}", "output": "Drone"} for n in range(3)]))
    with pytest.raises(SystemExit, match="no answer was accepted; 3 rejected"):
        main(
            [
                "data",
                "generate",
                "--teacher_model",
                str(model),
                "--teacher_base_url",
                address,
                "--input_dataset",
                str(tmp_path / "tasks.json"),
                "--output_file",
                str(tmp_path / "out.json"),
                "--attempts",
                "1",
                "--max_answer_tokens",
                "24",
            ]
        )
    rows = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 3
    for row in rows:
        assert row["reason"].startswith(("cut off: ", "empty: ", "answer ", "reasoning: ", "malformed JSON: "))
        assert 0 < row["usage"]["completion_tokens"] <= 24 and row["usage"]["prompt_tokens"] > 100

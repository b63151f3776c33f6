"""An exported folder in transformers' own pipeline, and on a hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.model.embervlm import EmberVLM, build_model

QUESTION = "Which robot flies?"


@pytest.fixture
def exported(lively_model, tmp_path):
    lively_model.save_pretrained(tmp_path / "checkpoint")
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    return tmp_path / "out"


@pytest.fixture
def picture(scene_data):
    return str(sorted((scene_data / "images").iterdir())[0])


def chat(picture, question=QUESTION):
    return [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": question}]}]


def lines_of(found):
    """What the pipeline should write for a result of `generate_with_reasoning`."""
    *steps, last = found["reasoning_steps"]
    numbered = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    last = last if last.startswith("Conclusion: ") else f"Step {len(steps) + 1}: {last}"
    return "\n".join([*numbered, last, *([f"Answer: {found['text']}"] if found["text"] else [])])


def test_the_pipeline_writes_what_the_model_does(exported, picture, caplog):
    pipe, model = pipeline("image-text-to-text", model=str(exported)), EmberVLM.from_pretrained(exported)
    assert "not supported" not in caplog.text
    opened = Image.open(picture)  # whole, where a path's JPEG is decoded at the size that is needed
    wanted = lines_of(model.generate_with_reasoning(opened, QUESTION, max_new_tokens=40))
    assert pipe(opened, text=QUESTION, max_new_tokens=40)[0]["generated_text"] == QUESTION + wanted
    wanted = lines_of(model.generate_with_reasoning(picture, QUESTION, max_new_tokens=40))
    said = pipe(text=chat(picture), max_new_tokens=40)[0]["generated_text"]
    assert said[-1] == {"role": "assistant", "content": wanted}
    assert pipe(text=chat(picture), max_new_tokens=40, return_full_text=False)[0]["generated_text"] == wanted
    bare = lines_of(model.generate_with_reasoning(None, QUESTION, max_new_tokens=40))
    assert pipe(text=QUESTION, max_new_tokens=40, return_full_text=False)[0]["generated_text"] == bare


def test_questions_of_unlike_length_are_answered_in_one_batch(exported, picture):
    model, processor = EmberVLM.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    questions = [QUESTION, "Take the load to the flag and inspect the site there. Which robots are suited?"]
    ids = model.generate(**processor([picture, picture], questions), max_new_tokens=30)
    for text, question in zip(processor.post_process_image_text_to_text(ids), questions, strict=True):
        assert text == question + lines_of(model.generate_with_reasoning(picture, question, max_new_tokens=30))


def test_draws_follow_torch_s_random_numbers(exported, picture):
    model, processor = EmberVLM.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    inputs = processor(picture, QUESTION)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=20).tolist())
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3


def test_stage_3_answers_directly(tiny_settings, tokenizer, tmp_path, picture):
    model = build_model({**tiny_settings, "stage": 3})
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "checkpoint")
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "checkpoint"))
    said = pipe(text=chat(picture), return_full_text=False, max_new_tokens=5)[0]["generated_text"]
    wanted = EmberVLM.from_pretrained(tmp_path / "checkpoint").generate_with_reasoning(
        picture, QUESTION, form="direct", max_new_tokens=5
    )
    assert wanted["text"] and said.strip() == wanted["text"]


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda p, m, i: p([i, i], "one question"), "2 pictures for 1 questions"),
        (lambda p, m, i: p.apply_chat_template([*chat(i), {"role": "assistant", "content": "x"}]), "user, assistant"),
        (lambda p, m, i: p.apply_chat_template([]), "0 pictures for 0 questions"),
        (lambda p, m, i: p.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]), "has video"),
        (lambda p, m, i: p.apply_chat_template(chat(None)), "none of image, url and path"),
        (lambda p, m, i: p(i, QUESTION, truncation=True), "processor: truncation: cannot be followed"),
        (lambda p, m, i: p.apply_chat_template(chat(i), tokenize=False, tools=["x"]), "processor: tools: cannot"),
        (lambda p, m, i: m.generate(**p(i, QUESTION), num_beams=4), "generate: num_beams: not known"),
        (lambda p, m, i: m.generate(**p(i, QUESTION), num_return_sequences=2), "needs do_sample"),
    ],
)
def test_what_it_cannot_do_is_one_line(exported, picture, ask, line):
    with pytest.raises(ConfigError, match=line):
        ask(AutoProcessor.from_pretrained(exported), EmberVLM.from_pretrained(exported), picture)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.server.asked.append(self.path)
        if not self.is_known():
            return None
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self.answer(200, {"url": f"{self.server.url}/me/robots", "name": "me/robots"})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            found = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer(200, {"files": found})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/me/robots/commit/1"}
        )

    def is_known(self):
        known = self.headers.get("Authorization") == "Bearer hf_right"
        if not known:
            self.answer(401, {"error": "Invalid username or password."})
        return known

    def do_GET(self):
        if self.is_known():
            self.answer(200, {"id": "me/robots", "sha": "0" * 40, "siblings": [], "private": True})

    def answer(self, status, value):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.asked, server.made = f"http://127.0.0.1:{server.server_port}", {}, [], None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub, checkpoint, out, *flags, token="hf_right", name="me/robots"):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "embervlm.cli", "export", str(checkpoint), str(out), "--push_to_hub", name, *flags],
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_an_upload_holds_every_file_of_the_folder(exported, tmp_path, hub):
    said = push(hub, tmp_path / "checkpoint", tmp_path / "pushed")
    assert said.returncode == 0 and f"uploaded: {hub.url}/me/robots/commit/1" in said.stdout, said.stderr
    folder = tmp_path / "pushed"
    wanted = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert wanted.keys() == {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert hub.files == wanted and hub.made["visibility"] == "private"
    assert push(hub, tmp_path / "checkpoint", tmp_path / "public", "--public").returncode == 0
    assert hub.made["visibility"] == "public"


@pytest.mark.slow
@pytest.mark.parametrize("change", ["token", "name", "nobody there"])
def test_a_hub_that_refuses_is_one_line_before_anything_is_written(exported, tmp_path, hub, change):
    asked, line = {"token": ({"token": "hf_wrong"}, "401"), "name": ({"name": "a b"}, "a b")}.get(change, ({}, ""))
    if change == "nobody there":
        hub.shutdown()
        hub.server_close()
    said = push(hub, tmp_path / "checkpoint", tmp_path / "pushed", **asked)
    assert said.returncode == 1 and said.stderr.startswith("error: --push_to_hub") and line in said.stderr
    assert said.stderr.count("\n") == 1 and not (tmp_path / "pushed").exists()

"""Graphs for onnxruntime, and the program that asks them without torch."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import enliven, make_tiny
from PIL import Image
from test_int8 import GPT2
from test_known import OFF, QUESTIONS, fitted, tokens

from embervlm.cli import main
from embervlm.data.images import load_image
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import generate_answers
from embervlm.model.known import Known
from embervlm.model.onnx_graphs import round_graphs
from embervlm.run import run_onnx
from embervlm.run.export_onnx import save_known
from embervlm.words.chain_text import parse_answer

ASKED = ("Which robot flies?", "Take the load to the flag and inspect the site there.", "Who goes <|step|> there?")
SAID = ("reasoning_steps", "answer", "answer_set", "text", "why", "cut_off")
NAMES = ("Drone", "Robot", "Robot with Wheels", "3", "3.5", "A")


def pictures(folder):
    """Files of every kind that is read in its own way."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (150, 201, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    noise.save(folder / "photo.jpg", exif=turned)
    noise.save(folder / "small.png")
    noise.convert("CMYK").save(folder / "print.jpg")
    noise.convert("L").save(folder / "grey.png")
    noise.quantize(16).save(folder / "palette.gif", transparency=3)
    transparent = noise.convert("RGBA")
    transparent.putalpha(noise.convert("L"))
    transparent.save(folder / "transparent.png")
    Image.fromarray(generator.integers(0, 65536, (40, 30), dtype=np.uint16)).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("fill", [None, (124, 116, 104)], ids=["squash", "pad"])
def test_the_runner_reads_a_picture_as_the_model_does(tmp_path, fill):
    for path in pictures(tmp_path):
        read = run_onnx.load_picture(path, 36, fill)
        assert np.array_equal(read, load_image(path, size=36, fill=fill)), path.name


def test_the_runner_says_in_a_line_which_picture_it_cannot_read(tmp_path):
    photo = next(path for path in pictures(tmp_path) if path.name == "photo.jpg")
    (tmp_path / "half.jpg").write_bytes(photo.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (
        ("half.jpg", "truncated"),
        ("text.png", "cannot identify"),
        ("gone.png", "No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: not readable as a picture \(.*{reason}"):
            run_onnx.load_picture(f"{tmp_path}/{name}", 36, None)


@pytest.mark.parametrize(
    "text",
    ["Drone, robot with wheels", "Primary: Robot", "a robot-with wheels.", "3", "-3", "3.5 and A", "none", "", "drone"],
)
def test_the_runner_finds_the_names_that_the_model_finds(text):
    assert tuple(run_onnx.parse_answer(text, NAMES)) == parse_answer(text, NAMES)


EMPTY = tokens(1, seed=2)[:, :1].repeat(1, 4, 1)


@pytest.mark.parametrize("known", [fitted(), fitted(share=0.9)], ids=["all", "most"])
def test_the_runner_knows_what_the_model_knows(known: Known, tmp_path):
    save_known(known, tmp_path / "known.npz")
    runner = run_onnx.Known(tmp_path / "known.npz")
    for question in (*QUESTIONS[:3], *OFF):
        for visual in (tokens(1, seed=2), tokens(1, seed=3, centre=4.0), EMPTY):
            for has_one in (True, False):
                (wanted,) = known.of(visual, torch.tensor([has_one]), [question])
                found = runner.of(visual.numpy(), has_one, question)
                assert found[1] == wanted[1] and found[0] == pytest.approx(wanted[0], abs=1e-5)


def test_the_runner_needs_neither_torch_nor_transformers_nor_this_package():
    code = "import sys, run_onnx; print([m for m in ('torch', 'transformers', 'embervlm') if m in sys.modules])"
    folder = run_onnx.__file__.rpartition("/")[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, env={}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_attention_windows_and_stage_3_are_refused_by_name(tiny_settings, tokenizer, tmp_path):
    windows = {
        "model_type": "mistral",
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    }
    make_tiny({**tiny_settings, "language": {"config": windows}}, tokenizer).save_pretrained(tmp_path / "windows")
    make_tiny({**tiny_settings, "stage": 3}, tokenizer).save_pretrained(tmp_path / "stage3")
    with pytest.raises(SystemExit, match="a mistral with layers of sliding_attention cannot be exported to ONNX"):
        main(["export", str(tmp_path / "windows"), str(tmp_path / "out"), "--format", "onnx"])
    with pytest.raises(SystemExit, match="a Stage 3 model writes no chains"):
        main(["export", str(tmp_path / "stage3"), str(tmp_path / "out"), "--format", "onnx"])
    assert not (tmp_path / "out").exists()


def runner_of(folder):
    """The program in an exported folder, with its model."""
    spec = importlib.util.spec_from_file_location("exported_runner", folder / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module.Model(folder, 1)


def assert_same(model, runner, picture, question, **limits):
    ids: list[int] = []
    (wanted,) = generate_answers(model, [picture], [question], Decoding(**limits), lambda _, token: ids.append(token))
    told: list[str] = []
    found = runner.ask(picture, question, told.append, **limits)
    assert found["ids"] == ids
    assert {name: found[name] for name in SAID} == {name: wanted[name] for name in SAID}
    assert found["confidence"] == pytest.approx(wanted["confidence"], abs=1e-4)
    assert told == wanted["reasoning_steps"]
    return found


LIMITS = ({}, {"max_reasoning_steps": 1}, {"max_reasoning_steps": 3, "max_new_tokens": 40}, {"max_new_tokens": 7})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2 in int8"])
def test_the_runner_writes_the_models_tokens_and_keeps_its_limits(
    kind, tiny_settings, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep thousands of lines
    settings = {**tiny_settings, "resize": "pad", "longest_chain_steps": 6, "longest_chain_tokens": 80}
    source = tmp_path / "checkpoint"
    if kind == "llama":
        model = enliven(make_tiny(settings, tokenizer))
    else:
        model = make_tiny({**settings, "language": {"config": GPT2}}, tokenizer)
        torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=2.0)
    model.config.prompt = ("Question: ", " Answer:")
    model.save_pretrained(source)
    if kind != "llama":
        main(["export", str(source), str(tmp_path / "int8"), "--format", "int8"])
        source = tmp_path / "int8"
    main(["export", str(source), str(tmp_path / "out"), "--format", "onnx"])
    model, runner = EmberVLM.from_pretrained(source), runner_of(tmp_path / "out")
    (photo,) = (path for path in pictures(tmp_path / "pictures") if path.name == "photo.jpg")
    written = [
        assert_same(model, runner, picture, question, **limits)
        for question in ASKED
        for picture in (str(photo), None)
        for limits in LIMITS
    ]
    assert len({tuple(found["ids"]) for found in written}) > len(LIMITS)  # they look, and read the question
    if kind == "llama":  # whose random weights begin steps often enough
        assert {found["cut_off"] for found in written} >= {"steps", "tokens"}
        check_rounded(tmp_path / "out", str(photo), written[0]["ids"])


def check_rounded(folder, picture, ids):
    """The graphs with weights of 8 bits are much smaller, and still write much the same."""
    before = (folder / "text.onnx").stat().st_size
    round_graphs(folder)
    assert (folder / "text.onnx").stat().st_size < 0.8 * before  # a tiny graph is mostly its operations
    found = runner_of(folder).ask(picture, ASKED[0])["ids"]
    assert found[:3] == ids[:3]

"""A checkpoint as a folder of safetensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_lora import BOTH, logits_of
from transformers import AutoConfig, AutoModel, AutoTokenizer

from embervlm import run_dir
from embervlm.cli import main
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.lora import add_adapters


@pytest.fixture
def checkpoint(lively_model, tmp_path):
    """One whose language model was trained by adapters, and whose confidence was calibrated."""
    add_adapters(lively_model, BOTH)
    for name, parameter in lively_model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lively_model.save_pretrained(tmp_path / "checkpoint")
    run_dir.write_json_atomic(run_dir.calibration_path(tmp_path / "checkpoint"), {"temperature": 2.5})
    return tmp_path / "checkpoint"


def test_the_auto_classes_and_ours_compute_what_the_checkpoint_does(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    main(["export", str(checkpoint), str(out)])
    assert "from embervlm import EmberVLM" in capsys.readouterr().out
    wanted, found, auto = (
        EmberVLM.from_pretrained(checkpoint),
        EmberVLM.from_pretrained(out),
        AutoModel.from_pretrained(out),
    )
    assert torch.equal(logits_of(found), logits_of(wanted)) and torch.equal(logits_of(auto), logits_of(wanted))
    assert AutoConfig.from_pretrained(out).to_dict()["architectures"] == ["EmberVLM"]
    asked = dict(instruction="Which robot flies?", image=None, max_new_tokens=8)
    assert auto.generate_with_reasoning(**asked) == wanted.generate_with_reasoning(**asked)
    assert auto.confidence_temperature == 2.5
    text = "Which robot flies?"
    ids = AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"]
    assert ids == wanted.tokenizer.encode(text)
    assert not list(out.glob("*.bin"))


def test_tied_weights_stand_once_and_stage_3_has_no_reasoning_module(tiny_settings, tokenizer, tmp_path):
    model = build_model({**tiny_settings, "stage": 3})
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "checkpoint")
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == {name for name, _ in model.named_parameters() if not name.startswith("reasoning_module.")} | {
        name for name, _ in model.named_buffers() if name in model.state_dict()
    }
    assert "language_model.backbone.lm_head.weight" not in held
    again = EmberVLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.language_model.backbone.lm_head.weight, model.language_model.backbone.lm_head.weight)


def test_a_folder_that_is_there_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SystemExit, match="out: is there already"):
        main(["export", str(checkpoint), str(tmp_path / "out")])


@pytest.mark.slow
def test_one_import_makes_the_folder_known_to_the_auto_classes(checkpoint, tmp_path):
    main(["export", str(checkpoint), str(tmp_path / "out")])
    code = (
        "from embervlm import EmberVLM; from transformers import AutoModel; "
        f"assert isinstance(AutoModel.from_pretrained({str(tmp_path / 'out')!r}), EmberVLM)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_card_says_what_the_evaluation_found_and_what_it_cannot_do(checkpoint, tmp_path):
    main(["export", str(checkpoint), str(tmp_path / "unrated")])
    card = (tmp_path / "unrated" / "README.md").read_text(encoding="utf-8")
    assert "It has not been evaluated" in card and "answers all the same" in card
    evaluation = {
        "format": run_dir.EVAL_FORMAT,
        "split": "test",
        "num_samples": 500,
        "phase": "phase 2",
        "metrics": {"final_answer_accuracy": 0.9884, "blind_accuracy": None},
        "intervals": {"final_answer_accuracy": [0.978, 0.996]},
    }
    run_dir.write_json_atomic(run_dir.eval_path(checkpoint, "test"), evaluation)
    main(["export", str(checkpoint), str(tmp_path / "rated")])
    card = ModelCard.load(tmp_path / "rated" / "README.md")  # as the hub reads it
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
    assert "| final_answer_accuracy | 0.988 [0.978, 0.996] |" in card.text and "blind_accuracy" not in card.text
    assert "500 records of the test split" in card.text
    assert f"{sum(EmberVLM.from_pretrained(checkpoint).parameter_counts().values()):,} parameters" in card.text
    assert "one or several of: Drone, " in card.text

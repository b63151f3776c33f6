"""Weights of 8 bits: what is rounded, what it costs, and who opens it."""

from __future__ import annotations

import pytest
import torch
from conftest import enliven, make_tiny
from safetensors.torch import load_file
from test_lora import logits_of
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from embervlm.cli import main
from embervlm.model.cache import roomy_cache
from embervlm.model.decode import head_step, language_step
from embervlm.model.embervlm import EmberVLM
from embervlm.model.int8 import Int8Embedding, Int8Linear, to_int8
from embervlm.model.storage import CheckpointError, load_checkpoint_into

GPT2 = {"model_type": "gpt2", "vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def exported(lively_model, tmp_path):
    """Folders: the model as it is, and in int8."""
    lively_model.save_pretrained(tmp_path / "float")
    main(["export", str(tmp_path / "float"), str(tmp_path / "int8"), "--format", "int8"])
    return tmp_path / "float", tmp_path / "int8"


def with_language(settings, tokenizer, language):
    return make_tiny({**settings, "language": {"config": language}}, tokenizer)


def test_a_weight_is_its_channels_numbers_times_their_scale(tiny_model):
    layer = tiny_model.projection.layers[0]
    before, states = layer.weight.detach().clone(), torch.randn(3, layer.in_features)
    wanted = layer(states)
    to_int8(tiny_model)
    layer = tiny_model.projection.layers[0]
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax(1).eq(127).all()  # no number goes unused
    half = layer.weight_scale[:, None] / 2
    rounded = layer.weight * layer.weight_scale[:, None]
    assert ((rounded - before).abs() <= half * 1.001).all()
    torch.testing.assert_close(layer(states), states @ rounded.T + layer.bias)
    assert (layer(states) - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_an_exported_model_is_opened_like_any_other_and_answers_the_same(exported, capsys, tmp_path):
    as_it_is, small = exported
    wanted, found = EmberVLM.from_pretrained(as_it_is), EmberVLM.from_pretrained(small)
    assert isinstance(AutoModel.from_pretrained(small), EmberVLM)
    assert torch.nn.functional.cosine_similarity(logits_of(found), logits_of(wanted), dim=-1).min() > 0.99
    assert found.parameter_counts() == wanted.parameter_counts()
    assert not any(p.requires_grad for p in found.parameters() if p.dtype == torch.int8)
    capsys.readouterr()
    main(["ask", "-", "Which robot flies?", "--checkpoint", str(small), "--max_new_tokens", "8"])
    assert "Answer:" in capsys.readouterr().out
    card = (small / "README.md").read_text(encoding="utf-8")
    assert "rounded to 8 bits" in card


def test_tied_weights_stand_once_in_the_file_and_stay_one(exported):
    held = load_file(exported[1] / "model.safetensors")
    kinds = {name.rpartition(".")[2] for name, value in held.items() if value.dtype == torch.int8}
    assert kinds == {"weight"} and "language_model.backbone.lm_head.weight" not in held
    backbone = EmberVLM.from_pretrained(exported[1]).language_model.backbone
    assert type(backbone.model.embed_tokens) is Int8Embedding and type(backbone.lm_head) is Int8Linear
    assert backbone.model.embed_tokens.weight is backbone.lm_head.weight


def test_norms_biases_convolutions_and_small_layers_stay_float(exported):
    model = EmberVLM.from_pretrained(exported[1])
    rounded = {name for name, value in model.state_dict().items() if value.dtype == torch.int8}
    assert not any("norm" in name or name.endswith("bias") or "patch_embeddings" in name for name in rounded)
    assert "reasoning_module.step_validator.surprise.weight" not in rounded  # one input
    assert "reasoning_module.reasoning_head.layers.0.self_attention.key_value.weight" in rounded


@pytest.mark.parametrize("language", [None, GPT2, QWEN], ids=["llama", "gpt2", "qwen2"])
def test_a_step_of_decoding_computes_what_the_whole_text_does(tiny_settings, tokenizer, tiny_model, language):
    """The steps of our own read weights past their modules; a family without one is called as it is."""
    model = enliven(tiny_model) if language is None else with_language(tiny_settings, tokenizer, language)
    to_int8(model)
    assert not any(type(m) in (torch.nn.Linear, Conv1D) for m in model.language_model.modules())
    ids, visual = torch.tensor([[5, 9, 44, 7]]), torch.randn(1, model.num_visual_tokens, 32)
    seen, mask = torch.ones(1, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    with torch.inference_mode():
        whole, _ = model.refine(model.read(visual, seen, ids, mask), ids, visual, seen)
        caches = roomy_cache(16), roomy_cache(16)
        first = model.read(visual, seen, ids[:, :3], mask[:, :3], caches[0])
        model.refine(first, ids[:, :3], visual, seen, cache=caches[1])
        place = model.num_visual_tokens + 3
        step, refine = language_step(model.language_model, 16), head_step(model.reasoning_module.reasoning_head)
        all_seen = torch.ones(1, place + 1, dtype=torch.bool)
        hidden = step(model.embed(ids[:, 3]), all_seen, None, torch.tensor([[place]]), caches[0])
        looked = model.reasoning_module.reasoning_head.look(visual, seen, True)
        found = refine(hidden, None, caches[1], looked)
    torch.testing.assert_close(found, whole[:, 3], rtol=1e-4, atol=1e-4)


def test_int8_weights_cannot_be_trained_or_rounded_again(exported, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="holds int8 weights, which only answer; use the checkpoint they were"):
        load_checkpoint_into(tiny_model, exported[1])
    with pytest.raises(SystemExit, match="holds int8 weights already"):
        main(["export", str(exported[1]), str(tmp_path / "again"), "--format", "int8"])


def test_the_file_is_less_than_half_as_large(exported):
    before, after = (exported[0] / "pytorch_model.bin").stat(), (exported[1] / "model.safetensors").stat()
    assert after.st_size < 0.5 * before.st_size  # the tiny model is mostly norms, biases and positions

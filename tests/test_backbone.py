"""Language models and picture encoders of other families than the presets', as Hugging Face computes them."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from embervlm.config import ConfigError
from embervlm.model.backbone import LanguageModel, VisionEncoder
from embervlm.model.config import EmberVLMConfig
from embervlm.model.embervlm import build_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "dim_model_base": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
HEADS = {"logit_scale": 0.25, "logits_scaling": 4.0, "final_logit_softcapping": 2.0, "lm_head_multiplier": 0.3}
"""What scales or caps the logits, under every name; each family takes its own."""
PLAIN = ("gpt2", "llama", "qwen3", "opt", "gemma")
SCALED = ("cohere", "cohere2", "granite", "granitemoe", "gemma2", "gemma3_text", "falcon_h1", "minicpm3", "nanochat")
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 36,
    "patch_size": 12,
}


def language(family: str) -> dict[str, Any]:
    known = AutoConfig.for_model(family)
    names = {*known.to_dict(), *known.attribute_map}
    return {
        "config": {"model_type": family, **{key: value for key, value in {**SIZES, **HEADS}.items() if key in names}}
    }


def config(**parts: Any) -> EmberVLMConfig:
    return EmberVLMConfig(**{"vision": {"config": {"model_type": "vit", **VISION}}, "image_size": 36, **parts})


@pytest.mark.parametrize("family", [*PLAIN, *SCALED])
def test_logits_are_those_of_the_model_itself(family: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config(language=language(family))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # as after some training: logits that a cap bends
        embeds, mask = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.long)
        wanted = model.backbone(inputs_embeds=embeds, attention_mask=mask).logits
        states = model(embeds, mask, torch.arange(7)[None].expand(2, -1))
        torch.testing.assert_close(model.logits(states), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.logits(states[:, -1]), wanted[:, -1], rtol=1e-5, atol=1e-5)
        product = model.backbone.get_output_embeddings()(states)
        assert torch.allclose(product, wanted, rtol=1e-3) == (family in PLAIN)
    assert not [name for name in model.state_dict() if not name.startswith("backbone.")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "gemma2"])
def test_a_shorter_vocabulary_leaves_the_logits_of_the_tokens_that_stay(family: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config(language=language(family))).eval()
    states, before = 50 * torch.randn(3, 32), model.vocab_size
    with torch.no_grad():
        wanted = model.logits(states)
        model.keep_rows(40)
        assert before > 64 == model.vocab_size == model.backbone.config.vocab_size
        torch.testing.assert_close(model.logits(states), wanted[:, :64])
        model.keep_rows(500)  # never longer: new rows would be random
    assert model.vocab_size == len(model.backbone.get_output_embeddings().weight) == 64


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2", "minicpm3"])
def test_scores_of_other_tokens_are_scaled_as_the_vocabularys_are(family: str) -> None:
    model = LanguageModel(config(language=language(family))).eval()
    with torch.no_grad():
        states = 50 * torch.randn(3, 32)
        product = states @ model.backbone.get_output_embeddings().weight.T
        torch.testing.assert_close(model.scaled(product), model.logits(states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_a_model_that_scales_its_logits_learns_and_answers(family: str, tokenizer: Any, tiny_settings: Any) -> None:
    spec = language(family)
    spec["config"]["vocab_size"] = tiny_settings["language"]["config"]["vocab_size"]
    model = build_model({**tiny_settings, "language": spec})
    model.attach_tokenizer(tokenizer)
    ids = torch.tensor([tokenizer.encode("Fly to the lake.")])
    inputs = {
        "pictures": torch.zeros(1, 36, 36, 3, dtype=torch.uint8),
        "image_mask": torch.ones(1, dtype=torch.bool),
        "input_ids": ids,
        "text_mask": torch.ones_like(ids).bool(),
        "score_index": torch.arange(3),
    }
    model(**inputs).token_logits.logsumexp(-1).sum().backward()
    assert model.language_model.backbone.get_input_embeddings().weight.grad.abs().sum() > 0
    found = model.eval().generate_with_reasoning(None, "Fly to the lake.", max_new_tokens=6)
    assert found["num_tokens"] > 0


GPT2 = {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024}}


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
@pytest.mark.parametrize("precision", ["autocast", "double", "bfloat16"])
def test_answers_are_written_under_autocast_and_in_every_precision(
    precision: str, family: str, records: Any, tokenizer: Any, tiny_settings: Any
) -> None:
    spec = {"gpt2": GPT2, "cohere": language("cohere")}.get(family, tiny_settings["language"])
    spec = {
        "config": {
            **spec["config"],
            "vocab_size": tiny_settings["language"]["config"]["vocab_size"],
            "max_position_embeddings": 1024,
        }
    }
    torch.manual_seed(0)
    model = build_model({**tiny_settings, "language": spec}).eval()
    model.attach_tokenizer(tokenizer)
    torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=0.5)
    asked = [record.image for record in records[:3]], [record.instruction for record in records[:3]]
    wanted = model.generate_with_reasoning(*asked, max_new_tokens=12)
    if precision != "autocast":
        model = model.to(getattr(torch, "float64" if precision == "double" else precision))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = model.generate_with_reasoning(*asked, max_new_tokens=12)
        first = model.generate_reasoning(asked[0][0], asked[1][0], max_new_tokens=12)
        followed = model.reason(asked[0][0], "And then?", first, max_new_tokens=12)
        model.verify_reasoning(followed["reasoning"])
    assert [result["num_tokens"] for result in found] == [result["num_tokens"] for result in wanted]
    if precision == "double":
        assert [result["text"] for result in found] == [result["text"] for result in wanted]


# -- picture encoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "whole"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_of_a_whole_clip_or_siglip_the_vision_tower_is_taken(kind: Any, whole: Any, tmp_path: Path) -> None:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    model = whole(kind(vision_config=VISION, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder(
        config(vision={"name_or_path": str(tmp_path), "pretrained": True}), load_weights=True
    ).eval()
    pictures = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        wanted = model.vision_model(pixel_values=pictures).last_hidden_state[:, -9:]
        torch.testing.assert_close(encoder(pictures), wanted)
    assert not [name for name in encoder.state_dict() if "text_model" in name]


def folder(path: Path, **values: Any) -> dict[str, Any]:
    """A model's folder that holds a configuration alone."""
    (path / "config.json").write_text(json.dumps(values))
    return {"name_or_path": str(path)}


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("vision", {"model_type": "siglip2"}, "is a SigLIP 2 of the NaFlex kind"),
        ("vision", {"model_type": "timm_wrapper", "architecture": "resnet18"}, "not installed: pip install timm$"),
        ("vision", {"model_type": "timm_backbone", "backbone": "resnet18"}, "not installed: pip install timm$"),
        ("vision", {"model_type": "bert", "hidden_size": 24}, "bert does not read pictures of image_size 36"),
        ("vision", {"model_type": "siglip_vision_model", **VISION, "image_size": 48}, "pictures of image_size 36"),
        ("language", {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized \(gptq\)"),
        ("language", {"model_type": "t5", "d_model": 32}, "^language: t5 is not a causal language model"),
        ("language", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "contains custom code"),
    ],
)
def test_a_part_that_cannot_be_used_is_said_in_a_line(
    part: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if "timm" in str(values):
        with contextlib.suppress(ImportError):
            pytest.skip(f"timm {importlib.import_module('timm').__version__} is installed")
    with pytest.raises(ConfigError, match=said) as raised:
        (VisionEncoder if part == "vision" else LanguageModel)(config(**{part: folder(tmp_path, **values)}))
    assert "\n" not in str(raised.value)

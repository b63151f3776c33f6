"""Checkpoints of other families as ours: the same numbers, and one line for what cannot be taken."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training_helpers import ok, train, write_run_yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from embervlm.cli import main
from embervlm.config import ConfigError, TrainConfig
from embervlm.config_file import model_preset
from embervlm.data.samples import Grid
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.evaluation.explain import explain_chains
from embervlm.model.config import EmberVLMConfig
from embervlm.model.connectors import build_connector
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.families import FAMILIES, ORIGIN
from embervlm.model.generation import look
from embervlm.model.importing import _renamed
from embervlm.run.start import start_from
from embervlm.world import World

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 12,
}
LANGUAGE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
IMAGE = 300
"""The id that stands for a visual token in their sequences."""
ONE_VIEW = {"image_sizes": torch.tensor([[48, 48]] * 2), "batch_num_images": torch.tensor([2])}
"""LLaVA-OneVision reads each of several pictures once, whole."""
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def llava(vision: Any = None, language: Any = None, **settings: Any) -> LlavaConfig:
    vision = vision or CLIPVisionConfig(**VISION, projection_dim=8)
    language = language or LlamaConfig(**LANGUAGE)
    return LlavaConfig(vision_config=vision, text_config=language, image_token_index=IMAGE, **settings)


def idefics3(**settings: Any) -> Idefics3Config:
    vision, text = Idefics3VisionConfig(**VISION).to_dict(), LlamaConfig(**LANGUAGE).to_dict()
    return Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, **settings)


def smolvlm() -> SmolVLMConfig:
    vision, text = SmolVLMVisionConfig(**VISION).to_dict(), LlamaConfig(**LANGUAGE).to_dict()
    return SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=4)


def onevision(**settings: Any) -> LlavaOnevisionConfig:
    vision, text = SiglipVisionConfig(**VISION, vision_use_head=False), Qwen2Config(**LANGUAGE, **settings)
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **settings)


MODELS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "llava of Qwen2 and SigLIP": lambda: llava(
        SiglipVisionConfig(**VISION, vision_use_head=False),
        Qwen2Config(**LANGUAGE, tie_word_embeddings=True),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
        projector_hidden_act="relu",
        tie_word_embeddings=True,
    ),
    **{
        f"llava of {kind.__name__.removesuffix('Config')}, which scales its logits": partial(
            lambda kind, scale: llava(language=kind(**LANGUAGE, **scale)), kind, scale
        )
        for kind, scale in (
            (Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 16}),
            (CohereConfig, {"logit_scale": 0.5}),
            (GraniteConfig, {"logits_scaling": 4.0}),
        )
    },
    "idefics3": idefics3,
    "idefics3 tied": lambda: idefics3(tie_word_embeddings=True),
    "smolvlm": smolvlm,
    "llava onevision": lambda: onevision(),
    "llava onevision tied": lambda: onevision(tie_word_embeddings=True),
}


def make(folder: Path, config: Any) -> Any:
    """A random model as its own library saves it, with a tokenizer of 290 tokens and the picture's preprocessor."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))  # as after some training, biases too
    model.save_pretrained(folder)
    tokenizer(290).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Bytes, and added tokens up to `size`."""
    found = train_tokenizer(["a"], 257)
    found.add_special_tokens({"additional_special_tokens": [f"<|of their own {n}|>" for n in range(size - len(found))]})
    return found


def imported(folder: Path, out: Path | None = None, *flags: str) -> EmberVLM:
    out = out or folder.with_name("out")
    main(["import-checkpoint", str(folder), str(out), *flags])
    return EmberVLM.from_pretrained(out)


def our_logits(model: EmberVLM, pixels: Any, seen: list[bool], ids: Any, mask: Any) -> Any:
    image_mask = torch.tensor(seen)
    return model.language_model.logits(model.read(model.see(pixels), image_mask, ids, mask.bool()))


@pytest.fixture
def batch() -> tuple[Any, Any, Any]:
    """Pixels of two pictures, ids of two texts of 9 and 6 tokens, and where they are no padding."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 48, 48, generator=generator)
    ids = torch.randint(3, 290, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return pixels, ids, mask


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_family_itself(name: str, batch: Any, tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", MODELS[name]())
    ours = imported(tmp_path / "theirs")
    pixels, ids, mask = batch
    real, num = mask.bool(), ours.num_visual_tokens
    given = pixels[:, None] if "idefics3" in name or "smolvlm" in name else pixels  # they take several a text
    visual = torch.full((2, num), IMAGE)
    wanted = theirs(
        input_ids=torch.cat([visual, ids], 1),
        attention_mask=torch.cat([torch.ones_like(visual), mask], 1),
        pixel_values=given,
        **(ONE_VIEW if "onevision" in name else {}),
    ).logits[:, num:]
    found = our_logits(ours, pixels, [True, True], ids, mask)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    left = [
        torch.stack([rows[0], rows[1].roll(3)]) for rows in (ids, mask)
    ]  # padding in front, between picture and text
    found = our_logits(ours, pixels, [True, True], *left)
    torch.testing.assert_close(found[left[1].bool()], wanted[real], rtol=1e-4, atol=1e-4)
    without = theirs(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(without[real], wanted[real], atol=1e-2)  # they do see
    found = our_logits(ours, pixels, [False, True], ids, mask)
    torch.testing.assert_close(found[0], without[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, :6], wanted[1, :6], rtol=1e-4, atol=1e-4)


def test_pictures_are_normalised_and_answered_as_the_folder_says(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    model = imported(tmp_path / "theirs")
    assert (list(model.config.image_mean), list(model.config.image_std)) == (MEAN, STD)
    assert (model.config.image_size, model.grid, model.config.imported_from) == (48, (4, 4), "LLaVA")
    assert model.tokenizer.base_vocab_size == 290
    assert model.tokenizer.hugging_face.convert_tokens_to_ids("<|of their own 0|>") == 257
    model.config.candidates = ("yes", "no")
    assert model.generate_with_reasoning(torch.zeros(9, 9, 3).numpy(), "Is it there?", max_new_tokens=4)["num_tokens"]


def test_weights_that_were_saved_into_the_folder_again_are_taken(tmp_path: Path) -> None:
    """transformers writes safetensors beside an older `.bin`, and reads them first."""
    old = make(tmp_path / "theirs", llava()).state_dict()
    torch.save({key: value + 1 for key, value in old.items()}, tmp_path / "theirs" / "pytorch_model.bin")
    model = imported(tmp_path / "theirs")
    assert torch.equal(model.language_model.backbone.get_output_embeddings().weight, old["lm_head.weight"])


def test_a_chat_template_of_the_processors_is_taken(tmp_path: Path) -> None:
    """Processors of transformers 4 kept it in a file of its own, which the tokenizer does not read."""
    make(tmp_path / "theirs", llava())
    template = "USER: {% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %} ASSISTANT:"
    (tmp_path / "theirs" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = imported(tmp_path / "theirs")
    assert tuple(model.config.prompt or ()) == ("USER: ", " ASSISTANT:")


def test_rotary_frequencies_keep_their_precision(tmp_path: Path) -> None:
    """Rounded to bfloat16 they are wrong by a radian at distance 1,000."""
    make(tmp_path / "theirs", llava())
    model = imported(tmp_path / "theirs")
    half = EmberVLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    ours, theirs = (dict(found.named_buffers()) for found in (half, model))
    (name,) = [name for name in ours if name.endswith("rotary_emb.inv_freq")]
    assert ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_what_became_of_every_weight_is_printed(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "theirs", idefics3())
    imported(tmp_path / "theirs")
    told = lines_of(capsys.readouterr().out)
    assert f"{tmp_path}/theirs: a SmolVLM/Idefics3 checkpoint" in told
    assert "projection: 1 weights taken, 2,048 parameters" in told
    assert "model.text_model.* -> language_model.backbone.model.* (20)" in told
    assert "lm_head.* -> language_model.backbone.lm_head.* (1)" in told
    assert "a picture: 4 visual tokens (2 x 2), connector pixel_shuffle" in told
    assert any(line.startswith("new: reasoning_module, ") for line in told)
    assert "tokenizer: 290 tokens of 512 embedding rows, and Stage 4's behind them" in told
    assert told[-1].endswith(f"--stages 4 --resume_from {tmp_path}/out`")


LAYOUTS = {
    "before 4.52": [("vision_tower.", "vision_tower.vision_model.")],
    "in memory": [
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_older_and_newer_names_are_the_same_model(layout: str, suffix: str, tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "theirs", llava())
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    named = {}
    for name, value in weights.items():
        start, other = next((pair for pair in LAYOUTS[layout] if name.startswith(pair[0])), ("", ""))
        named[other + name.removeprefix(start)] = value
    named["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    wanted = imported(tmp_path / "theirs").state_dict()
    file.unlink()
    save_file(named, file) if suffix == ".safetensors" else torch.save(named, file.with_name("pytorch_model.bin"))
    found = imported(tmp_path / "theirs", tmp_path / "again").state_dict()
    assert "dropped: 1 (vision_tower.vision_model.embeddings.position_ids): computed anew" in capsys.readouterr().out
    assert all(torch.equal(value, found[name]) for name, value in wanted.items() if "reasoning_module" not in name)


def test_half_precision_in_shards_is_taken(tmp_path: Path) -> None:
    model = make(tmp_path / "theirs", llava()).to(torch.bfloat16)
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    found = imported(tmp_path / "theirs").state_dict()
    assert torch.equal(found["projection.layers.0.weight"], model.model.multi_modal_projector.linear_1.weight.float())


# ---- what cannot be taken


def refused(folder: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        imported(folder, None, *flags)
    told = str(ended.value)
    assert told.startswith("error: ") and "\n" not in told
    assert not folder.with_name("out").exists()
    assert not list(folder.parent.glob(".tmp-*"))
    return told


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_family_that_is_not_known_is_told_with_its_first_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    save_file({f"qformer.{n}": torch.zeros(1) for n in "abcd"}, tmp_path / "model.safetensors")
    (folder := tmp_path / "theirs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(folder / name)
    told = refused(folder)
    assert (
        "of no known family (its first names are qformer.a, qformer.b, qformer.c); known are LLaVA-OneVision, LLaVA, S"
        in told
    )


def test_a_vision_encoder_with_as_many_tokens_as_the_picture_is_large_is_refused(tmp_path: Path) -> None:
    pixtral = PixtralVisionConfig(**VISION)
    make(tmp_path / "theirs", llava(pixtral, vision_feature_layer=-1, vision_feature_select_strategy="full"))
    assert "its vision encoder is a pixtral, whose visual tokens are as many as" in refused(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model_type": "llava_next"}, "model_type 'llava_next' has names like LLaVA's and computes something else"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer [-2, -3] is several layers"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full' of a clip_vision_model"),
        ({"text_config": {**LANGUAGE, "model_type": "llama", "vocab_size": 99}}, "config.json describes"),
    ],
)
def test_what_is_computed_otherwise_is_refused(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    change(tmp_path / "theirs", **changes)
    assert wanted in refused(tmp_path / "theirs")


def test_a_weight_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), "image_column": torch.zeros(32)}, file)
    assert "image_column: no part of a LLaVA model" in refused(tmp_path / "theirs")


def test_a_language_model_that_looks_both_ways_is_refused(tmp_path: Path) -> None:
    vision, text = SiglipVisionConfig(**VISION, vision_use_head=False), GemmaConfig(**LANGUAGE, head_dim=16)
    make(tmp_path / "theirs", PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32))
    told = refused(tmp_path / "theirs")
    assert "a PaliGemma checkpoint, whose language model looks in both directions over picture and question" in told


def test_the_token_behind_a_picture_stands_for_no_place(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "theirs", onevision())
    model = imported(tmp_path / "theirs")
    assert "a picture: 17 visual tokens (4 x 4), connector mlp" in lines_of(capsys.readouterr().out)
    assert (model.grid.size, model.num_visual_tokens) == (16, 17)
    model.config.candidates = ("yes", "no")
    image = torch.zeros(9, 9, 3).numpy()
    found = model.generate_with_reasoning(image, "Is it there?", max_new_tokens=4)
    assert found["num_tokens"] == 4
    visual, seen = look(model, [image])
    (explained,) = explain_chains(model, visual, seen, ["Is it there?"], [["It is.", "Conclusion: yes."]])
    assert explained["attention"]["grid"] == [4, 4]
    assert [len(step) for step in explained["attention"]["steps"]] == [16, 16]
    text = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": text, "text_mask": text > 0, "image_mask": seen, "visual": visual}
    out = model(**batch, ground_index=torch.tensor([1]))
    assert (out.grounding_attention.shape, out.patch_features.shape) == ((1, 16), (1, 16, 32))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    model = make(tmp_path / "theirs", llava())
    (tmp_path / "theirs" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    shards[1].unlink()
    assert f"{shards[1]}: missing, 1 of the {len(shards)} files" in refused(tmp_path / "theirs")


def test_a_pickle_of_more_than_weights_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(pickle.dumps({"model": Path("a")}))
    assert "pytorch_model.bin: contains more than weights" in refused(tmp_path / "theirs")


def test_a_tokenizer_that_is_missing_or_too_large_is_refused_and_another_may_be_named(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    tokenizer(600).save_pretrained(tmp_path / "theirs")
    assert "tokenizer has 600 tokens, but the language model embeds only 512" in refused(tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("tokenizer*"):
        path.unlink()
    told = refused(tmp_path / "theirs")
    assert "contains no readable tokenizer" in told and told.endswith("with --tokenizer")
    tokenizer(400).save_pretrained(tmp_path / "words")
    assert imported(tmp_path / "theirs", None, "--tokenizer", f"{tmp_path}/words").base_vocab_size == 400


def test_our_own_checkpoint_and_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    imported(tmp_path / "theirs")
    with pytest.raises(SystemExit, match="out: is there already; name a new folder"):
        imported(tmp_path / "theirs")
    with pytest.raises(SystemExit, match="is a checkpoint of EmberVLM already; give its folder to --resume_from"):
        imported(tmp_path / "out", tmp_path / "again")
    with pytest.raises(
        SystemExit, match=r"no checkpoint of EmberVLM \(its model_type is 'llava'\); try `embervlm import"
    ):
        main(["describe", "--model", str(tmp_path / "theirs")])


def test_a_run_that_is_given_a_checkpoint_of_another_family_names_the_command(tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    with pytest.raises(ConfigError, match="is a LLaVA checkpoint; run `embervlm import-checkpoint .*theirs OUT` and"):
        start_from(TrainConfig(model="quickstart"), World.join(), tmp_path / "theirs", 4)


def test_a_checkpoint_of_other_parts_says_so(tmp_path: Path) -> None:
    make(tmp_path / "theirs", idefics3())
    change(tmp_path / "theirs", scale_factor=4)
    with pytest.raises(SystemExit, match=r"projection.linear.weight has shape \[32, 64\], the model \[32, 256\]"):
        imported(tmp_path / "theirs")


# ---- families that are no package: their names and shapes, as their own code writes them

NANO = {
    "vit_hidden_dim": 16,
    "vit_inter_dim": 32,
    "vit_patch_size": 12,
    "vit_img_size": 48,
    "vit_n_heads": 2,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "lm_hidden_dim": 32,
    "lm_inter_dim": 48,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 512,
    "lm_vocab_size": 512,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_tie_weights": True,
    "mp_pixel_shuffle_factor": 2,
}
NANO_SHAPES = {
    "MP.proj.weight": [32, 64],
    "decoder.blocks.N.attn.k_proj.weight": [16, 32],
    "decoder.blocks.N.attn.out_proj.weight": [32, 32],
    "decoder.blocks.N.attn.q_proj.weight": [32, 32],
    "decoder.blocks.N.attn.v_proj.weight": [16, 32],
    "decoder.blocks.N.mlp.down_proj.weight": [32, 48],
    "decoder.blocks.N.mlp.gate_proj.weight": [48, 32],
    "decoder.blocks.N.mlp.up_proj.weight": [48, 32],
    "decoder.blocks.N.norm1.weight": [32],
    "decoder.blocks.N.norm2.weight": [32],
    "decoder.head.weight": [512, 32],
    "decoder.norm.weight": [32],
    "decoder.rotary_embd.inv_freq": [4],
    "vision_encoder.blocks.N.attn.out_proj.bias": [16],
    "vision_encoder.blocks.N.attn.out_proj.weight": [16, 16],
    "vision_encoder.blocks.N.attn.qkv_proj.bias": [48],
    "vision_encoder.blocks.N.attn.qkv_proj.weight": [48, 16],
    "vision_encoder.blocks.N.ln1.bias": [16],
    "vision_encoder.blocks.N.ln1.weight": [16],
    "vision_encoder.blocks.N.ln2.bias": [16],
    "vision_encoder.blocks.N.ln2.weight": [16],
    "vision_encoder.blocks.N.mlp.fc1.bias": [32],
    "vision_encoder.blocks.N.mlp.fc1.weight": [32, 16],
    "vision_encoder.blocks.N.mlp.fc2.bias": [16],
    "vision_encoder.blocks.N.mlp.fc2.weight": [16, 32],
    "vision_encoder.layer_norm.bias": [16],
    "vision_encoder.layer_norm.weight": [16],
    "vision_encoder.patch_embedding.conv.bias": [16],
    "vision_encoder.patch_embedding.conv.weight": [16, 3, 12, 12],
    "vision_encoder.patch_embedding.position_embedding": [1, 16, 16],
}


def write(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A folder of random weights of these names, `N` standing for layers 0 and 1."""
    torch.manual_seed(0)
    names = {name.replace(".N.", f".{n}."): shape for name, shape in shapes.items() for n in range(2)}
    weights = {name: torch.randn(shape) for name, shape in names.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def test_a_nanovlm_is_taken_with_its_matrices_split(tmp_path: Path, capsys: Any) -> None:
    """Its own code gave the same logits through ours within 5e-6, tied and untied, with and without a picture."""
    weights = write(tmp_path / "theirs", NANO, NANO_SHAPES)
    tokenizer(290).save_pretrained(tmp_path / "words")
    model = imported(tmp_path / "theirs", None, "--tokenizer", str(tmp_path / "words"))
    found = model.state_dict()
    layer = "vision_encoder.backbone.encoder.layers.1.self_attn."
    query, key, value = weights["vision_encoder.blocks.1.attn.qkv_proj.weight"].chunk(3)
    for letter, part in zip("qkv", (query, key, value)):
        assert torch.equal(found[f"{layer}{letter}_proj.weight"], part)
    assert torch.equal(
        found["language_model.backbone.model.layers.1.post_attention_layernorm.weight"],
        weights["decoder.blocks.1.norm2.weight"],
    )
    embedding = model.language_model.backbone.get_input_embeddings().weight
    assert embedding is model.language_model.backbone.get_output_embeddings().weight
    assert torch.equal(embedding, weights["decoder.head.weight"])
    config = model.language_model.backbone.config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100000, 1e-5)
    assert (model.num_visual_tokens, tuple(model.config.image_mean), tuple(model.config.image_std)) == (
        4,
        (0, 0, 0),
        (1, 1, 1),
    )
    told = lines_of(capsys.readouterr().out)
    assert "dropped: 1 (decoder.rotary_embd.inv_freq): computed anew" in told
    assert "decoder.head.* -> language_model.backbone.lm_head.* (1)" in told
    assert "decoder.blocks.N.norm1.* -> language_model.backbone.model.layers.N.input_layernorm.* (2)" in told


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"vit_cls_flag": True}, "vit_cls_flag"), ({"lm_attn_scaling": 0.5}, "lm_attn_scaling other than 1")],
)
def test_a_nanovlm_that_computes_something_else_is_refused(changes: Any, wanted: str, tmp_path: Path) -> None:
    write(tmp_path / "theirs", {**NANO, **changes}, NANO_SHAPES)
    assert wanted in refused(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text("{}")
    assert "lacks 'vit_hidden_dim', which that of a nanoVLM has" in refused(tmp_path / "theirs")


ORIGIN_SHAPES = {
    "vision_encoder.backbone.stem.conv1.c.weight": [24, 3, 3, 3],
    "vision_encoder.ln_vision.weight": [384],
    "vision_encoder.ln_vision.bias": [384],
    "vision_encoder.projection.0.weight": [384, 384],
    "vision_encoder.projection.0.bias": [384],
    "vision_encoder.projection.1.weight": [384],
    "vision_encoder.projection.1.bias": [384],
    "fusion_module.vision_proj.weight": [32, 384],
    "fusion_module.vision_proj.bias": [32],
    "fusion_module.pre_norm.weight": [32],
    "fusion_module.pre_norm.bias": [32],
    "fusion_module.adapter.down_proj.weight": [48, 32],
    "fusion_module.adapter.down_proj.bias": [48],
    "fusion_module.adapter.up_proj.weight": [32, 48],
    "fusion_module.adapter.up_proj.bias": [32],
    "fusion_module.adapter.layer_norm.weight": [32],
    "fusion_module.adapter.layer_norm.bias": [32],
    "fusion_module.output_norm.weight": [32],
    "fusion_module.output_norm.bias": [32],
    "reasoning_module.step_embed.weight": [4, 8],
    "reasoning_loss.weight": [2],
}
"""Beside the language model's, and of the vision encoder one; its own `config.json` has more keys than these."""
ORIGIN_CONFIG = {
    "vision_model": "repvit_m0_9",
    "num_visual_tokens": 8,
    "vision_output_dim": 384,
    "image_size": 224,
    "language_hidden_size": 32,
    "language_num_heads": 2,
    "language_vocab_size": 257,
    "fusion_bottleneck_dim": 48,
}
ORIGIN_TOKENS = ("reasoning_start", "reasoning_end", "robot_selection", "action_plan", "image")


@pytest.fixture
def origin(tmp_path: Path) -> tuple[Path, Any]:
    """A Stage 3 checkpoint of the origin, as far as its names go, in bf16, and the language model in it."""
    torch.manual_seed(0)
    words = train_tokenizer(["a"], 257)
    words.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in ORIGIN_TOKENS]})
    words.save_pretrained(tmp_path / "words")
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    weights = {f"language_model.model.{name}": value.clone() for name, value in theirs.state_dict().items()}
    weights |= {name: torch.randn(shape) for name, shape in ORIGIN_SHAPES.items()}
    if find_spec("timm") is not None:
        import timm

        encoder = timm.create_model("repvit_m0_9", num_classes=0).state_dict()
        weights |= {f"vision_encoder.backbone.{name}": value.clone() for name, value in encoder.items()}
    (folder := tmp_path / "theirs").mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGIN_CONFIG))
    torch.save({name: value.bfloat16() for name, value in weights.items()}, folder / "pytorch_model.bin")
    return folder, theirs


def test_the_origin_is_recognised_and_its_way_out_is_told(origin: Any) -> None:
    if find_spec("timm") is None:
        told = refused(origin[0])
        assert "Stage 3 checkpoint of euhidaman/EmberVLM, whose vision encoder is repvit_m0_9 of timm" in told
        assert "pip install 'embervlm[timm]'" in told and "--language_only" in told
    change(origin[0], vision_model="repvit_xxs")
    told = refused(origin[0])
    assert "vision encoder 'repvit_xxs', which is none of timm's" in told and "--language_only" in told


@torch.no_grad()
def test_the_origins_way_from_features_to_the_language_model_is_ours(origin: Any) -> None:
    """Its `RepViTEncoder` behind the backbone and its `FusionModule`, written out."""
    weights = torch.load(origin[0] / "pytorch_model.bin")
    state = {name: value.float() for name, value in weights.items()}
    (family,) = [one for one in FAMILIES if one.name == ORIGIN]
    renamed = _renamed(family, state, origin[0])
    assert not [name for name in renamed if name.startswith("reasoning")]
    features = torch.randn(2, 8, 384)
    options = {"kind": "norm_adapter", "width": 384, "bottleneck": 48}
    ours = build_connector(EmberVLMConfig(connector=options), 384, 32, Grid(2, 4))
    own = {ours.removeprefix("projection."): state[theirs] for theirs, ours in renamed.items() if "projection." in ours}
    ours.load_state_dict(own)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm(features, "vision_encoder.ln_vision")
    x = norm(linear(x, "vision_encoder.projection.0"), "vision_encoder.projection.1")
    x = norm(linear(x, "fusion_module.vision_proj"), "fusion_module.pre_norm")
    inner = linear(F.gelu(linear(x, "fusion_module.adapter.down_proj")), "fusion_module.adapter.up_proj")
    x = norm(x + norm(inner, "fusion_module.adapter.layer_norm"), "fusion_module.output_norm")
    torch.testing.assert_close(ours(features), x, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed: it needs torchvision")
@torch.no_grad()
def test_the_whole_origin_is_taken_with_timm(origin: Any, tmp_path: Path, capsys: Any) -> None:
    """`benchmarks/origin_parity.py` compares its numbers with those of its own code."""
    model = imported(origin[0], None, "--tokenizer", str(tmp_path / "words"))
    told = lines_of(capsys.readouterr().out)
    assert "dropped: 2 (reasoning_module.step_embed.weight, ...): its heads for robots, plans and actions" in str(told)
    assert (model.grid, model.config.image_size) == ((2, 4), 224)
    ids = torch.tensor([[5, 258, 7, 261]])
    mask = torch.ones_like(ids).bool()
    read = model.read(torch.zeros(1, model.num_visual_tokens, 32), torch.tensor([False]), ids, mask)
    wanted = origin[1].to(torch.bfloat16).float()(ids).logits
    torch.testing.assert_close(model.language_model.logits(read), wanted, rtol=1e-4, atol=1e-4)
    assert model.generate_with_reasoning(np.zeros((50, 70, 3), np.uint8), "a", max_new_tokens=4)["num_tokens"] > 0


@torch.no_grad()
def test_the_origins_language_model_is_taken_with_its_added_rows_and_tokens(
    origin: Any, tiny_settings: Any, tmp_path: Path, capsys: Any
) -> None:
    folder, theirs = origin
    out = tmp_path / "language"
    main(["import-checkpoint", str(folder), str(out), "--language_only", "--tokenizer", str(tmp_path / "words")])
    told = lines_of(capsys.readouterr().out)
    assert any(line.endswith("weights taken (gpt2, 262 rows)") for line in told)
    assert any("weights of fusion_module, reasoning_loss, reasoning_module, vision_encoder:" in line for line in told)
    model = build_model({**tiny_settings, "language": {"name_or_path": str(out), "pretrained": True}}).eval()
    words = ReasoningTokenizer.from_folder(out)
    model.attach_tokenizer(words)
    assert words.base_vocab_size == 262
    assert words.hugging_face.convert_tokens_to_ids(["<|reasoning_end_of_before|>", "<|image|>"]) == [258, 261]
    assert words.ids["<|reasoning_start|>"] == 262
    assert words.encode("a") == [65] and max(words.encode("<|reasoning_end|>")) < 257
    ids = torch.tensor([[5, 258, 7, 261]])
    mask = torch.ones_like(ids).bool()
    read = model.read(torch.zeros(1, model.num_visual_tokens, 32), torch.tensor([False]), ids, mask)
    wanted = theirs.to(torch.bfloat16).float()(ids).logits
    torch.testing.assert_close(model.language_model.logits(read), wanted, rtol=1e-4, atol=1e-4)


def test_the_language_model_of_a_known_family_is_taken_alone_too(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", llava())
    main(["import-checkpoint", str(tmp_path / "theirs"), str(tmp_path / "language"), "--language_only"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert torch.equal(found.lm_head.weight, theirs.lm_head.weight)


# ---- training from it


@pytest.mark.slow
def test_both_phases_start_from_an_imported_checkpoint_by_resume_from_alone(scene_data: Path, tmp_path: Path) -> None:
    make(tmp_path / "theirs", llava())
    imported(tmp_path / "theirs")
    config = write_run_yaml(
        tmp_path, "embervlm-39m", scene_data / "reasoning_data.json", stage4__max_reasoning_length=900
    )
    flags = ["--config", config, "--engine", "torch", "--max_steps", "1", "--stages", "4"]
    ok(train("python", *flags, "--phase", "1", "--resume_from", tmp_path / "out"))
    first = tmp_path / "outputs" / "stage4" / "phase1" / "checkpoint-final"
    ok(train("python", *flags, "--phase", "2", "--resume_from", first))
    trained = EmberVLM.from_pretrained(tmp_path / "outputs" / "stage4" / "phase2" / "checkpoint-final")
    start = EmberVLM.from_pretrained(tmp_path / "out")
    assert (trained.grid, trained.config.imported_from) == ((4, 4), "LLaVA")
    moved = {
        name.split(".")[0] for name, p in trained.named_parameters() if not torch.equal(p, start.state_dict()[name])
    }
    assert moved == {"vision_encoder", "projection", "language_model", "reasoning_module"}
    assert model_preset(str(first))["connector"] == {"kind": "mlp", "activation": "gelu", "bias": True}

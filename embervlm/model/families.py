"""Families of vision-language models whose checkpoints can be imported: their names, and what they compute."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, SiglipVisionConfig, TimmWrapperConfig

from embervlm.config import BACKBONE
from embervlm.model.storage import CheckpointError

ORIGIN = "euhidaman/EmberVLM"
ORIGIN_LANGUAGE = r"language_model\.model\.(?=transformer\.|lm_head\.)|language_model\.(?=lm_head\.)"
"""What stands before the names of its language model."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint: how it is recognised, what its names are here, and what model that makes."""

    name: str
    model_types: tuple[str, ...] = ()
    """Of its `config.json`. Others with the same names compute something else and are refused. (): of no library, and
    the configuration is its plain JSON."""
    keys: tuple[str, ...]
    """Each a regular expression that some name matches."""
    names: tuple[tuple[str, str], ...]
    """(Regular expression for the start of a name, what stands there in ours)."""
    inner: tuple[tuple[str, str], ...] = ()
    """(Text anywhere in a name, what stands there in ours)."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(Regular expression for the start of a name, why these weights have no place here)."""
    reshaped: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    """The weights with those split or reshaped that ours has in another form."""
    settings: Callable[[Any, Mapping[str, Tensor], Path], dict[str, Any]]
    """Of the model that its configuration and its weights describe; raises CheckpointError for what ours does not
    compute."""


def parts(vision: PretrainedConfig, text: PretrainedConfig, is_tied: bool) -> dict[str, Any]:
    """The settings of both parts from their own configurations, whole."""
    return {
        "vision": {"built": vision.to_dict()},
        "language": {"built": {**text.to_dict(), "tie_word_embeddings": is_tied or text.tie_word_embeddings}},
        "image_size": vision.image_size,
    }


def family_of(names: Collection[str]) -> Family | None:
    """The family whose names these are, if any."""
    return next((one for one in FAMILIES if all(any(re.match(key, name) for name in names) for key in one.keys)), None)


def recognised(names: Iterable[str], path: Path) -> Family:
    """The family whose names these are; CheckpointError for none."""
    names = list(names)
    if (family := family_of(names)) is not None:
        return family
    if any(name.startswith("reasoning_module.") for name in names) or {*BACKBONE} == {n.split(".")[0] for n in names}:
        raise CheckpointError(f"{path}: is a checkpoint of EmberVLM already; give its folder to --resume_from")
    shown = ", ".join(names[:3]) or "none"
    known = ", ".join(IMPORTABLE)
    raise CheckpointError(f"{path}: of no known family (its first names are {shown}); known are {known}")


_SCALED_BY = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""What caps or scales the logits of some language models, and what does not; LLaVA's own class reads none of these."""


def _llava(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    vision, layer = config.vision_config, config.vision_feature_layer
    if not isinstance(layer, int):
        raise CheckpointError(f"{folder}/config.json: vision_feature_layer {layer} is several layers; one is read here")
    if vision.model_type == "pixtral":
        raise CheckpointError(
            f"{folder}/config.json: its vision encoder is a pixtral, whose visual tokens are as many as the picture is "
            "large; one that reads squares of one size (CLIP, SigLIP) is needed here, so this cannot be imported"
        )
    has_class = vision.model_type == "clip_vision_model"
    if (strategy := config.vision_feature_select_strategy) != ("default" if has_class else "full"):
        raise CheckpointError(
            f"{folder}/config.json: vision_feature_select_strategy {strategy!r} of a {vision.model_type} does not give "
            "a square of visual tokens, which is what is read here"
        )
    for name, without in _SCALED_BY.items():
        if hasattr(config.text_config, name):
            setattr(config.text_config, name, without)
    return {
        **parts(vision, config.text_config, config.tie_word_embeddings),
        "vision_feature_layer": layer,
        "connector": {
            "kind": "mlp",
            "activation": config.projector_hidden_act,
            "bias": config.multimodal_projector_bias,
        },
    }


def _idefics3(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    return {
        **parts(config.vision_config, config.text_config, config.tie_word_embeddings),
        "connector": {"kind": "pixel_shuffle", "factor": config.scale_factor},
    }


def _nanovlm(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    try:
        if config.get("vit_cls_flag") or config.get("lm_attn_scaling", 1) != 1:
            raise CheckpointError(
                f"{folder}/config.json: vit_cls_flag and a lm_attn_scaling other than 1 are not computed here, so this "
                "cannot be imported"
            )
        vision = SiglipVisionConfig(
            hidden_size=config["vit_hidden_dim"],
            intermediate_size=config["vit_inter_dim"],
            patch_size=config["vit_patch_size"],
            image_size=config["vit_img_size"],
            num_attention_heads=config["vit_n_heads"],
            num_hidden_layers=config["vit_n_blocks"],
            layer_norm_eps=config["vit_ln_eps"],
            vision_use_head=False,
        )
        text = LlamaConfig(
            vocab_size=config["lm_vocab_size"],
            hidden_size=config["lm_hidden_dim"],
            intermediate_size=config["lm_inter_dim"],
            rms_norm_eps=config["lm_rms_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": float(config["lm_re_base"])},
            max_position_embeddings=config["lm_max_position_embeddings"],
            num_attention_heads=config["lm_n_heads"],
            num_key_value_heads=config["lm_n_kv_heads"],
            num_hidden_layers=config["lm_n_blocks"],
        )
        factor = config["mp_pixel_shuffle_factor"]
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: lacks {error}, which that of a nanoVLM has") from error
    return {
        **parts(vision, text, bool(config.get("lm_tie_weights"))),
        "connector": {"kind": "pixel_shuffle", "factor": factor},
        "image_mean": (0.0, 0.0, 0.0),  # its pictures are scaled to [0, 1] and not normalised
        "image_std": (1.0, 1.0, 1.0),
    }


def _nanovlm_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of the vision encoder, one matrix there, are three here; positions have no batch."""
    out = {}
    for name, value in state.items():
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", value.chunk(3)):
                out[name.replace(".qkv_proj.", f".{letter}_proj.")] = part.clone()
        elif name.startswith("decoder."):
            out[name.replace(".attn.out_proj.", ".attn.o_proj.")] = value
        elif name == "vision_encoder.patch_embedding.position_embedding":
            out[name + ".weight"] = value.squeeze(0)
        else:
            out[name] = value
    return out


def language_of(start: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Of each weight behind `start`, a regular expression: its name there, its whole name, its value."""
    for name, value in state.items():
        if match := re.match(start, name):
            yield name[match.end() :], name, value


def gpt2_of(config: dict[str, Any], state: Mapping[str, Tensor], folder: Path) -> GPT2Config:
    """The configuration of the origin's language model, from the shapes of `state`, by transformers' names.

    Its own counts other rows of the embedding than there are: five tokens were added.
    """
    layers = {
        int(match[1]) for name in state if (match := re.match(r"transformer\.h\.(\d+)\.attn\.c_attn\.weight", name))
    }
    words, places = (state.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    heads = config.get("language_num_heads")
    if not layers or words is None or places is None or not heads:
        raise CheckpointError(
            f"{folder}: its language model is no GPT-2 by transformers' names (transformer.h.*, wte, wpe, and "
            "language_num_heads in config.json), and no other can be taken from it"
        )
    return GPT2Config(
        vocab_size=words.shape[0],
        n_embd=words.shape[1],
        n_positions=places.shape[0],
        n_layer=len(layers),
        n_head=heads,
        tie_word_embeddings="lm_head.weight" not in state or torch.equal(state["lm_head.weight"], words),
    )


def _origin(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    vision, tokens = config.get("vision_model"), config.get("num_visual_tokens")
    alone = "its language model alone can be taken with --language_only (docs/own_data.md)"
    if not str(vision).startswith("repvit_m") or not tokens:
        raise CheckpointError(
            f"{folder}: a Stage 3 checkpoint of {ORIGIN} with the vision encoder {vision!r}, which is none of timm's "
            f"and not computed here; {alone}"
        )
    if find_spec("timm") is None:
        raise CheckpointError(
            f"{folder}: a Stage 3 checkpoint of {ORIGIN}, whose vision encoder is {vision} of timm; that needs `pip "
            f"install 'embervlm[timm]'`, or {alone}"
        )
    encoder = TimmWrapperConfig(architecture=str(vision).split(".")[0], do_pooling=False)
    language = {name: value for name, _, value in language_of(ORIGIN_LANGUAGE, state)}
    side = math.isqrt(tokens)
    return {
        "vision": {"built": encoder.to_dict()},
        "language": {"built": gpt2_of(config, language, folder).to_dict()},
        "image_size": config["image_size"],
        "image_mean": (0.485, 0.456, 0.406),  # in its code, and in no file of the checkpoint
        "image_std": (0.229, 0.224, 0.225),
        "num_visual_tokens": tokens if side * side == tokens else (2, 4),  # as its encoder pools
        "connector": {
            "kind": "norm_adapter",
            "width": config["vision_output_dim"],
            "bottleneck": config["fusion_bottleneck_dim"],
        },
    }


def _onevision(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    settings = _llava(config, state, folder)
    return {**settings, "connector": {**settings["connector"], "newline": True}}


def _paligemma(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    raise CheckpointError(
        f"{folder}: a PaliGemma checkpoint, whose language model looks in both directions over picture and question; "
        "here every token sees only those before it, so this would compute something else and is not imported"
    )


_LLAVA_NAMES = (
    (r"(model\.)?vision_tower\.", "vision_encoder.backbone."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "projection.layers.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "projection.layers.2."),
    (r"(language_model\.)?lm_head\.", "language_model.backbone.lm_head."),
    (r"language_model\.model\.|(model\.)?language_model\.", "language_model.backbone.model."),
)
_LLAVA_KEYS = (
    r"(model\.)?vision_tower\.",
    r"(model\.)?multi_modal_projector\.linear_1\.",
    r"(model\.)?language_model\.",
)
FAMILIES = (
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        keys=(*_LLAVA_KEYS, r"(model\.)?image_newline$"),
        names=(*_LLAVA_NAMES, (r"(model\.)?image_newline$", "projection.newline")),
        settings=_onevision,
    ),
    Family(name="LLaVA", model_types=("llava",), keys=_LLAVA_KEYS, names=_LLAVA_NAMES, settings=_llava),
    Family(
        name="SmolVLM/Idefics3",
        model_types=("idefics3", "smolvlm"),
        keys=(r"(model\.)?vision_model\.", r"(model\.)?connector\.modality_projection\.", r"(model\.)?text_model\."),
        names=(
            (r"(model\.)?vision_model\.", "vision_encoder.backbone."),
            (r"(model\.)?connector\.modality_projection\.proj\.", "projection.linear."),
            (r"lm_head\.", "language_model.backbone.lm_head."),
            (r"(model\.)?text_model\.", "language_model.backbone.model."),
        ),
        settings=_idefics3,
    ),
    Family(
        name="nanoVLM",
        keys=(r"vision_encoder\.blocks\.", r"MP\.proj\.", r"decoder\.blocks\."),
        names=(
            (r"vision_encoder\.patch_embedding\.conv\.", "vision_encoder.backbone.embeddings.patch_embedding."),
            (r"vision_encoder\.patch_embedding\.", "vision_encoder.backbone.embeddings."),
            (r"vision_encoder\.layer_norm\.", "vision_encoder.backbone.post_layernorm."),
            (r"vision_encoder\.blocks\.", "vision_encoder.backbone.encoder.layers."),
            (r"MP\.proj\.", "projection.linear."),
            (r"decoder\.head\.", "language_model.backbone.lm_head."),
            (r"decoder\.token_embedding\.", "language_model.backbone.model.embed_tokens."),
            (r"decoder\.rotary_embd\.", "language_model.backbone.model.rotary_emb."),
            (r"decoder\.norm\.", "language_model.backbone.model.norm."),
            (r"decoder\.blocks\.", "language_model.backbone.model.layers."),
        ),
        inner=(
            (".ln1.", ".layer_norm1."),
            (".ln2.", ".layer_norm2."),
            (".attn.", ".self_attn."),
            (".norm1.", ".input_layernorm."),
            (".norm2.", ".post_attention_layernorm."),
        ),
        reshaped=_nanovlm_weights,
        settings=_nanovlm,
    ),
    Family(
        name=ORIGIN,
        keys=(r"vision_encoder\.backbone\.", r"vision_encoder\.ln_vision\.", r"fusion_module\.", r"language_model\."),
        names=(
            (ORIGIN_LANGUAGE, "language_model.backbone."),
            (r"vision_encoder\.backbone\.", "vision_encoder.backbone.timm_model."),
            (r"vision_encoder\.ln_vision\.", "projection.norm."),
            (r"vision_encoder\.projection\.", "projection.features."),
            (r"fusion_module\.vision_proj\.", "projection.project.0."),
            (r"fusion_module\.pre_norm\.", "projection.project.1."),
            (r"fusion_module\.adapter\.down_proj\.", "projection.adapter.0."),
            (r"fusion_module\.adapter\.up_proj\.", "projection.adapter.2."),
            (r"fusion_module\.adapter\.layer_norm\.", "projection.adapter.3."),
            (r"fusion_module\.output_norm\.", "projection.output_norm."),
        ),
        left_out=(
            (r"reasoning_module\.|reasoning_loss\.", "its heads for robots, plans and actions; Stage 4 has its own"),
        ),
        settings=_origin,
    ),
    Family(
        name="PaliGemma",
        model_types=("paligemma",),
        keys=(r"(model\.)?vision_tower\.", r"(model\.)?multi_modal_projector\.linear\.", r"(model\.)?language_model\."),
        names=_LLAVA_NAMES,
        settings=_paligemma,
    ),
)
IMPORTABLE = tuple(family.name for family in FAMILIES if family.settings is not _paligemma)

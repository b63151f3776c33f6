"""The parts that Stage 4 starts from: vision encoder, projection, language model. Any Hugging Face model fits."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from embervlm.config import ConfigError
from embervlm.errors import UNREADABLE
from embervlm.model.config import EmberVLMConfig
from embervlm.run_dir import closest_path, names_a_path

_OF_THE_FOLDER = ("_name_or_path", "architectures", "dtype", "transformers_version")


def hugging_face_config(part: str, spec: dict[str, Any], *, pretrained: bool) -> PretrainedConfig:
    """The configuration that `spec` names: by id or local folder, or written out under `config`.

    `built`, which a checkpoint carries, is that of the part as it was built, and needs neither.
    """
    if (built := spec.get("built")) and not pretrained:
        found: PretrainedConfig = CONFIG_MAPPING[built["model_type"]].from_dict(dict(built))
        return found
    if wrong := sorted(set(spec) - {"name_or_path", "pretrained", "config", "built"}):
        raise ConfigError(f"{part}: unknown keys {wrong}; there are name_or_path, pretrained and config")
    name = spec.get("name_or_path")
    if pretrained and not name:
        raise ConfigError(f"{part}: pretrained is true, but name_or_path is empty; name a model id or a local folder")
    if name and (pretrained or not spec.get("config")):
        if names_a_path(name) and not Path(name).exists():
            raise ConfigError(_not_found(part, name, f"no such folder{closest_path(name)}"))
        try:
            return AutoConfig.from_pretrained(name)
        except UNREADABLE as error:
            raise ConfigError(_not_found(part, name, error)) from error
    settings = dict(spec.get("config") or {})
    model_type = settings.pop("model_type", None)
    if not model_type:
        raise ConfigError(f"{part}: neither name_or_path nor config.model_type is given")
    try:
        known = AutoConfig.for_model(model_type)
        config = AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ConfigError(f"{part}: config.model_type {model_type!r}: {error}") from error
    if wrong := sorted(set(settings) - set(known.to_dict()) - set(known.attribute_map)):
        raise ConfigError(f"{part}: config has keys that {model_type} does not know: {wrong}")
    return config


def with_built_config(spec: dict[str, Any], backbone: Any) -> dict[str, Any]:
    """`spec` of a part with the whole configuration it was built from, so that a checkpoint depends on no folder."""
    whole = {key: value for key, value in backbone.config.to_dict().items() if key not in _OF_THE_FOLDER}
    return {**spec, "built": whole}


def _not_found(part: str, name: str, error: Exception | str) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{part}: cannot get {name!r} ({reason}). Without network or cache, download it elsewhere "
        f"(`hf download {name} --local-dir DIR`) and set {part}.name_or_path to that folder, "
        f"or set {part}.pretrained to false and write its config out"
    )


def _build(part: str, auto: Any, spec: dict[str, Any], load_weights: bool) -> nn.Module:
    pretrained = bool(spec.get("pretrained")) and load_weights
    config = hugging_face_config(part, spec, pretrained=pretrained)
    if pretrained:
        try:
            return auto.from_pretrained(spec["name_or_path"], dtype=torch.float32)
        except UNREADABLE as error:
            raise ConfigError(_not_found(part, spec["name_or_path"], error)) from error
    return auto.from_config(config, dtype=torch.float32)


class VisionEncoder(nn.Module):
    """Any Hugging Face vision backbone as `[batch, num_visual_tokens, vision_dim]`."""

    backbone: Any

    def __init__(self, config: EmberVLMConfig, load_weights: bool = False) -> None:
        super().__init__()
        self.backbone = _build("vision", AutoModel, config.vision, load_weights)
        if "add_pooling_layer" in inspect.signature(type(self.backbone).__init__).parameters:
            self.backbone.pooler = None  # its output is not used, so its weights would never learn
        self._wanted_tokens = config.num_visual_tokens
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            probe = self._features(torch.zeros(1, 3, config.image_size, config.image_size))
        self.backbone.train(was_training)
        self.num_visual_tokens, self.vision_dim = probe.shape[1:]
        self.grid = math.isqrt(self.num_visual_tokens)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]`, normalised -> `[batch, num_visual_tokens, vision_dim]`, row by row."""
        return self._features(pixel_values)

    def _features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.backbone(pixel_values=pixel_values).last_hidden_state
        if features.dim() == 4:
            features = features.flatten(2).transpose(1, 2)
        side = math.isqrt(features.shape[1])
        features = features[:, features.shape[1] - side * side :]  # class and register tokens stand in front
        if self._wanted_tokens and self._wanted_tokens != side * side:
            wanted = math.isqrt(self._wanted_tokens)
            if wanted * wanted != self._wanted_tokens:
                raise ConfigError(f"num_visual_tokens: {self._wanted_tokens} is not a square number")
            grid = features.transpose(1, 2).unflatten(-1, (side, side))
            features = F.adaptive_avg_pool2d(grid, wanted).flatten(2).transpose(1, 2)
        return features


class Projection(nn.Module):
    """Two-layer perceptron from visual features to the language model's width."""

    def __init__(self, vision_dim: int, hidden: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim)
        self.layers = nn.Sequential(nn.Linear(vision_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(self.norm(features))


class LanguageModel(nn.Module):
    """Any Hugging Face causal language model, fed with embeddings."""

    backbone: Any

    def __init__(self, config: EmberVLMConfig, load_weights: bool = False) -> None:
        super().__init__()
        self.backbone = _build("language", AutoModelForCausalLM, config.language, load_weights)
        self.hidden_size = self.backbone.get_input_embeddings().weight.shape[1]
        self.vocab_size = self.backbone.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Tokens it can read, those of the picture included; None where its configuration sets no limit."""
        limit = getattr(self.backbone.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit and limit > 0 else None

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.backbone.get_input_embeddings()(input_ids)

    def forward(self, embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Any = None) -> Tensor:
        """Hidden states `[batch, length, hidden]`. `mask`: `[batch, cached + length]` int64, 0 at padding."""
        outputs = self.backbone.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        return outputs.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.get_output_embeddings()(hidden)

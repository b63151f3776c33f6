"""The pretrained parts that Stage 4 starts from: vision encoder and language model. Any Hugging Face model fits."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from embervlm.config import ConfigError
from embervlm.data.samples import Grid
from embervlm.errors import UNREADABLE, UserError
from embervlm.model.config import EmberVLMConfig
from embervlm.model.grid import grid_of, pooled_grid
from embervlm.model.storage import shards_of
from embervlm.paths import closest_path, names_a_path

_OF_THE_FOLDER = ("_name_or_path", "architectures", "dtype", "transformers_version")
Logits = Callable[[Tensor], Tensor]


class VisionEncoder(nn.Module):
    """Any Hugging Face vision backbone as `[batch, num_visual_tokens, vision_dim]`, before the connector."""

    backbone: Any
    grid: Grid

    def __init__(self, config: EmberVLMConfig, load_weights: bool = False) -> None:
        super().__init__()
        self.backbone = _build("vision", AutoModel, config.vision, load_weights)
        if "add_pooling_layer" in inspect.signature(type(self.backbone).__init__).parameters:
            self.backbone.pooler = None  # its output is not used, so its weights would never learn
        _BatchNorm2d.put_into(self.backbone)
        self._wanted_grid = pooled_grid(config.num_visual_tokens)
        self._size = config.image_size
        self._layer = config.vision_feature_layer
        was_training = self.backbone.training
        self.backbone.eval()
        size = config.image_size
        try:
            with torch.no_grad():
                probe, self.grid = self._features(torch.zeros(1, 3, size, size))
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            if isinstance(error, ConfigError):
                raise
            kind = self.backbone.config.model_type
            raise ConfigError(
                f"vision: {kind} does not read pictures of image_size {size} "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error
        self.backbone.train(was_training)
        self.num_visual_tokens, self.vision_dim = probe.shape[1:]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]`, normalised -> `[batch, num_visual_tokens, vision_dim]`, row by row."""
        return self._features(pixel_values)[0]

    def _features(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        features: Tensor
        if self._layer is None:
            features = self.backbone(pixel_values=pixel_values).last_hidden_state
        else:
            features = self.backbone(pixel_values=pixel_values, output_hidden_states=True).hidden_states[self._layer]
        if features.dim() == 4:
            grid = Grid(*features.shape[2:])
            features = features.flatten(2).transpose(1, 2)
        else:
            grid = grid_of(self.backbone.config, features.shape[1], self._size)
            features = features[:, features.shape[1] - grid.size :]  # class and register tokens stand in front
        if self._wanted_grid and self._wanted_grid != grid:
            in_rows = features.transpose(1, 2).unflatten(-1, grid)
            features = F.adaptive_avg_pool2d(in_rows, self._wanted_grid).flatten(2).transpose(1, 2)
            grid = self._wanted_grid
        return features, grid


class LanguageModel(nn.Module):
    """Any Hugging Face causal language model, fed with embeddings."""

    backbone: Any

    def __init__(self, config: EmberVLMConfig, load_weights: bool = False) -> None:
        super().__init__()
        self.backbone = _build("language", AutoModelForCausalLM, config.language, load_weights)
        self.hidden_size = self.backbone.get_input_embeddings().weight.shape[1]
        self.vocab_size = self.backbone.get_input_embeddings().weight.shape[0]
        self._head: Logits | None = None
        self._scaled: Logits | None = None
        self.find_head()

    def find_head(self) -> None:
        """Find out whether the logits are more than a product with the output embedding; again where weights came that
        could say something else."""
        self._head = self._scaled = None
        if self.backbone.base_model is self.backbone or self.backbone.get_input_embeddings().weight.is_meta:
            return  # without weights there is nothing to compare
        head = _without_modules(self.backbone, [self.backbone.base_model])
        states = torch.randn(1, 4, self.hidden_size, generator=torch.Generator().manual_seed(0))
        states = 100 * states.to(self.backbone.dtype)  # a soft cap is the identity near zero
        with torch.no_grad():
            if not torch.allclose(_logits(head, states), self.logits(states), rtol=1e-4):
                self._head = partial(_logits, head)
                self._scaled = partial(_logits, _without_modules(head, [self.backbone.get_output_embeddings()]))

    def keep_rows(self, num_tokens: int) -> None:
        """Keep embedding rows for `num_tokens` tokens, up to the next multiple of 64, and drop those behind them."""
        rows = 64 * math.ceil(num_tokens / 64)
        if rows < self.vocab_size:
            self.backbone.resize_token_embeddings(rows)
            self.vocab_size = rows
            self.find_head()

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
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary as the model itself computes them: some scale or cap them behind the embedding."""
        return self._head(hidden) if self._head else self.backbone.get_output_embeddings()(hidden)

    def scaled(self, scores: Tensor) -> Tensor:
        """Scores of other tokens than the vocabulary's, `hidden @ embedding`, scaled or capped like `logits`."""
        return self._scaled(scores) if self._scaled else scores


def _build(part: str, auto: Any, spec: dict[str, Any], load_weights: bool) -> nn.Module:
    pretrained = bool(spec.get("pretrained")) and load_weights
    config = hugging_face_config(part, spec, pretrained=pretrained)
    name = spec.get("name_or_path") or config.model_type
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ConfigError(
            f"{part}: {name!r} is quantized ({method}), and such weights cannot be trained; use the "
            f"model that it was made from"
        )
    if part == "vision":
        config = getattr(config, "vision_config", None) or config  # of CLIP and its kin the vision tower alone
        if config.model_type.startswith("siglip2"):
            raise ConfigError(
                f"vision: {name!r} is a SigLIP 2 of the NaFlex kind, which reads patches of pictures of any shape; "
                "use one of a fixed size, such as google/siglip2-base-patch16-224 (its model_type is siglip)"
            )
    with _said_clearly(part, name):
        try:
            if pretrained:
                return _loaded(part, auto, name, config)
            return auto.from_config(config, dtype=torch.float32)
        except ValueError as error:
            if isinstance(error, UserError) or (pretrained and "nrecognized configuration" not in str(error)):
                raise
            wanted = "picture encoder" if part == "vision" else "causal language model"
            raise ConfigError(f"{part}: {config.model_type} is not a {wanted} ({_first_line(error)[:200]})") from error


def _loaded(part: str, auto: Any, name: str, config: PretrainedConfig) -> nn.Module:
    """The model with its weights; ConfigError where one is missing, which the library would leave random."""
    for index in Path(name).glob("*.index.json"):
        shards_of(index)
    model, told = auto.from_pretrained(
        name, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(key for key in told["missing_keys"] if not key.startswith("pooler.")):
        raise ConfigError(
            f"{part}: {name!r} has not all weights of a {config.model_type}: {len(missing)} are missing "
            f"({missing[0]}, ...); it is damaged, or of another model than its config.json says"
        )
    out: nn.Module = model
    return out


def hugging_face_config(part: str, spec: dict[str, Any], *, pretrained: bool) -> PretrainedConfig:
    """The configuration that `spec` names: by id or local folder, or written out under `config`.

    `built`, which a checkpoint carries, is that of the part as it was built, and needs neither.
    """
    if (built := spec.get("built")) and not pretrained:
        found: PretrainedConfig = CONFIG_MAPPING[built["model_type"]].from_dict(dict(built))
        return found
    if wrong := sorted(set(spec) - {"name_or_path", "pretrained", "config", "built"}):
        raise ConfigError(f"{part}: unknown keys {wrong}; known are name_or_path, pretrained and config")
    name = spec.get("name_or_path")
    if pretrained and not name:
        raise ConfigError(f"{part}: pretrained is true, but name_or_path is empty; give a model id or a local folder")
    if name and (pretrained or not spec.get("config")):
        if names_a_path(name) and not Path(name).exists():
            raise ConfigError(_not_found(part, name, f"no such folder{closest_path(name)}"))
        with _said_clearly(part, name):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)  # asks on the terminal otherwise
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


def _not_found(part: str, name: str, error: Exception | str) -> str:
    if Path(name).exists():
        return f"{part}: cannot read {name!r} ({_first_line(error)[:200]}); save or download it again"
    return (
        f"{part}: cannot get {name!r} ({_first_line(error)}). Without network or cache, download it elsewhere "
        f"(`hf download {name} --local-dir DIR`) and set {part}.name_or_path to that folder, "
        f"or set {part}.pretrained to false and write its whole config"
    )


@contextmanager
def _said_clearly(part: str, name: str) -> Iterator[None]:
    """Turns an error of Hugging Face while reading `name` into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{part}: {name!r} has weights in a .bin file that is damaged or contains more than weights, and reading "
            "the rest could run code; save only the weights, as safetensors"
        ) from error
    except ImportError as error:
        needed = re.search(r"requires the (\S+) library", str(error))
        what = f"the package {needed[1].lower()}, which is" if needed else "a package that is"
        advice = f"pip install {needed[1].lower()}" if needed else _first_line(error)
        raise ConfigError(f"{part}: {name!r} needs {what} not installed: {advice}") from error
    except (*UNREADABLE, SafetensorError, RuntimeError, EOFError) as error:
        raise ConfigError(_not_found(part, name, error)) from error


def _first_line(error: Exception | str) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def with_built_config(spec: dict[str, Any], backbone: Any) -> dict[str, Any]:
    """`spec` of a part with the whole configuration it was built from, so that a checkpoint depends on no folder."""
    whole = {key: value for key, value in backbone.config.to_dict().items() if key not in _OF_THE_FOLDER}
    return {**spec, "built": whole}


class _BatchNorm2d(nn.BatchNorm2d):
    """Takes its weights as wide as its statistics: engines round the one and not the other, which torch refuses."""

    @classmethod
    def put_into(cls, backbone: nn.Module) -> None:
        for module in backbone.modules():
            if type(module) is nn.BatchNorm2d and module.affine and module.running_mean is not None and module.momentum:
                module.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and self.momentum is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(input, mean, variance, weight, bias, self.training, self.momentum, self.eps)


def _without_modules(model: nn.Module, left_out: Sequence[nn.Module]) -> nn.Module:
    """`model` with the same parameters, without hooks, and with nothing done by some of its direct parts."""
    out = copy.copy(model)
    out._modules = {
        name: _Through(part) if part is not None and any(part is other for other in left_out) else part
        for name, part in model._modules.items()
    }
    return out


def _logits(model: nn.Module, states: Tensor) -> Tensor:
    """What `model`, whose base is left out, makes of `states` `[..., hidden]`."""
    flat = states.reshape(1, -1, states.shape[-1])
    logits: Tensor = model.forward(inputs_embeds=flat, use_cache=False).logits
    return logits.view(*states.shape[:-1], -1)


class _Through(nn.Module):
    """Stands in for a module, or for a part of it: gives back what it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a part of this one

    def __getattr__(self, name: str) -> Any:  # some heads read a factor off the model
        value = getattr(self.__dict__["module"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, given: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        return given if inputs_embeds is None else _States(inputs_embeds)


class _States:
    """What a model gives its head: states, and None of everything else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None

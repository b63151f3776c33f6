"""LoRA adapters in the frozen parts of a model: put in, merged, and written in peft's own format. Alone names peft.

An adapted layer's weight `X.weight` becomes `X.base_layer.weight`, beside `X.lora_A.default.weight` `[rank, in]` and
`X.lora_B.default.weight` `[out, rank]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from embervlm.config import ConfigError
from embervlm.config_lora import LORA_COMPONENTS, LoraConfig
from embervlm.model.network import EmberVLMNetwork

ADAPTERS = "adapters"
"""Folder of a checkpoint with one folder of peft's for each component that has adapters."""
_NAME = "default"
_BASE = re.compile(r"(.*)\.base_layer\.(weight|bias)")


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` is one of an adapter."""
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


def is_adapted(name: str) -> bool:
    """Whether the parameter `name` is one of an adapter, or of a layer that has one."""
    return is_adapter(name) or _BASE.fullmatch(name) is not None


def add_adapters(model: EmberVLMNetwork, lora: Mapping[str, LoraConfig], seed: int = 0) -> None:
    """Put the adapters of `lora` (component -> settings) into `model`; its outputs stay what they were.

    Args:
        seed: Of A's random numbers; B is 0.

    Raises:
        ConfigError: a target names no linear layer of its component.
    """
    if not lora:
        return
    import peft

    model.adapted = tuple(lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, settings in lora.items():
            backbone = getattr(model, component).backbone
            targets = _targets(component, backbone, settings.targets)
            peft.inject_adapter_in_model(
                peft.LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.alpha,
                    lora_dropout=settings.dropout,
                    target_modules=targets,
                    fan_in_fan_out=isinstance(backbone.get_submodule(targets[0]), Conv1D),
                    task_type="CAUSAL_LM" if component == "language_model" else "FEATURE_EXTRACTION",
                ),
                backbone,
                _NAME,
            )


def check_targets(model: EmberVLMNetwork, lora: Mapping[str, LoraConfig]) -> None:
    """ConfigError as `add_adapters`, before anything is trained; changes nothing."""
    for component, settings in lora.items():
        _targets(component, getattr(model, component).backbone, settings.targets)


def _targets(component: str, backbone: Any, wanted: tuple[str, ...]) -> list[str]:
    """The full names of the linear layers of `backbone` that `wanted` means; () means all."""
    head = backbone.get_output_embeddings()  # may be tied to the input embedding, and is used past the backbone
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if missing := [name for name in wanted if not any(f".{found}".endswith(f".{name}") for found in linear)]:
        raise ConfigError(
            f"lora: {component}: targets {', '.join(missing)}: no linear layer is called so; there are "
            f"{', '.join(kinds)}"
        )
    if not linear:
        raise ConfigError(f"lora: {component}: has no linear layer that adapters could be added to; leave it out")
    return [name for name in linear if not wanted or any(f".{name}".endswith(f".{end}") for end in wanted)]


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, whole and under the names of `model`, with its adapters added to the weights they belong to."""
    out = {}
    for name, value in state.items():
        if (match := _BASE.fullmatch(name)) is not None:
            layer, kind = match.groups()
            if kind == "weight":
                down, up = (state[f"{layer}.lora_{letter}.{_NAME}.weight"] for letter in "AB")
                module: Any = model.get_submodule(layer)
                change = (up @ down) * module.scaling[_NAME]
                value = value + (change.T if module.fan_in_fan_out else change)
            out[f"{layer}.{kind}"] = value
        elif not is_adapter(name):
            out[name] = value
    return out


def save_adapters(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters of `state` so that `PeftModel.from_pretrained(backbone, folder / "adapters" / component)`
    adds them to the component that the phase began with. Nothing where there are none."""
    for component in LORA_COMPONENTS:
        prefix = f"{component}.backbone."
        own = {
            name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix) and is_adapter(name)
        }
        if not own:
            continue
        from safetensors.torch import save_file

        target = folder / ADAPTERS / component
        target.mkdir(parents=True)
        own = {f"base_model.model.{name}".replace(f".{_NAME}.", "."): value.contiguous() for name, value in own.items()}
        save_file(own, target / "adapter_model.safetensors", metadata={"format": "pt"})
        getattr(model, component).backbone.peft_config[_NAME].save_pretrained(str(target))

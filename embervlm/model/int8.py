"""Weights of 8 bits: each output channel of a linear layer as whole numbers in [-127, 127] and one float, its scale.

Only weights are rounded. They stay as they are in memory, and a layer makes floats of its own where it computes.
Norms, biases, convolutions and small layers keep their floats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from embervlm.model.network import EmberVLMNetwork

SCALE = "weight_scale"
"""The float of each channel, beside `weight`."""
LEAST_INPUTS = 32
"""A layer with fewer inputs gains little: its scales, biases and norms are as large as its weights."""
_LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer, or GPT-2's `Conv1D`, with a `weight` `[out, in]` int8."""

    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer(SCALE, scale)

    def forward(self, states: Tensor) -> Tensor:
        # the scale belongs to an output, so it can wait until the product is there
        out = F.linear(states, self.weight.to(states.dtype)) * self.weight_scale
        return out if self.bias is None else out + self.bias


class Int8Embedding(nn.Module):
    """A token embedding with a `weight` `[tokens, width]` int8; one that is tied to a linear layer shares it."""

    weight_scale: Tensor

    def __init__(self, weight: nn.Parameter, scale: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer(SCALE, scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = self.weight_scale[input_ids]
        return self.weight[input_ids].to(scale.dtype) * scale[..., None]


def to_int8(model: EmberVLMNetwork) -> None:
    """Round the weights of `model` in place, all that can be; it then answers and cannot be trained."""
    shared = _rounded_weights(model)
    floats = {names[0]: _of_channels(model.get_submodule(names[0])) for names in shared}
    _replace(model, shared)
    with torch.no_grad():
        for name, weight in floats.items():
            layer: Any = model.get_submodule(name)
            scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
            layer.weight_scale.copy_(scale)
            layer.weight.copy_((weight / scale[:, None]).round())
    model.language_model.find_head()


def holds_int8(state: Mapping[str, Tensor]) -> bool:
    """Whether these weights are those of a model that went through `to_int8`."""
    return any(value.dtype == torch.int8 for value in state.values())


def room_for_int8(model: EmberVLMNetwork, state: Collection[str]) -> None:
    """Put layers for the int8 weights named in `state` into a new `model`."""
    layers = {key.removesuffix(f".{SCALE}") for key in state if key.endswith(f".{SCALE}")}
    model.language_model.backbone.tie_weights()  # left out where a model is built without initialising it
    _replace(model, [names for names in _rounded_weights(model) if layers & set(names)])


def _rounded_weights(model: EmberVLMNetwork) -> list[list[str]]:
    """The layers of each weight that can be rounded; several where it is tied."""
    words = model.language_model.backbone.get_input_embeddings()
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    out = []
    for layers in owners.values():
        known = all(type(m) in (nn.Linear, Conv1D) or (m is words and type(m) is nn.Embedding) for _, m in layers)
        if known and layers is owners[id(layers[0][1].weight)] and _num_inputs(layers[0][1]) >= LEAST_INPUTS:
            out.append([name for name, _ in layers])
    return out


def _num_inputs(layer: Any) -> int:
    return int(layer.weight.shape[0 if type(layer) is Conv1D else 1])


def _of_channels(layer: Any) -> Tensor:
    """Its weight as `[out, in]`."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if type(layer) is Conv1D else weight


def _replace(model: nn.Module, shared: Collection[Collection[str]]) -> None:
    for names in shared:
        shape = _of_channels(model.get_submodule(next(iter(names)))).shape
        weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        scale = torch.empty(shape[0])
        for name in names:
            old: Any = model.get_submodule(name)
            new = Int8Embedding(weight, scale) if type(old) is nn.Embedding else Int8Linear(weight, scale, old.bias)
            model.set_submodule(name, new)

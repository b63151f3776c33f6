"""Connectors between vision encoder and language model, by name: `connector: {kind: ...}` of a preset.

Each takes visual features `[batch, tokens, vision_dim]`, `grid.columns` in a row, and gives `[batch, tokens /
factor**2, hidden]`; `factor` is by how much it shortens a side of the grid. Some put `num_behind`
tokens of their own behind these.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from embervlm.config import ConfigError
from embervlm.data.samples import Grid
from embervlm.model.config import EmberVLMConfig


class NormMLP(nn.Module):
    """Norm and two-layer perceptron; what the presets use."""

    factor = 1

    def __init__(self, vision_dim: int, hidden_size: int, *, width: int, positions: int = 0) -> None:
        """`positions`: visual tokens of a picture, to each of which a learned vector of its place is added; none: 0."""
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim)
        self.layers = nn.Sequential(nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, hidden_size))
        if positions:
            self.places = nn.Parameter(0.02 * torch.randn(positions, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layers(self.norm(features))
        return out + self.places if hasattr(self, "places") else out


class MLP(nn.Module):
    """Two linear layers as wide as the language model, with an activation between them (LLaVA 1.5).

    With `newline` a learned token stands behind the last row (LLaVA-OneVision).
    """

    factor = 1

    def __init__(
        self, vision_dim: int, hidden_size: int, *, activation: str = "gelu", bias: bool = True, newline: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise ConfigError(f"connector: activation {activation!r} is not known; known are {', '.join(ACT2FN)}")
        self.layers = nn.Sequential(
            nn.Linear(vision_dim, hidden_size, bias=bias),
            ACT2FN[activation],
            nn.Linear(hidden_size, hidden_size, bias=bias),
        )
        self.num_behind = int(newline)
        self.newline = nn.Parameter(0.02 * torch.randn(hidden_size)) if newline else None

    def forward(self, features: Tensor) -> Tensor:
        out = self.layers(features)
        if self.newline is None:
            return out
        return torch.cat([out, self.newline.to(out.dtype).expand(len(out), 1, -1)], dim=1)


class NormAdapter(nn.Module):
    """Norm and projection, projection and norm, then an adapter with a bottleneck (euhidaman/EmberVLM)."""

    factor = 1

    def __init__(self, vision_dim: int, hidden_size: int, *, width: int, bottleneck: int) -> None:
        """`width`: of what stands between both projections."""
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim)
        self.features = nn.Sequential(nn.Linear(vision_dim, width), nn.LayerNorm(width))
        self.project = nn.Sequential(nn.Linear(width, hidden_size), nn.LayerNorm(hidden_size))
        self.adapter = nn.Sequential(
            nn.Linear(hidden_size, bottleneck), nn.GELU(), nn.Linear(bottleneck, hidden_size), nn.LayerNorm(hidden_size)
        )
        self.output_norm = nn.LayerNorm(hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(self.features(self.norm(features)))
        out: Tensor = self.output_norm(projected + self.adapter(projected))
        return out


class PixelShuffle(nn.Module):
    """Each square of `factor` x `factor` features side by side as one, then a linear layer (Idefics3, nanoVLM)."""

    columns: int
    """Features in a row of the grid."""

    def __init__(self, vision_dim: int, hidden_size: int, *, factor: int, bias: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(vision_dim * factor**2, hidden_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        squares = features.unflatten(1, (-1, self.factor, self.columns // self.factor, self.factor)).transpose(2, 3)
        return self.linear(squares.flatten(3).flatten(1, 2))


class Linear(nn.Module):
    """One linear layer."""

    factor = 1

    def __init__(self, vision_dim: int, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_dim, hidden_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


CONNECTORS: dict[str, type[nn.Module]] = {
    "norm_mlp": NormMLP,
    "mlp": MLP,
    "linear": Linear,
    "norm_adapter": NormAdapter,
    "pixel_shuffle": PixelShuffle,
}


def build_connector(config: EmberVLMConfig, vision_dim: int, hidden_size: int, grid: Grid) -> Any:
    """The connector that `config` names, between features in `grid` and a language model of `hidden_size`."""
    options = dict(config.connector)
    kind = options.pop("kind", "norm_mlp")
    if kind not in CONNECTORS:
        raise ConfigError(f"connector: kind {kind!r} is not known; known are {', '.join(CONNECTORS)}")
    if kind == "norm_mlp":
        options = {"width": config.projection_hidden_size, **options}
    arguments = inspect.signature(CONNECTORS[kind]).parameters.values()
    known = {argument.name: argument for argument in arguments if argument.kind == argument.KEYWORD_ONLY}
    if wrong := sorted(set(options) - set(known)):
        raise ConfigError(f"connector: {kind} has no {', '.join(wrong)}; it has {', '.join(known)}")
    if missing := [
        name for name, argument in known.items() if argument.default is argument.empty and name not in options
    ]:
        raise ConfigError(f"connector: {kind} needs {', '.join(missing)}")
    factor = options.get("factor", 1)
    if type(factor) is not int or factor < 1:
        raise ConfigError(f"connector: factor {factor!r} is not a whole number above 0")
    if grid.rows % factor or grid.columns % factor:
        raise ConfigError(f"connector: factor {factor} does not divide the {grid} features of a picture")
    if kind == "norm_mlp" and options.get("positions"):  # `true` in a preset: convolutions hardly say where things are
        options["positions"] = grid.size
    built = CONNECTORS[kind](vision_dim, hidden_size, **options)
    if isinstance(built, PixelShuffle):
        built.columns = grid.columns
    return built

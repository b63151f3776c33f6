"""The settings of LoRA: small matrices that are trained in place of a component's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embervlm.config_checks import ConfigError, bounded, require

LORA_COMPONENTS = ("vision_encoder", "language_model")
"""Parts that can have adapters; the projection is small and new, and is trained as it is."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of one component (Hu et al. 2021): W + alpha / rank * B A, of which B and A are trained."""

    rank: int = 16
    """Width between A and B."""
    alpha: float = 32.0
    """Scale of what the adapters add, before it is divided by the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is left out in training."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as q_proj; by default all but the output embedding."""

    def __post_init__(self) -> None:
        bounded(self, "rank", least=1)
        require(self.alpha > 0, f"alpha: {self.alpha} is not positive")
        require(0 <= self.dropout < 1, f"dropout: {self.dropout} is not in [0, 1)")


def check_lora(lora: Mapping[str, LoraConfig], multipliers: Mapping[str, float]) -> None:
    """ConfigError for a component that has no adapters, or whose adapters would not learn."""
    for name in lora:
        require(name in LORA_COMPONENTS, f"lora: {name!r} has no adapters; {' and '.join(LORA_COMPONENTS)} can have")
        if not multipliers[name]:
            raise ConfigError(
                f"lora: {name}: its learning rate multiplier is 0, so its adapters would not learn; raise it, or leave "
                "them out"
            )

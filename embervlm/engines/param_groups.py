"""The parameters that are trained, and their learning rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from embervlm.config import COMPONENTS, ConfigError, PhaseConfig
from embervlm.model.lora import is_adapter

AUXILIARY = "auxiliary"
"""Parts that only training needs (the dense head of Stage 3); they learn at the peak rate."""


def build_param_groups(model: nn.Module, phase: PhaseConfig) -> list[dict[str, Any]]:
    """Freeze and group the parameters of `model`. Call before the engine wraps it.

    Each group has `name` (a component), `lr` (its peak rate) and `params`; no group is empty.
    """
    factors = {**phase.multipliers, AUXILIARY: 1.0}
    params: dict[str, list[nn.Parameter]] = {name: [] for name in factors}
    for path, parameter in model.named_parameters():
        component = next((part for part in path.split(".") if part in factors), None)
        if component is None:
            raise ConfigError(f"parameter {path!r} belongs to no component of {COMPONENTS}")
        learns = factors[component] > 0 and (component not in phase.lora or is_adapter(path))
        parameter.requires_grad_(learns)
        if learns:
            params[component].append(parameter)
    groups = [
        {"name": name, "params": params[name], "lr": phase.learning_rate * factor}
        for name, factor in factors.items()
        if params[name]
    ]
    if not groups:
        raise ConfigError(f"phase {phase.name!r}: every component is frozen; nothing would be trained")
    return groups

"""The engine that a run asks for, around a module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from embervlm.config import ConfigError, PhaseConfig, TrainConfig
from embervlm.engines.base import Engine
from embervlm.engines.deepspeed import DeepSpeedEngine, deepspeed_settings
from embervlm.engines.plain import TorchEngine
from embervlm.world import World


def build_engine(
    module: nn.Module, config: TrainConfig, phase: PhaseConfig, world: World, *, batch_size: int, accumulation: int
) -> Engine:
    """Freeze, group and wrap `module` for one phase.

    Args:
        batch_size: Most samples in a micro-batch of one process.
        accumulation: Micro-batches of one process per update.
    """
    precision = resolve_precision(config.precision, world.device, config.engine)
    module.to(world.device)
    if world.size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
    if config.engine == "torch":
        return TorchEngine(module, phase, world, precision)
    if config.engine == "fsdp":
        from embervlm.engines.fsdp import FsdpEngine

        return FsdpEngine(module, phase, world, precision)

    settings = deepspeed_settings(config, phase, precision, batch_size, accumulation, world.size)
    return DeepSpeedEngine(module, phase, world, precision, settings)


def resolve_precision(precision: str, device: torch.device, engine: str) -> str:
    """`fp32`, `bf16` or `fp16` on `device`; ConfigError for fp16 where it cannot run."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type != "cuda" and engine == "deepspeed":
        raise ConfigError(f"precision: DeepSpeed cannot train in fp16 on {device.type}; use fp32 or bf16 here")
    return precision

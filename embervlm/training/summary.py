"""What is printed of a phase before and behind its progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from embervlm.config import TrainConfig
from embervlm.engines.build import resolve_precision
from embervlm.model.embervlm import EmberVLM
from embervlm.model.lora import is_adapter
from embervlm.training.job import PhaseJob
from embervlm.world import World

RATE_KNOWN_AFTER_S, RATE_KNOWN_AFTER_STEPS = 20.0, 5
"""The first steps are slower: caches are empty."""


def opening(job: PhaseJob, config: TrainConfig, world: World) -> list[str]:
    """What a phase is going to do; call it when the model is frozen and no engine has wrapped it."""
    batch = f"{job.plan.global_batch} records each: {processes(world.size)} x {job.batch_size}"
    if job.policy is not None:
        batch = (
            f"{job.plan.global_batch} questions with {job.policy.config.num_generations} chains each: "
            f"{processes(world.size)} x {job.batch_size}"
        )
    if job.accumulation > 1:
        batch += f" x {job.accumulation} micro-batches"
    engine = f"deepspeed, ZeRO {config.zero_stage}" if config.engine == "deepspeed" else config.engine
    evaluated = f", evaluated every {config.eval_steps}" if config.eval_steps else ""
    precision = resolve_precision(config.precision, world.device, config.engine)
    return [
        job.name if job.phase.name in job.name else f"{job.name}: {job.phase.name}",
        f"  model      {config.model}, {sum(p.numel() for p in job.model.parameters()):,} parameters",
        f"  trains     {trained_parts(job.model, job.phase.multipliers)}",
        f"  records    {len(job.plan.main):,}{_mixed(job)}",
        f"  steps      {_steps(job, config)}, of {batch}",
        f"  rate       {job.phase.learning_rate:g} at its peak, after {job.phase.warmup_steps:,} steps",
        f"  runs on    {world.device.type}, {processes(world.size)}, {engine}, {precision}",
        f"  saves to   {job.folder}, every {config.save_steps:,} steps{evaluated}",
    ]


def trained_parts(model: EmberVLM, multipliers: Mapping[str, float]) -> str:
    """The parameters that learn, their share, and the factor on the learning rate of each part."""
    total, learning = 0, dict[tuple[str, float], int]()
    for path, parameter in model.named_parameters():
        total += parameter.numel()
        component = path.partition(".")[0]
        if parameter.requires_grad and (factor := multipliers[component]) > 0:
            part = (f"{component}{' adapters' if is_adapter(path) else ''}", factor)
            learning[part] = learning.get(part, 0) + parameter.numel()
    count = sum(learning.values())
    parts = [
        f"{name} {size:,}{'' if factor == 1 else f' at {factor:g} x the rate'}"
        for (name, factor), size in learning.items()
    ]
    return f"{count:,} ({count / total:.1%}): {', '.join(parts)}"


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _mixed(job: PhaseJob) -> str:
    ratios = [ratio for samples, ratio in job.plan.mixed if ratio and len(samples)]
    return f", and {sum(ratios):.0%} as many in other forms" if ratios else ""


def _steps(job: PhaseJob, config: TrainConfig) -> str:
    phase = job.phase
    by_time = "" if phase.max_minutes is None else f"as many as {phase.max_minutes:.1f} minutes allow"
    if by_time and not phase.stop_at_plateau:
        return f"{by_time}, whatever `epochs` says"
    most = min(job.total_steps, config.max_steps or job.total_steps)
    if job.samples_wanted is not None or most < job.total_steps:
        return f"{most:,}"
    until = "at most " if phase.stop_at_plateau else ""
    epochs = f"{until}{most:,} in {phase.epochs} epoch{'s' if phase.epochs > 1 else ''}"
    return f"{by_time}, {epochs}" if by_time else epochs


def expected_end(name: str, steps: int, seconds: float, left: float, *, at_plateau: bool = False) -> str | None:
    """When the phase will end, from the `steps` that took `seconds`; None while that is not known yet.

    `at_plateau`: it probably ends earlier.
    """
    if steps < RATE_KNOWN_AFTER_STEPS or seconds < RATE_KNOWN_AFTER_S or left <= 0:
        return None
    more = left * seconds / steps
    at = time.strftime("%H:%M" if more < 20 * 3600 else "%a %d %b %H:%M", time.localtime(time.time() + more))
    speed = f"{steps / seconds:.2g} steps a second"
    if at_plateau:
        return (
            f"{name}: at most {duration(more)} to go at {speed}; it ends earlier where the val loss no longer falls, "
            "and --max_minutes sets a limit"
        )
    return f"{name}: {duration(more)} to go at {speed}, so it ends at about {at}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def saved_line(path: Path, val_loss: float | None) -> str:
    return f"saved {path}" + ("" if val_loss is None else f" (val loss {val_loss:.3f})")

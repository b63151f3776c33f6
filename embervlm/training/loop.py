"""Train one phase, from its first step or from where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.config import BACKBONE, COMPONENTS, PhaseConfig, ScheduledSamplingConfig, TrainConfig, as_dict
from embervlm.data.collate import Batch, Collator
from embervlm.data.dataset import EpochPlan, Sample
from embervlm.data.images import PictureCache
from embervlm.model.embervlm import EmberVLM
from embervlm.model.storage import load_checkpoint_into
from embervlm.training.checkpoint import CheckpointStore, Progress, load_training_state, restore
from embervlm.training.engine import Engine, World, build_engine
from embervlm.training.module import TrainingModule
from embervlm.training.schedule import learning_rate_factor, teacher_forcing_ratio
from embervlm.training.tracking import Tracker
from embervlm.training.visual_cache import VisualCache


@dataclass(kw_only=True)
class PhaseJob:
    """One phase to train, with everything it needs."""

    name: str
    folder: Path
    phase: PhaseConfig
    model: EmberVLM
    plan: EpochPlan
    collator: Collator
    pictures: PictureCache
    batch_size: int
    accumulation: int = 1
    scheduled_sampling: ScheduledSamplingConfig = field(
        default_factory=lambda: ScheduledSamplingConfig(enabled=False)
    )  # fmt: skip
    dense_sizes: list[int] | None = None
    gradient_checkpointing: bool = False
    after_epoch: Callable[[EmberVLM, int], None] | None = None
    """Called on every process with the model and the epoch just finished, counted from 1 within the phase."""
    after_save: Callable[[Path], None] | None = None
    """Called on every process after a checkpoint of `eval_steps`."""
    samples_wanted: int | None = None
    """Stop after this many records instead of after `epochs`."""

    @property
    def total_steps(self) -> int:
        if self.samples_wanted is not None:
            return max(1, round(self.samples_wanted / self.plan.global_batch))
        return self.plan.steps_per_epoch * self.phase.epochs


def deal(samples: Sequence[Sample], world: World, accumulation: int) -> list[tuple[list[int], list[Sample]]]:
    """This process's micro-batches of a global batch, each with its samples' places in it.

    Every `world.size * accumulation`-th sample goes to the same micro-batch, so lengths stay alike. A share may be
    empty in the last batch of an epoch.
    """
    parts = world.size * accumulation
    shares = []
    for micro in range(accumulation):
        places = list(range(world.rank * accumulation + micro, len(samples), parts))
        shares.append((places, [samples[place] for place in places]))
    return shares


def train_phase(job: PhaseJob, config: TrainConfig, world: World) -> Path:
    """Train `job` to its end and return its `checkpoint-final`. A finished phase returns at once."""
    store = CheckpointStore(job.folder, config.keep_last)
    if (done := store.final()) is not None:
        if world.rank == 0:
            print(f"{job.name}: already finished, see {done}")
        return done
    engine, progress, cache = _prepare(job, config, world, store)
    total = min(job.total_steps, config.max_steps or job.total_steps)
    if job.phase.max_minutes is not None:
        total = config.max_steps or 10**9
    settings: dict[str, Any] = {
        "phase": job.name, "config": as_dict(config), "global_batch": job.plan.global_batch
    }  # fmt: skip
    tracker = Tracker(
        job.folder, active=world.rank == 0, name=job.name, first_step=progress.step,
        total_steps=None if job.phase.max_minutes else total, project=config.wandb_project,
        run_name=config.wandb_run_name, settings=settings["config"],
    )  # fmt: skip
    model = job.model
    model.train()
    began, samples_began = time.monotonic(), progress.samples
    elapsed_before = progress.elapsed_s
    last_saved = progress.step
    while progress.step < total and not _out_of_time(job, progress, world):
        step = progress.step
        epoch = step // job.plan.steps_per_epoch
        samples = job.plan.batch(step)
        forcing = teacher_forcing_ratio(epoch, job.phase.epochs, job.scheduled_sampling)
        batches = _micro_batches(job, samples, step, forcing, world, cache)
        factor = _rate_factor(job, progress, total)
        rates = {name: peak * factor for name, peak in _peak_rates(job.phase).items()}
        terms, _ = engine.train_step(batches, job.phase.loss_weights, rates, step)
        progress.step, progress.samples = step + 1, progress.samples + len(samples)
        progress.elapsed_s = elapsed_before + time.monotonic() - began
        logs = progress.step % config.log_steps == 0 or progress.step == total
        speed = (progress.samples - samples_began) / max(1e-9, progress.elapsed_s - elapsed_before)
        tracker.advance(progress.step, {
            "epoch": epoch + 1, "loss": terms, "learning_rate": engine.rates, "teacher_forcing": forcing,
            "samples_per_s": speed, "elapsed_s": progress.elapsed_s,
        } if logs else None)  # fmt: skip
        ends_epoch = progress.step % job.plan.steps_per_epoch == 0 or progress.step == total
        if ends_epoch and job.after_epoch is not None:
            with engine.whole():
                job.after_epoch(model, epoch + 1)
            model.train()
        evaluates = bool(config.eval_steps) and progress.step % (config.eval_steps or 1) == 0
        if progress.step < total and (progress.step % config.save_steps == 0 or evaluates):
            saved = store.save(engine, progress, settings)
            last_saved = progress.step
            if evaluates and job.after_save is not None:
                job.after_save(saved)
    if progress.step == last_saved == 0:
        raise RuntimeError(f"{job.name}: no step was done")
    final = store.save(engine, progress, settings, final=True)
    tracker.close()
    model.freeze_backbone(False)
    return final


def _prepare(
    job: PhaseJob, config: TrainConfig, world: World, store: CheckpointStore
) -> tuple[Engine, Progress, VisualCache | None]:
    newest = store.newest()
    state = load_training_state(newest) if newest is not None else None
    module = TrainingModule(job.model, job.dense_sizes)
    if newest is not None and state is not None:
        components = COMPONENTS if job.collator.use_reasoning else BACKBONE
        load_checkpoint_into(job.model, newest, components)
        module.load_state_dict(state["auxiliary"], strict=False)
        if world.rank == 0:
            print(f"{job.name}: resuming from {newest}")
        _keep_global_batch(job, newest, world)
    job.model.freeze_backbone(job.phase.freeze_backbone)
    if job.gradient_checkpointing:
        job.model.enable_gradient_checkpointing()
    cache = None
    if all(job.phase.multipliers[name] == 0 for name in ("vision_encoder", "projection")):
        cache = VisualCache.build(job.model, job.pictures, world)
    torch.manual_seed(config.seed + world.rank)
    engine = build_engine(
        module, config, job.phase, world, batch_size=job.batch_size, accumulation=job.accumulation
    )  # fmt: skip
    return engine, restore(engine, state) if state is not None else Progress(), cache


def _keep_global_batch(job: PhaseJob, checkpoint: Path, world: World) -> None:
    """Go on with the batches of the checkpoint, on however many processes: no record is left out or seen twice."""
    started_with = run_dir.read_json(checkpoint / "state.json")["settings"].get("global_batch", job.plan.global_batch)
    if started_with == job.plan.global_batch:
        return
    job.plan = job.plan.with_global_batch(started_with)
    job.accumulation = -(-started_with // (job.batch_size * world.size))
    if world.rank == 0:
        print(
            f"{job.name}: keeps its {started_with} records per update; on {world.size} processes "
            f"that is {job.accumulation} micro-batches of {job.batch_size} at most"
        )


def _peak_rates(phase: PhaseConfig) -> dict[str, float]:
    return {"auxiliary": phase.learning_rate} | {
        name: phase.learning_rate * factor for name, factor in phase.multipliers.items()
    }


def _rate_factor(job: PhaseJob, progress: Progress, total: int) -> float:
    phase = job.phase
    if phase.max_minutes is not None:  # the clock is the schedule: a thousandth of the time counts as a step
        return learning_rate_factor(
            1000 * progress.elapsed_s / (60 * phase.max_minutes), 1000, 20, phase.final_lr_ratio
        )
    return learning_rate_factor(progress.step, total, phase.warmup_steps, phase.final_lr_ratio)


def _out_of_time(job: PhaseJob, progress: Progress, world: World) -> bool:
    if job.phase.max_minutes is None:
        return False
    spent = world.sum(torch.tensor(progress.elapsed_s, device=world.device)) / world.size
    progress.elapsed_s = float(spent)
    return progress.elapsed_s >= 60 * job.phase.max_minutes


def _micro_batches(
    job: PhaseJob, samples: Sequence[Sample], step: int, forcing: float, world: World, cache: VisualCache | None
) -> list[Batch]:
    batches = []
    for places, mine in deal(samples, world, job.accumulation):
        empty = not mine
        batch = job.collator(
            mine or samples[:1], step=step, places=places or [0], teacher_forcing=forcing, load_pictures=cache is None
        )  # fmt: skip
        if empty:  # every process must take part in the step; this share counts nothing
            batch.mute()
        if cache is not None:
            cache.fill(batch, next(p.dtype for p in job.model.projection.parameters()))
        batches.append(batch)
    return batches

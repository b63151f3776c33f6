"""Train one phase, from its first step or from where it stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from embervlm.config import BACKBONE, COMPONENTS, ConfigError, PhaseConfig, ScheduledSamplingConfig, TrainConfig
from embervlm.data.collate import Batch, Collator
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.images import PictureCache
from embervlm.data.samples import Sample
from embervlm.engines.base import Engine
from embervlm.engines.build import build_engine
from embervlm.model.embervlm import EmberVLM
from embervlm.model.storage import load_checkpoint_into
from embervlm.signals import Preempted, stop_noted
from embervlm.training.checkpoint import CheckpointStore, Progress, load_training_state, newest_sound
from embervlm.training.module import TrainingModule
from embervlm.training.schedule import (
    learning_rate_factor,
    shortened_warmup,
    teacher_forcing_ratio,
    timed_learning_rate_factor,
)
from embervlm.training.settings import changes, saved_with
from embervlm.training.tracking import Tracker
from embervlm.training.visual_cache import VisualCache
from embervlm.world import World


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
    scheduled_sampling: ScheduledSamplingConfig = field(default_factory=lambda: ScheduledSamplingConfig(enabled=False))
    dense_sizes: list[int] | None = None
    gradient_checkpointing: bool = False
    after_epoch: Callable[[EmberVLM, int], None] | None = None
    """Called on every process with the model and the epoch just finished, counted from 1 within the phase."""
    after_save: Callable[[Path], None] | None = None
    """Called on every process after a checkpoint of `eval_steps`, and with them after the final one."""
    samples_wanted: int | None = None
    """Stop after this many records instead of after `epochs`."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """See `settings.trained_with`."""

    @property
    def total_steps(self) -> int:
        if self.samples_wanted is not None:
            return max(1, round(self.samples_wanted / self.plan.global_batch))
        return self.plan.num_steps(self.phase.epochs)


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
    """Train `job` to its end, from the newest sound checkpoint in its folder, and return its `checkpoint-final`."""
    engine, progress, cache, wandb_run_id = _prepare(job, config, world)
    store = CheckpointStore(
        job.folder,
        world,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        keep_weights=config.keep_weights,
        on_error=config.on_save_error,
        in_background=config.background_saves,
    )
    total = min(job.total_steps, config.max_steps or job.total_steps)
    if job.phase.max_minutes is not None:
        total = config.max_steps or 10**9
    elif world.rank == 0 and shortened_warmup(job.phase.warmup_steps, total) < job.phase.warmup_steps:
        print(
            f"{job.name}: warmup_steps {job.phase.warmup_steps} would be all of its {total} steps; the rate warms up "
            "over a tenth of them instead"
        )
    settings: dict[str, Any] = {"phase": job.name, "config": asdict(config), "trained_with": job.trained_with}
    tracker = Tracker(
        job.folder,
        active=world.rank == 0,
        name=job.name,
        first_step=progress.step,
        total_steps=None if job.phase.max_minutes else total,
        project=config.wandb_project,
        run_name=config.wandb_run_name,
        settings=settings["config"],
        wandb_run_id=wandb_run_id,
    )
    extra = {"data": _data_state(job.plan), "wandb_run_id": tracker.wandb_run_id}
    model = job.model
    model.train()
    began, samples_began = time.monotonic(), progress.samples
    elapsed_before, first_step = progress.elapsed_s, progress.step
    with store, tracker.bar:  # closed before an error is printed, so that this has a line of its own
        while progress.step < total and not _out_of_time(job, progress, world):
            store.poll()
            step = progress.step
            epoch, _ = job.plan.locate(step)
            samples = job.plan.batch(step)
            forcing = teacher_forcing_ratio(epoch, job.phase.epochs, job.scheduled_sampling)
            batches = _micro_batches(job, samples, step, forcing, engine, cache)
            factor = _rate_factor(job, progress, total)
            rates = {name: peak * factor for name, peak in _peak_rates(job.phase).items()}
            _seed(config.seed, step, world.rank)
            terms, _ = engine.train_step(batches, job.phase.loss_weights, rates, step)
            progress.elapsed_s = elapsed_before + time.monotonic() - began
            if engine.overflowed:  # nothing was learned: the same batch again, at the loss scale that is lower now
                progress.overflows += 1
                continue
            progress.step, progress.samples = step + 1, progress.samples + len(samples)
            logs = progress.step % config.log_steps == 0 or progress.step == total
            speed = (progress.samples - samples_began) / max(1e-9, progress.elapsed_s - elapsed_before)
            values = {
                "epoch": epoch + 1,
                "loss": terms,
                "learning_rate": engine.rates,
                "teacher_forcing": forcing,
                "samples_per_s": speed,
                "elapsed_s": progress.elapsed_s,
                "save_stall_s": store.stalled_s + engine.copy_wait_s,
            }
            if engine.loss_scale is not None:
                values |= {"loss_scale": engine.loss_scale["scale"], "overflows": progress.overflows}
            if logs and config.log_records:
                values["records"] = _record_ids(batches, world)
            tracker.advance(progress.step, values if logs else None)
            ends_epoch = job.after_epoch is not None and job.plan.locate(progress.step)[1] == 0
            evaluates = bool(config.eval_steps) and progress.step % (config.eval_steps or 1) == 0
            stopping = world.any(stop_noted())  # all get the same answer, so all save or none does
            due = progress.step % config.save_steps == 0 or ends_epoch or evaluates or stopping
            if progress.step < total and due:
                saved = store.save(engine, progress, settings, extra)
                if stopping:
                    store.wait(required=True)  # it must not say "saved" of what is not on disk
                if ends_epoch:  # behind the save: whatever becomes of it, the epoch is kept
                    _end_epoch(job, engine, progress.step)
                if stopping:
                    tracker.close()
                    raise Preempted(progress.step)
                if evaluates and job.after_save is not None and store.wait():
                    began += _evaluate(job.after_save, saved, tracker, progress.step)
        if progress.step == first_step == 0:
            raise RuntimeError(f"{job.name}: no step was done")
        final = store.save(engine, progress, settings, extra, final=True)
        _end_epoch(job, engine, progress.step)
    if config.eval_steps and job.after_save is not None:
        _evaluate(job.after_save, final, tracker, progress.step)
    tracker.close()
    model.freeze_backbone(False)
    return final


def _end_epoch(job: PhaseJob, engine: Engine, step: int) -> None:
    """What is to be done with the model once the epoch that ends with `step` is saved."""
    if job.after_epoch is not None:
        with engine.whole():
            job.after_epoch(job.model, job.plan.locate(step - 1)[0] + 1)
        job.model.train()


def _evaluate(after_save: Callable[[Path], None], saved: Path, tracker: Tracker, step: int) -> float:
    """Seconds it took, which do not count as training."""
    began = time.monotonic()
    after_save(saved)
    tracker.log_evaluations(step)
    return time.monotonic() - began


def _prepare(
    job: PhaseJob, config: TrainConfig, world: World
) -> tuple[Engine, Progress, VisualCache | None, str | None]:
    """Engine, where it stands, what it sees, and the id of its W&B run."""
    newest = world.broadcast(newest_sound(job.folder) if world.rank == 0 else None)
    module = TrainingModule(job.model, job.dense_sizes)
    state = None
    if newest is not None:
        if config.resume == "never":
            raise ConfigError(f"--resume never: {newest} could be resumed; use --resume auto or another --output_dir")
        state = load_training_state(newest)
        _keep_order(job, state["data"], newest, world)
        components = COMPONENTS if job.collator.use_reasoning else BACKBONE
        load_checkpoint_into(job.model, newest, components)
        module.load_state_dict(state["auxiliary"], strict=False)
        if world.rank == 0:
            print(f"{job.name}: resuming from {newest}")
            if found := changes(saved_with(newest), job.trained_with):
                print(f"{job.name}: goes on with other settings than before: {'; '.join(found)}")
    job.model.freeze_backbone(job.phase.freeze_backbone)
    if job.gradient_checkpointing:
        job.model.enable_gradient_checkpointing()
    cache = None
    if all(job.phase.multipliers[name] == 0 for name in ("vision_encoder", "projection")):
        cache = VisualCache.build(job.model, job.pictures, world)
    engine = build_engine(module, config, job.phase, world, batch_size=job.batch_size, accumulation=job.accumulation)
    if state is None:
        return engine, Progress(), cache, None
    engine.load_optimizer_state(state["optimizer"])
    return engine, Progress(**state["progress"]), cache, state["wandb_run_id"]


def _data_state(plan: EpochPlan) -> dict[str, Any]:
    return {"order": plan.digest(), "global_batch": plan.global_batch}


def _keep_order(job: PhaseJob, saved: dict[str, Any], checkpoint: Path, world: World) -> None:
    """Go on in the order of samples that `checkpoint` is in the middle of, however many processes there are now."""
    if saved["order"] != job.plan.digest():
        raise ConfigError(
            f"{checkpoint}: was trained on other data, or with another seed or mix, so a resume would see samples "
            f"twice and miss others; set --seed, --reasoning_data and *_records_ratio back, or start in "
            f"another --output_dir"
        )
    if saved["global_batch"] == job.plan.global_batch:
        return
    job.plan = job.plan.with_global_batch(saved["global_batch"])
    job.accumulation = -(-job.plan.global_batch // (job.batch_size * world.size))
    if world.rank == 0:
        print(
            f"{job.name}: the global batch stays {job.plan.global_batch}: {world.size} processes with "
            f"{job.accumulation} micro-batches per update"
        )


def _seed(seed: int, step: int, rank: int) -> None:
    """What a step draws (dropout) depends on these alone, so that no random state need be saved."""
    torch.manual_seed(random.Random(f"{seed}:{step}:{rank}").getrandbits(63))


def _record_ids(batches: Sequence[Batch], world: World) -> list[str]:
    mine = [name for batch in batches if not batch.muted for name in batch.record_ids]
    return [name for share in world.gather(mine) for name in share]


def _peak_rates(phase: PhaseConfig) -> dict[str, float]:
    return {"auxiliary": phase.learning_rate} | {
        name: phase.learning_rate * factor for name, factor in phase.multipliers.items()
    }


def _rate_factor(job: PhaseJob, progress: Progress, total: int) -> float:
    phase = job.phase
    if phase.max_minutes is not None:
        spent_ratio = progress.elapsed_s / (60 * phase.max_minutes)
        return timed_learning_rate_factor(progress.step, phase.warmup_steps, spent_ratio, phase.final_lr_ratio)
    return learning_rate_factor(progress.step, total, phase.warmup_steps, phase.final_lr_ratio)


def _out_of_time(job: PhaseJob, progress: Progress, world: World) -> bool:
    if job.phase.max_minutes is None:
        return False
    spent = world.sum(torch.tensor(progress.elapsed_s, device=world.device)) / world.size
    progress.elapsed_s = float(spent)
    return progress.elapsed_s >= 60 * job.phase.max_minutes


def _micro_batches(
    job: PhaseJob, samples: Sequence[Sample], step: int, forcing: float, engine: Engine, cache: VisualCache | None
) -> list[Batch]:
    batches = []
    for places, mine in deal(samples, engine.world, job.accumulation):
        empty = not mine
        batch = job.collator(
            mine or samples[:1], step=step, places=places or [0], teacher_forcing=forcing, load_pictures=cache is None
        )
        if empty:  # every process must take part in the step; this share counts nothing
            batch.mute()
        if cache is not None:
            cache.fill(batch, engine.compute_dtype)
        batches.append(batch)
    return batches

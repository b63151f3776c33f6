"""Train one phase, from its first step or from where it stopped."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from embervlm.config import BACKBONE, COMPONENTS, ConfigError, TrainConfig
from embervlm.data.collate import Batch
from embervlm.data.epoch_plan import EpochPlan
from embervlm.engines.base import Engine
from embervlm.engines.build import build_engine
from embervlm.model.lora import add_adapters
from embervlm.model.storage import load_checkpoint_into
from embervlm.progress import note
from embervlm.run_dir import metrics_log_path
from embervlm.signals import Preempted, stop_noted
from embervlm.training import plateau, summary
from embervlm.training.checkpoint import CheckpointStore, Progress, load_training_state, newest_sound
from embervlm.training.feed import Fed, Feed, data_workers, micro_batches
from embervlm.training.job import PhaseJob
from embervlm.training.module import TrainingModule
from embervlm.training.policy import PolicyError, Roller
from embervlm.training.policy_steps import PolicySteps, what_changed, without_reported
from embervlm.training.rewards import RewardError
from embervlm.training.schedule import (
    LONGEST_WARMUP,
    learning_rate_factor,
    shortened_warmup,
    timed_learning_rate_factor,
)
from embervlm.training.settings import NO_LORA, changes, saved_with, shown_lora
from embervlm.training.tracking import Tracker
from embervlm.training.visual_cache import VisualCache
from embervlm.world import World


def train_phase(job: PhaseJob, config: TrainConfig, world: World) -> Path:
    """Train `job` to its end, from the newest intact checkpoint in its folder, and return its `checkpoint-final`."""
    return _Training(job, config, world).run()


class _Training:
    """One phase under way."""

    def __init__(self, job: PhaseJob, config: TrainConfig, world: World) -> None:
        self.job, self.config, self.world = job, config, world
        self.engine, self.progress, self.cache, wandb_run_id = _prepare(job, config, world)
        self.by_time = job.phase.max_minutes is not None and not job.phase.stop_at_plateau
        steps = 10**9 if self.by_time else job.total_steps
        self.most = min(steps, config.max_steps or steps)
        self.measured_every = plateau.measured_every(
            job.phase.plateau_steps, self.most, job.total_steps // job.phase.epochs
        )
        self.total = self._total_steps()
        self.settings: dict[str, Any] = {"phase": job.name, "config": asdict(config), "trained_with": job.trained_with}
        self.store = CheckpointStore(
            job.folder,
            world,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_weights=config.keep_weights,
            on_error=config.on_save_error,
            in_background=config.background_saves,
            on_saved=self._say_saved,
            are_ranked=job.collator.use_reasoning,
        )
        self.tracker = Tracker(
            job.folder,
            active=world.rank == 0,
            name=job.name,
            first_step=self.progress.step,
            total_steps=None if self.by_time else self.total,
            epochs=job.phase.epochs if job.samples_wanted is None else None,
            project=config.wandb_project,
            run_name=config.wandb_run_name,
            settings=self.settings["config"],
            wandb_run_id=wandb_run_id,
        )
        self.feed = Feed(
            job,
            world,
            load_pictures=self.cache is None,
            num_workers=0 if job.policy is not None else data_workers(config.data_workers, world),
            end=self.most,
        )
        self.started = replace(self.progress)
        self.began = time.monotonic()
        self.end_is_said = False
        self.is_due = {"save": False, "evaluation": False}
        self.policy: PolicySteps | None = None
        if job.policy is not None:
            roller = Roller(job.policy, job.model, job.collator, self.cache, world)
            self.policy = PolicySteps(roller, job.plan, self.progress, self.tracker, job.name)

    def run(self) -> Path:
        job, progress = self.job, self.progress
        self._learn()
        with contextlib.ExitStack() as stack:  # closed before an error is printed, so that this has a line of its own
            for part in (self.policy or contextlib.nullcontext(), self.feed, self.store, self.tracker.bar):
                stack.enter_context(part)
            while progress.step < self.total and not self._out_of_time():
                self.store.poll()
                if self._step() and progress.step < self.total:
                    self._measure_if_due()
                    self._decay_if_time()
                    self._save_if_due()
            if progress.step == 0:
                raise RuntimeError(f"{job.name}: no step was done")
            final = self._save(final=True)
            self._end_epoch()
            if job.at_end is not None:
                with self.engine.whole():
                    job.at_end(job.model)
        if self.config.eval_steps:
            self._evaluate(final)
        self.tracker.close()
        if self.world.rank == 0:
            took = summary.duration(progress.elapsed_s)
            print(f"{job.name}: finished after {progress.step:,} steps, {took} of training", flush=True)
            if self.policy is not None and (told := what_changed(metrics_log_path(job.folder))):
                print(f"{job.name}: {told}", flush=True)
        job.model.freeze(())
        return final

    def _learn(self) -> None:
        """Put the model into the mode that it learns in: without dropout where it is held against its own draws."""
        self.job.model.train(self.job.policy is None)

    def _total_steps(self) -> int:
        phase, total = self.job.phase, self.most
        if self.by_time:
            return total
        if phase.stop_at_plateau:
            total = plateau.total_steps(self.progress.decay_from, self.most)
        if self.world.rank == 0 and shortened_warmup(phase.warmup_steps, total) < phase.warmup_steps:
            print(
                f"{self.job.name}: warmup_steps {phase.warmup_steps} is more than {LONGEST_WARMUP:.0%} of its {total} "
                "steps; the learning rate warms up over that share of them"
            )
        return total

    def _out_of_time(self) -> bool:
        return self.by_time and self._spent_ratio() >= 1

    def _spent_ratio(self) -> float:
        """Elapsed share of `max_minutes`, the same on all processes."""
        minutes, progress = self.job.phase.max_minutes, self.progress
        assert minutes is not None
        spent = self.world.sum(torch.tensor(progress.elapsed_s, device=self.world.device)) / self.world.size
        progress.elapsed_s = float(spent)
        return progress.elapsed_s / (60 * minutes)

    def _step(self) -> bool:
        """One update, counted and logged; False if it overflowed, so nothing was learned."""
        job, progress, engine, step = self.job, self.progress, self.engine, self.progress.step
        fed = self._fed(step)
        if self.cache is not None:
            for batch in fed.batches:
                self.cache.fill(batch, engine.compute_dtype)
        factor = self._rate_factor()
        rates = {name: peak * factor for name, peak in engine.peak_rates.items()}
        _seed(self.config.seed, step, self.world.rank)
        terms, _ = engine.train_step(fed.batches, job.phase.loss_weights, rates, step)
        progress.elapsed_s = self.started.elapsed_s + time.monotonic() - self.began
        if engine.overflowed:  # the same batch again, at the loss scale that is lower now
            progress.overflows += 1
            return False
        progress.step, progress.samples = step + 1, progress.samples + fed.num_samples
        values = None
        if progress.step % self.config.log_steps == 0 or progress.step == self.total:
            losses = without_reported(terms)
            total = sum(job.phase.loss_weights[term] * value for term, value in losses.items())
            values = {"epoch": fed.epoch + 1, "loss": losses, "total_loss": total}
            values |= {} if self.policy is None else self.policy.values(terms)
            values |= {"learning_rate": engine.rates, "teacher_forcing": fed.teacher_forcing}
            values |= self._speed(fed.batches)
        self.tracker.advance(progress.step, values)
        self._say_when_it_ends()
        return True

    def _fed(self, step: int) -> Fed:
        """The samples of an update; in phase 3 they are drawn, and an error in that is raised behind a checkpoint."""
        if self.policy is None:
            return self.feed.of(step)
        try:
            samples = self.policy.samples(self.engine, step)
        except (PolicyError, RewardError):
            if step > self.started.step:
                self._save()
                self.store.wait(required=True)
            raise
        self._learn()
        return self.feed.made_of(samples, step)

    def _say_when_it_ends(self) -> None:
        if self.end_is_said or self.by_time or self.world.rank != 0:
            return
        done, seconds = self.progress.step - self.started.step, self.progress.elapsed_s - self.started.elapsed_s
        left: float = self.total - self.progress.step
        open_end = self.job.phase.stop_at_plateau and self.progress.decay_from is None
        if open_end and done and (minutes := self.job.phase.max_minutes) is not None:
            left, open_end = min(left, (60 * minutes - self.progress.elapsed_s) * done / seconds), False
        if line := summary.expected_end(self.job.name, done, seconds, left, at_plateau=open_end):
            self.end_is_said = True
            note(line)

    def _say_saved(self, path: Path) -> None:
        losses = self.progress.val_losses
        note(summary.saved_line(path, losses[-1] if losses else None))

    def _rate_factor(self) -> float:
        phase, progress = self.job.phase, self.progress
        if self.by_time:
            assert phase.max_minutes is not None
            spent_ratio = progress.elapsed_s / (60 * phase.max_minutes)
            return timed_learning_rate_factor(progress.step, phase.warmup_steps, spent_ratio, phase.final_lr_ratio)
        if phase.stop_at_plateau:
            warmup_steps = shortened_warmup(phase.warmup_steps, self.most)
            return plateau.rate_factor(
                progress.step, progress.decay_from, self.most, warmup_steps, phase.final_lr_ratio
            )
        return learning_rate_factor(progress.step, self.total, phase.warmup_steps, phase.final_lr_ratio)

    def _measure_if_due(self) -> None:
        """Measure the loss on the val split, and begin the decay at a plateau."""
        job, progress = self.job, self.progress
        if job.measure is None or not job.phase.stop_at_plateau or progress.step % self.measured_every:
            return
        if progress.decay_from is not None or progress.step >= plateau.latest_start(self.most):
            return
        with self.engine.whole():
            found = self.world.broadcast(job.measure(job.model))
        self._learn()
        if found is None:
            return
        progress.val_losses += (found.loss,)
        if found.looks and plateau.is_plateau(progress.val_losses, job.phase.plateau_improvement):
            self._decay(f"the val loss no longer falls ({found.loss:.3f})")

    def _decay_if_time(self) -> None:
        """Begin the decay at the latest when it still ends within `max_minutes`."""
        phase, progress = self.job.phase, self.progress
        if not phase.stop_at_plateau or phase.max_minutes is None or progress.decay_from is not None:
            return
        if progress.step < plateau.latest_start(self.most) and self._spent_ratio() >= plateau.LATEST_START:
            self._decay(f"{plateau.LATEST_START:.0%} of the {phase.max_minutes:.1f} minutes are over")

    def _decay(self, why: str) -> None:
        """Let the learning rate fall from here to the end, which is nearer now."""
        self.progress.decay_from = self.progress.step
        self.total = self._total_steps()
        self.tracker.shorten(self.total)
        if self.world.rank == 0:
            note(
                f"{self.job.name}: {why}: the learning rate decays from step {self.progress.step} to the end at "
                f"{self.total}"
            )

    def _speed(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """The values of a log line besides the losses."""
        progress, started, scale = self.progress, self.started, self.engine.loss_scale
        values: dict[str, Any] = {
            "samples_per_s": (progress.samples - started.samples) / max(1e-9, progress.elapsed_s - started.elapsed_s),
            "elapsed_s": progress.elapsed_s,
            "data_wait_s": self.feed.waited_s,
            "save_stall_s": self.store.stalled_s + self.engine.copy_wait_s,
        }
        if self.world.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if progress.val_losses:
            values["val_loss"] = progress.val_losses[-1]
        if scale is not None:
            values |= {"loss_scale": scale["scale"], "overflows": progress.overflows}
        if self.config.log_records:
            mine = [name for batch in batches if not batch.muted for name in batch.record_ids]
            values["records"] = [name for share in self.world.gather(mine) for name in share]
        return values

    def _save_if_due(self) -> None:
        """Save, evaluate and stop when it is time to."""
        job, config, step = self.job, self.config, self.progress.step
        ends_epoch = job.after_epoch is not None and job.plan.locate(step)[1] == 0
        self.is_due["save"] |= step % config.save_steps == 0
        self.is_due["evaluation"] |= bool(config.eval_steps) and step % (config.eval_steps or 1) == 0
        stopping = self.world.any(stop_noted())  # all get the same answer, so all save or none does
        if step % job.plan.repeats:  # a resume could not draw again what older weights drew
            return
        evaluates = self.is_due["evaluation"]
        if not (self.is_due["save"] or ends_epoch or evaluates or stopping):
            return
        self.is_due = dict.fromkeys(self.is_due, False)
        saved = self._save()
        if stopping:
            self.store.wait(required=True)  # it must not say "saved" of what is not on disk
        if ends_epoch:  # behind the save: whatever becomes of it, the epoch is kept
            self._end_epoch()
        if stopping:
            self.tracker.close()
            raise Preempted(step)
        if evaluates and job.after_save is not None and self.store.wait():
            began = time.monotonic()
            self._evaluate(saved)
            self.began += time.monotonic() - began  # it does not count as training

    def _save(self, *, final: bool = False) -> Path:
        extra = {"data": _data_state(self.job.plan), "wandb_run_id": self.tracker.wandb_run_id}
        return self.store.save(self.engine, self.progress, self.settings, extra, final=final)

    def _end_epoch(self) -> None:
        """Work with the model after an epoch is saved."""
        job = self.job
        if job.after_epoch is not None:
            with self.engine.whole():
                job.after_epoch(job.model, job.plan.locate(self.progress.step - 1)[0] + 1)
            self._learn()

    def _evaluate(self, saved: Path) -> None:
        if self.job.after_save is not None:
            self.job.after_save(saved)
            self.tracker.log_evaluations(self.progress.step)


def _seed(seed: int, step: int, rank: int) -> None:
    """The random numbers of a step (dropout) depend only on these, so no random state must be saved."""
    torch.manual_seed(random.Random(f"{seed}:{step}:{rank}").getrandbits(63))


def _prepare(
    job: PhaseJob, config: TrainConfig, world: World
) -> tuple[Engine, Progress, VisualCache | None, str | None]:
    """Engine, where it stands, what it sees, and the id of its W&B run."""
    newest = world.broadcast(newest_sound(job.folder) if world.rank == 0 else None)
    module = TrainingModule(job.model, job.dense_sizes, None if job.policy is None else job.policy.loss(job.model))
    state = None
    if newest is not None:
        if config.resume == "never":
            raise ConfigError(
                f"--resume never: {newest} exists and could be resumed; use --resume auto or another --output_dir"
            )
        state = load_training_state(newest)
        _keep_order(job, state["data"], newest, world)
        components = COMPONENTS if job.collator.use_reasoning else BACKBONE
        load_checkpoint_into(job.model, newest, components)
        _keep_adapters(job, newest)
        if world.rank == 0:
            print(f"{job.name}: resuming from {newest}")
            if found := changes(saved_with(newest), job.trained_with):
                print(f"{job.name}: continues with other settings than before: {'; '.join(found)}")
    add_adapters(job.model, job.phase.lora, config.seed)
    if state is not None:
        module.load_state_dict(state["auxiliary"], strict=False)
    job.model.freeze(job.phase.frozen_parts)
    if world.rank == 0:
        print("\n".join(summary.opening(job, config, world)), flush=True)
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


def _keep_adapters(job: PhaseJob, checkpoint: Path) -> None:
    """ConfigError if the adapters of `checkpoint` are not those of `job`."""
    saved, now = saved_with(checkpoint).get("lora", NO_LORA), shown_lora(job.phase.lora)
    if saved != now:
        raise ConfigError(
            f"{checkpoint}: was trained with other adapters (lora: {saved}; now: {now}); restore stage4.phase2.lora, "
            "or start in another --output_dir"
        )


def _data_state(plan: EpochPlan) -> dict[str, Any]:
    return {"order": plan.digest(), "global_batch": plan.global_batch}


def _keep_order(job: PhaseJob, saved: dict[str, Any], checkpoint: Path, world: World) -> None:
    """Continue in the sample order of `checkpoint`, however many processes there are now."""
    if saved["order"] != job.plan.digest():
        raise ConfigError(
            f"{checkpoint}: was trained on other data, or with another seed or mix, so a resume would use samples "
            f"twice and miss others; restore --seed, --reasoning_data and *_records_ratio, or start in "
            f"another --output_dir"
        )
    if saved["global_batch"] == job.plan.global_batch:
        return
    job.plan = job.plan.with_global_batch(saved["global_batch"])
    job.accumulation = micro_batches(job.plan.global_batch * job.samples_each, job.batch_size, world)
    if world.rank == 0:
        print(
            f"{job.name}: the global batch stays {job.plan.global_batch}: {world.size} processes with "
            f"{job.accumulation} micro-batches per update"
        )

"""The stages of a run: Stage 3, phases 1 to 3, baselines. Each is a `PhaseJob` built from config and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.config import BACKBONE, ConfigError, Phase3Config, PhaseConfig, TrainConfig
from embervlm.config_file import model_preset
from embervlm.data.collate import Collator, DenseLabels
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.facts import fact_domains
from embervlm.data.negatives import PairMaker
from embervlm.data.store import has_field
from embervlm.evaluation.asked import refuse_long_questions
from embervlm.evaluation.sight import Form, Sight, encode_chains, encode_stage3, sight
from embervlm.model.config import STAGE3, STAGE4
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.lora import check_targets
from embervlm.model.preprocessor import preprocessor_notes
from embervlm.run.by_products import after_epoch, evaluate_saved, say_whether_it_looks
from embervlm.run.run_data import Encoder, RunData, first_on_rank_0, load_data, note_lengths
from embervlm.run.start import adopt_tokenizer, model_settings, refuse_stage3, start_from
from embervlm.run.train_flags import known_to_harm, rates_that_harm
from embervlm.training.checkpoint import is_finished
from embervlm.training.feed import micro_batches
from embervlm.training.job import PhaseJob
from embervlm.training.loop import train_phase
from embervlm.training.policy import PolicyJob
from embervlm.training.settings import changes, of_stage4, saved_with, trained_with
from embervlm.world import World

MOST_GROUPS = 4


class Run:
    """One call of `launch/train.py`: which stages, in order."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.output = Path(config.output_dir)
        self._data: RunData | None = None

    def go(self, stages: Sequence[str], phase: int | None) -> Path:
        """Run `stages` in order, starting from `resume_from` or the checkpoints of this output folder.

        Returns the last final checkpoint, that of Stage 4 where it is one of them.
        """
        resume = Path(self.config.resume_from) if self.config.resume_from else None
        stage3 = run_dir.checkpoint_path(run_dir.stage3_dir(self.output), None)
        first_on_rank_0(self.world, lambda: self._check_finished(stages, phase))
        if self.world.rank == 0:
            print("".join(f"{line}\n" for line in preprocessor_notes(model_preset(self.config.model))), end="")
        final = resume or stage3
        if "3" in stages:
            final = stage3 = self.stage3()
        if "4" in stages:
            if self.world.rank == 0:
                trained = (phase,) if phase else (2, 3)
                harm = [*known_to_harm(self.config.stage4), *rates_that_harm(self.config, trained)]
                print("".join(f"{line}\n" for line in harm), end="")
            start = resume or stage3
            if phase in (None, 1):
                final = start = self.phase(1, start)
            if phase in (None, 2):
                first = run_dir.checkpoint_path(run_dir.phase_dir(self.output, 1), None)
                final = start = self.phase(2, start if phase is None else (resume or first))
            if phase == 3 or (phase is None and self.config.stage4.phase3 is not None):
                second = run_dir.checkpoint_path(run_dir.phase_dir(self.output, 2), None)
                final = self.phase3(start if phase is None else (resume or second))
        if "baseline" in stages:
            baselines = self.baselines(resume or stage3)
            final = final if "4" in stages else baselines[-1]
        return final

    def phase(self, number: int, start: Path) -> Path:
        """Train phase 1 or 2 of Stage 4 from the weights in `start`."""
        config, stage = self.config, self.config.stage4
        folder = run_dir.phase_dir(config.output_dir, number)
        wanted = self._phase_settings(number, start)
        if (done := self._finished(folder, wanted)) is not None:
            return done
        phase = (stage.phase1, stage.phase2)[number - 1]
        model = start_from(config, self.world, start, STAGE4)
        check_targets(model, stage.phase2.lora)
        data = self._load_data(model)
        encoder = Encoder(config=config, world=self.world, model=model, data=data)
        samples, epochs = encoder.chains()
        if not len(samples):
            raise ConfigError(
                f"{config.reasoning_data}: no training record has a chain, which phase {number} learns from; add some, "
                "or train `--phase 3` from a Stage 4 checkpoint"
            )
        encoder.say_what_is_cut(samples, number)
        first_epoch = stage.phase1.epochs if number == 2 else 0
        direct = encoder.direct()
        note_lengths(model, direct, samples)
        plan = EpochPlan(
            main=samples,
            mixed=((direct, phase.direct_records_ratio), *encoder.edited(samples, number, phase)),
            epochs=epochs[first_epoch : first_epoch + phase.epochs],
            global_batch=stage.batch_size * stage.gradient_accumulation_steps * self.world.size,
            seed=config.seed + number,
        )
        collator = self._collator(
            model,
            data,
            records=data.reasoning,
            pair_maker=PairMaker(data.reasoning, samples, model.tokenizer),
            pair_records_ratio=phase.validator_records_ratio,
            grounding=phase.multimodal_loss_weight > 0,
            picture_shift=phase.picture_shift,
        )
        job = PhaseJob(
            name=f"phase {number}",
            folder=folder,
            phase=phase,
            model=model,
            plan=plan,
            collator=collator,
            pictures=data.pictures,
            batch_size=stage.batch_size,
            accumulation=stage.gradient_accumulation_steps,
            scheduled_sampling=stage.scheduled_sampling,
            gradient_checkpointing=stage.gradient_checkpointing,
            after_epoch=lambda trained, epoch: after_epoch(config, self.world, trained, data, first_epoch + epoch),
            at_end=self._say_whether_it_looks(data, f"phase {number}", encode_chains, Decoding()),
            after_save=partial(evaluate_saved, config, self.world),
            measure=self._measure(phase, data, encode_chains),
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    def phase3(self, start: Path) -> Path:
        """Train phase 3 from the weights in `start`: chains are drawn and rewarded, so records need only an answer."""
        config, stage = self.config, self.config.stage4
        assert stage.phase3 is not None
        phase, folder = stage.phase3, run_dir.phase_dir(config.output_dir, 3)
        wanted = self._phase_settings(3, start)
        if (done := self._finished(folder, wanted)) is not None:
            return done
        model = start_from(config, self.world, start, STAGE4)
        refuse_stage3(start)
        check_targets(model, phase.lora)
        data = self._load_data(model)
        refuse_long_questions(model, data.train)
        if stage.gradient_checkpointing and self.world.rank == 0:
            print("phase 3: gradient_checkpointing does nothing here: the model learns as it draws, in eval mode")
        encoder = Encoder(config=config, world=self.world, model=model, data=data)
        chains, _ = encoder.chains()
        direct = encoder.direct()
        note_lengths(model, direct)
        supervised = phase.supervised_records_ratio if len(chains) else 0.0
        plan = EpochPlan(
            main=encoder.questions(),
            mixed=((chains, supervised), (direct, phase.direct_records_ratio)),
            global_batch=phase.prompts_per_rollout,
            seed=config.seed + 4,
            repeats=phase.num_iterations,
        )
        samples_each = phase.num_generations + (1 + supervised) * (1 + phase.direct_records_ratio) - 1
        job = PhaseJob(
            name="phase 3",
            folder=folder,
            phase=phase,
            model=model,
            plan=plan,
            collator=self._collator(
                model,
                data,
                records=data.reasoning,
                pair_maker=PairMaker(data.reasoning, chains, model.tokenizer) if supervised else None,
                pair_records_ratio=phase.validator_records_ratio,
                grounding=phase.multimodal_loss_weight > 0,
                policy=True,
            ),
            pictures=data.pictures,
            batch_size=stage.batch_size,
            accumulation=micro_batches(plan.global_batch * samples_each, stage.batch_size, self.world),
            samples_each=samples_each,
            gradient_checkpointing=stage.gradient_checkpointing,
            after_epoch=self._after_epoch_of_phase3(data),
            at_end=self._say_whether_it_looks(data, "phase 3", encode_chains, Decoding()),
            after_save=partial(evaluate_saved, config, self.world),
            policy=self._policy(phase, data, start),
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    def _say_whether_it_looks(
        self, data: RunData, ended: str, form: Form, decoding: Decoding | None
    ) -> Callable[[EmberVLM], None]:
        return partial(say_whether_it_looks, self.world, data, ended, form, decoding, self.config.compared_records)

    def _policy(self, phase: Phase3Config, data: RunData, start: Path) -> PolicyJob:
        return PolicyJob(
            config=phase,
            records=data.reasoning,
            domains=fact_domains(data.train),
            seed=self.config.seed,
            reference=partial(start_from, self.config, self.world, start, STAGE4) if phase.kl_coef else None,
        )

    def _after_epoch_of_phase3(self, data: RunData) -> Callable[[EmberVLM, int], None]:
        stage = self.config.stage4
        before = stage.phase1.epochs + stage.phase2.epochs
        return lambda trained, epoch: after_epoch(self.config, self.world, trained, data, before + epoch)

    def stage3(self) -> Path:
        """Train a substitute for a Stage 3 checkpoint: captions, direct answers and the dense target, no reasoning."""
        config, folder = self.config, run_dir.stage3_dir(self.config.output_dir)
        wanted = self._stage3_settings()
        if (done := self._finished(folder, wanted)) is not None:
            return done
        if self.world.rank == 0 and (frozen := config.stage3.frozen_parts):
            rest = " and ".join(name for name in BACKBONE if name not in frozen)
            print(f"stage 3: trains {rest}; {' and '.join(frozen)} stay as they are (stage3.learning_rate_multipliers)")
        torch.manual_seed(config.seed)
        model = build_model(model_settings(config, STAGE3))
        check_targets(model, config.stage4.phase2.lora)  # not only after days
        data = self._load_data(model)
        adopt_tokenizer(config, model, data.reasoning)
        labels = DenseLabels(data.train, model.grid, model.config.padded_size)
        if has_field(data.train, "boxes").any() and not labels.classes and self.world.rank == 0:
            print(
                "stage 3: dense_loss_weight does nothing: no box has a `label` and a `kind` that the record's `scene` "
                "names (docs/data.md)"
            )
        encoder = Encoder(config=config, world=self.world, model=model, data=data)
        encoder.chains()  # what Stage 4 refuses is refused now
        direct = encoder.direct()
        note_lengths(model, direct)
        plan = EpochPlan(
            main=direct,
            mixed=(
                (encoder.captions(), config.stage3.caption_records_ratio),
                (encoder.glossary(), config.stage3.glossary_records_ratio),
            ),
            global_batch=config.stage3_batch_size * self.world.size,
            seed=config.seed,
        )
        asked = Decoding(form="direct") if config.stage3.direct_loss_weight else None
        job = PhaseJob(
            name="stage 3",
            folder=folder,
            phase=_without_reasoning(config.stage3),
            model=model,
            plan=plan,
            collator=self._collator(
                model,
                data,
                dense=labels if labels.classes else None,
                use_reasoning=False,
                picture_shift=config.stage3.picture_shift,
            ),
            pictures=data.pictures,
            batch_size=config.stage3_batch_size,
            dense_sizes=labels.sizes,
            measure=self._measure(config.stage3, data, encode_stage3),
            at_end=self._say_whether_it_looks(data, "stage 3", encode_stage3, asked),
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    def baselines(self, start: Path) -> list[Path]:
        """Train Stage 3 further with direct answers: for as many samples as both phases, or for as long."""
        spent = [
            run_dir.read_object(self._required(number) / "state.json", "samples", "elapsed_s") for number in (1, 2)
        ]
        samples, seconds = (sum(state[key] for state in spent) for key in ("samples", "elapsed_s"))
        wanted = [("same_samples", samples, None)]
        if self.config.baseline.same_time:
            wanted.append(("same_time", None, seconds / 60))
        return [self._baseline(start, name, count, minutes) for name, count, minutes in wanted]

    def _baseline(self, start: Path, name: str, samples: int | None, minutes: float | None) -> Path:
        config, baseline, frozen = self.config, self.config.baseline, self.config.stage4.phase2.frozen_parts
        folder = self.output / "baseline" / name
        phase = PhaseConfig(
            name=name,
            learning_rate=baseline.learning_rate,
            warmup_steps=baseline.warmup_steps,
            direct_loss_weight=1.0,
            # what learns, and from which pictures, is the same as in phase 2
            learning_rate_multipliers=dict.fromkeys(frozen if len(frozen) < len(BACKBONE) else (), 0.0),
            lora=config.stage4.phase2.lora,
            picture_shift=config.stage4.phase2.picture_shift,
            max_minutes=minutes,
            epochs=1,
        )
        wanted = self._settings(phase, start, baseline.batch_size, samples=samples)
        if (done := self._finished(folder, wanted)) is not None:
            return done
        model = start_from(config, self.world, start, STAGE3)
        data = self._load_data(model)
        direct = Encoder(config=config, world=self.world, model=model, data=data).direct()
        note_lengths(model, direct)
        plan = EpochPlan(main=direct, global_batch=baseline.batch_size * self.world.size, seed=config.seed + 3)
        job = PhaseJob(
            name=f"baseline {name}",
            folder=folder,
            phase=_without_reasoning(phase),
            model=model,
            plan=plan,
            collator=self._collator(model, data, use_reasoning=False, picture_shift=phase.picture_shift),
            pictures=data.pictures,
            batch_size=baseline.batch_size,
            samples_wanted=samples,
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _load_data(self, model: EmberVLM) -> RunData:
        if self._data is None:
            self._data = load_data(self.config, model.config.image_size, self.world, model.config.fill)
        model.config.candidates = list(self._data.train.store.candidates)
        return self._data

    def _collator(self, model: EmberVLM, data: RunData, **options: Any) -> Collator:
        dense, records = options.pop("dense", None), options.pop("records", data.train)
        made = Collator(
            records,
            model.tokenizer,
            data.pictures,
            seed=self.config.seed,
            image_size=model.config.image_size,
            max_pair_tokens=model.max_pair_tokens,
            dense_labels=dense,
            most_groups=self._most_groups(),
            **options,
        )
        if made.grounding and made.has_boxes and not made.grounds and self.world.rank == 0:
            print(
                "boxes: no record's `seen` says which steps read what has a box, so attention to them is not learned; "
                "chains are held against other pictures instead, as without boxes (docs/data.md)"
            )
        if (share := options.get("picture_shift")) and not made.picture_shift and self.world.rank == 0:
            print(
                f"picture_shift {share:g} does nothing here: records have boxes, which would stand beside their things"
            )
        return made

    def _most_groups(self) -> int:
        """Parts of a micro-batch that are read one after the other; see `data.length_groups`.

        1 where a pass costs more than padding: on a GPU, and where weights are gathered for each pass, which all
        processes must do alike.
        """
        config = self.config
        gathers = config.engine == "fsdp" or (config.engine == "deepspeed" and config.zero_stage == 3)
        return 1 if gathers or self.world.device.type != "cpu" else MOST_GROUPS

    def _measure(self, phase: PhaseConfig, data: RunData, form: Form) -> partial[Sight | None]:
        """Measures the val loss; ConfigError if a phase is to stop by it and there are no records for that."""
        wanted = "records with a chain" if form is encode_chains else "records"
        if phase.stop_at_plateau and not any(record.steps or form is not encode_chains for record in data.val):
            raise ConfigError(
                f"stop_at_plateau: {self.config.reasoning_data} has no {wanted} in the val split; set it to false, or "
                "give some of them `metadata.split: val`"
            )
        return partial(sight, pictures=data.pictures, records=data.val, form=form)

    def _finished(self, folder: Path, wanted: dict[str, Any]) -> Path | None:
        """The final checkpoint of `folder`, if there is one; ConfigError if it was trained with other settings than
        `wanted`."""
        if not is_finished(folder, self.world):
            return None
        path = run_dir.checkpoint_path(folder, None)
        _refuse_changes(folder, changes(saved_with(path), wanted))
        if self.world.rank == 0:
            print(f"already finished: {path}")
        return path

    def _required(self, number: int) -> Path:
        path = run_dir.checkpoint_path(run_dir.phase_dir(self.output, number), None)
        if not path.is_dir():
            raise ConfigError(f"the baseline is matched to both phases, but {path} does not exist; train Stage 4 first")
        return path

    def _check_finished(self, stages: Sequence[str], phase: int | None) -> None:
        """Check all finished phases before anything is trained, so a later one is not refused after hours of
        training."""
        planned = [("stage 3", run_dir.stage3_dir(self.output), self._stage3_settings())] if "3" in stages else []
        for number in (1, 2, 3) if "4" in stages else ():
            if phase == number or (phase is None and (number < 3 or self.config.stage4.phase3 is not None)):
                folder = run_dir.phase_dir(self.output, number)
                planned.append((f"phase {number}", folder, self._phase_settings(number, None)))
        if "baseline" in stages:  # matched to both phases; the settings of its own are compared when its turn comes
            planned += [
                (f"baseline {name}", self.output / "baseline" / name, {}) for name in ("same_samples", "same_time")
            ]
        to_train: list[str] = []
        for name, folder, wanted in planned:
            final = run_dir.checkpoint_path(folder, None)
            if any(found.path == final for found in run_dir.list_checkpoints(folder)):
                found = changes(saved_with(final), wanted)
                _refuse_changes(
                    folder, found + [f"weights of another {name}, which is now trained again" for name in to_train]
                )
            else:
                to_train.append(name)

    def _settings(self, phase: PhaseConfig, start: Path | None, batch_size: int, **more: Any) -> dict[str, Any]:
        processes = self.world.size
        return trained_with(phase, self.config, start, global_batch=batch_size * processes, processes=processes, **more)

    def _stage3_settings(self) -> dict[str, Any]:
        return self._settings(self.config.stage3, None, self.config.stage3_batch_size)

    def _phase_settings(self, number: int, start: Path | None) -> dict[str, Any]:
        stage = self.config.stage4
        if number == 3 and stage.phase3 is not None:
            return trained_with(
                stage.phase3,
                self.config,
                start,
                global_batch=stage.phase3.prompts_per_rollout,
                processes=1,
                **of_stage4(self.config),
            )
        phase, batch = (stage.phase1, stage.phase2)[number - 1], stage.batch_size * stage.gradient_accumulation_steps
        return self._settings(phase, start, batch, **of_stage4(self.config))


def _refuse_changes(folder: Path, found: Sequence[str]) -> None:
    """ConfigError that names the differences `found` to the settings of the finished phase in `folder`."""
    if found:
        raise ConfigError(
            f"{folder} is finished, and was trained with other settings: {'; '.join(found)}. A finished "
            f"phase cannot be "
            "trained further, because its learning rate has decayed. Restore the settings, or train with "
            "these from the "
            "start: in another --output_dir (with --resume_from for the starting weights), or here after deleting "
            f"{folder} and what was trained from it"
        )


def _without_reasoning(phase: PhaseConfig) -> PhaseConfig:
    """`phase` with a frozen reasoning module, for models that have none yet."""
    factors = {**phase.learning_rate_multipliers, "reasoning_module": 0.0}
    return dataclasses.replace(phase, learning_rate_multipliers=factors)

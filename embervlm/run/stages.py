"""The stages of a run: Stage 3, phase 1, phase 2, baselines. Each is a `PhaseJob` built from config and data."""

from __future__ import annotations

import dataclasses
import gc
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from embervlm import run_dir
from embervlm.config import ConfigError, PhaseConfig, TrainConfig
from embervlm.config_file import model_preset
from embervlm.curate.augment import augment_cached
from embervlm.data.collate import Collator, DenseLabels
from embervlm.data.curriculum import records_of_epochs
from embervlm.data.dataset import edit_facts, encode_captions, encode_direct, encode_glossary, encode_reasoning
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.images import PictureCache
from embervlm.data.lengths import Limits, refuse_too_long
from embervlm.data.negatives import PairMaker, cut_for_validator
from embervlm.data.record_fields import told_unused
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Sample, Samples
from embervlm.data.sources import source_files
from embervlm.data.store import RecordView, has_field, picture_paths, prepare
from embervlm.data.tokenizer import ReasoningTokenizer, tokenizer_of
from embervlm.errors import UserError
from embervlm.evaluation.sight import sight
from embervlm.model.config import STAGE3, STAGE4
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.storage import CheckpointError, load_checkpoint_into
from embervlm.robots.domain import domain_named
from embervlm.run.eval_jobs import submit_evaluation
from embervlm.run.train_flags import known_to_harm
from embervlm.training.checkpoint import is_finished
from embervlm.training.loop import PhaseJob, train_phase
from embervlm.training.settings import changes, of_stage4, saved_with, trained_with
from embervlm.world import World

STAGES = ("3", "4", "baseline")
_log = logging.getLogger(__name__)
Prepared = TypeVar("Prepared")


@dataclass(kw_only=True)
class RunData:
    """The records of a run and their pictures at the model's size."""

    train: RecordView
    """The given training records alone: augmentation makes more chains, but no more questions."""
    val: RecordView
    test: RecordView
    """Not trained on; what an evaluation would refuse is refused before."""
    pictures: PictureCache
    reasoning: Sequence[ReasoningRecord]
    """The given training records and, behind them, those that augmentation made."""
    epochs: list[np.ndarray]
    """For each epoch, over both phases, the `reasoning` records it trains on; [] without a curriculum."""


def load_data(config: TrainConfig, image_size: int, world: World) -> RunData:
    """Read, split and decode the data of a run; every problem of the file is reported before training."""
    path = Path(config.reasoning_data)
    if not all(file.exists() for file in source_files(path) or [path]):
        raise ConfigError(
            f"--reasoning_data {path}: no such file; make one with `embervlm data generate --teacher_model rules "
            f"--output_file {path} --num_samples 50000`"
        )
    cache, augmentation = Path(config.output_dir) / "cache", config.stage4.reasoning_augmentation
    store = first_on_rank_0(
        world,
        lambda: prepare(
            path,
            cache,
            candidates=domain_named(config.domain).candidates,
            max_closed_answers=config.max_closed_answers,
            image_root=config.image_root,
            allow_outside=config.allow_outside,
        ),
    )
    if world.rank == 0 and (unused := told_unused(store.unused)):
        print(f"{path}: {unused}")
    if world.rank == 0 and (told := told_answers(store.answer_kinds, store.candidates)):
        print(f"{path}: {told}")
    train, val = store.split("train"), store.split("val")
    if not train:
        raise ConfigError(f"{path}: none of its {len(store)} records falls into the train split; it needs more records")
    shown = RecordView(store, np.concatenate([train.rows, val.rows]))
    pictures = first_on_rank_0(world, lambda: PictureCache(picture_paths(shown), image_size, cache))
    # what a file holds of augmentations goes to the end, so that the given records have the same places in both
    augmented = has_field(train, "augmentation")
    train = train.take(np.argsort(augmented, kind="stable"))
    reasoning: Sequence[ReasoningRecord] = train
    if augmentation is not None:
        reasoning = first_on_rank_0(
            world, lambda: augment_cached(train, augmentation, cache, config.seed, make=world.rank == 0)
        )
    epochs = []
    if config.curriculum is not None:
        curriculum, num_epochs = config.curriculum, config.stage4.phase1.epochs + config.stage4.phase2.epochs
        epochs = first_on_rank_0(world, lambda: records_of_epochs(reasoning, curriculum, num_epochs))
        if world.rank == 0:
            print("curriculum: records by epoch " + ", ".join(str(len(places)) for places in epochs))
    num_given = len(train) - int(augmented.sum())
    return RunData(
        train=train[: num_given or None],
        val=val,
        test=store.split("test"),
        pictures=pictures,
        reasoning=reasoning,
        epochs=epochs,
    )


def told_answers(kinds: Mapping[str, int], candidates: Sequence[str] = ()) -> str:
    """What the answers are chosen from; "" where it is the domain's candidates everywhere."""
    spelled = {
        "domain": "choose among the domain's candidates",
        "closed": f"choose among the {len(candidates)} answers of the data ({_listed(candidates)})",
        "own": "among candidates of their own (metadata.candidates)",
        "open": "are free text, which the answer head has no part in",
    }
    found = [f"{kinds[name]} records {text}" for name, text in spelled.items() if kinds.get(name)]
    return f"answers: {', '.join(found)}" if set(kinds) - {"domain"} else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def model_settings(config: TrainConfig, stage: int) -> dict[str, Any]:
    """The preset's settings; ConfigError where it names answers, which come from the records."""
    settings = model_preset(config.model)
    candidates = domain_named(config.domain).candidates
    own = tuple(settings.get("candidates") or candidates)
    if own != candidates:
        raise ConfigError(
            f"model {config.model}: candidates: {', '.join(own)[:200]} would not be used: a run takes its answers from "
            "the records. Write them into each record's metadata.candidates, and take the key out of the preset"
        )
    return {**settings, "stage": stage, "candidates": candidates}


def first_on_rank_0(world: World, prepared: Callable[[], Prepared]) -> Prepared:
    """`prepared()`, which leaves its work in the cache, on process 0 and then on the others; its error on all.

    The others are told every minute that it is still going on: one collective call may last 30 minutes at most.
    """
    if world.size == 1:
        return prepared()
    error: Exception | None = None
    if world.rank == 0:
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(prepared)
            while not wait([work], timeout=60).done:
                world.broadcast((False, None))
        failed = work.exception()
        error = failed if isinstance(failed, UserError) else None
        world.broadcast((True, error))
        return work.result()
    done = False
    while not done:
        done, error = world.broadcast(None)
    if error is not None:
        raise error
    try:
        return prepared()
    except UserError as own:  # process 0 had no trouble: a file that this node does not see, say
        raise _of_this_process(own, world.rank) from own


def _of_this_process(error: UserError, rank: int) -> UserError:
    """`error` as one that this process alone meets, and therefore says."""
    told = UserError(f"process {rank} on {socket.gethostname()} alone: {error}")
    told.is_of_one_process = True
    return told


class Run:
    """One call of `launch/train.py`: which stages, in order."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.output = Path(config.output_dir)
        self.domain = domain_named(config.domain)
        self._data: RunData | None = None

    # -- stages ------------------------------------------------------------------------------------------------------

    def stage3(self) -> Path:
        """Train the stand-in for a Stage 3 checkpoint: captions, direct answers and the dense target, no reasoning."""
        config, folder = self.config, run_dir.stage3_dir(self.config.output_dir)
        wanted = self._stage3_settings()
        if (done := self._finished(folder, wanted)) is not None:
            return done
        settings = model_settings(config, STAGE3)
        torch.manual_seed(config.seed)
        model = build_model(settings)
        data = self._load_data(model)
        model.attach_tokenizer(self._tokenizer(settings, model, data.reasoning))
        labels = DenseLabels(data.train, model.vision_encoder.grid)
        self._chains(model, data)  # what Stage 4 refuses is refused now
        direct = self._asked(encode_direct, model, data.train)
        _note_lengths(model, direct)
        plan = EpochPlan(
            main=direct,
            mixed=(
                (self._captions(model, data), config.stage3.caption_records_ratio),
                (self._glossary(model), config.stage3.glossary_records_ratio),
            ),
            global_batch=config.stage3_batch_size * self.world.size,
            seed=config.seed,
        )
        job = PhaseJob(
            name="stage 3",
            folder=folder,
            phase=_without_reasoning(config.stage3),
            model=model,
            plan=plan,
            collator=self._collator(model, data, dense=labels if labels.classes else None, use_reasoning=False),
            pictures=data.pictures,
            batch_size=config.stage3_batch_size,
            dense_sizes=labels.sizes,
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    def phase(self, number: int, start: Path) -> Path:
        """Train phase 1 or 2 of Stage 4 from the weights in `start`."""
        config, stage = self.config, self.config.stage4
        folder = run_dir.phase_dir(config.output_dir, number)
        wanted = self._phase_settings(number, start)
        if (done := self._finished(folder, wanted)) is not None:
            return done
        phase = stage.phase1 if number == 1 else stage.phase2
        model = self._start_from(start, STAGE4)
        data = self._load_data(model)
        tokenizer = model.tokenizer
        samples, epochs = self._chains(model, data)
        if self.world.rank == 0:
            self._say_what_is_cut(samples, number, model, len(data.reasoning))
        first_epoch = stage.phase1.epochs if number == 2 else 0
        direct = self._asked(encode_direct, model, data.train)
        _note_lengths(model, direct, samples)
        plan = EpochPlan(
            main=samples,
            mixed=((direct, phase.direct_records_ratio), *self._edited(data.reasoning, samples, number, phase)),
            epochs=epochs[first_epoch : first_epoch + phase.epochs],
            global_batch=stage.batch_size * stage.gradient_accumulation_steps * self.world.size,
            seed=config.seed + number,
        )
        collator = self._collator(
            model,
            data,
            records=data.reasoning,
            pair_maker=PairMaker(data.reasoning, samples, tokenizer),
            pair_records_ratio=phase.validator_records_ratio,
            grounding=phase.multimodal_loss_weight > 0,
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
            after_epoch=lambda trained, epoch: self._after_epoch(
                trained, data, first_epoch + epoch, f"phase {number}" if epoch == phase.epochs - 1 else None
            ),
            after_save=self._evaluate,
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    def _edited(
        self, records: Sequence[ReasoningRecord], samples: Samples, number: int, phase: PhaseConfig
    ) -> list[tuple[Samples, float]]:
        """Chains with edited facts and how many per record, where asked for."""
        if not phase.edited_facts_ratio:
            return []
        edited = edit_facts(records, samples, self.config.seed + number)
        if not edited and self.world.rank == 0:
            print(
                f"phase {number}: edited_facts_ratio does nothing: these records do not say which steps state facts "
                "(metadata.seen), or ask each question about one picture only"
            )
        return [(edited, phase.edited_facts_ratio)]

    def baselines(self, start: Path) -> list[Path]:
        """Train Stage 3 on with direct answers: for as many samples as both phases saw, and for as long."""
        spent = [
            run_dir.read_object(self._required(number) / "state.json", "samples", "elapsed_s") for number in (1, 2)
        ]
        samples, seconds = (sum(state[key] for state in spent) for key in ("samples", "elapsed_s"))
        wanted = [("same_samples", samples, None)]
        if self.config.baseline.same_time:
            wanted.append(("same_time", None, seconds / 60))
        return [self._baseline(start, name, count, minutes) for name, count, minutes in wanted]

    def _baseline(self, start: Path, name: str, samples: int | None, minutes: float | None) -> Path:
        config, baseline = self.config, self.config.baseline
        folder = self.output / "baseline" / name
        phase = PhaseConfig(
            name=name,
            learning_rate=baseline.learning_rate,
            warmup_steps=baseline.warmup_steps,
            direct_loss_weight=1.0,
            max_minutes=minutes,
            epochs=1,
        )
        wanted = self._settings(phase, start, baseline.batch_size, samples=samples)
        if (done := self._finished(folder, wanted)) is not None:
            return done
        model = self._start_from(start, STAGE3)
        data = self._load_data(model)
        direct = self._asked(encode_direct, model, data.train)
        _note_lengths(model, direct)
        plan = EpochPlan(main=direct, global_batch=baseline.batch_size * self.world.size, seed=config.seed + 3)
        job = PhaseJob(
            name=f"baseline {name}",
            folder=folder,
            phase=_without_reasoning(phase),
            model=model,
            plan=plan,
            collator=self._collator(model, data, use_reasoning=False),
            pictures=data.pictures,
            batch_size=baseline.batch_size,
            samples_wanted=samples,
            trained_with=wanted,
        )
        return train_phase(job, config, self.world)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _settings(self, phase: PhaseConfig, start: Path | None, batch_size: int, **more: Any) -> dict[str, Any]:
        processes = self.world.size
        return trained_with(phase, self.config, start, global_batch=batch_size * processes, processes=processes, **more)

    def _stage3_settings(self) -> dict[str, Any]:
        return self._settings(self.config.stage3, None, self.config.stage3_batch_size)

    def _phase_settings(self, number: int, start: Path | None) -> dict[str, Any]:
        stage = self.config.stage4
        phase, batch = (stage.phase1, stage.phase2)[number - 1], stage.batch_size * stage.gradient_accumulation_steps
        return self._settings(phase, start, batch, **of_stage4(self.config))

    def _finished(self, folder: Path, wanted: dict[str, Any]) -> Path | None:
        """The final checkpoint of `folder`, if there is one; ConfigError where it is not of the `wanted` settings."""
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
            raise ConfigError(f"the baseline is matched to both phases, but {path} is not there; train Stage 4 first")
        return path

    def _load_data(self, model: EmberVLM) -> RunData:
        if self._data is None:
            self._data = load_data(self.config, model.config.image_size, self.world)
        model.config.candidates = list(self._data.train.store.candidates)
        return self._data

    def _asked(
        self, encode: Callable[[RecordView, ReasoningTokenizer], Samples], model: EmberVLM, records: RecordView
    ) -> Samples:
        """Samples whose lengths are counted, none longer than the model reads."""

        def counted() -> Samples:
            samples = encode(records, model.tokenizer)
            refuse_too_long([(records, samples)], self._limits(model))
            return samples

        return first_on_rank_0(self.world, counted)

    def _limits(self, model: EmberVLM) -> Limits:
        return Limits(
            max_reasoning_length=self.config.stage4.max_reasoning_length,
            num_visual_tokens=model.num_visual_tokens,
            positions=model.language_model.max_positions,
        )

    def _chains(self, model: EmberVLM, data: RunData) -> tuple[Samples, list[np.ndarray]]:
        """The chains that both phases train on, and which of them each epoch does.

        Raises:
            DataError: every record of any split that is too long to be trained on or asked.
        """
        tokenizer, grid, limits = model.tokenizer, model.vision_encoder.grid, self._limits(model)

        def fitting() -> Samples:
            chains = (data.reasoning, data.val, data.test)
            asked = [(records, encode_reasoning(records, tokenizer, grid)) for records in chains]
            asked += [(records, encode_direct(records, tokenizer)) for records in (data.train, data.val, data.test)]
            refuse_too_long(asked, limits)
            return encode_reasoning(data.reasoning, tokenizer, grid, limits=limits)

        samples, epochs = first_on_rank_0(self.world, fitting), data.epochs
        if len(samples) < len(data.reasoning):
            epochs = [np.flatnonzero(np.isin(samples.rows, records)) for records in epochs]
        if not all(map(len, epochs)):
            raise ConfigError("curriculum: an epoch has only augmented chains above --max_reasoning_length; raise it")
        return samples, epochs

    @staticmethod
    def _say_what_is_cut(samples: Samples, number: int, model: EmberVLM, num_records: int) -> None:
        if left_out := num_records - len(samples):
            print(
                f"phase {number}: {left_out} augmented records left out, longer than --max_reasoning_length or "
                "than the language model reads"
            )
        if cut := cut_for_validator(samples.sizes, model.max_pair_tokens):
            print(f"phase {number}: {cut}")

    def _captions(self, model: EmberVLM, data: RunData) -> Samples | list[Sample]:
        return self._asked(encode_captions, model, data.train) if self.config.stage3.caption_records_ratio else []

    def _glossary(self, model: EmberVLM) -> list[Sample]:
        samples = encode_glossary(self.domain.glossary, model.tokenizer)
        longest, room = max(map(len, samples), default=0), self._limits(model).room
        if self.config.stage3.glossary_records_ratio and room is not None and longest > room:
            raise ConfigError(
                f"stage3.glossary_records_ratio: its texts have up to {longest} tokens, and beside the picture the "
                f"language model reads {room}; set it to 0, or choose a model with more positions"
            )
        return samples

    def _tokenizer(
        self, settings: dict[str, Any], model: EmberVLM, records: Sequence[ReasoningRecord]
    ) -> ReasoningTokenizer:
        language = settings["language"]
        if language.get("pretrained") or (language.get("name_or_path") and not language.get("config")):
            return ReasoningTokenizer.from_folder(language["name_or_path"])
        return tokenizer_of(records, model.language_model.vocab_size, self.domain.glossary)

    def _start_from(self, checkpoint: Path, stage: int) -> EmberVLM:
        """The model of this run with the weights of `checkpoint`; a Stage 3 one gets a new reasoning module."""
        gc.collect()  # engine and samples of the phase before refer to themselves, and would stay through this one
        if not checkpoint.is_dir():
            hint = (
                "train a stand-in with `python launch/train.py --stages 3` (the same flags as here)"
                if "stage3" in checkpoint.parts
                else "train it first, or name another with --resume_from"
            )
            close = run_dir.closest_path(checkpoint)
            raise ConfigError(f"--resume_from {checkpoint}: no such checkpoint{close}; {hint}")
        if (checkpoint / "COMPLETE").is_file():
            run_dir.verify_checkpoint(checkpoint)
        settings = model_settings(self.config, stage)
        self._say_what_was_chosen_from(checkpoint)
        torch.manual_seed(self.config.seed)
        model = build_model(settings, load_pretrained=False)
        try:
            load_checkpoint_into(model, checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"{error} (this run's preset is {self.config.model!r}; choose with --model)") from error
        model.attach_tokenizer(ReasoningTokenizer.from_folder(checkpoint))
        return model

    def _say_what_was_chosen_from(self, checkpoint: Path) -> None:
        config = checkpoint / "config.json"
        if checkpoint.is_relative_to(self.output):  # of this run, with the same data
            return
        candidates = self.domain.candidates
        own = tuple((run_dir.read_object(config).get("candidates") if config.exists() else None) or candidates)
        if own != candidates and self.world.rank == 0:
            print(
                f"{checkpoint}: its answers ({', '.join(map(str, own))[:200]}) are not taken over: this run's come "
                f"from each record's metadata.candidates, else from the domain ({self.domain.name})"
            )

    def _collator(self, model: EmberVLM, data: RunData, **options: Any) -> Collator:
        dense, records = options.pop("dense", None), options.pop("records", data.train)
        return Collator(
            records,
            model.tokenizer,
            data.pictures,
            seed=self.config.seed,
            image_size=model.config.image_size,
            max_pair_tokens=model.max_pair_tokens,
            dense_labels=dense,
            **options,
        )

    def _after_epoch(self, model: EmberVLM, data: RunData, epoch: int, ended: str | None) -> None:
        """Samples are a by-product: whatever goes wrong with them is only said, and training goes on.

        `ended`: the phase whose last epoch this was; then it is also said whether the model looks at the picture.

        No process waits for another here, so it may go wrong on one alone.
        """
        try:
            self._write_samples(model, data, epoch)
            if ended is not None and (found := sight(model, data.pictures, data.val or data.train)) is not None:
                self._say(f"{ended}: {found}")
        except Exception as error:  # a device may be out of memory
            if self.world.rank == 0 or not isinstance(error, UserError):  # the latter is the same on every process
                reason = str(error) if isinstance(error, run_dir.WriteError) else f"{type(error).__name__}: {error}"
                _log.warning("epoch %d: no samples (%s); training goes on", epoch, reason)

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text)

    def _write_samples(self, model: EmberVLM, data: RunData, epoch: int) -> None:
        """Chains of a few val records; every process computes them (ZeRO-3 needs all), one writes."""
        records = (data.val or data.train)[: self.config.sample_records]
        images = [data.pictures[record.image] if record.image else None for record in records]
        results = model.generate_with_reasoning(images, [record.instruction for record in records])
        if self.world.rank == 0:
            samples = [
                {
                    "id": record.record_id,
                    "image": record.image,
                    "instruction": record.instruction,
                    "gold_answer": list(record.answer),
                    "gold_steps": list(record.steps),
                    **result,
                }
                for record, result in zip(records, results)
            ]
            run_dir.write_json_atomic(run_dir.reasoning_samples_path(self.output, epoch), samples)
            if cut := sum(bool(result["cut_off"]) for result in results):
                print(f"epoch {epoch}: {cut} of {len(results)} sample chains are cut off before their end")

    def _evaluate(self, checkpoint: Path) -> None:
        """What `select_best` reads: computed here by all processes, or by a job of its own.

        Whatever goes wrong is only said: training goes on, and `select_best` evaluates what has no evaluation.
        """
        from embervlm.evaluation.evaluate import evaluate_checkpoint

        try:
            if self.config.eval_cluster is None:
                evaluate_checkpoint(
                    checkpoint, split="val", num_samples=self.config.eval_samples, progress=False, world=self.world
                )
            elif self.world.rank == 0:
                print(f"{checkpoint.name} is evaluated by job {submit_evaluation(checkpoint, self.config)}")
        except Exception as error:  # the same one on every process
            if self.world.rank == 0:
                print(f"{checkpoint}: not evaluated ({type(error).__name__}: {error}); training goes on")

    def _check_finished(self, stages: Sequence[str], phase: int | None) -> None:
        """Whatever a finished phase would be refused for once those before it have trained, before anything does."""
        planned = [("stage 3", run_dir.stage3_dir(self.output), self._stage3_settings())] if "3" in stages else []
        for number in (1, 2) if "4" in stages else ():
            if phase in (None, number):
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
                _refuse_changes(folder, found + [f"weights of another {name}, now trained anew" for name in to_train])
            else:
                to_train.append(name)

    def go(self, stages: Sequence[str], phase: int | None) -> None:
        """Run `stages` in order, starting from `resume_from` or the checkpoints of this output folder."""
        resume = Path(self.config.resume_from) if self.config.resume_from else None
        stage3 = run_dir.checkpoint_path(run_dir.stage3_dir(self.output), None)
        first_on_rank_0(self.world, lambda: self._check_finished(stages, phase))
        if "3" in stages:
            stage3 = self.stage3()
        if "4" in stages:
            if self.world.rank == 0:
                print("".join(f"{line}\n" for line in known_to_harm(self.config.stage4)), end="")
            start = resume or stage3
            if phase in (None, 1):
                start = self.phase(1, start)
            if phase in (None, 2):
                first = run_dir.checkpoint_path(run_dir.phase_dir(self.output, 1), None)
                self.phase(2, start if phase is None else (resume or first))
        if "baseline" in stages:
            self.baselines(resume or stage3)


def _refuse_changes(folder: Path, found: Sequence[str]) -> None:
    """ConfigError that says what differs in `found` from what the finished phase in `folder` was trained with."""
    if found:
        raise ConfigError(
            f"{folder} is finished, and was trained with other settings: {'; '.join(found)}. A finished phase is not "
            "trained on, as its learning rate has come down to its end. Set them back, or train with these from the "
            "start: in another --output_dir (with --resume_from for the weights to start from), or here after deleting "
            f"{folder} and what was trained from it"
        )


def _without_reasoning(phase: PhaseConfig) -> PhaseConfig:
    """`phase` with the reasoning module left alone, for models that have none yet."""
    factors = {**phase.learning_rate_multipliers, "reasoning_module": 0.0}
    return dataclasses.replace(phase, learning_rate_multipliers=factors)


def _note_lengths(model: EmberVLM, direct: Samples, chains: Samples | None = None) -> None:
    """Leave in the model's configuration what its data need, from which generation takes its limits."""
    model.config.longest_answer_tokens = int(direct.sizes[:, 1].max())
    if chains is not None:
        model.config.longest_chain_tokens = int(chains.sizes[:, 1].max())
        model.config.longest_chain_steps = int(chains.num_steps.max())

"""The data of a run: its records, read once for all processes, and the training samples made from them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from embervlm.config import ConfigError, PhaseConfig, TrainConfig
from embervlm.curate.augment import augment_cached
from embervlm.data.answer_space import told_answers
from embervlm.data.curriculum import records_of_epochs
from embervlm.data.dataset import (
    edit_facts,
    encode_captions,
    encode_direct,
    encode_glossary,
    encode_questions,
    encode_reasoning,
    having_chains,
)
from embervlm.data.images import Colour, PictureCache, told_shrinking
from embervlm.data.lengths import Limits, refuse_too_long
from embervlm.data.negatives import cut_for_validator
from embervlm.data.record_fields import told_several, told_unused
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Sample, Samples
from embervlm.data.sources import source_files
from embervlm.data.splits import SPLITS
from embervlm.data.store import RecordView, has_field, picture_hashes, picture_paths, prepare
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.errors import UserError
from embervlm.model.embervlm import EmberVLM
from embervlm.robots.domain import domain_named
from embervlm.world import World

Prepared = TypeVar("Prepared")


@dataclass(kw_only=True)
class RunData:
    """The records of a run and their pictures at the model's size."""

    train: RecordView
    """Only the given training records: augmentation makes more chains, but no more questions."""
    val: RecordView
    test: RecordView
    """Not trained on; checked before training, so an evaluation does not refuse them later."""
    pictures: PictureCache
    reasoning: Sequence[ReasoningRecord]
    """The given training records, followed by those that augmentation made."""
    epochs: list[np.ndarray]
    """For each epoch of both phases, the `reasoning` records that it trains on; [] without a curriculum."""


def load_data(config: TrainConfig, image_size: int, world: World, fill: Colour | None = None) -> RunData:
    """Read, split and decode the data of a run; every problem of the file is reported before training."""
    path = Path(config.reasoning_data)
    if not all(file.exists() for file in source_files(path) or [path]):
        raise ConfigError(
            f"--reasoning_data {path}: no such file; make one with `embervlm data generate --teacher_model rules "
            f"--output_file {path} --num_samples 50000`"
        )
    cache, augmentation = Path(config.output_dir) / "cache", config.stage4.reasoning_augmentation
    phase3 = config.stage4.phase3
    store = first_on_rank_0(
        world,
        lambda: prepare(
            path,
            cache,
            candidates=domain_named(config.domain).candidates,
            max_closed_answers=config.max_closed_answers,
            image_root=config.image_root,
            allow_outside=config.allow_outside,
            require_reasoning=phase3 is None,
            require_answer=phase3 is None or phase3.unanswered_records == "stop",
        ),
    )
    if world.rank == 0 and (unused := told_unused(store.unused)):
        print(f"{path}: {unused}")
    if world.rank == 0 and (several := told_several(store.several_pictures)):
        print(f"{path}: {several}")
    if world.rank == 0 and (told := told_answers(store.answer_kinds, store.candidates)):
        print(f"{path}: {told}")
    train, val, test = (_answered(store.split(name), config, world) for name in SPLITS)
    if not train:
        raise ConfigError(f"{path}: none of its {len(store)} records is in the train split; add records")
    boxed, pictured = int(has_field(train, "boxes").sum()), int((picture_hashes(train) != 0).sum())
    if world.rank == 0 and 0 < boxed < pictured:
        print(
            f"{path}: {boxed} of {pictured} records with a picture have boxes; the others have no multimodal loss "
            "where attention to boxes is learned"
        )
    shown = RecordView(store, np.concatenate([train.rows, val.rows]))
    paths = list(picture_paths(shown))
    pictures = first_on_rank_0(world, lambda: PictureCache(paths, image_size, cache, fill))
    if world.rank == 0 and (told := told_shrinking(paths, image_size)):
        print(told)
    # what a file holds of augmentations goes to the end, so that the given records have the same places in both
    augmented = has_field(train, "augmentation")
    train = train.take(np.argsort(augmented, kind="stable"))
    reasoning: Sequence[ReasoningRecord] = train
    if augmentation is not None:
        reasoning = first_on_rank_0(
            world, lambda: augment_cached(train, augmentation, cache, config.seed, make=world.rank == 0)
        )
    epochs = _epochs(reasoning, config, world)
    num_given = len(train) - int(augmented.sum())
    return RunData(
        train=train[: num_given or None], val=val, test=test, pictures=pictures, reasoning=reasoning, epochs=epochs
    )


def _epochs(records: Sequence[ReasoningRecord], config: TrainConfig, world: World) -> list[np.ndarray]:
    """The records of each epoch by the curriculum; [] without one."""
    if (curriculum := config.curriculum) is None:
        return []
    num_epochs = config.stage4.phase1.epochs + config.stage4.phase2.epochs
    epochs = first_on_rank_0(world, lambda: records_of_epochs(records, curriculum, num_epochs))
    if world.rank == 0:
        print("curriculum: records by epoch " + ", ".join(str(len(places)) for places in epochs))
        if left := len(records) - len(np.unique(np.concatenate(epochs))):
            print(
                f"curriculum: {left:,} of {len(records):,} records are in none of these epochs: they have more steps "
                "than `max_steps`, or are harder than `complexity`, of every stage that is reached"
            )
    return epochs


def _answered(records: RecordView, config: TrainConfig, world: World) -> RecordView:
    """`records` without those that have no answer, which only `unanswered_records: skip` admits."""
    if config.stage4.phase3 is None or config.stage4.phase3.unanswered_records == "stop":
        return records
    unanswered = np.fromiter((not record.answer for record in records), bool, len(records))
    if unanswered.any() and world.rank == 0:
        names = [records[int(place)].record_id for place in np.flatnonzero(unanswered)[:5]]
        print(
            f"{unanswered.sum():,} of {len(records):,} records are left out, because they have no answer "
            f"(unanswered_records: skip): {', '.join(names)}{', ...' if unanswered.sum() > len(names) else ''}"
        )
    return records.take(np.flatnonzero(~unanswered))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The training records of a run as `model` reads them, in every form."""

    config: TrainConfig
    world: World
    model: EmberVLM
    data: RunData

    def chains(self) -> tuple[Samples, list[np.ndarray]]:
        """The chains that both phases train on, and which of them each epoch uses.

        Raises:
            DataError: names every record of any split that is too long for training or evaluation.
        """
        data, tokenizer, limits = self.data, self.model.tokenizer, self._limits
        encode = partial(
            encode_reasoning, tokenizer=tokenizer, grid=self.model.grid, padded_size=self.model.config.padded_size
        )

        def fitting() -> Samples:
            chains = (data.reasoning, data.val, data.test)
            asked = [(records, encode(records)) for records in chains]
            asked += [(records, encode_direct(records, tokenizer)) for records in (data.train, data.val, data.test)]
            refuse_too_long(asked, limits)
            return encode(data.reasoning, limits=limits)

        samples, epochs = first_on_rank_0(self.world, fitting), data.epochs
        if self.config.stage4.phase3 is not None:
            samples = having_chains(data.reasoning, samples)
        if len(samples) < len(data.reasoning):
            epochs = [np.flatnonzero(np.isin(samples.rows, records)) for records in epochs]
        if not all(map(len, epochs)):
            raise ConfigError(
                "curriculum: an epoch has only augmented chains that are longer than --max_reasoning_length; raise it"
            )
        return samples, epochs

    def direct(self) -> Samples:
        """The samples with question and answer, without a chain."""
        return self._asked(encode_direct)

    def questions(self) -> Samples:
        """The questions alone."""
        return self._asked(encode_questions)

    def captions(self) -> Samples | list[Sample]:
        return self._asked(encode_captions) if self.config.stage3.caption_records_ratio else []

    def glossary(self) -> list[Sample]:
        samples = encode_glossary(domain_named(self.config.domain).glossary, self.model.tokenizer)
        longest, room = max(map(len, samples), default=0), self._limits.room
        if self.config.stage3.glossary_records_ratio and room is not None and longest > room:
            raise ConfigError(
                f"stage3.glossary_records_ratio: its texts have up to {longest} tokens, but after the picture the "
                f"language model has room for {room}; set it to 0, or choose a model with more positions"
            )
        return samples

    def edited(self, samples: Samples, number: int, phase: PhaseConfig) -> list[tuple[Samples, float]]:
        """Chains with edited facts and their number per record, if the phase uses them."""
        if not phase.edited_facts_ratio:
            return []
        edited = edit_facts(self.data.reasoning, samples, self.config.seed + number)
        if not edited and self.world.rank == 0:
            print(
                f"phase {number}: edited_facts_ratio does nothing: these records do not say which steps state facts "
                "(metadata.seen), or ask each question about one picture only"
            )
        return [(edited, phase.edited_facts_ratio)]

    def say_what_is_cut(self, samples: Samples, number: int) -> None:
        if self.world.rank > 0:
            return
        num_given = len(self.data.train)
        if left_out := len(self.data.reasoning) - num_given - int((samples.rows >= num_given).sum()):
            print(
                f"phase {number}: {left_out} augmented records left out, longer than --max_reasoning_length or "
                "than the language model's context"
            )
        if cut := cut_for_validator(samples.sizes, self.model.max_pair_tokens):
            print(f"phase {number}: {cut}")

    def _asked(self, encode: Callable[[RecordView, ReasoningTokenizer], Samples]) -> Samples:
        """Samples with counted lengths, none longer than the model's context."""

        def counted() -> Samples:
            samples = encode(self.data.train, self.model.tokenizer)
            refuse_too_long([(self.data.train, samples)], self._limits)
            return samples

        return first_on_rank_0(self.world, counted)

    @property
    def _limits(self) -> Limits:
        return Limits(
            max_reasoning_length=self.config.stage4.max_reasoning_length,
            num_visual_tokens=self.model.num_visual_tokens,
            positions=self.model.language_model.max_positions,
        )


def note_lengths(model: EmberVLM, direct: Samples, chains: Samples | None = None) -> None:
    """Write the lengths of the data into the model's configuration, which sets the limits for generation."""
    model.config.longest_answer_tokens = int(direct.sizes[:, 1].max())
    if chains is not None:
        model.config.longest_chain_tokens = int(chains.sizes[:, 1].max())
        model.config.longest_chain_steps = int(chains.num_steps.max())


def first_on_rank_0(world: World, prepared: Callable[[], Prepared]) -> Prepared:
    """`prepared()`, which leaves its work in the cache, on process 0 and then on the others; its error on all.

    A message every minute keeps the others waiting: one collective call can take at most 30 minutes.
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
    """`error`, marked as an error of this process only, so that this process prints it."""
    told = UserError(f"only process {rank} on {socket.gethostname()}: {error}")
    told.is_of_one_process = True
    return told

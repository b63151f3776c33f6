"""The settings of an evaluation, and its data: the records of a split, and the fit of the metrics on the training
split."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.data.answer_space import chosen_from
from embervlm.data.domain import Domain
from embervlm.data.facts import fact_domains
from embervlm.data.images import Colour, PictureCache
from embervlm.data.record_fields import quote
from embervlm.data.records import ReasoningRecord, read_records
from embervlm.data.sources import source_files
from embervlm.data.splits import SPLITS
from embervlm.data.store import prepare
from embervlm.evaluation.batches import see
from embervlm.evaluation.faithfulness import NUM_SAMPLES
from embervlm.evaluation.known import KnownData
from embervlm.evaluation.sharing import failing_together
from embervlm.judge.backends import EMBEDDED
from embervlm.judge.metrics import ChainScorer
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.robots.domain import domain_named
from embervlm.world import World

MAX_REFERENCE_RECORDS = 20_000
"""Training records, evenly spaced, from which the metrics learn orders and facts."""
CALIBRATION_RECORDS = 200
"""Of the val split, to fit the temperature of `confidence` on."""


def alone() -> World:
    """This process without others, on the GPU if there is one."""
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(kw_only=True)
class Evaluation:
    """The settings of an evaluation. Missing ones come from the checkpoint's own settings."""

    checkpoint: Path
    split: str = "test"
    num_samples: int | None = None
    reasoning_data: str | None = None
    image_root: str | None = None
    allow_outside: bool | None = None
    test_set: str | None = None
    """A file of which all records are evaluated, whatever split they would fall into; `split` only names them then."""
    decoding: Decoding = field(default_factory=Decoding)
    compare: bool = True
    """Evaluate the baselines, no picture and the swapped picture in addition to the chains."""
    explained: int = 0
    """Number of samples that also get their attention and the validator's scores."""
    faithfulness_samples: int = NUM_SAMPLES
    """Number of records to test whether the answer comes from the chain; none for 0, or without `compare`."""
    progress: bool = True
    world: World = field(default_factory=alone)
    """The processes that share the work."""
    similarity: str = EMBEDDED
    entailment: str = EMBEDDED
    """The judge of the chains: `embedded`, or the id or folder of a model."""
    partial: Path | None = None
    """Folder for finished batches until the evaluation is written."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"--num_samples {self.num_samples}: there is nothing to evaluate; give at least 1")
        if self.decoding.candidates:
            raise ConfigError(
                "decoding.candidates: an evaluation uses the candidates of each record; write them into the records"
            )
        if self.explained < 0:
            raise ConfigError(f"--explain_samples {self.explained}: give 0 or more")
        if self.faithfulness_samples < 0:
            raise ConfigError(f"--faithfulness_samples {self.faithfulness_samples}: give 0 or more")


@dataclass(kw_only=True)
class EvalData:
    """Records of one split, and what the metrics learn from the training split."""

    records: list[ReasoningRecord]
    pictures: PictureCache
    scorer: ChainScorer | None
    """On process 0, which alone scores."""
    domains: Mapping[str, frozenset[str]]
    domain: Domain
    val: list[ReasoningRecord] = field(default_factory=list)
    """Where the split is another one: records to calibrate on."""
    known: KnownData | None = None
    """What to tell known questions by; None where there is too little, or a test set in val's place."""

    def see(self, model: EmberVLM, records: Sequence[ReasoningRecord]) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens of the records' pictures, and which have one."""
        return see(model, self.pictures, records)


def load_eval_data(
    job: Evaluation, image_size: int, closed: Sequence[str] = (), fill: Colour | None = None
) -> EvalData:
    """Records of the split, with what the metrics take from the training split.

    Args:
        closed: the answers that the model's training data were a set of, from which those of a `test_set` are chosen
            too where neither its records nor a domain say it.
        fill: the colour that pictures are padded with, if they are.
    """
    if job.split not in SPLITS:
        raise ConfigError(f"--split {job.split}: unknown; choose from {', '.join(SPLITS)}")
    made_with = run_dir.trained_with(job.checkpoint)
    path = named = job.reasoning_data or made_with.get("reasoning_data")
    outside = bool(made_with.get("allow_outside")) if job.allow_outside is None else job.allow_outside
    if path and not all(file.exists() for file in source_files(path) or [Path(path)]):
        path = None
    if not path and job.test_set is None:
        raise ConfigError(
            f"{job.checkpoint}: its data {named or '(not recorded)'} does not exist; give the file with "
            f"--reasoning_data"
        )
    cache = Path(made_with["output_dir"]) / "cache" if made_with.get("output_dir") else None
    domain = domain_named(made_with.get("domain") or "robots")
    root = (None if job.test_set else job.image_root) or made_with.get("image_root")
    with tempfile.TemporaryDirectory() as elsewhere:
        limit = int(made_with.get("max_closed_answers") or 0)
        phase3 = (made_with.get("stage4") or {}).get("phase3")
        needs_answers = phase3 is None or phase3["unanswered_records"] == "stop"
        read = partial(
            prepare,
            candidates=domain.candidates,
            max_closed_answers=limit,
            image_root=root,
            allow_outside=outside,
            require_reasoning=phase3 is None,  # as where the model was trained
            require_answer=needs_answers,
        )
        store = read(path, elsewhere, ready_in=cache) if path else None
        splits: dict[str, Sequence[ReasoningRecord]] = {name: store.split(name) if store else [] for name in SPLITS}
        if not needs_answers:
            splits = {name: [record for record in found if record.answer] for name, found in splits.items()}
        if job.test_set is not None:
            records = _read_test_set(job, domain, outside, known=splits["train"], unpack_dir=elsewhere)
            splits[job.split] = [chosen_from(record, closed) for record in records]
            _tell_unknown_answers(job, splits[job.split], closed)
        return _eval_data(job, splits, domain, job.test_set or path or "", image_size, fill)


def _eval_data(
    job: Evaluation,
    splits: Mapping[str, Sequence[ReasoningRecord]],
    domain: Domain,
    path: str,
    image_size: int,
    fill: Colour | None,
) -> EvalData:
    train = splits["train"]
    if not splits[job.split]:
        raise ConfigError(f"{path}: the {job.split} split is empty, so there is no record to evaluate")
    records = _some(splits[job.split], job.num_samples)
    reference = list(train[:: -(-len(train) // MAX_REFERENCE_RECORDS)]) if train else records
    domains = fact_domains([*reference, *records])
    val = _some(splits["val"], CALIBRATION_RECORDS) if job.compare and job.split != "val" else []
    return EvalData(
        records=records,
        pictures=PictureCache([r.image for r in (*records, *val) if r.image], image_size, fill=fill),
        scorer=_scorer(job, reference, domains),
        domains=domains,
        domain=domain,
        val=val,
        known=None if job.test_set is not None else KnownData.of(reference if train else [], splits["val"]),
    )


def _scorer(
    job: Evaluation, reference: Sequence[ReasoningRecord], domains: Mapping[str, frozenset[str]]
) -> ChainScorer | None:
    """The judge, fitted where it is needed: on process 0."""
    with failing_together(job.world):
        if job.world.rank > 0:
            return None
        chains = [record.steps for record in reference if record.steps]
        asked = [(record.instruction, record.answer) for record in reference]
        return ChainScorer.fit(chains, domains, asked=asked, similarity=job.similarity, entailment=job.entailment)


def _read_test_set(
    job: Evaluation, domain: Domain, outside: bool, known: Sequence[ReasoningRecord], unpack_dir: str
) -> list[ReasoningRecord]:
    """All records of the file, with a warning about those that were used for training."""
    assert job.test_set is not None
    if not Path(job.test_set).exists():
        raise ConfigError(f"--test_set {job.test_set}: no such file")
    read = partial(read_records, candidates=domain.candidates, image_root=job.image_root, allow_outside=outside)
    records = list(read(job.test_set, unpack_dir=unpack_dir))
    asked = {(record.image, record.instruction, record.steps) for record in records}
    seen = len({key for record in known if (key := (record.image, record.instruction, record.steps)) in asked})
    if seen and job.world.rank == 0:
        print(
            f"{seen} of the {len(records)} records of {job.test_set} were used for training; their "
            f"results say nothing about new records"
        )
    return records


def _tell_unknown_answers(job: Evaluation, records: Sequence[ReasoningRecord], closed: Sequence[str]) -> None:
    unknown = [r for r in records if closed and r.default_candidates == tuple(closed) and set(r.answer) - set(closed)]
    if unknown and job.world.rank == 0:
        print(
            f"{len(unknown)} of the {len(records)} records of {job.test_set} have an answer that the training data do "
            f"not have (record {unknown[0].record_id}: {quote(', '.join(unknown[0].answer))}); they count as wrong, "
            f"because the model chooses among {len(closed)} answers"
        )


def _some(records: Sequence[ReasoningRecord], count: int | None) -> list[ReasoningRecord]:
    """At most `count`, the same ones every time."""
    if count is None or count >= len(records):
        return list(records)
    return [records[int(index)] for index in sorted(np.random.default_rng(0).permutation(len(records))[:count])]

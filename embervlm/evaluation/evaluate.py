"""Checkpoint x split -> one JSON file: the metrics, what they are compared with, and the chains."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.data.collate import validator_inputs
from embervlm.data.dataset import encode_reasoning
from embervlm.data.facts import fact_domains
from embervlm.data.images import PictureCache
from embervlm.data.negatives import NEGATIVE_KINDS, PairMaker
from embervlm.data.records import DataError, ReasoningRecord, read_records
from embervlm.data.samples import known_boxes
from embervlm.data.sources import source_files
from embervlm.data.splits import SPLITS
from embervlm.data.store import RecordStore, prepare
from embervlm.data.tokenizer import DIRECT_PROMPT
from embervlm.evaluation.calibration import calibration, confidences
from embervlm.evaluation.explain import attention_by_thing, explain_chains, looked_at
from embervlm.evaluation.faithfulness import NUM_SAMPLES, Faithfulness
from embervlm.evaluation.own_steps import OwnSteps
from embervlm.evaluation.sharing import Journal, Task, raise_together, share_out
from embervlm.judge.backends import EMBEDDED
from embervlm.judge.metrics import (
    ChainScorer,
    balanced_accuracy,
    bootstrap_interval,
    compare_with_targets,
    final_answer_accuracy,
    is_right,
    per_candidate_precision_recall,
)
from embervlm.judge.reading import ChainContext
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import Decoding, generate_from_visual
from embervlm.progress import progress_bar
from embervlm.ranking import CHAIN_METRICS, RANKABLE
from embervlm.report.table import cut_off_lines
from embervlm.version import __version__
from embervlm.world import World

BATCH_SIZE = 64
MAX_REFERENCE_RECORDS = 20_000
"""Training records, evenly spaced, from which the metrics learn orders and facts."""
CALIBRATION_RECORDS = 200
"""Of the val split, to fit the temperature of `confidence` on."""
EXPLAIN_BATCH = 16
COMPARISONS = {
    "direct": "stage4_direct_accuracy",
    "swapped": "swapped_image_accuracy",
    "blind": "blind_accuracy",
    "same_samples": "no_reasoning_accuracy",
    "same_time": "no_reasoning_same_time_accuracy",
}
"""What else is asked, and the name of its accuracy."""
METRICS = (*RANKABLE, *COMPARISONS.values())


@dataclass(kw_only=True)
class EvalData:
    """Records of one split, and what the metrics learn from the training split."""

    records: list[ReasoningRecord]
    pictures: PictureCache
    scorer: ChainScorer | None
    """On process 0, which alone scores."""
    domains: Mapping[str, frozenset[str]]
    val: list[ReasoningRecord] = field(default_factory=list)
    """Where the split is another one: records to calibrate on."""


@dataclass(kw_only=True)
class Evaluation:
    """What to evaluate, and where the data is. Everything left out comes from the checkpoint's own record."""

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
    """Also the baselines, no picture and the swapped picture, not only the chains."""
    explained: int = 0
    """Samples that also get their attention and the validator's scores."""
    faithfulness_samples: int = NUM_SAMPLES
    """Records of which it is also asked whether the answer comes from the chain; 0, or without `compare`: none."""
    progress: bool = True
    world: World | None = None
    """The processes that share the work; None is this one alone."""
    similarity: str = EMBEDDED
    entailment: str = EMBEDDED
    """Who judges the chains: `embedded`, or the id or folder of a model."""
    partial: Path | None = None
    """Folder that keeps finished batches until the evaluation is written."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"--num_samples {self.num_samples}: there is nothing to evaluate; give at least 1")
        if self.decoding.candidates:
            raise ConfigError("decoding.candidates: an evaluation takes each record's own; write them into the records")
        if self.explained < 0:
            raise ConfigError(f"--explain_samples {self.explained}: give 0 or more")
        if self.faithfulness_samples < 0:
            raise ConfigError(f"--faithfulness_samples {self.faithfulness_samples}: give 0 or more")


def evaluate_checkpoint(checkpoint: str | Path, split: str = "val", **options: Any) -> dict[str, Any]:
    """Evaluate `checkpoint` on `split`, write `<checkpoint>/evals/<split>.json`, and return what it holds.

    The result is what `select_best` reads. See `Evaluation` for the options.
    """
    options.setdefault("compare", False)
    job = Evaluation(checkpoint=Path(checkpoint), split=split, **options)
    result, _ = evaluate(job)
    if job.world is None or job.world.rank == 0:
        keep_in_checkpoint(job, result, samples=None, whole=True)
        if warning := cut_off_lines(result):
            print(f"{checkpoint}: {warning}", file=sys.stderr)  # select_best's output is one line
    return result


def keep_in_checkpoint(
    job: Evaluation, result: dict[str, Any], samples: list[dict[str, Any]] | None, *, whole: bool
) -> None:
    """Leave in the checkpoint what others look for there; a warning where it cannot be written.

    That is the temperature that `from_pretrained` takes and, of a `whole` evaluation, the file of its split with its
    samples, which `select_best` and the report read.
    """
    path = run_dir.eval_path(job.checkpoint, job.split)
    samples_file = path.with_name(f"{path.stem}_samples.json")
    try:
        if (found := result["calibration"]) is not None:
            kept = {name: found[name] for name in ("split_fitted", "num_fitted", "temperature")}
            run_dir.write_json_atomic(run_dir.calibration_path(job.checkpoint), kept)
        if whole:
            run_dir.write_json_atomic(path, result)
            with run_dir.naming_unwritten(samples_file):
                samples_file.unlink(missing_ok=True)  # of an evaluation before
            if samples is not None:
                run_dir.write_json_atomic(samples_file, samples)
    except run_dir.WriteError as error:
        print(f"warning: nothing is kept in the checkpoint: {error}", file=sys.stderr)


def evaluate(job: Evaluation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result (on every process), and on process 0 one sample per record: picture, chain, answers and scores."""
    world = job.world or World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    models = _Models(world.device)
    model = models(job.checkpoint)
    data = load_eval_data(job, model.config.image_size)
    refuse_long_questions(model, [*data.records, *data.val])
    passes = _passes(job, data, reasons=model.config.stage != 3)
    journal = Journal(job.partial, _digest(job, passes), world)
    quiet = not job.progress or world.rank > 0
    bar = progress_bar(total=0, unit="record", desc=f"evaluate {job.split}", disable=quiet)
    tasks = [task for name in passes for task in _answer_tasks(name, passes[name], data.pictures)]
    answers = share_out([*tasks, *_validator_tasks(model, job.checkpoint, data)], models, world, journal, bar)
    results = {name: _in_order(name, passes[name], answers) for name in passes}
    chains = results["chains"]
    reasons = model.config.stage != 3
    faithfulness = own_steps = None
    later = _explain_tasks(job, data, chains) if reasons else []

    def look(model: EmberVLM, records: Sequence[ReasoningRecord]) -> tuple[torch.Tensor, torch.Tensor]:
        return see(model, data.pictures, records)

    if reasons and job.compare:
        own_steps = OwnSteps(data.records, chains, data.domains)
        later += own_steps.tasks(job.checkpoint, look, job.decoding)
    if reasons and job.compare and job.faithfulness_samples:
        own = [chain["reasoning_steps"] for chain in chains]
        faithfulness = Faithfulness(data.records, own, job.faithfulness_samples)
        later += faithfulness.tasks(job.checkpoint, look, job.decoding)
    bar.close()
    # how much there is to ask of the chains is known now: one bar for both would go to its end and back
    bar = progress_bar(total=0, unit="record", desc=f"ask about {job.split}", disable=quiet or not later)
    explained = share_out(later, models, world, journal, bar)
    bar.close()
    result: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    failed: Exception | None = None
    if world.rank == 0:
        try:
            samples = [_score(record, found, data) for record, found in zip(data.records, chains)]
            details = [detail for key in sorted(explained) if key[0] == "explained" for detail in explained[key]]
            _complete(samples, data, results, details)
            result = _result(job, model, data, samples, results, passes, answers)
            result["own_steps"] = None if own_steps is None else own_steps.result(explained)
            if faithfulness is not None:
                swapped = result["metrics"]["swapped_image_accuracy"]
                result["faithfulness"] = {"swapped_picture_accuracy": swapped, **faithfulness.result(explained)}
        except Exception as error:  # the other processes wait for the result
            failed = error
    raise_together(world, failed)
    return world.broadcast(result), samples


# -- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One way of asking: which model, which records with which pictures, and for what."""

    checkpoint: Path
    records: Sequence[ReasoningRecord]
    decoding: Decoding

    @property
    def batches(self) -> list[list[int]]:
        """Places of the records; those of like length are answered together."""
        own = self.records
        order = sorted(range(len(own)), key=lambda i: (len(own[i].steps), len(own[i].instruction)))
        return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def _passes(job: Evaluation, data: EvalData, reasons: bool) -> dict[str, _Pass]:
    def asked(records: Sequence[ReasoningRecord], checkpoint: Path = job.checkpoint, **decoding: Any) -> _Pass:
        settings = dataclasses.replace(job.decoding, **decoding)
        return _Pass(checkpoint=checkpoint, records=records, decoding=settings)

    out = {"chains": asked(data.records)}
    if not job.compare:
        return out
    if data.val and reasons:
        out["calibration"] = asked(data.val)
    out["direct"] = asked(data.records, form="direct")
    if swapped := swap_pictures(data.records):
        out["swapped"] = asked(swapped)
    if any(record.image for record in data.records):
        out["blind"] = asked([dataclasses.replace(record, image=None) for record in data.records])
    for name in ("same_samples", "same_time"):
        if (path := baseline_of(job.checkpoint, name)) is not None:
            out[name] = asked(data.records, path, form="direct")
    return out


def _answer_tasks(name: str, asked: _Pass, pictures: PictureCache) -> list[Task]:
    def task(number: int, batch: list[int]) -> Task:
        records = [asked.records[index] for index in batch]
        return Task(
            name=name,
            number=number,
            checkpoint=asked.checkpoint,
            num_records=len(batch),
            run=lambda model: answer(model, pictures, records, asked.decoding),
        )

    return [task(number, batch) for number, batch in enumerate(asked.batches)]


def _in_order(name: str, asked: _Pass, answers: Mapping[tuple[str, int], Any]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [{} for _ in asked.records]
    for number, batch in enumerate(asked.batches):
        for index, found in zip(batch, answers[name, number]):
            out[index] = found
    return out


def refuse_long_questions(model: EmberVLM, records: Sequence[ReasoningRecord]) -> None:
    """DataError with every record whose question leaves the language model no room for an answer."""
    room, tokenizer, visual = model.text_room, model.tokenizer, model.num_visual_tokens
    if room is None or tokenizer is None:
        return
    asked = tokenizer.encode_many([record.instruction + DIRECT_PROMPT for record in records])
    problems = [
        f"record {record.record_id}: instruction: {len(ids):,} tokens and {visual:,} of the picture, and the language "
        f"model reads {room + visual:,} with the answer; shorten it, or leave the record out"
        for record, ids in zip(records, asked)
        if len(ids) + 1 >= room
    ]
    if problems:
        raise DataError.of(problems)


def answer(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord], decoding: Decoding
) -> list[dict[str, Any]]:
    """Model output for a batch of records."""
    visual, seen = see(model, pictures, records)
    own = [record.candidates for record in records]
    return generate_from_visual(model, visual, seen, [record.instruction for record in records], decoding, own)


@torch.inference_mode()
def see(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual tokens of the records' pictures, and which have one."""
    model.eval()
    device = model.projection.norm.weight.device
    size = model.config.image_size
    blank = np.zeros((size, size, 3), dtype=np.uint8)
    pixels = np.stack([pictures[record.image] if record.image else blank for record in records])
    mask = torch.tensor([record.image is not None for record in records], device=device)
    return model.see(model.normalise(torch.from_numpy(pixels).to(device))), mask


class _Models:
    """Loaded models, by checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._loaded = device, dict[Path, EmberVLM]()

    def __call__(self, checkpoint: Path) -> EmberVLM:
        if checkpoint not in self._loaded:
            self._loaded[checkpoint] = load_model(checkpoint, self._device)
        return self._loaded[checkpoint]


def load_model(checkpoint: Path, device: torch.device | None = None) -> EmberVLM:
    model = EmberVLM.from_pretrained(checkpoint)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device)  # type: ignore[no-any-return, arg-type]


# -- data ------------------------------------------------------------------------------------------------------------


def load_eval_data(job: Evaluation, image_size: int) -> EvalData:
    """Records of the split, with what the metrics take from the training split."""
    if job.split not in SPLITS:
        raise ConfigError(f"--split {job.split}: there are {', '.join(SPLITS)}")
    made_with = run_dir.trained_with(job.checkpoint)
    path = named = job.reasoning_data or made_with.get("reasoning_data")
    outside = bool(made_with.get("allow_outside")) if job.allow_outside is None else job.allow_outside
    if path and not all(file.exists() for file in source_files(path) or [Path(path)]):
        path = None
    if not path and job.test_set is None:
        raise ConfigError(
            f"{job.checkpoint}: its data {named or '(not recorded)'} is not there; name the file with --reasoning_data"
        )
    cache = Path(made_with["output_dir"]) / "cache" if made_with.get("output_dir") else None
    root = (None if job.test_set else job.image_root) or made_with.get("image_root")
    with tempfile.TemporaryDirectory() as elsewhere:
        store = prepare(path, elsewhere, ready_in=cache, image_root=root, allow_outside=outside) if path else None
        return _eval_data(job, store, outside, job.test_set or path or "", image_size, elsewhere)


def _eval_data(
    job: Evaluation, store: RecordStore | None, outside: bool, path: str, image_size: int, unpack_dir: str
) -> EvalData:
    splits: dict[str, Sequence[ReasoningRecord]] = {name: store.split(name) if store else [] for name in SPLITS}
    train = splits["train"]
    if job.test_set is not None:
        splits[job.split] = _read_test_set(job, outside, known=train, unpack_dir=unpack_dir)
    if not splits[job.split]:
        raise ConfigError(f"{path}: the {job.split} split is empty; it has no record to evaluate")
    records = _some(splits[job.split], job.num_samples)
    reference = list(train[:: -(-len(train) // MAX_REFERENCE_RECORDS)]) if train else records
    domains = fact_domains([*reference, *records])
    val = _some(splits["val"], CALIBRATION_RECORDS) if job.compare and job.split != "val" else []
    return EvalData(
        records=records,
        pictures=PictureCache([r.image for r in (*records, *val) if r.image], image_size),
        scorer=_scorer(job, reference, domains),
        domains=domains,
        val=val,
    )


def _scorer(
    job: Evaluation, reference: Sequence[ReasoningRecord], domains: Mapping[str, frozenset[str]]
) -> ChainScorer | None:
    """The judge, fitted where it is needed: on process 0."""
    world = job.world or World(0, 1, torch.device("cpu"))
    found, failed = None, None
    if world.rank == 0:
        try:
            chains = [record.steps for record in reference if record.steps]
            found = ChainScorer.fit(chains, domains, similarity=job.similarity, entailment=job.entailment)
        except Exception as error:  # the other processes wait to hear
            failed = error
    raise_together(world, failed)
    return found


def _read_test_set(
    job: Evaluation, outside: bool, known: Sequence[ReasoningRecord], unpack_dir: str
) -> list[ReasoningRecord]:
    """All records of the file, with a warning of those that were trained on."""
    assert job.test_set is not None
    if not Path(job.test_set).exists():
        raise ConfigError(f"--test_set {job.test_set}: no such file")
    records = list(read_records(job.test_set, image_root=job.image_root, allow_outside=outside, unpack_dir=unpack_dir))
    asked = {(record.image, record.instruction, record.steps) for record in records}
    seen = len({key for record in known if (key := (record.image, record.instruction, record.steps)) in asked})
    if seen and (job.world is None or job.world.rank == 0):
        print(
            f"{seen} of the {len(records)} records of {job.test_set} were trained on; they say nothing about new ones"
        )
    return records


def _some(records: Sequence[ReasoningRecord], count: int | None) -> list[ReasoningRecord]:
    """At most `count`, the same ones every time."""
    if count is None or count >= len(records):
        return list(records)
    return [records[int(index)] for index in sorted(np.random.default_rng(0).permutation(len(records))[:count])]


def baseline_of(checkpoint: Path, name: str) -> Path | None:
    """The no-reasoning baseline `name` of the run that `checkpoint` belongs to, where it has been trained."""
    config = run_dir.trained_with(checkpoint)
    outputs = [checkpoint.absolute().parents[2]] if len(checkpoint.absolute().parents) > 2 else []  # of a moved run too
    outputs += [Path(config["output_dir"])] if "output_dir" in config else []
    paths = [run_dir.checkpoint_path(output / "baseline" / name, None) for output in outputs]
    return next((path for path in paths if (path / run_dir.COMPLETE).exists()), None)


def swap_pictures(records: Sequence[ReasoningRecord]) -> list[ReasoningRecord]:
    """The same questions, each with the picture of another record whose picture is another scene."""
    with_picture = [record for record in records if record.image]
    out = []
    for index, record in enumerate(with_picture):
        for shift in range(1, len(with_picture)):
            other = with_picture[(index + shift * 7919) % len(with_picture)]
            if _scene(other) != _scene(record):
                out.append(dataclasses.replace(record, image=other.image))
                break
    return out


def _scene(record: ReasoningRecord) -> str:
    return str(record.metadata.get("split_group") or record.image)


def _digest(job: Evaluation, passes: Mapping[str, _Pass]) -> str:
    """Of all that the answers depend on: weights, records, pictures by name, decoding."""
    about: list[Any] = [run_dir.EVAL_FORMAT, __version__, BATCH_SIZE, job.explained, job.faithfulness_samples]
    for name, asked in passes.items():
        manifest = asked.checkpoint / run_dir.COMPLETE
        files = sorted(path for path in asked.checkpoint.iterdir() if path.is_file())
        weights = (
            manifest.read_text("utf-8")
            if manifest.exists()
            else [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        )
        records = [(r.record_id, r.image, r.instruction, r.steps, r.answer) for r in asked.records]
        about.append([name, str(asked.checkpoint), weights, records, dataclasses.asdict(asked.decoding)])
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


# -- what comes out --------------------------------------------------------------------------------------------------


def _score(record: ReasoningRecord, result: Mapping[str, Any], data: EvalData) -> dict[str, Any]:
    context = ChainContext(
        instruction=record.instruction,
        facts=record.metadata.get("facts") or {},
        domains=data.domains,
        reference_steps=record.steps,
        step_types=record.metadata.get("step_types") or (),
        answer=frozenset(result["answer_set"]),
        gold_answer=frozenset(record.answer),
        candidates=frozenset(record.candidates),
    )
    assert data.scorer is not None
    scores = data.scorer.score(result["reasoning_steps"], context)
    scores["reasons"] = [*cut_off_reasons(result), *scores["reasons"]]
    boxes = known_boxes(record.metadata)
    return {
        "id": record.record_id,
        "image": record.image,
        "instruction": record.instruction,
        "complexity": record.metadata.get("complexity"),
        "question_kind": record.metadata.get("question_kind"),
        "gold_steps": list(record.steps),
        "gold_answer": list(record.answer),
        **result,
        "is_open": not record.candidates,
        "correct": is_right(result["answer_set"], record),
        "step_types": list(record.metadata.get("step_types") or ()) or None,
        "completeness_by_type": scores.pop("completeness_by_type"),
        "scores": scores,
        "boxes": [dict(box) for box in boxes] or None,
        "without_reasoning": None,
        "validator_scores": None,
        "attention": None,
        "looked_at": None,
    }


def cut_off_reasons(result: Mapping[str, Any]) -> list[str]:
    """What to say of a text that a limit cut off."""
    limits = {"steps": "max_reasoning_steps", "tokens": "max_new_tokens"}
    return [f"the text is cut off by {limits[result['cut_off']]}"] if result.get("cut_off") else []


def _complete(
    samples: list[dict[str, Any]],
    data: EvalData,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    details: Sequence[Mapping[str, Any]],
) -> None:
    """Beside each sample what the baseline answered, and for the first ones what the chain looked at."""
    for sample, record, direct in zip(samples, data.records, results.get("same_samples", ())):
        right = is_right(direct["answer_set"], record)
        sample["without_reasoning"] = {"answer_set": direct["answer_set"], "correct": right}
    for sample, record, detail in zip(samples, data.records, details):
        sample |= detail
        sample["looked_at"] = looked_at(sample, record.metadata.get("seen") or ())


def _result(
    job: Evaluation,
    model: EmberVLM,
    data: EvalData,
    samples: list[dict[str, Any]],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    passes: Mapping[str, _Pass],
    answers: Mapping[tuple[str, int], Any],
) -> dict[str, Any]:
    values = _values(samples, results, passes)
    metrics = {name: _mean(found) for name, found in values.items()}
    about = run_dir.read_state(job.checkpoint)
    calibrated = _calibrate(job, data, samples, results)
    closed = [sample for sample in samples if not sample["is_open"]]
    return {
        "format": run_dir.EVAL_FORMAT,
        "embervlm_version": __version__,
        "checkpoint": str(job.checkpoint),
        "step": about.get("step"),
        "phase": about.get("settings", {}).get("phase"),
        "split": job.split,
        "num_samples": len(samples),
        "decoding": dataclasses.asdict(job.decoding.for_model(model.config)),
        "backend": data.scorer.backends.record if data.scorer else None,
        "metrics": metrics,
        "intervals": {name: list(bootstrap_interval(found)) for name, found in values.items() if found},
        "gains": gains(values),
        "targets": compare_with_targets(metrics),
        "accuracy_by_complexity": {name: row["reasoning"] for name, row in by(samples, "complexity").items()},
        "impact_by_complexity": by(samples, "complexity"),
        "accuracy_by_question_kind": by(samples, "question_kind"),
        "per_candidate": per_candidate_precision_recall(
            [s["answer_set"] for s in closed], [s["gold_answer"] for s in closed]
        ),
        "cut_off": {name: _mean([float(bool(r["cut_off"])) for r in found]) for name, found in results.items()},
        "calibration": calibrated,
        "faithfulness": None,
        "validator": _validator_accuracy(answers),
        "own_steps": None,
        "attention": attention_by_thing([sample["looked_at"] for sample in samples]),
    }


def _values(
    samples: Sequence[Mapping[str, Any]],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    passes: Mapping[str, _Pass],
) -> dict[str, list[float]]:
    """Each metric's value for every record; [] where it was not measured."""
    values: dict[str, list[float]] = {name: [_finite(s["scores"][name]) for s in samples] for name in CHAIN_METRICS}
    values["final_answer_accuracy"] = [float(s["correct"]) for s in samples]
    for name, other in (("head_accuracy", "gold_answer"), ("head_agreement", "answer_set")):
        values[name] = [final_answer_accuracy(s.get("head_answer", ()), s[other]) for s in samples if not s["is_open"]]
    values["unparseable_share"] = [float(not s["reasoning_steps"] or not s["answer_set"]) for s in samples]
    values["cut_off_share"] = [float(bool(s["cut_off"])) for s in samples]
    for name, metric in COMPARISONS.items():
        asked = passes[name].records if name in passes else ()
        found = results.get(name, ())
        values[metric] = [float(is_right(r["answer_set"], record)) for r, record in zip(found, asked)]
    return values


def _finite(value: float) -> float:
    """A score that is no number counts as 0: it is a fault of the chain or of the scorer, and is never skipped."""
    return float(value) if np.isfinite(value) else 0.0


def gains(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """How much more often the chains' answer is right than each comparison's, record by record."""
    final = values["final_answer_accuracy"]
    out = {}
    for metric in COMPARISONS.values():
        other = values[metric]
        if other and len(other) == len(final):
            difference = [a - b for a, b in zip(final, other)]
            out[metric] = {"gain": _mean(difference), "interval": list(bootstrap_interval(difference))}
    return out


def _calibrate(
    job: Evaluation, data: EvalData, samples: list[dict[str, Any]], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any] | None:
    """Fit on val, and set the samples' `confidence`."""
    if job.split == "val":
        fitted_on, asked = results["chains"], data.records
    elif "calibration" in results:
        fitted_on, asked = results["calibration"], data.val
    else:
        return None
    right = [is_right(r["answer_set"], record) for r, record in zip(fitted_on, asked)]
    found = calibration(fitted_on, right, results["chains"], [s["correct"] for s in samples])
    if found is not None:
        for sample, sure in zip(samples, confidences(results["chains"], found["temperature"])):
            sample["confidence"] = sure
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def by(samples: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """For each value of `key`: number of records, and accuracy with reasoning and without (None: not measured)."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(str(sample[key]), []).append(sample)
    return {
        name: {
            "num": len(group),
            "reasoning": _mean([float(s["correct"]) for s in group]),
            "no_reasoning": _mean([float(s["without_reasoning"]["correct"]) for s in group if s["without_reasoning"]]),
        }
        for name, group in sorted(groups.items())
    }


# -- validator and attention ------------------------------------------------------------------------------------------


def _validator_tasks(model: EmberVLM, checkpoint: Path, data: EvalData, seed: int = 0) -> list[Task]:
    """The step validator's verdicts on gold steps and on each kind of negative."""
    assert model.tokenizer is not None
    if model.config.stage == 3:
        return []
    samples = encode_reasoning(data.records, model.tokenizer, model.vision_encoder.grid)
    maker = PairMaker(data.records, samples, model.tokenizer)

    def judge(start: int) -> Callable[[EmberVLM], dict[str, list[bool]]]:
        return lambda judging: _verdicts(judging, data, maker, samples[start : start + BATCH_SIZE], start, seed)

    return [
        Task(name="validator", number=number, checkpoint=checkpoint, num_records=0, run=judge(start))
        for number, start in enumerate(range(0, len(samples), BATCH_SIZE))
    ]


@torch.inference_mode()
def _verdicts(
    model: EmberVLM, data: EvalData, maker: PairMaker, part: Sequence[Any], start: int, seed: int
) -> dict[str, list[bool]]:
    visual, seen = see(model, data.pictures, [data.records[sample.record] for sample in part])
    pairs = [
        (row, sample, pair)
        for row, sample in enumerate(part)
        for pair in maker.pairs(sample, random.Random(f"{seed}:{start + row}"), NEGATIVE_KINDS)
    ]
    pairs.sort(key=lambda found: sum(map(len, (found[1].prompt, found[2].previous, found[2].step))))
    out: dict[str, list[bool]] = {}
    for begin in range(0, len(pairs), BATCH_SIZE):  # of like lengths, so that little is padding
        some = pairs[begin : begin + BATCH_SIZE]
        rows = torch.tensor([row for row, _, _ in some], device=visual.device)
        texts = [(sample.prompt, pair.previous, pair.step) for _, sample, pair in some]
        inputs = {key: value.to(visual.device) for key, value in validator_inputs(texts, model.max_pair_tokens).items()}
        logits = model.judge_steps(visual[rows], seen[rows], **inputs)
        for (_, _, pair), logit in zip(some, logits.tolist()):
            out.setdefault(pair.kind, []).append(logit > 0)
    return out


def _validator_accuracy(answers: Mapping[tuple[str, int], Any]) -> dict[str, float]:
    """Balanced accuracy of the step validator for each kind of negative."""
    predictions: dict[str, list[bool]] = {}
    for (name, _), found in answers.items():
        for kind, verdicts in found.items() if name == "validator" else ():
            predictions.setdefault(kind, []).extend(verdicts)
    valid = predictions.get("valid", [])
    return {
        kind: balanced_accuracy([True] * len(valid) + [False] * len(found), valid + found)
        for kind in NEGATIVE_KINDS
        if (found := predictions.get(kind, []))
    }


def _explain_tasks(job: Evaluation, data: EvalData, chains: Sequence[Mapping[str, Any]]) -> list[Task]:
    def explain(places: range) -> Callable[[EmberVLM], list[dict[str, Any]]]:
        records = [data.records[place] for place in places]
        steps = [chains[place]["reasoning_steps"] for place in places]
        return lambda model: explain_chains(
            model, *see(model, data.pictures, records), [record.instruction for record in records], steps
        )

    last = min(job.explained, len(data.records))
    starts = range(0, last, EXPLAIN_BATCH)
    return [
        Task(
            name="explained",
            number=number,
            checkpoint=job.checkpoint,
            num_records=0,
            run=explain(range(start, min(start + EXPLAIN_BATCH, last))),
        )
        for number, start in enumerate(starts)
    ]

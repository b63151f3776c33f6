"""Checkpoint x split -> one JSON file: the metrics, what they are compared with, and the chains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.data.claims import fact_domains
from embervlm.data.collate import validator_inputs
from embervlm.data.dataset import CAPTION_PROMPT, encode_reasoning
from embervlm.data.images import PictureCache
from embervlm.data.negatives import NEGATIVE_KINDS, PairMaker
from embervlm.data.records import ROBOTS, ReasoningRecord, read_records
from embervlm.data.splits import SPLITS, split_records
from embervlm.evaluation.metrics import (
    ChainContext,
    ChainScorer,
    balanced_accuracy,
    compare_with_targets,
    final_answer_accuracy,
)
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import Decoding, generate_from_visual
from embervlm.progress import progress_bar

BATCH_SIZE = 64
EVAL_FORMAT = 1
CHAIN_METRICS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "adjacent_similarity")


@dataclass(kw_only=True)
class EvalData:
    """Records of one split, and what the metrics learn from the training split."""

    records: list[ReasoningRecord]
    pictures: PictureCache
    scorer: ChainScorer
    domains: Mapping[str, frozenset[str]]


@dataclass(kw_only=True)
class Evaluation:
    """What to evaluate, and where the data is. Everything left out comes from the checkpoint's own record."""

    checkpoint: Path
    split: str = "test"
    num_samples: int | None = None
    reasoning_data: str | None = None
    image_root: str | None = None
    allow_outside: bool | None = None
    decoding: Decoding = field(default_factory=Decoding)
    compare: bool = True
    """Also the baselines and the swapped picture, not only the chains."""
    progress: bool = True


def evaluate_checkpoint(checkpoint: str | Path, split: str = "val", **options: Any) -> dict[str, Any]:
    """Evaluate `checkpoint` on `split`, write `<checkpoint>/evals/<split>.json`, and return what it holds.

    The result is what `select_best` reads. See `Evaluation` for the options.
    """
    options.setdefault("compare", False)
    result, _ = evaluate(Evaluation(checkpoint=Path(checkpoint), split=split, **options))
    path = run_dir.eval_path(checkpoint, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_dir.write_json_atomic(path, result)
    return result


def evaluate(job: Evaluation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and one sample per record, with picture, chain, answers and scores."""
    model = load_model(job.checkpoint)
    data = load_eval_data(job, model.config.image_size)
    bar = progress_bar(total=0, unit="record", desc=f"evaluate {job.split}", disable=not job.progress)
    results = _answer(model, data, data.records, job.decoding, bar)
    samples = [_score(record, result, data) for record, result in zip(data.records, results)]
    metrics: dict[str, float | None] = {name: _mean(s["scores"][name] for s in samples) for name in CHAIN_METRICS}
    metrics["final_answer_accuracy"] = _mean(float(s["correct"]) for s in samples)
    metrics["head_accuracy"] = _mean(
        final_answer_accuracy(s.get("head_answer", ()), s["gold_answer"]) for s in samples
    )  # fmt: skip
    metrics["head_agreement"] = _mean(
        final_answer_accuracy(s.get("head_answer", ()), s["answer_set"]) for s in samples
    )  # fmt: skip
    metrics["unparseable_share"] = _mean(float(not s["reasoning_steps"] or not s["answer_set"]) for s in samples)
    metrics["stage4_direct_accuracy"] = metrics["swapped_image_accuracy"] = None
    metrics["no_reasoning_accuracy"] = metrics["no_reasoning_same_time_accuracy"] = None
    if job.compare:
        direct = dataclasses.replace(job.decoding, form="direct", max_new_tokens=48)
        metrics["stage4_direct_accuracy"] = _accuracy(model, data, data.records, direct, bar)
        swapped = swap_pictures(data.records)
        metrics["swapped_image_accuracy"] = _accuracy(model, data, swapped, job.decoding, bar) if swapped else None
        for key, name in (("no_reasoning_accuracy", "same_samples"), ("no_reasoning_same_time_accuracy", "same_time")):
            if (path := baseline_of(job.checkpoint, name)) is not None:
                metrics[key] = _accuracy(load_model(path), data, data.records, direct, bar)
    bar.close()
    result = {
        "format": EVAL_FORMAT,
        "checkpoint": str(job.checkpoint),
        "split": job.split,
        "num_samples": len(samples),
        "decoding": dataclasses.asdict(job.decoding),
        "backend": data.scorer.backends.record,
        "metrics": metrics,
        "targets": compare_with_targets(metrics),
        "accuracy_by_complexity": by_complexity(samples),
        "validator": validator_accuracy(model, data),
    }
    return result, samples


def load_model(checkpoint: Path) -> EmberVLM:
    model = EmberVLM.from_pretrained(checkpoint)
    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[no-any-return, arg-type]


def load_eval_data(job: Evaluation, image_size: int) -> EvalData:
    """Records of the split, with what the metrics take from the training split."""
    if job.split not in SPLITS:
        raise ConfigError(f"--split {job.split}: there are {', '.join(SPLITS)}")
    made_with = _training_config(job.checkpoint)
    path = job.reasoning_data or made_with.get("reasoning_data")
    if not path or not Path(path).exists():
        raise ConfigError(
            f"{job.checkpoint}: its data {path or '(not recorded)'} is not there; name the file with --reasoning_data"
        )
    splits = split_records(read_records(
        path,
        image_root=job.image_root or made_with.get("image_root"),
        allow_outside=bool(made_with.get("allow_outside")) if job.allow_outside is None else job.allow_outside,
    ))  # fmt: skip
    records = list(splits[job.split])
    if not records:
        raise ConfigError(f"{path}: the {job.split} split is empty; it has no record to evaluate")
    if job.num_samples is not None and job.num_samples < len(records):
        chosen = np.random.default_rng(0).permutation(len(records))[: max(1, job.num_samples)]
        records = [records[index] for index in sorted(chosen)]
    reference = splits["train"] or records
    domains = fact_domains([*reference, *records])
    return EvalData(
        records=records,
        pictures=PictureCache([r.image for r in records if r.image], image_size),
        scorer=ChainScorer.fit([r.steps for r in reference], domains),
        domains=domains,
    )


def _training_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    return run_dir.read_json(path)["settings"]["config"] if path.exists() else {}


def baseline_of(checkpoint: Path, name: str) -> Path | None:
    """The no-reasoning baseline `name` of the run that `checkpoint` belongs to, where it has been trained."""
    config = _training_config(checkpoint)
    if "output_dir" not in config:
        return None
    path = run_dir.checkpoint_path(Path(config["output_dir"]) / "baseline" / name, None)
    return path if (path / "COMPLETE").exists() else None


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


def _answer(
    model: EmberVLM, data: EvalData, records: Sequence[ReasoningRecord], decoding: Decoding, bar: Any
) -> list[dict[str, Any]]:
    """Model output for every record, in its order. Records of like length are answered together."""
    bar.total += len(records)
    order = sorted(range(len(records)), key=lambda i: (len(records[i].steps), len(records[i].instruction)))
    out: list[dict[str, Any]] = [{} for _ in records]
    for start in range(0, len(order), BATCH_SIZE):
        part = order[start : start + BATCH_SIZE]
        visual, seen = see(model, data.pictures, [records[index] for index in part])
        own = [records[index].metadata.get("candidates") or () for index in part]
        answers = generate_from_visual(model, visual, seen, [records[i].instruction for i in part], decoding, own)
        for index, answer in zip(part, answers):
            out[index] = answer
        bar.update(len(part))
    return out


@torch.inference_mode()
def see(
    model: EmberVLM, pictures: PictureCache, records: Sequence[ReasoningRecord]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Visual tokens of the records' pictures, and which have one."""
    model.eval()
    device = model.projection.norm.weight.device
    size = model.config.image_size
    blank = np.zeros((size, size, 3), dtype=np.uint8)
    pixels = np.stack([pictures[record.image] if record.image else blank for record in records])
    mask = torch.tensor([record.image is not None for record in records], device=device)
    return model.see(model.normalise(torch.from_numpy(pixels).to(device))), mask


def _accuracy(
    model: EmberVLM, data: EvalData, records: Sequence[ReasoningRecord], decoding: Decoding, bar: Any
) -> float:
    results = _answer(model, data, records, decoding, bar)
    return _mean(final_answer_accuracy(r["answer_set"], record.answer) for r, record in zip(results, records))


def _score(record: ReasoningRecord, result: Mapping[str, Any], data: EvalData) -> dict[str, Any]:
    context = ChainContext(
        instruction=record.instruction, facts=record.metadata.get("facts") or {}, domains=data.domains,
        reference_steps=record.steps, step_types=record.metadata.get("step_types") or (),
        answer=frozenset(result["answer_set"]), gold_answer=frozenset(record.answer),
        candidates=frozenset(record.metadata.get("candidates") or ROBOTS),
    )  # fmt: skip
    return {
        "id": record.record_id, "image": record.image, "instruction": record.instruction,
        "complexity": record.metadata.get("complexity"), "gold_steps": list(record.steps),
        "gold_answer": list(record.answer), **result,
        "correct": bool(final_answer_accuracy(result["answer_set"], record.answer)),
        "scores": data.scorer.score(result["reasoning_steps"], context),
    }  # fmt: skip


def _mean(values: Any) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0


def by_complexity(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Answer accuracy for each complexity that the records name."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(str(sample["complexity"]), []).append(float(sample["correct"]))
    return {name: _mean(values) for name, values in sorted(groups.items())}


@torch.inference_mode()
def validator_accuracy(model: EmberVLM, data: EvalData, seed: int = 0) -> dict[str, float]:
    """Balanced accuracy of the step validator for each kind of negative, on the gold chains of the split."""
    import random

    assert model.tokenizer is not None
    if model.config.stage == 3:
        return {}
    samples = encode_reasoning(data.records, model.tokenizer, model.vision_encoder.grid, max_length=10**6)
    maker = PairMaker(data.records, samples, model.tokenizer)
    predictions: dict[str, list[bool]] = {}
    for start in range(0, len(samples), BATCH_SIZE):
        part = samples[start : start + BATCH_SIZE]
        visual, seen = see(model, data.pictures, [data.records[s.record] for s in part])
        pairs = [
            (row, sample, pair)
            for row, sample in enumerate(part)
            for pair in maker.pairs(sample, random.Random(f"{seed}:{start + row}"), NEGATIVE_KINDS)
        ]
        rows = torch.tensor([row for row, _, _ in pairs], device=visual.device)
        texts = [(sample.prompt, pair.previous, pair.step) for _, sample, pair in pairs]
        inputs = {key: value.to(visual.device) for key, value in validator_inputs(texts).items()}
        logits = model.judge_steps(visual[rows], seen[rows], **inputs)
        for (_, _, pair), logit in zip(pairs, logits.tolist()):
            predictions.setdefault(pair.kind, []).append(logit > 0)
    valid = predictions.get("valid", [])
    return {
        kind: balanced_accuracy([True] * len(valid) + [False] * len(found), valid + found)
        for kind in NEGATIVE_KINDS
        if (found := predictions.get(kind, []))
    }


def perception_accuracy(model: EmberVLM, data: EvalData) -> dict[str, float]:
    """Share of the scene's facts that the model's caption states rightly, for each fact: can it see?"""
    bar = progress_bar(total=0, disable=True)
    described = [record for record in data.records if record.metadata.get("scene") and record.image]
    asked = [dataclasses.replace(record, instruction=CAPTION_PROMPT) for record in described]
    results = _answer(model, data, asked, Decoding(form="text", max_new_tokens=64), bar)
    right: dict[str, list[float]] = {}
    for record, result in zip(described, results):
        for name, value in record.metadata["scene"].items():
            right.setdefault(name, []).append(float(f"{name} is {value}" in result["text"]))
    return {name: _mean(values) for name, values in right.items()}

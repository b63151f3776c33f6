"""The questions of an evaluation: for the chains, and for the answers that they are compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.data.images import PictureCache
from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.tokenizer import DIRECT_PROMPT
from embervlm.evaluation.batches import BATCH_SIZE, alike, answer, tasks_of
from embervlm.evaluation.eval_data import EvalData, Evaluation
from embervlm.evaluation.sharing import Task
from embervlm.judge.metrics import is_right
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.version import __version__


@dataclass(kw_only=True)
class Pass:
    """One way of asking: which model, which records with which pictures, and for what."""

    checkpoint: Path
    records: Sequence[ReasoningRecord]
    decoding: Decoding
    results: list[dict[str, Any]] = field(default_factory=list)
    """The model's answer to each record, after it was asked."""

    @property
    def right(self) -> list[bool]:
        return [is_right(result["answer_set"], record) for result, record in zip(self.results, self.records)]

    @property
    def batches(self) -> list[Sequence[int]]:
        return alike((len(record.steps), len(record.instruction)) for record in self.records)

    def tasks(self, name: str, pictures: PictureCache) -> list[Task]:
        def run(batch: Sequence[int], model: EmberVLM) -> list[dict[str, Any]]:
            return answer(model, pictures, [self.records[place] for place in batch], self.decoding)

        return tasks_of(name, self.checkpoint, self.batches, run)


def passes_of(job: Evaluation, data: EvalData, reasons: bool) -> dict[str, Pass]:
    def asked(records: Sequence[ReasoningRecord], checkpoint: Path = job.checkpoint, **decoding: Any) -> Pass:
        settings = dataclasses.replace(job.decoding, **decoding)
        return Pass(checkpoint=checkpoint, records=records, decoding=settings)

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


def refuse_long_questions(model: EmberVLM, records: Sequence[ReasoningRecord]) -> None:
    """DataError with every record whose question leaves the language model no room for an answer."""
    room, tokenizer, visual = model.text_room, model.tokenizer, model.num_visual_tokens
    if room is None:
        return
    asked = tokenizer.prompts([record.instruction + DIRECT_PROMPT for record in records])
    problems = [
        f"record {record.record_id}: instruction: {len(ids):,} tokens and {visual:,} of the picture, but the language "
        f"model reads {room + visual:,} with the answer; shorten it, or leave the record out"
        for record, ids in zip(records, asked)
        if len(ids) + 1 >= room
    ]
    if problems:
        raise DataError.of(problems)


def digest_of(job: Evaluation, passes: Mapping[str, Pass]) -> str:
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


class Models:
    """Loaded models, by checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._loaded = device, dict[Path, EmberVLM]()

    def __call__(self, checkpoint: Path) -> EmberVLM:
        if checkpoint not in self._loaded:
            self._loaded[checkpoint] = load_model(checkpoint, self._device)
        return self._loaded[checkpoint]


def load_model(checkpoint: Path, device: torch.device | str = "auto") -> EmberVLM:
    return EmberVLM.from_pretrained(checkpoint, device_map=device)

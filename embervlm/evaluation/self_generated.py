"""Chains that the model writes itself, kept where the answer is right and validator and rules find no fault.

The Stage 4 guide's third source. Sampling several chains and keeping those with the right answer is rejection sampling
as in STaR (Zelikman et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embervlm.config import ConfigError
from embervlm.curate.commands import check_output
from embervlm.curate.teachers.answers import Rejected, checked
from embervlm.curate.teachers.collection import (
    Answer,
    Collection,
    Question,
    finished_record,
    need_input,
    read_questions,
)
from embervlm.data.domain import Domain
from embervlm.data.facts import fact_domains
from embervlm.data.images import PictureCache
from embervlm.data.shard import Shard
from embervlm.evaluation.asked import load_model
from embervlm.evaluation.batches import BATCH_SIZE, chunks, cut_off_reasons, known_of, see
from embervlm.judge.faults import judge_steps
from embervlm.judge.metrics import is_right
from embervlm.model.config import STAGE3
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import check_length, generate_from_visual
from embervlm.model.judging import step_probabilities
from embervlm.progress import progress_bar
from embervlm.words.chain_text import CONCLUSION, format_reasoning
from embervlm.words.claims import conclusion_fault


@dataclass(frozen=True, kw_only=True)
class SelfGeneration:
    """The model that writes, and its settings."""

    checkpoint: Path | None
    """A Stage 4 checkpoint."""
    samples_per_record: int = 4
    """Chains drawn for each question; only the first of equal ones is kept."""
    temperature: float = 0.8
    seed: int = 0
    max_reasoning_steps: int | None = None
    """Maximum number of steps, including the conclusion; None is the maximum of the model's training data."""

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("--source self: needs the model; give its folder with --checkpoint")
        if self.samples_per_record < 1:
            raise ConfigError(f"--samples_per_record {self.samples_per_record}: must be at least 1")
        if self.temperature == 0 and self.samples_per_record > 1:
            raise ConfigError("--temperature 0: all samples would be the same; raise it, or use --samples_per_record 1")


def generate_by_itself(
    settings: SelfGeneration,
    *,
    domain: Domain,
    input_dataset: Path | None,
    output_file: Path,
    num_samples: int,
    image_root: Path | None = None,
    shard: str | None = None,
) -> None:
    """Write the model's own chains for the questions in `input_dataset`; the same call again continues."""
    part = Shard.parse(shard)
    check_output(output_file, num_samples)
    path = need_input(input_dataset, "--source self")
    questions = read_questions(path, domain, image_root=image_root, shard=part, need_answers=True)
    assert settings.checkpoint is not None
    model = load_model(settings.checkpoint)
    if model.config.stage == STAGE3:
        raise ConfigError(f"--checkpoint {settings.checkpoint}: a Stage 3 model has no step validator; use Stage 4")
    begun = {
        "--source": "self",
        "--checkpoint": str(settings.checkpoint),
        "--seed": settings.seed,
        "--shard": str(part),
    }
    wanted = part.share_of(num_samples)
    with Collection(output_file, questions, image_root=image_root or path.parent, settings=begun) as collection:
        _Writer(model, settings, questions).fill(collection, wanted)
        print(f"{len(questions)} questions, {len(collection.accepted)} accepted, {collection.rejections()}")
        print(f"{output_file}: {collection.write(wanted)} records")


class _Writer:
    """The model with the questions that it has to answer."""

    def __init__(self, model: EmberVLM, settings: SelfGeneration, questions: Sequence[Question]) -> None:
        self.model, self.settings, self.questions = model, settings, questions
        self.domains = fact_domains([question.record for question in questions])

    def fill(self, collection: Collection, num_samples: int) -> None:
        """Sample for each question that has not been through, until `num_samples` chains are accepted."""
        bar = progress_bar(total=len(self.questions), desc="own chains", unit="record")
        number = self.settings.samples_per_record
        size = max(1, BATCH_SIZE // number)
        for turn, part in enumerate(chunks(self.questions, size)):
            if len(collection.accepted) >= num_samples:
                break
            rows = [(question, sample) for question in part for sample in range(number)]
            keys = [f"{question.key}:{sample}" for question, sample in rows]
            wanted = [key not in collection.accepted and not collection.num_rejected[key] for key in keys]
            if any(wanted):
                # The batch is drawn whole, so that a continued run draws what an uninterrupted one would have.
                drawn = self._draw(part, seed=self.settings.seed + turn * size)
                collection.add(
                    [
                        self._judged(*row, *found, collection)
                        for row, found, is_wanted in zip(rows, drawn, wanted)
                        if is_wanted
                    ]
                )
            bar.update(len(part))
            bar.set_postfix(accepted=len(collection.accepted), rejected=collection.total_rejected)
        bar.close()

    @torch.inference_mode()
    def _draw(self, questions: Sequence[Question], seed: int) -> list[tuple[dict[str, Any], list[float]]]:
        """For each question its chains, each with the step validator's probabilities of its steps."""
        settings, model, records = self.settings, self.model, [question.record for question in questions]
        number, steps = settings.samples_per_record, settings.max_reasoning_steps
        decoding = Decoding(temperature=settings.temperature, seed=seed, max_reasoning_steps=steps)
        check_length(model, [record.instruction for record in records], decoding)
        paths = [record.image for record in records if record.image]
        pictures = PictureCache(paths, model.config.image_size, fill=model.config.fill)
        visual, seen = (values.repeat_interleave(number, 0) for values in see(model, pictures, records))
        texts = [record.instruction for record in records for _ in range(number)]
        results = generate_from_visual(model, visual, seen, texts, decoding)
        return [
            (result, step_probabilities(model, visual[row, None], seen[row, None], text, result["reasoning_steps"]))
            for row, (text, result) in enumerate(zip(texts, results))
        ]

    def _judged(
        self,
        question: Question,
        sample: int,
        result: Mapping[str, Any],
        followed: Sequence[float],
        collection: Collection,
    ) -> Answer:
        key, gold, steps = f"{question.key}:{sample}", question.record.answer, result["reasoning_steps"]
        reason = self._fault(question, result, followed)
        if not reason and not collection.is_new_chain(key, steps):
            reason = "repeated: the question has this chain already"
        record = None
        if not reason:
            record = finished_record(
                question, sample, source="self_generated", steps=steps, answer=gold, confidence=result["confidence"]
            )
        about = {
            "id": question.record.record_id,
            "text": result["text"],
            "steps": list(steps),
            "gold_answer": list(gold),
        }
        return Answer(key=key, record=record, reason=reason, details=about)

    def _fault(self, question: Question, result: Mapping[str, Any], followed: Sequence[float]) -> str:
        """The reason why the chain is not kept; empty if it is kept."""
        record, steps = question.record, result["reasoning_steps"]
        if reasons := cut_off_reasons(result):
            return f"cut off: {reasons[0]}"
        if not is_right(result["answer_set"], record):
            return f"wrong answer: {result['answer'][:80]} instead of {', '.join(record.answer)}"
        if len(steps) < 2 or not steps[-1].startswith(CONCLUSION):
            return f"incomplete: {len(steps)} steps" + (", no conclusion" if steps else "")
        if other := conclusion_fault(steps[-1], record.answer, record.candidates):
            return f"conclusion: {other}"
        try:
            read = checked({"reasoning": format_reasoning(steps), "answer": list(record.answer)}, question)
            if list(read.steps) != steps:
                return "steps: the text of one contains the beginning of another"
        except Rejected as error:
            return str(error)
        context = known_of(record, self.domains, record.answer)
        for number, fault in enumerate(judge_steps(steps, context), 1):
            if found := fault.reason(context):
                return f"rules: step {number} {found}"
        for number, probability in enumerate(followed, 1):
            if probability <= 0.5:
                return f"step validator: step {number} follows with probability {probability:.2f}"
        return ""

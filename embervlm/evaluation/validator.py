"""Measures whether the step validator distinguishes gold steps from steps that do not follow."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embervlm.data.dataset import encode_reasoning, having_chains
from embervlm.data.negatives import NEGATIVE_KINDS, PairMaker
from embervlm.data.samples import Sample
from embervlm.evaluation.batches import chunks, found_by, tasks_of
from embervlm.evaluation.eval_data import EvalData
from embervlm.evaluation.sharing import Task
from embervlm.judge.metrics import balanced_accuracy
from embervlm.model.config import STAGE3
from embervlm.model.embervlm import EmberVLM
from embervlm.model.judging import judge_texts


def validator_tasks(model: EmberVLM, checkpoint: Path, data: EvalData, seed: int = 0) -> list[Task]:
    """The step validator's verdicts on gold steps and on each kind of negative."""
    if model.config.stage == STAGE3:
        return []
    samples = having_chains(data.records, encode_reasoning(data.records, model.tokenizer, model.grid))
    maker = PairMaker(data.records, samples, model.tokenizer)

    def judge(batch: Sequence[int], judging: EmberVLM) -> dict[str, list[bool]]:
        return _verdicts(judging, data, maker, {place: samples[place] for place in batch}, seed)

    return tasks_of("validator", checkpoint, chunks(range(len(samples))), judge, counted=False)


@torch.inference_mode()
def _verdicts(
    model: EmberVLM, data: EvalData, maker: PairMaker, samples: Mapping[int, Sample], seed: int
) -> dict[str, list[bool]]:
    visual, seen = data.see(model, [data.records[sample.record] for sample in samples.values()])
    pairs = [
        (row, pair, (sample.prompt, pair.previous, pair.step))
        for row, (place, sample) in enumerate(samples.items())
        for pair in maker.pairs(sample, random.Random(f"{seed}:{place}"), NEGATIVE_KINDS)
    ]
    pairs.sort(key=lambda found: sum(map(len, found[2])))
    out: dict[str, list[bool]] = {}
    for some in chunks(pairs):  # of like lengths, so that little is padding
        rows = torch.tensor([row for row, _, _ in some], device=visual.device)
        logits = judge_texts(model, visual[rows], seen[rows], [text for _, _, text in some])
        for (_, pair, _), logit in zip(some, logits.tolist()):
            out.setdefault(pair.kind, []).append(logit > 0)
    return out


def validator_accuracy(answers: Mapping[tuple[str, int], Any]) -> dict[str, float]:
    """Balanced accuracy of the step validator for each kind of negative."""
    predictions: dict[str, list[bool]] = {}
    for found in found_by("validator", answers):
        for kind, verdicts in found.items():
            predictions.setdefault(kind, []).extend(verdicts)
    valid = predictions.get("valid", [])
    return {
        kind: balanced_accuracy([True] * len(valid) + [False] * len(found), valid + found)
        for kind in NEGATIVE_KINDS
        if (found := predictions.get(kind, []))
    }

"""Does the step validator know the model's own mistakes, and does attention rest on what a step reads?

    python benchmarks/own_chains.py --checkpoint outputs/quickstart/stage4/phase2/checkpoint-final --split test

Prints what `embervlm evaluate` reports under `own_steps` and `attention`, over as many records and at the temperature
that are asked for, with the scores' quantiles: whether they tell steps apart at all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import REPOSITORY  # noqa: F401

from embervlm.data.samples import known_boxes
from embervlm.evaluation import own_steps
from embervlm.evaluation.asked import load_model
from embervlm.evaluation.batches import BATCH_SIZE, answer
from embervlm.evaluation.eval_data import EvalData, Evaluation, load_eval_data
from embervlm.evaluation.explain import attention_by_thing, explain_chains, looked_at
from embervlm.evaluation.own_steps import OwnSteps
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM

QUANTILES = (0, 0.01, 0.05, 0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--reasoning_data", help="default: the data that the checkpoint was trained with")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=own_steps.TEMPERATURE)
    parser.add_argument("--output_file", type=Path)
    args = parser.parse_args()
    own_steps.TEMPERATURE = args.temperature
    model = load_model(args.checkpoint)
    job = Evaluation(
        checkpoint=args.checkpoint,
        split=args.split,
        num_samples=args.num_samples,
        compare=False,
        reasoning_data=args.reasoning_data,
    )
    data = load_eval_data(job, model.config.image_size, tuple(model.config.candidates), model.config.fill)
    chains: list[dict[str, Any]] = []
    for start in range(0, len(data.records), BATCH_SIZE):
        chains += answer(model, data.pictures, data.records[start : start + BATCH_SIZE], Decoding())
    asked = OwnSteps(data.records, chains, data.domains, num_samples=args.num_samples)
    done = {}
    for task in asked.tasks(args.checkpoint, data.see, Decoding()):
        done[task.key] = task.run(model)
    found: dict[str, Any] = {
        "own_steps": asked.result(done),
        "attention": attention_by_thing(looks(model, data, chains)),
    }
    for name in ("greedy", "drawn"):
        scores = [score for part in done.values() for _, scores, _ in part[name] for score in scores]
        found[f"{name}_score_quantiles"] = np.quantile(scores, QUANTILES).round(4).tolist()
    right = [set(chain["answer_set"]) == set(record.answer) for record, chain in zip(data.records, chains)]
    found["final_answer_accuracy"] = float(np.mean(right))
    print(json.dumps(found, indent=1))
    if args.output_file:
        args.output_file.write_text(json.dumps(found, indent=1), encoding="utf-8")


def looks(model: EmberVLM, data: EvalData, chains: list[dict[str, Any]]) -> list[list[dict[str, list[float]]] | None]:
    """Of each greedy chain what its steps looked at."""
    out = []
    for start in range(0, len(chains), BATCH_SIZE):
        records = data.records[start : start + BATCH_SIZE]
        steps = [chain["reasoning_steps"] for chain in chains[start : start + BATCH_SIZE]]
        questions = [record.instruction for record in records]
        for record, found in zip(records, explain_chains(model, *data.see(model, records), questions, steps)):
            sample = {**found, "boxes": known_boxes(record.metadata)}
            out.append(looked_at(sample, record.metadata.get("seen") or ()))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

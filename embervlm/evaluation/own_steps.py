"""Does the step validator know the model's own mistakes from its own valid steps?

Greedy chains hold few mistakes, so chains are also drawn. A step is wrong where it contradicts what is known of
the record (`judge_steps`); steps behind a chain's first wrong one are not asked about, since they may follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from embervlm.data.records import ReasoningRecord
from embervlm.evaluation.batches import See, chunks, found_by, known_of, mean, tasks_of
from embervlm.evaluation.explain import explain_chains
from embervlm.evaluation.sharing import Key, Task
from embervlm.judge.faults import judge_steps
from embervlm.judge.metrics import balanced_accuracy, is_right
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import generate_from_visual

NUM_SAMPLES = 200
"""Number of records whose chains are tested."""
TEMPERATURE = 1.0
"""Of the chains that are drawn."""
BATCH_SIZE = 50
VALID = 0.5
"""A step with a higher score passes, for `verify_reasoning` too."""


class OwnSteps:
    """The validator tests of one evaluation, as tasks that any process can do, and their results."""

    def __init__(
        self,
        records: Sequence[ReasoningRecord],
        chains: Sequence[Mapping[str, Any]],
        domains: Mapping[str, frozenset[str]],
        num_samples: int = NUM_SAMPLES,
    ) -> None:
        """`chains`: what the model answered to each of `records`."""
        known = [place for place, record in enumerate(records) if record.metadata.get("facts")]
        self._places = known[:: -(-len(known) // num_samples) or 1][:num_samples]
        self._records, self._chains, self._domains = records, chains, domains

    def tasks(self, checkpoint: Path, see: See, decoding: Decoding) -> list[Task]:
        batches = chunks(self._places, BATCH_SIZE)

        def ask(batch: Sequence[int], model: EmberVLM) -> dict[str, Any]:
            records = [self._records[place] for place in batch]
            seed = decoding.seed + batches.index(batch)
            drawn = replace(decoding, temperature=TEMPERATURE, top_p=1.0, seed=seed)
            visual, seen = see(model, records)
            asked = [record.instruction for record in records]
            own = [record.candidates for record in records]
            found = generate_from_visual(model, visual, seen, asked, drawn, own)
            out = {}
            for name, chains in (("greedy", [self._chains[place] for place in batch]), ("drawn", found)):
                scores = explain_chains(model, visual, seen, asked, [chain["reasoning_steps"] for chain in chains])
                out[name] = [
                    self._judged(record, chain, score["validator_scores"])
                    for record, chain, score in zip(records, chains, scores)
                ]
            return out

        return tasks_of("own steps", checkpoint, batches, ask)

    def _judged(
        self, record: ReasoningRecord, chain: Mapping[str, Any], scores: Sequence[float]
    ) -> tuple[list[bool], list[float], bool]:
        """For each step whether it is right and its score, and whether the answer is right."""
        faults = judge_steps(chain["reasoning_steps"], known_of(record, self._domains, chain["answer_set"]))
        right = [fault.contradicted is None for fault in faults]
        return right, list(scores), is_right(chain["answer_set"], record)

    def result(self, done: Mapping[Key, Any]) -> dict[str, Any] | None:
        """For greedy and drawn chains what `summarise` gives; None where no record has known facts."""
        found = found_by("own steps", done)
        if not found:
            return None
        return {
            "temperature": TEMPERATURE,
            **{name: summarise([chain for part in found for chain in part[name]]) for name in ("greedy", "drawn")},
        }


def summarise(chains: Sequence[tuple[Sequence[bool], Sequence[float], bool]]) -> dict[str, Any]:
    """How well the scores tell a chain's first wrong step from the valid ones before it, and right chains from wrong.

    `valid`, `wrong`: number of steps. `balanced_accuracy` at one half and `auroc` of the scores; None without both.
    `right_chains` and `wrong_chains` (a wrong step or answer) with the share that passes: every step above one half.
    """
    labels: list[bool] = []
    scores: list[float] = []
    passed: dict[bool, list[float]] = {True: [], False: []}
    for right, found, answered in chains:
        until = right.index(False) + 1 if False in right else len(right)  # type: ignore[attr-defined]
        labels += right[:until]
        scores += found[:until]
        passed[bool(answered and all(right))].append(float(all(score > VALID for score in found)))
    both = len(set(labels)) == 2
    return {
        "valid": labels.count(True),
        "wrong": labels.count(False),
        "balanced_accuracy": balanced_accuracy(labels, [score > VALID for score in scores]) if both else None,
        "auroc": auroc(labels, scores) if both else None,
        "right_chains": len(passed[True]),
        "right_chains_passed": mean(passed[True]),
        "wrong_chains": len(passed[False]),
        "wrong_chains_passed": mean(passed[False]),
    }


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """How often a valid step scores above a wrong one, ties half (area under the ROC curve)."""
    valid = np.asarray(labels, dtype=bool)
    ranks = rankdata(scores)
    num = int(valid.sum())
    return float((ranks[valid].sum() - num * (num + 1) / 2) / (num * (len(valid) - num)))

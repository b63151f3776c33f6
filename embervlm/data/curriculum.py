"""Which records an epoch trains on: short and simple chains first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embervlm.config import ConfigError
from embervlm.config_data import COMPLEXITIES, CurriculumConfig
from embervlm.data.facts import reader_of
from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.store import RecordView, kept_array
from embervlm.words.claims import ClaimReader

STEP_LIMITS = (3, 5)
"""Most numbered steps of a simple and of a medium chain: the guide's curriculum."""
CLAIM_LIMITS = (14, 20)
"""Most distinct claims of a simple and of a medium chain."""
_SPELLINGS = {**{name: name for name in COMPLEXITIES}, "low": "simple", "high": "complex"}
"""The Stage 4 guide spells complexity in two ways."""


def complexity_problem(metadata: Mapping[str, Any]) -> str:
    """The problem of `metadata.complexity`, and what to do; empty if there is none."""
    given = metadata.get("complexity")
    if given is None or _spelling(given) in _SPELLINGS:
        return ""
    known = ", ".join(_SPELLINGS)
    return f"metadata.complexity: {given!r:.40} is not one of {known}; correct it, or leave it out and it is computed"


def _spelling(given: Any) -> str:
    return str(given).strip().casefold()


def complexity_of(record: ReasoningRecord, reader: ClaimReader) -> str:
    """One of `COMPLEXITIES`: what `metadata.complexity` says; where that is missing, computed from the chain.

    A chain is as complex as its number of steps or its number of distinct claims makes it, whichever is more.
    Raises:
        DataError: `metadata.complexity` is another word.
    """
    if problem := complexity_problem(record.metadata):
        raise DataError(f"record {record.record_id}: {problem}")
    if (given := record.metadata.get("complexity")) is not None:
        return _SPELLINGS[_spelling(given)]
    steps = record.steps[: record.num_steps]
    num_claims = len({claim for step in steps for claim in reader.read(step)})
    by_claims = COMPLEXITIES[sum(num_claims > limit for limit in CLAIM_LIMITS)]
    return max(complexity_by_steps(len(steps)), by_claims, key=COMPLEXITIES.index)


def complexity_by_steps(num_steps: int) -> str:
    """The Stage 4 guide's curriculum: simple to 3 steps, medium to 5, complex beyond."""
    return COMPLEXITIES[sum(num_steps > limit for limit in STEP_LIMITS)]


def records_of_epochs(
    records: Sequence[ReasoningRecord], curriculum: CurriculumConfig, num_epochs: int
) -> list[np.ndarray]:
    """For each epoch of the run, phase 1's first, the indices of the records it trains on.

    Raises:
        ConfigError: an epoch has no record.
        DataError: every unknown complexity.
    """
    num_steps, levels = _steps_and_levels(records).T
    of_stage: dict[str, np.ndarray] = {}
    epochs = []
    for epoch in range(1, num_epochs + 1):
        name, stage = curriculum.stage_of(epoch)
        level = COMPLEXITIES.index(stage.complexity)
        if name not in of_stage:
            of_stage[name] = np.flatnonzero((num_steps <= stage.max_steps) & (levels <= level)).astype(np.int32)
        epochs.append(of_stage[name])
        if not len(epochs[-1]):
            shortest, simplest = min(num_steps), COMPLEXITIES[min(levels)]
            raise ConfigError(
                f"curriculum.{name}: none of the {len(records)} training records has at most {stage.max_steps} steps "
                f"and is {stage.complexity} or simpler, so epoch {epoch} is empty (the shortest chain has {shortest} "
                f"steps, the simplest is {simplest}); raise the limits or give the stage's epochs to another"
            )
    return epochs


def _steps_and_levels(records: Sequence[ReasoningRecord]) -> np.ndarray:
    """Numbered steps of each record and the index of its complexity, `[records, 2]` uint8; kept beside a store."""
    file = records.file("complexity") if isinstance(records, RecordView) else None
    return kept_array(file, lambda: _count_steps_and_levels(records))


def _count_steps_and_levels(records: Sequence[ReasoningRecord]) -> np.ndarray:
    reader = reader_of(records)
    out, problems = np.zeros((len(records), 2), np.uint8), []
    for place, record in enumerate(records):
        try:
            out[place] = (record.num_steps, COMPLEXITIES.index(complexity_of(record, reader)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError.of(problems)
    return out

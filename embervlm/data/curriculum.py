"""Which records an epoch trains on: short and simple chains first."""

from __future__ import annotations

from collections.abc import Sequence

from embervlm.config import COMPLEXITIES, ConfigError, CurriculumConfig
from embervlm.data.claims import ClaimReader, reader_of
from embervlm.data.records import DataError, ReasoningRecord

STEP_LIMITS = (3, 5)
"""Most numbered steps of a simple and of a medium chain: the guide's curriculum."""
CLAIM_LIMITS = (14, 20)
"""Most distinct claims of a simple and of a medium chain."""
_SPELLINGS = {**{name: name for name in COMPLEXITIES}, "low": "simple", "high": "complex"}
"""The Stage 4 guide spells complexity in two ways."""


def complexity_of(record: ReasoningRecord, reader: ClaimReader) -> str:
    """One of `COMPLEXITIES`: what `metadata.complexity` says; where that is missing, computed from the chain.

    A chain is as complex as its number of steps or its number of distinct claims makes it, whichever is more.
    Raises:
        DataError: `metadata.complexity` is another word.
    """
    given = record.metadata.get("complexity")
    if given is not None:
        if (known := _SPELLINGS.get(str(given).strip().casefold())) is None:
            raise DataError(
                f"record {record.record_id}: metadata.complexity: {given!r} is not one of {', '.join(_SPELLINGS)}; "
                "correct it, or leave it out and it is computed"
            )
        return known
    steps = record.steps[: record.num_steps]
    num_claims = len({claim for step in steps for claim in reader.read(step)})
    by_steps = sum(len(steps) > limit for limit in STEP_LIMITS)
    by_claims = sum(num_claims > limit for limit in CLAIM_LIMITS)
    return COMPLEXITIES[max(by_steps, by_claims)]


def records_of_epochs(
    records: Sequence[ReasoningRecord], curriculum: CurriculumConfig, num_epochs: int
) -> list[list[int]]:
    """For each epoch of the run, phase 1's first, the indices of the records it trains on.

    Raises:
        ConfigError: an epoch has no record.
        DataError: every unknown complexity.
    """
    reader = reader_of(records)
    levels, problems = [], []
    for record in records:
        try:
            levels.append(COMPLEXITIES.index(complexity_of(record, reader)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError.of(problems)
    epochs = []
    for epoch in range(1, num_epochs + 1):
        name, stage = curriculum.stage_of(epoch)
        level = COMPLEXITIES.index(stage.complexity)
        epochs.append([
            index for index, record in enumerate(records)
            if record.num_steps <= stage.max_steps and levels[index] <= level
        ])  # fmt: skip
        if not epochs[-1]:
            shortest = min(record.num_steps for record in records)
            simplest = COMPLEXITIES[min(levels)]
            raise ConfigError(
                f"curriculum.{name}: none of the {len(records)} training records has at most {stage.max_steps} steps "
                f"and is {stage.complexity} or simpler, so epoch {epoch} is empty (the shortest chain has {shortest} "
                f"steps, the simplest is {simplest}); raise the limits or leave the stage's epochs to another"
            )
    return epochs

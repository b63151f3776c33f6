"""A phase to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from embervlm.config import PhaseConfig, ScheduledSamplingConfig
from embervlm.data.collate import Collator
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.images import PictureCache
from embervlm.model.embervlm import EmberVLM
from embervlm.training.policy import PolicyJob


class Measured(Protocol):
    """What a model does on the val split."""

    @property
    def loss(self) -> float:
        """Nats per token."""

    @property
    def looks(self) -> bool:
        """Whether the picture matters to it."""


@dataclass(kw_only=True)
class PhaseJob:
    """One phase to train, with everything it needs."""

    name: str
    folder: Path
    phase: PhaseConfig
    model: EmberVLM
    plan: EpochPlan
    collator: Collator
    pictures: PictureCache
    batch_size: int
    accumulation: int = 1
    scheduled_sampling: ScheduledSamplingConfig = field(default_factory=lambda: ScheduledSamplingConfig(enabled=False))
    dense_sizes: list[int] | None = None
    gradient_checkpointing: bool = False
    after_epoch: Callable[[EmberVLM, int], None] | None = None
    """Called on every process with the model and the epoch just finished, counted from 1 within the phase."""
    at_end: Callable[[EmberVLM], None] | None = None
    """Called on every process with the trained model, once it is saved."""
    after_save: Callable[[Path], None] | None = None
    """Called on every process after a checkpoint of `eval_steps`, and with them after the final one."""
    measure: Callable[[EmberVLM], Measured | None] | None = None
    """Called on every process where `phase.stop_at_plateau`; None of data without a val split."""
    samples_wanted: int | None = None
    """Stop after this many records instead of after `epochs`."""
    policy: PolicyJob | None = None
    """In phase 3, whose main samples are questions to which chains are drawn."""
    samples_each: float = 1.0
    """Samples that an update trains on for each of its main samples."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """See `settings.trained_with`."""

    @property
    def total_steps(self) -> int:
        if self.samples_wanted is not None:
            return max(1, round(self.samples_wanted / self.plan.global_batch))
        return self.plan.num_steps(self.phase.epochs)

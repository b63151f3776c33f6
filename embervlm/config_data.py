"""The settings of what the epochs of Stage 4 train on: augmentation and curriculum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from embervlm.config_checks import bounded, one_of, require

AUGMENTATION_STRATEGIES: Mapping[str, float] = {"paraphrase": 0.3, "reorder": 0.2, "expand": 0.3, "simplify": 0.2}
"""The guide's shares of the new records."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Augmentation: more chains made from those of the training split, before training."""

    target_samples: int = 50000
    """Total number of training records, including the given ones; fewer if no more distinct chains can be made."""
    validate_reasoning: bool = True
    """Check the claims and the conclusion of every new chain."""
    augmentation_strategies: Mapping[str, float] = field(default_factory=lambda: AUGMENTATION_STRATEGIES)
    """Strategy -> its weight among those named; one not named is not used. What one cannot give, the others do."""

    def __post_init__(self) -> None:
        bounded(self, "target_samples", least=1)
        weights = self.augmentation_strategies
        for name, weight in weights.items():
            one_of("augmentation_strategies", name, tuple(AUGMENTATION_STRATEGIES))
            require(weight >= 0, f"augmentation_strategies: {name}: {weight} is negative")
        require(any(weights.values()), "augmentation_strategies: no weight is above 0; leave the section out instead")


COMPLEXITIES = ("simple", "medium", "complex")
"""Levels of chain complexity, the simplest first."""


@dataclass(frozen=True, kw_only=True)
class CurriculumStageConfig:
    """Which records an epoch of this stage trains on."""

    max_steps: int
    """Maximum number of numbered steps in a chain, without the conclusion."""
    complexity: str = "complex"
    """One of `COMPLEXITIES`; simpler records are used as well."""
    epochs: tuple[int, ...] = ()
    """First and last epoch, counted from 1 over both phases; by default the guide's."""

    def __post_init__(self) -> None:
        one_of("complexity", self.complexity, COMPLEXITIES)
        bounded(self, "max_steps", least=1)
        if self.epochs:
            ordered = len(self.epochs) == 2 and 1 <= self.epochs[0] <= self.epochs[1]
            require(ordered, f"epochs: {list(self.epochs)} is not [first, last], counted from 1")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Short and simple chains first. The last stage lasts to the end of the run."""

    stage1: CurriculumStageConfig = CurriculumStageConfig(max_steps=3, complexity="simple")
    """Epochs 1 to 3."""
    stage2: CurriculumStageConfig = CurriculumStageConfig(max_steps=5, complexity="medium")
    """Epochs 4 to 7."""
    stage3: CurriculumStageConfig = CurriculumStageConfig(max_steps=10, complexity="complex")
    """Epochs 8 to 10."""

    def __post_init__(self) -> None:
        expected = 1
        for name, (first, last) in self._epochs.items():
            require(
                first == expected,
                f"{name}.epochs: [{first}, {last}] does not start at epoch {expected}; stages follow each other "
                "without a gap or an overlap, so give `epochs` to each",
            )
            expected = last + 1

    @property
    def _epochs(self) -> dict[str, tuple[int, ...]]:
        guide = {"stage1": (1, 3), "stage2": (4, 7), "stage3": (8, 10)}
        return {name: getattr(self, name).epochs or epochs for name, epochs in guide.items()}

    def stage_of(self, epoch: int) -> tuple[str, CurriculumStageConfig]:
        """Name and settings of the stage that `epoch`, from 1 over both phases, belongs to."""
        name = next((name for name, (_, last) in self._epochs.items() if epoch <= last), "stage3")
        return name, getattr(self, name)

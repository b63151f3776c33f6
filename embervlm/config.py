"""The settings of a run: frozen dataclasses, checked when they are made. `config_file` reads them from YAML.

YAML keys are the field names (the Stage 4 guide's where it names one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from embervlm.config_checks import ConfigError, bounded, filled_in, one_of, require
from embervlm.config_data import AugmentationConfig, CurriculumConfig
from embervlm.config_lora import LoraConfig, check_lora
from embervlm.config_policy import PolicySettings

REPOSITORY = Path(__file__).resolve().parent.parent
COMPONENTS = ("vision_encoder", "projection", "language_model", "reasoning_module")
"""Parts of the model with their own learning rate; the first level of the parameter names."""
BACKBONE = COMPONENTS[:-1]
REASONING_PARTS = ("reasoning_head", "step_validator", "answer_head")
LOSS_TERMS = ("reasoning", "consistency", "answer", "multimodal", "direct")
POLICY_TERMS = ("policy", "kl")
"""Loss terms of phase 3 besides those."""
ALIASES = {"language_model_backbone": "language_model", "projection_layer": "projection"}
"""The guide's other names of components."""


@dataclass(frozen=True, kw_only=True)
class ScheduledSamplingConfig:
    enabled: bool = True
    """Put the model's own tokens into some places of the chains that it is trained on."""
    initial_teacher_forcing: float = 1.0
    """Share of gold tokens among the chain's inputs in a phase's first epoch."""
    final_teacher_forcing: float = 0.5
    """The same in its last epoch."""

    def __post_init__(self) -> None:
        bounded(self, "initial_teacher_forcing", "final_teacher_forcing", least=0, most=1)


def _by_component(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under the names of `COMPONENTS`; ConfigError where a component has two names in it."""
    out = {ALIASES.get(name, name): value for name, value in given.items()}
    if len(out) < len(given):
        raise ConfigError(f"{key}: {sorted(given)} name one component twice")
    return out


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training with one optimizer: a baseline, or the settings that Stage 3 and the two phases share."""

    default_multipliers: ClassVar[Mapping[str, float]] = {}
    """Factor of a component that `learning_rate_multipliers` does not name; 1 if this does not name it either."""
    named_multipliers: ClassVar[frozenset[str]] = frozenset()
    """Components that `learning_rate_multipliers` named, before it was completed."""
    does_nothing: ClassVar[tuple[str, ...]] = ()
    """Fields that have no effect in this kind of phase, so any value other than 0 is a mistake."""

    name: str = ""
    """What messages call it."""
    epochs: int = 5
    """Passes over the records."""
    learning_rate: float = 1e-4
    """Peak learning rate, before `learning_rate_multipliers`."""
    warmup_steps: int = 0
    """Optimizer steps of linear warmup; cosine decay to `final_lr_ratio` follows."""
    final_lr_ratio: float = 0.1
    """The last learning rate as a share of the peak."""
    freeze_backbone: bool = False
    """Train only the reasoning module."""
    trainable_components: tuple[str, ...] = ()
    """The guide's list; only checked against `freeze_backbone` and the multipliers."""
    frozen_components: tuple[str, ...] = ()
    """The guide's list of the others; checked in the same way."""
    learning_rate_multipliers: Mapping[str, float] = field(default_factory=dict)
    """Component -> factor on `learning_rate`; 0 freezes. A component that is not named gets its default, or 0 under
    `freeze_backbone`."""
    lora: Mapping[str, LoraConfig] = field(default_factory=dict)
    """Component (vision_encoder, language_model) -> its adapters, which are trained at its learning rate in place of
    its own weights; `{}` are adapters of the default size. Checkpoints hold merged weights, and the adapters apart."""
    reasoning_loss_weight: float = 0.0
    """Weight of writing the chain and the answer, token by token."""
    consistency_loss_weight: float = 0.0
    """Weight of the step validator: does a step follow?"""
    answer_loss_weight: float = 0.0
    """Weight of the answer head: which candidates are right?"""
    multimodal_loss_weight: float = 0.0
    """Weight of looking at what a step reads, by its boxes; without boxes, of telling the own picture from others."""
    direct_loss_weight: float = 0.0
    """Weight of answering directly, without a chain; without it, phase 2 forgets how to do this."""
    validator_records_ratio: float = 1.0
    """Share of the records whose steps the validator judges; a smaller share makes a training step cheaper."""
    direct_records_ratio: float = 0.0
    """Direct-answer records per reasoning record in a batch."""
    edited_facts_ratio: float = 0.0
    """Chains with the facts of another picture per reasoning record in a batch: the steps that state facts are given,
    the rest has to follow from them and not from the picture. Needs data that say which steps state facts (`seen`)."""
    dense_loss_weight: float = 0.0
    """Stage 3: weight of predicting what is in each patch, if the data contain this."""
    caption_records_ratio: float = 0.0
    """Stage 3: captions per direct record."""
    glossary_records_ratio: float = 0.0
    """Stage 3: texts without a picture, a few rules each, per direct record: the words that chains are made of."""
    picture_shift: float = 0.0
    """Pictures are shifted and scaled by up to this share of their side, anew at each step, so that few of them are not
    learned by heart. Not where records have boxes, which would stand beside what they name."""
    max_minutes: float | None = None
    """Stop after this much wall-clock time; None trains `epochs`. The rate then falls with the time, behind a warmup of
    `warmup_steps`, or of a quarter of the time where these take longer. With `stop_at_plateau` the decay begins after
    four fifths of the time at the latest, so that the phase ends at about this time."""
    stop_at_plateau: bool = False
    """Keep the peak rate until the loss on the val split no longer falls, then decay over a quarter as many steps and
    stop. `epochs` is then the most, and a model that does not look at the picture yet trains on."""
    plateau_steps: int = 200
    """Optimizer steps between two measurements of that loss; fewer where `epochs` have less than 12 of them, more where
    an epoch has more than 50."""
    plateau_improvement: float = 0.01
    """Share by which the best loss must fall within three measurements; less is a plateau."""
    weight_decay: float = 0.01
    """Of AdamW, for every parameter that learns."""
    gradient_clipping: float = 1.0
    """Greatest norm of the gradient over all parameters."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except ConfigError as error:
            raise ConfigError(f"phase {self.name!r}: {error}" if self.name else str(error)) from None

    def _check(self) -> None:
        bounded(self, "epochs", "plateau_steps", least=1)
        for name in ("learning_rate", "gradient_clipping", "max_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: {value} is not positive")
        self._complete_multipliers()
        for name in self.does_nothing:
            value = getattr(self, name)
            shown = ", ".join(value) if isinstance(value, Mapping) else value
            require(not value, f"{name}: {shown} does nothing in this phase")
        object.__setattr__(self, "lora", _by_component("lora", self.lora))
        check_lora(self.lora, self.multipliers)
        mixed = ("direct_records_ratio", "edited_facts_ratio", "caption_records_ratio", "glossary_records_ratio")
        weights = [f"{term}_loss_weight" for term in (*LOSS_TERMS, "dense")]
        bounded(self, *weights, *mixed, "warmup_steps", "weight_decay", least=0)
        bounded(self, "final_lr_ratio", "validator_records_ratio", "plateau_improvement", least=0, most=1)
        bounded(self, "picture_shift", least=0, most=0.5)
        self._check_component_lists()

    def _complete_multipliers(self) -> None:
        given = _by_component("learning_rate_multipliers", self.learning_rate_multipliers)
        if wrong := set(given) - set(COMPONENTS):
            raise ConfigError(f"learning_rate_multipliers: unknown {sorted(wrong)}; components are {COMPONENTS}")
        if negative := [name for name, factor in given.items() if factor < 0]:
            raise ConfigError(f"learning_rate_multipliers: {negative} are negative")
        defaults = dict.fromkeys(COMPONENTS, 1.0) | dict(self.default_multipliers)
        if self.freeze_backbone:
            idle = [name for name, factor in given.items() if factor and name in BACKBONE]
            require(not idle, f"learning_rate_multipliers: {idle} do nothing under freeze_backbone: true")
            defaults |= dict.fromkeys(BACKBONE, 0.0)
        complete = {name: float(given.get(name, defaults[name])) for name in COMPONENTS}
        object.__setattr__(self, "learning_rate_multipliers", complete)
        object.__setattr__(self, "named_multipliers", frozenset(given))

    def _check_component_lists(self) -> None:
        multipliers = self.multipliers
        for field_name, should_train in (("trainable_components", True), ("frozen_components", False)):
            for listed in getattr(self, field_name):
                name = ALIASES.get(listed, listed)
                if name == "all":
                    wrong = [part for part, factor in multipliers.items() if (factor > 0) != should_train]
                    require(not wrong, f"{field_name}: says all, but {wrong} would not be trained")
                    continue
                component = "reasoning_module" if name in REASONING_PARTS else name
                require(component in COMPONENTS, f"{field_name}: no component is called {listed!r}")
                require(
                    (multipliers[component] > 0) == should_train,
                    f"{field_name}: lists {listed}, but its learning rate multiplier is "
                    f"{multipliers[component]:g} (freeze_backbone: {str(self.freeze_backbone).lower()})",
                )

    @property
    def multipliers(self) -> dict[str, float]:
        """Factor on the learning rate for every component."""
        return dict(self.learning_rate_multipliers)

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Parts of the backbone that do not learn."""
        return tuple(name for name in BACKBONE if not self.multipliers[name])

    @property
    def loss_weights(self) -> dict[str, float]:
        return {term: getattr(self, f"{term}_loss_weight") for term in (*LOSS_TERMS, "dense")}


@dataclass(frozen=True, kw_only=True)
class Stage3Config(PhaseConfig):
    """Stage 3: answers without chains, and what is in the picture."""

    does_nothing: ClassVar[tuple[str, ...]] = (
        *(f"{term}_loss_weight" for term in LOSS_TERMS if term != "direct"),
        *("direct_records_ratio", "edited_facts_ratio", "lora"),
    )

    name: str = "perception_and_answers"
    learning_rate: float = 5e-4
    warmup_steps: int = 500
    direct_loss_weight: float = 1.0
    dense_loss_weight: float = 1.0
    caption_records_ratio: float = 0.5
    glossary_records_ratio: float = 0.5

    def _check(self) -> None:
        super()._check()
        learns = self.direct_loss_weight > 0 or self.dense_loss_weight > 0
        require(learns, "direct_loss_weight and dense_loss_weight are both 0: nothing would be learned")


@dataclass(frozen=True, kw_only=True)
class ReasoningPhaseConfig(PhaseConfig):
    """The settings that both phases of Stage 4 have."""

    does_nothing: ClassVar[tuple[str, ...]] = ("dense_loss_weight", "caption_records_ratio", "glossary_records_ratio")

    def _check(self) -> None:
        super()._check()
        needs_records = () if self.direct_records_ratio else ("direct",)  # 0 of them is a way to leave the term out
        terms = [f"{term}_loss_weight" for term in LOSS_TERMS if term not in needs_records]
        require(
            any(getattr(self, name) for name in terms),
            f"{', '.join(terms)} are all 0: nothing would be learned; the guide has 0.4/0.3/0.3 "
            "in phase 1 and 0.3/0.2/0.3/0.2 in phase 2",
        )


@dataclass(frozen=True, kw_only=True)
class Phase1Config(ReasoningPhaseConfig):
    """Phase 1 with the guide's values."""

    does_nothing: ClassVar[tuple[str, ...]] = (*ReasoningPhaseConfig.does_nothing, "lora", "picture_shift")

    name: str = "train_reasoning_heads"
    warmup_steps: int = 500
    freeze_backbone: bool = True
    reasoning_loss_weight: float = 0.4
    consistency_loss_weight: float = 0.3
    answer_loss_weight: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Phase2Config(ReasoningPhaseConfig):
    """Phase 2 with the guide's values."""

    default_multipliers: ClassVar[Mapping[str, float]] = dict(vision_encoder=0.1, projection=0.5, language_model=0.5)

    name: str = "joint_finetuning"
    learning_rate: float = 5e-5
    warmup_steps: int = 200
    reasoning_loss_weight: float = 0.3
    consistency_loss_weight: float = 0.2
    answer_loss_weight: float = 0.3
    multimodal_loss_weight: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Phase3Config(ReasoningPhaseConfig, PolicySettings):
    """Phase 3: learning to reason from answers alone."""

    default_multipliers: ClassVar[Mapping[str, float]] = dict(vision_encoder=0.0, projection=0.0, language_model=0.5)
    does_nothing: ClassVar[tuple[str, ...]] = (
        *ReasoningPhaseConfig.does_nothing,
        *("edited_facts_ratio", "stop_at_plateau", "max_minutes", "picture_shift"),
    )

    name: str = "reinforcement"
    epochs: int = 1
    learning_rate: float = 1e-5
    """Peak learning rate, before `learning_rate_multipliers`. Left out of a YAML it is a fifth of phase 2's."""
    warmup_steps: int = 10
    reasoning_loss_weight: float = 0.1
    answer_loss_weight: float = 0.1
    consistency_loss_weight: float = 0.1

    def _check(self) -> None:
        super()._check()
        self.check_policy()

    @property
    def loss_weights(self) -> dict[str, float]:
        return {**super().loss_weights, "policy": 1.0, "kl": self.kl_coef}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Stage 4: its phases and what they share."""

    name: str = "cot_reasoning"
    """The guide's; nothing depends on it."""
    phase1: Phase1Config = Phase1Config()
    phase2: Phase2Config = Phase2Config()
    phase3: Phase3Config | None = None
    """With this section phase 3 follows phase 2, and records need no chain; `--phase 3` alone runs it with defaults."""
    batch_size: int = 32
    """Records per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update."""
    reasoning_augmentation: AugmentationConfig | None = None
    """None trains on the records unchanged, which was better in every measurement (docs/results.md)."""
    scheduled_sampling: ScheduledSamplingConfig = ScheduledSamplingConfig(enabled=False)
    """Off without this section; an empty section turns it on."""
    max_reasoning_length: int = 512
    """Tokens of the chain and answer; longer chains are an error of the data, listed before training."""
    gradient_checkpointing: bool = False
    """Recompute activations of the backbone in the backward pass."""

    def __post_init__(self) -> None:
        bounded(self, "batch_size", "gradient_accumulation_steps", "max_reasoning_length", least=1)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """More training with direct answers only, to measure what reasoning adds."""

    learning_rate: float = 1e-4
    """Peak learning rate of all parts."""
    warmup_steps: int = 20
    """Optimizer steps of linear warmup."""
    batch_size: int = 32
    """Records per device."""
    same_time: bool = True
    """Also train for as much wall-clock time as both phases took."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate: {self.learning_rate} is not positive")
        bounded(self, "warmup_steps", least=0)
        bounded(self, "batch_size", least=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a whole run."""

    model: str = "embervlm-39m"
    """Name of a preset in `configs/model/`, or a path to such a YAML."""
    seed: int = 0
    """Seed for all random numbers."""
    output_dir: str = "outputs"
    """Folder for stage3/, stage4/ and results/."""
    reasoning_data: str = "data/stage4/reasoning_data.json"
    """Records: a JSON, JSONL or Parquet file, a folder of parts, or a pattern."""
    domain: str = "robots"
    """Domain of the data; it supplies the answers for records that name none: robots, or none for your own data."""
    max_closed_answers: int = 64
    """Without a domain: the most distinct answers of the data that still are a set to choose from. More are free
    text, which the model writes."""
    image_root: str | None = None
    """Folder that picture paths are relative to; None is the data file's own folder."""
    allow_outside: bool = False
    """Accept pictures outside the image folder."""
    resume_from: str | None = None
    """Checkpoint whose weights a phase starts from. An interrupted run resumes by itself; see `resume`."""
    resume: str = "auto"
    """auto resumes from the newest intact checkpoint in `output_dir`; never reports an error if there is one."""
    engine: str = "deepspeed"
    """deepspeed, fsdp or torch; each can resume a checkpoint of any other."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: bf16 on a GPU that supports it, fp16 on other GPUs, fp32 on the CPU."""
    zero_stage: int = 2
    """ZeRO stage 0, 1, 2 or 3."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON to use instead of the one for `zero_stage` and `precision`."""
    stage3: Stage3Config = Stage3Config()
    stage3_batch_size: int = 64
    """Records per device in Stage 3."""
    stage4: StageConfig = StageConfig()
    curriculum: CurriculumConfig | None = None
    """None trains on all records in every epoch."""
    baseline: BaselineConfig = BaselineConfig()
    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    background_saves: bool = True
    """Write checkpoints in the background while training continues; false waits for each."""
    on_save_error: str = "stop"
    """stop ends the run when a checkpoint cannot be written; continue warns and tries again at the next one."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on the val split; there is one at the end too. None leaves them to
    `select_best`."""
    eval_samples: int = 64
    """Val records that such an evaluation asks about."""
    eval_cluster: str | None = None
    """Node recipe for evaluation on one GPU, in a separate Slurm job while training continues; None evaluates between
    two steps."""
    sample_records: int = 8
    """Chains written to `reasoning_samples` after every epoch."""
    compared_records: int = 48
    """Val questions that are answered with their picture and with another behind each phase, which tells whether it
    looks; 0 asks none."""
    keep_last: int = 3
    """Number of newest numbered checkpoints to keep whole, so that a phase can resume from them."""
    keep_weights: int = 20
    """Numbered checkpoints before those of which the weights are kept, a third of their size; older ones are deleted.
    20 are a whole phase of the guide's, 500 steps apart, on one GPU."""
    keep_best: int = 1
    """Number of best evaluated checkpoints to keep in addition, by their weights."""
    data_workers: int | None = None
    """Processes beside each training process that make its batches ahead; 0 makes them between two steps. None is 0
    on a CPU, and up to 4 beside a GPU."""
    log_steps: int = 10
    """Optimizer steps between log lines."""
    log_records: bool = False
    """Also log the ids of the records of every logged step."""
    max_steps: int | None = None
    """Stop each phase after this many optimizer steps."""
    max_minutes: float | None = None
    """Training time of Stage 3 and both phases together, as far as the command trains them. They share it 6 to 1 to 3,
    as `max_minutes` of each; what one leaves is not passed on. The look at val questions behind each is not in it."""
    report: bool = False
    """Write `stage4/visualizations/` when Stage 4 has ended, and add its figures to the W&B run."""
    wandb_project: str | None = None
    """Weights & Biases project; offline if W&B finds no key."""
    wandb_run_name: str | None = None
    """Name of the run there."""

    def __post_init__(self) -> None:
        of_data = ("output_dir", "reasoning_data", "image_root")
        for name in ("model", *of_data, "resume_from", "deepspeed_config", "eval_cluster"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, filled_in(name, path))
        one_of("engine", self.engine, ("deepspeed", "fsdp", "torch"))
        one_of("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        one_of("resume", self.resume, ("auto", "never"))
        one_of("on_save_error", self.on_save_error, ("stop", "continue"))
        require(self.zero_stage in (0, 1, 2, 3), f"zero_stage: {self.zero_stage} is not 0, 1, 2 or 3")
        bounded(self, "keep_best", "keep_weights", "data_workers", "sample_records", "compared_records", least=0)
        bounded(self, "seed", "max_closed_answers", least=0)
        bounded(self, "save_steps", "log_steps", "keep_last", "stage3_batch_size", "eval_samples", least=1)
        bounded(self, "max_steps", "eval_steps", least=1)
        require(self.max_minutes is None or self.max_minutes > 0, f"max_minutes: {self.max_minutes} is not positive")

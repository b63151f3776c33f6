"""What a run is made of: frozen dataclasses, read from YAML, checked before anything else happens.

YAML keys are the field names (the Stage 4 guide's where it names one). An unknown key is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from embervlm.errors import UserError
from embervlm.paths import PathError, expanded

REPOSITORY = Path(__file__).resolve().parent.parent
COMPONENTS = ("vision_encoder", "projection", "language_model", "reasoning_module")
"""Parts of the model that have a learning rate of their own; the first level of parameter names."""
BACKBONE = COMPONENTS[:-1]
REASONING_PARTS = ("reasoning_head", "step_validator", "answer_head")
LOSS_TERMS = ("reasoning", "consistency", "answer", "multimodal", "direct")
_ALIASES = {"language_model_backbone": "language_model", "projection_layer": "projection"}
"""The guide's other names of components."""

Config = TypeVar("Config")


class ConfigError(UserError):
    """A setting that cannot be run with; the message says which, and what to write instead."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _expanded(name: str, path: str) -> str:
    try:
        return expanded(path)
    except PathError as error:
        raise ConfigError(f"{name}: {error}") from None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name}: {value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ScheduledSamplingConfig:
    enabled: bool = True
    initial_teacher_forcing: float = 1.0
    """Share of gold tokens among the chain's inputs in a phase's first epoch."""
    final_teacher_forcing: float = 0.5
    """The same in its last epoch."""

    def __post_init__(self) -> None:
        for name in ("initial_teacher_forcing", "final_teacher_forcing"):
            _require(0 <= getattr(self, name) <= 1, f"{name}: {getattr(self, name)} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One pass of training with one optimizer: a baseline, or what Stage 3 and the two phases have in common."""

    default_multipliers: ClassVar[Mapping[str, float]] = {}
    """Factor of a component that `learning_rate_multipliers` does not name; 1 where this does not name it either."""
    does_nothing: ClassVar[tuple[str, ...]] = ()
    """Fields that have no effect on this kind of phase, so that another value than 0 is a mistake."""

    name: str = ""
    epochs: int = 5
    """Passes over the records."""
    learning_rate: float = 1e-4
    """Peak learning rate, before `learning_rate_multipliers`."""
    warmup_steps: int = 0
    """Optimizer steps of linear warmup; cosine decay to `final_lr_ratio` follows."""
    final_lr_ratio: float = 0.1
    freeze_backbone: bool = False
    trainable_components: tuple[str, ...] = ()
    """The guide's list; only checked against what `freeze_backbone` and the multipliers say."""
    frozen_components: tuple[str, ...] = ()
    learning_rate_multipliers: Mapping[str, float] = field(default_factory=dict)
    """Component -> factor on `learning_rate`; 0 freezes. Complete once checked: a component not named gets its default,
    or 0 under `freeze_backbone`."""
    reasoning_loss_weight: float = 0.0
    consistency_loss_weight: float = 0.0
    answer_loss_weight: float = 0.0
    multimodal_loss_weight: float = 0.0
    direct_loss_weight: float = 0.0
    """Weight of answering directly, without a chain; Phase 2 without it forgets how."""
    validator_records_ratio: float = 1.0
    """Share of the records whose steps the validator is asked about; less makes a step cheaper."""
    direct_records_ratio: float = 0.0
    """Direct-answer records per reasoning record in a batch."""
    edited_facts_ratio: float = 0.0
    """Chains with the facts of another picture per reasoning record in a batch: the steps that state facts are given,
    the rest has to follow from them and not from the picture. Needs data that say which steps state facts (`seen`)."""
    dense_loss_weight: float = 0.0
    """Stage 3: what is in each patch, where the data know it."""
    caption_records_ratio: float = 0.0
    """Stage 3: captions per direct record."""
    glossary_records_ratio: float = 0.0
    """Stage 3: texts without a picture, a few rules each, per direct record: the words that chains are made of."""
    max_minutes: float | None = None
    """Stop after this time on the clock, warmup and decay stretched over it; None trains `epochs`."""
    weight_decay: float = 0.01
    gradient_clipping: float = 1.0

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}: " if self.name else ""
        _require(self.epochs >= 1, f"{where}epochs: {self.epochs} is less than 1")
        _require(self.learning_rate > 0, f"{where}learning_rate: {self.learning_rate} is not positive")
        _require(self.warmup_steps >= 0, f"{where}warmup_steps: {self.warmup_steps} is negative")
        _require(self.gradient_clipping > 0, f"{where}gradient_clipping: {self.gradient_clipping} is not positive")
        self._complete_multipliers(where)
        for name in (f"{term}_loss_weight" for term in (*LOSS_TERMS, "dense")):
            _require(getattr(self, name) >= 0, f"{where}{name}: {getattr(self, name)} is negative")
        for name in (
            "direct_records_ratio",
            "edited_facts_ratio",
            "caption_records_ratio",
            "glossary_records_ratio",
            "weight_decay",
        ):
            _require(getattr(self, name) >= 0, f"{where}{name}: {getattr(self, name)} is negative")
        for name in ("final_lr_ratio", "validator_records_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"{where}{name}: {getattr(self, name)} is not in [0, 1]")
        if self.max_minutes is not None:
            _require(self.max_minutes > 0, f"{where}max_minutes: {self.max_minutes} is not positive")
        self._check_component_lists(where)
        for name in self.does_nothing:
            _require(not getattr(self, name), f"{where}{name}: {getattr(self, name)} does nothing in this phase")

    def _complete_multipliers(self, where: str) -> None:
        given = {_ALIASES.get(name, name): factor for name, factor in self.learning_rate_multipliers.items()}
        where += "learning_rate_multipliers: "
        if wrong := set(given) - set(COMPONENTS):
            raise ConfigError(f"{where}unknown {sorted(wrong)}; components are {COMPONENTS}")
        _require(
            len(given) == len(self.learning_rate_multipliers),
            f"{where}{sorted(self.learning_rate_multipliers)} name one component twice",
        )
        if negative := [name for name, factor in given.items() if factor < 0]:
            raise ConfigError(f"{where}{negative} are negative")
        defaults = dict.fromkeys(COMPONENTS, 1.0) | dict(self.default_multipliers)
        if self.freeze_backbone:
            idle = [name for name, factor in given.items() if factor and name in BACKBONE]
            _require(not idle, f"{where}{idle} do nothing under freeze_backbone: true")
            defaults |= dict.fromkeys(BACKBONE, 0.0)
        complete = {name: float(given.get(name, defaults[name])) for name in COMPONENTS}
        object.__setattr__(self, "learning_rate_multipliers", complete)

    def _check_component_lists(self, where: str) -> None:
        multipliers = self.multipliers
        for field_name, should_train in (("trainable_components", True), ("frozen_components", False)):
            for listed in getattr(self, field_name):
                name = _ALIASES.get(listed, listed)
                if name == "all":
                    wrong = [part for part, factor in multipliers.items() if (factor > 0) != should_train]
                    _require(not wrong, f"{where}{field_name}: says all, but {wrong} would not")
                    continue
                component = "reasoning_module" if name in REASONING_PARTS else name
                _require(component in COMPONENTS, f"{where}{field_name}: no component is called {listed!r}")
                _require(
                    (multipliers[component] > 0) == should_train,
                    f"{where}{field_name}: lists {listed}, but its learning rate multiplier is "
                    f"{multipliers[component]:g} (freeze_backbone: {str(self.freeze_backbone).lower()})",
                )

    @property
    def multipliers(self) -> dict[str, float]:
        """Factor on the learning rate for every component."""
        return dict(self.learning_rate_multipliers)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {term: getattr(self, f"{term}_loss_weight") for term in (*LOSS_TERMS, "dense")}


@dataclass(frozen=True, kw_only=True)
class Stage3Config(PhaseConfig):
    """Stage 3: answers without chains, and what is in the picture."""

    does_nothing: ClassVar[tuple[str, ...]] = (
        "reasoning_loss_weight",
        "consistency_loss_weight",
        "answer_loss_weight",
        "multimodal_loss_weight",
        "direct_records_ratio",
        "edited_facts_ratio",
    )

    name: str = "perception_and_answers"
    learning_rate: float = 5e-4
    warmup_steps: int = 500
    direct_loss_weight: float = 1.0
    dense_loss_weight: float = 1.0
    caption_records_ratio: float = 0.5
    glossary_records_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.direct_loss_weight > 0 or self.dense_loss_weight > 0,
            f"phase {self.name!r}: direct_loss_weight and dense_loss_weight are both 0: nothing would be learned",
        )


@dataclass(frozen=True, kw_only=True)
class ReasoningPhaseConfig(PhaseConfig):
    """What the two phases of Stage 4 have in common."""

    does_nothing: ClassVar[tuple[str, ...]] = ("dense_loss_weight", "caption_records_ratio", "glossary_records_ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_records = () if self.direct_records_ratio else ("direct",)  # 0 of them is a way to leave the term out
        terms = [f"{term}_loss_weight" for term in LOSS_TERMS if term not in needs_records]
        _require(
            any(getattr(self, name) for name in terms),
            f"phase {self.name!r}: {', '.join(terms)} are all 0: nothing would be learned; the guide has 0.4/0.3/0.3 "
            "in phase 1 and 0.3/0.2/0.3/0.2 in phase 2",
        )


@dataclass(frozen=True, kw_only=True)
class Phase1Config(ReasoningPhaseConfig):
    """Phase 1 as the guide has it."""

    name: str = "train_reasoning_heads"
    warmup_steps: int = 500
    freeze_backbone: bool = True
    reasoning_loss_weight: float = 0.4
    consistency_loss_weight: float = 0.3
    answer_loss_weight: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Phase2Config(ReasoningPhaseConfig):
    """Phase 2 as the guide has it."""

    default_multipliers: ClassVar[Mapping[str, float]] = {
        "vision_encoder": 0.1,
        "projection": 0.5,
        "language_model": 0.5,
        "reasoning_module": 1.0,
    }

    name: str = "joint_finetuning"
    learning_rate: float = 5e-5
    warmup_steps: int = 200
    reasoning_loss_weight: float = 0.3
    consistency_loss_weight: float = 0.2
    answer_loss_weight: float = 0.3
    multimodal_loss_weight: float = 0.2


AUGMENTATION_STRATEGIES: Mapping[str, float] = {"paraphrase": 0.3, "reorder": 0.2, "expand": 0.3, "simplify": 0.2}
"""The guide's shares of the new records."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Chains made from those of the training split, before training."""

    target_samples: int = 50000
    """Training records in all, the given ones included; fewer where there are no more distinct chains."""
    validate_reasoning: bool = True
    """Check the claims and the conclusion of every new chain."""
    augmentation_strategies: Mapping[str, float] = field(default_factory=lambda: AUGMENTATION_STRATEGIES)
    """Strategy -> its weight among those named; one not named is not used. What one cannot give, the others do."""

    def __post_init__(self) -> None:
        _require(self.target_samples >= 1, f"target_samples: {self.target_samples} is less than 1")
        weights = self.augmentation_strategies
        for name, weight in weights.items():
            _one_of("augmentation_strategies", name, tuple(AUGMENTATION_STRATEGIES))
            _require(weight >= 0, f"augmentation_strategies: {name}: {weight} is negative")
        _require(any(weights.values()), "augmentation_strategies: no weight is above 0; leave the section out instead")


COMPLEXITIES = ("simple", "medium", "complex")
"""How complex a chain can be, the simplest first."""


@dataclass(frozen=True, kw_only=True)
class CurriculumStageConfig:
    """What an epoch of this stage trains on."""

    max_steps: int
    """Most numbered steps of a chain, the conclusion not counted."""
    complexity: str = "complex"
    """One of `COMPLEXITIES`; simpler records are trained on as well."""
    epochs: tuple[int, ...] = ()
    """First and last epoch, counted from 1 over both phases; by default the guide's."""

    def __post_init__(self) -> None:
        _one_of("complexity", self.complexity, COMPLEXITIES)
        _require(self.max_steps >= 1, f"max_steps: {self.max_steps} is less than 1")
        if self.epochs:
            ordered = len(self.epochs) == 2 and 1 <= self.epochs[0] <= self.epochs[1]
            _require(ordered, f"epochs: {list(self.epochs)} is not [first, last], counted from 1")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Short and simple chains first. The last stage goes on to the end of the run."""

    stage1: CurriculumStageConfig = CurriculumStageConfig(max_steps=3, complexity="simple")
    """Epochs 1 to 3."""
    stage2: CurriculumStageConfig = CurriculumStageConfig(max_steps=5, complexity="medium")
    """Epochs 4 to 7."""
    stage3: CurriculumStageConfig = CurriculumStageConfig(max_steps=10, complexity="complex")
    """Epochs 8 to 10."""

    def __post_init__(self) -> None:
        expected = 1
        for name, (first, last) in self._epochs.items():
            _require(
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


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Stage 4: both phases and what they share."""

    name: str = "cot_reasoning"
    phase1: Phase1Config = Phase1Config()
    phase2: Phase2Config = Phase2Config()
    batch_size: int = 32
    """Records per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update."""
    reasoning_augmentation: AugmentationConfig | None = None
    """None trains on the records as they are, which was better in every measurement (docs/results.md)."""
    scheduled_sampling: ScheduledSamplingConfig = ScheduledSamplingConfig(enabled=False)
    """Off where the section is left out; the section alone turns it on."""
    max_reasoning_length: int = 512
    """Tokens of the chain and answer; longer chains are an error of the data, listed before training."""
    gradient_checkpointing: bool = False
    """Recompute activations of the backbone in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "max_reasoning_length"):
            _require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is less than 1")

    @property
    def known_to_harm(self) -> list[str]:
        """A line for each setting of the guide's that is on and whose price is known."""
        lines = []
        if self.reasoning_augmentation is not None:
            lines.append(
                "reasoning_augmentation is on: in our measurements it lost 9 to 35 points of answer accuracy "
                "(docs/results.md, 'Augmented or not'); leave it out to train on the given records"
            )
        if self.scheduled_sampling.enabled:
            lines.append(
                "scheduled_sampling is on: gold steps behind the model's own wrong ones teach it to ignore its chain; "
                "the recipe of docs/results.md has `enabled: false`"
            )
        return lines


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Training on with direct answers only, to see what reasoning is worth."""

    learning_rate: float = 1e-4
    warmup_steps: int = 20
    batch_size: int = 32
    same_time: bool = True
    """Also train for as long on the clock as both phases took."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: str = "embervlm-39m"
    """Name of a preset in `configs/model/`, or a path to such a YAML."""
    seed: int = 0
    """Seed of everything."""
    output_dir: str = "outputs"
    """Where stage3/, stage4/ and results/ go."""
    reasoning_data: str = "data/stage4/reasoning_data.json"
    """Records: a JSON, JSONL or Parquet file, a folder of parts, or a pattern."""
    image_root: str | None = None
    """Folder that picture paths are relative to; None is the data file's own folder."""
    allow_outside: bool = False
    """Accept pictures outside that folder."""
    resume_from: str | None = None
    """Checkpoint whose weights a phase starts from. A run that is under way resumes by itself; see `resume`."""
    resume: str = "auto"
    """auto resumes from the newest sound checkpoint in `output_dir`; never makes such a checkpoint an error."""
    engine: str = "deepspeed"
    """deepspeed, fsdp or torch; a checkpoint of one resumes under any other."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: bf16 on a GPU that has it, fp16 on other GPUs, fp32 on the CPU."""
    zero_stage: int = 2
    """ZeRO stage 0, 1, 2 or 3."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON that is used in place of the one for `zero_stage` and `precision`."""
    stage3: Stage3Config = Stage3Config()
    stage3_batch_size: int = 64
    stage4: StageConfig = StageConfig()
    curriculum: CurriculumConfig | None = None
    """None trains on all records in every epoch."""
    baseline: BaselineConfig = BaselineConfig()
    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    background_saves: bool = True
    """Write checkpoints while training goes on; false waits for each."""
    on_save_error: str = "stop"
    """stop ends the run when a checkpoint cannot be written; continue warns and tries again at the next one."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on the val split, one at the end included; None leaves them to
    `select_best`."""
    eval_samples: int = 64
    eval_cluster: str | None = None
    """Node recipe of which one GPU evaluates, in a Slurm job of its own while training goes on; None evaluates between
    two steps."""
    sample_records: int = 8
    """Chains written to `reasoning_samples` after every epoch."""
    keep_last: int = 3
    """Newest numbered checkpoints to keep whole, so that a phase can resume from them."""
    keep_weights: int = 20
    """Numbered checkpoints before those of which the weights are kept, a third of their size; older ones are deleted.
    20 are a whole phase of the guide's, 500 steps apart, on one GPU."""
    keep_best: int = 1
    """Best evaluated checkpoints to keep besides, by their weights."""
    log_steps: int = 10
    """Optimizer steps between log lines."""
    log_records: bool = False
    """Also log the ids of the records of every logged step."""
    max_steps: int | None = None
    """Stop each phase after this many optimizer steps."""
    report: bool = False
    """Write `stage4/visualizations/` when Stage 4 has ended, and add its figures to the W&B run."""
    wandb_project: str | None = None
    """Weights & Biases project; offline where W&B finds no key."""
    wandb_run_name: str | None = None
    """Name of the run there."""

    def __post_init__(self) -> None:
        for name in (
            "model",
            "output_dir",
            "reasoning_data",
            "image_root",
            "resume_from",
            "deepspeed_config",
            "eval_cluster",
        ):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, _expanded(name, path))
        _one_of("engine", self.engine, ("deepspeed", "fsdp", "torch"))
        _one_of("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        _one_of("resume", self.resume, ("auto", "never"))
        _one_of("on_save_error", self.on_save_error, ("stop", "continue"))
        _require(self.zero_stage in (0, 1, 2, 3), f"zero_stage: {self.zero_stage} is not 0, 1, 2 or 3")
        for name in ("keep_best", "keep_weights"):
            _require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is negative")
        for name in ("save_steps", "log_steps", "keep_last", "stage3_batch_size", "eval_samples"):
            _require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is less than 1")
        for name in ("max_steps", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}: {value} is less than 1")


def from_mapping(cls: type[Config], values: Any, where: str = "") -> Config:
    """A `cls` from parsed YAML. Every unknown key and wrong type in it is reported together, with its path."""
    problems: list[str] = []
    built = _build(cls, values, where, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return typing.cast(Config, built)


def _build(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'config'}: expected a mapping, found {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    kwargs = {}
    found_before = len(problems)
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(f"{path}: unknown key{_advice(str(key), hints)}")
            continue
        kwargs[key] = _convert(hints[key], value, path, problems)
    required = (f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING)
    problems += [f"{where or 'config'}: {name} is missing" for name in required if name not in values]
    if len(problems) > found_before:
        return None
    try:
        return cls(**kwargs)
    except ConfigError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return None


def _advice(key: str, hints: Mapping[str, Any]) -> str:
    """What to do about a key that is none of `hints`: where it belongs, or what may have been meant."""
    name = _ALIASES.get(key, key)
    if name in COMPONENTS:
        return f"; it belongs under stage4.phase2.learning_rate_multipliers: {name}"
    if places := sorted(_places_of(TrainConfig, key), key=lambda place: (not place.startswith("stage4"), place)):
        return "; it belongs to " + " or ".join(place or "the top of the file" for place in places)
    close = difflib.get_close_matches(key, hints, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _places_of(cls: Any, key: str, where: str = "") -> list[str]:
    """Dotted paths of the sections of `cls` that have a setting called `key`."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if inner is not None:
            found += _places_of(inner, key, f"{where}.{name}".lstrip("."))
        if name == key and name not in getattr(cls, "does_nothing", ()):
            found.append(where)
    return found


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, problems)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(arg for arg in typing.get_args(hint) if arg is not type(None)), value, path, problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(typing.get_args(hint)[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        item_hint = typing.get_args(hint)[1]
        return {key: _convert(item_hint, item, f"{path}.{key}", problems) for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(hint, str(hint))
    problems.append(f"{path}: expected {wanted}, found {value!r}")
    return None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with file and line otherwise."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(values).__name__}")
    return values


def override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings, in place."""
    *parents, last = dotted.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {parent} is {values!r} in the YAML, not a section with keys")
    component = _ALIASES.get(last, last)
    for other in [key for key in values if _ALIASES.get(key, key) == component]:
        del values[other]
    values[component] = value


MOVED = {
    "phase1": "stage4.phase1",
    "phase2": "stage4.phase2",
    "augmentation_strategies": "stage4.reasoning_augmentation.augmentation_strategies",
}
"""Blocks that the guide prints alone -> where they belong."""


def _move_blocks(values: dict[str, Any]) -> None:
    for block, home in MOVED.items():
        if block not in values:
            continue
        at: Any = values
        for part in home.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        _require(at is None, f"{block}: stands at the top and in {home.rpartition('.')[0]}; keep one of them")
        override(values, home, values.pop(block))


def load_train_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, flags: Mapping[str, str] | None = None
) -> TrainConfig:
    """The run in YAML file `path`, with `overrides` (dotted key -> value) on top.

    Args:
        flags: Dotted key -> the flag that an override came from; an error names it, or else the file.
    """
    values = read_yaml(path)
    try:
        _move_blocks(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    given = {}
    for dotted, value in (overrides or {}).items():
        block, dot, rest = dotted.partition(".")
        given[f"{MOVED.get(block, block)}{dot}{rest}"] = ((flags or {}).get(dotted, dotted), value)
    problems = _problems(values, given)
    if not problems:
        return from_mapping(TrainConfig, _overridden(values, given))
    in_file = _problems(values, {})
    raise ConfigError("\n".join(f"{_origin(path, values, given, p, in_file)}: {p}" for p in problems))


Given = Mapping[str, tuple[str, Any]]
"""Dotted key -> the flag it came from, and the value."""


def _overridden(values: dict[str, Any], given: Given) -> dict[str, Any]:
    out = copy.deepcopy(values)
    for dotted, (_, value) in given.items():
        override(out, dotted, value)
    return out


def _problems(values: dict[str, Any], given: Given) -> list[str]:
    try:
        from_mapping(TrainConfig, _overridden(values, given))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _origin(path: str | Path, values: dict[str, Any], given: Given, problem: str, in_file: list[str]) -> str:
    """Where `problem` comes from: the file, or the flag that makes it alone, or flags and file together."""
    if problem in in_file or not given:
        return str(path)
    for dotted, (flag, value) in given.items():
        if problem in _problems(values, {dotted: (flag, value)}):
            return f"{flag} {value}"
    return f"{path} with {', '.join(flag for flag, _ in given.values())}"


def model_preset(name: str) -> dict[str, Any]:
    """Settings of an `EmberVLMConfig` by preset name or YAML path."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = REPOSITORY / "configs" / "model" / f"{name}.yaml"
        if not path.exists():
            known = sorted(preset.stem for preset in path.parent.glob("*.yaml"))
            raise ConfigError(f"model: no preset {name!r}; known are {', '.join(known)}, or give a path to a YAML")
    values = read_yaml(path)
    for part in ("vision", "language"):
        settings = values.get(part)
        if isinstance(settings, dict) and isinstance(name_or_path := settings.get("name_or_path"), str):
            settings["name_or_path"] = _expanded(f"{path}: {part}.name_or_path", name_or_path)
    return values


def as_dict(config: Any) -> dict[str, Any]:
    """Plain mapping of a config, as saved with every run."""
    return dataclasses.asdict(config)

"""Command line of `launch/train.py`: flags override a node recipe, which overrides a YAML.

Imports no torch: Slurm's helpers read it on login nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml

from embervlm.cluster import CLUSTER_VARIABLE, load_recipe
from embervlm.config import REPOSITORY, ConfigError, PhaseConfig, StageConfig, TrainConfig
from embervlm.config_file import brings_its_shape, frozen_in_stage3, load_train_config, pretrained_parts
from embervlm.errors import OneLineParser
from embervlm.options import add_flag

_Phase = TypeVar("_Phase", bound=PhaseConfig)
_OF_THE_RUN = (
    "model",
    "output_dir",
    "reasoning_data",
    "domain",
    "image_root",
    "allow_outside",
    "resume_from",
    "seed",
    "resume",
    "engine",
    "precision",
    "zero_stage",
    "deepspeed_config",
    "max_steps",
    "max_minutes",
    "save_steps",
    "eval_steps",
    "eval_cluster",
    "keep_last",
    "keep_weights",
    "keep_best",
    "log_steps",
    "wandb_project",
    "wandb_run_name",
)
_OF_STAGE4 = ("batch_size", "gradient_accumulation_steps", "max_reasoning_length", "gradient_checkpointing")
_OF_A_PHASE = ("epochs", "learning_rate", "warmup_steps")
FLAGS = {
    **{name: name for name in _OF_THE_RUN},
    **{name: f"stage4.{name}" for name in _OF_STAGE4},
    **{f"phase{number}_{name}": f"stage4.phase{number}.{name}" for name in _OF_A_PHASE for number in (1, 2, 3)},
    "stage3_epochs": "stage3.epochs",
}
"""Flag -> key in the YAML, which defines type, default and help."""
_TIME_SHARES = {"stage3": 6, "phase1": 1, "phase2": 3}
"""Of `max_minutes`: what they took on easy-VQA, until each had learned what it could (docs/results.md)."""


def parser() -> argparse.ArgumentParser:
    out = OneLineParser(
        prog="launch/train.py",
        description="Train Stage 3, Stage 4 or baselines. Flags override --cluster, which overrides --config.",
        example="python launch/train.py --stages 3 4 --output_dir outputs --reasoning_data data/reasoning_data.json",
        allow_abbrev=False,
    )
    out.add_argument(
        "--config", type="path", default=str(REPOSITORY / "configs" / "training_stages.yaml"), help="the run's YAML"
    )
    out.add_argument(
        "--cluster",
        type="path",
        default=os.environ.get(CLUSTER_VARIABLE) or None,
        help="node recipe in configs/cluster/, or a YAML; its settings override --config, flags override both. "
        f"Default: ${CLUSTER_VARIABLE}",
    )
    out.add_argument("--stages", nargs="+", default=["4"], help="3, 4, baseline; several in order")
    out.add_argument(
        "--phase",
        type=int,
        choices=(1, 2, 3),
        help="only this phase of Stage 4; default: 1 and 2, and 3 where the YAML has stage4.phase3",
    )
    out.add_argument("--run_both_phases", action="store_true", help="phase 1, then phase 2 (the default)")
    out.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="any other key of the YAML"
    )
    out.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    for flag, key in FLAGS.items():
        action = add_flag(out, TrainConfig, key, flag=flag, default=None, dest=flag)  # None: the YAML decides
        action.help = f"{(action.help or '').rstrip('.')} (default: as in --config)"
    return out


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value, from the node recipe and the given flags; the flags override the recipe."""
    out = load_recipe(args.cluster).train_settings if args.cluster else {}
    out |= {key: value for flag, key in FLAGS.items() if (value := getattr(args, flag)) is not None}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write KEY=VALUE")
        out[key] = yaml.safe_load(value)
    return out


def load_config(args: argparse.Namespace) -> TrainConfig:
    """The run that `args` describe; an error names its origin: the flag, the node recipe or the YAML."""
    overrides = overrides_of(args)
    names = {key: f"--cluster {args.cluster}: {key}" for key in overrides}
    names |= {key: f"--{flag}" for flag, key in FLAGS.items() if getattr(args, flag) is not None}
    names |= {key: f"--set {key}" for key in (item.partition("=")[0] for item in args.set)}
    config = load_train_config(args.config, overrides, names)
    if args.phase == 3 and config.stage4.phase3 is None:
        config = load_train_config(args.config, {**overrides, "stage4.phase3": {}}, names)
    if "model" not in overrides and config.resume_from and brings_its_shape(config.resume_from):
        config = dataclasses.replace(config, model=config.resume_from)
    if "3" in stages_of(args) and (frozen := frozen_in_stage3(config)):
        factors = {**config.stage3.multipliers, **dict.fromkeys(frozen, 0.0)}
        config = dataclasses.replace(
            config, stage3=dataclasses.replace(config.stage3, learning_rate_multipliers=factors)
        )
    return config if config.max_minutes is None else _with_time_shared(config, stages_of(args), args.phase)


def _with_time_shared(config: TrainConfig, stages: Sequence[str], phase: int | None) -> TrainConfig:
    """`config` in which each stage that the command trains has its part of `max_minutes`."""
    assert config.max_minutes is not None
    trained = ["stage3"] if "3" in stages else []
    trained += [f"phase{number}" for number in (1, 2) if "4" in stages and phase in (None, number)]
    if not trained:
        raise ConfigError("max_minutes: the time of Stage 3 and phases 1 and 2, and this command trains none of them")
    whole = sum(_TIME_SHARES[name] for name in trained)
    minutes = {name: config.max_minutes * _TIME_SHARES[name] / whole for name in trained}

    def timed(name: str, phase: _Phase) -> _Phase:
        if name not in trained:
            return phase
        if phase.max_minutes is not None:
            raise ConfigError(f"max_minutes is given for the whole run and for {name}; give one of them")
        return dataclasses.replace(phase, max_minutes=minutes[name])

    stage = config.stage4
    stage = dataclasses.replace(stage, phase1=timed("phase1", stage.phase1), phase2=timed("phase2", stage.phase2))
    return dataclasses.replace(config, stage3=timed("stage3", config.stage3), stage4=stage)


def stages_of(args: argparse.Namespace) -> list[str]:
    stages = [stage for item in args.stages for stage in item.split(",") if stage]
    if wrong := [stage for stage in stages if stage not in ("3", "4", "baseline")]:
        raise ConfigError(f"--stages: {', '.join(wrong)}: this program trains 3, 4 and baseline")
    if args.phase and args.run_both_phases:
        raise ConfigError("--phase and --run_both_phases contradict each other; give one of them")
    if args.phase and "4" not in stages:
        raise ConfigError(f"--phase {args.phase} is a phase of Stage 4, which --stages {' '.join(stages)} leaves out")
    return stages


def check_start(stages: Sequence[str], config: TrainConfig) -> None:
    """ConfigError if `resume_from` would not be used."""
    if "3" in stages and config.resume_from:
        raise ConfigError(
            f"--stages {' '.join(stages)} trains Stage 3 from its beginning, so --resume_from {config.resume_from} "
            "would not be used; leave out 3 to start Stage 4 from that checkpoint, or leave out --resume_from (a Stage "
            "3 that was stopped resumes by itself in its --output_dir)"
        )


PRETRAINED_RATE = 2e-4
"""At which SmolLM2-135M learned; at 1e-3 it diverged (docs/results.md)."""


def rates_that_harm(config: TrainConfig, phases: Sequence[int]) -> list[str]:
    """A line for each pretrained or imported component that would learn faster than is known to be good for one."""
    stage, lines = config.stage4, []
    for number, phase in ((2, stage.phase2), (3, stage.phase3)):
        if number not in phases or phase is None:
            continue
        for name in pretrained_parts(config):
            if (rate := phase.learning_rate * phase.multipliers[name]) > 1.01 * PRETRAINED_RATE:
                lines.append(
                    f"phase {number}: {name} is pretrained and learns at a rate of {rate:g}. At 1e-3 such a model lost "
                    f"what it knew, at {PRETRAINED_RATE:g} it did not (docs/results.md): --set stage4.phase{number}."
                    f"learning_rate_multipliers.{name}={PRETRAINED_RATE / phase.learning_rate:.2g}"
                )
    return lines


def known_to_harm(stage: StageConfig) -> list[str]:
    """A line for each active setting of the guide that is known to cost accuracy."""
    lines = []
    if stage.reasoning_augmentation is not None:
        lines.append(
            "reasoning_augmentation is on: in our measurements it lost 9 to 35 points of answer accuracy "
            "(docs/results.md, 'Augmented or not'); leave it out to train on the given records"
        )
    if stage.scheduled_sampling.enabled:
        lines.append(
            "scheduled_sampling is on: gold steps after the model's own wrong ones teach it to ignore its chain; "
            "the recipe of docs/results.md has `enabled: false`"
        )
    return lines

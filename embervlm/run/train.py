"""Command line of `launch/train.py`: flags over a YAML, then the stages."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embervlm.cluster import CLUSTER_VARIABLE, load_recipe
from embervlm.config import REPOSITORY, ConfigError, TrainConfig, load_train_config
from embervlm.errors import OneLineParser, UserError, told_in_one_line
from embervlm.run.eval_jobs import check_eval_cluster
from embervlm.run.owner import owning
from embervlm.run_dir import phase_dir
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE, Preempted, listen

if TYPE_CHECKING:
    from embervlm.world import World

FLAGS: dict[str, tuple[str, type, str]] = {
    "model": ("model", str, "preset in configs/model/, or a YAML"),
    "output_dir": ("output_dir", str, "where stage3/, stage4/ and results/ go"),
    "reasoning_data": ("reasoning_data", str, "records: a JSON, JSONL or Parquet file, a folder of parts, a pattern"),
    "image_root": ("image_root", str, "folder that picture paths are relative to"),
    "resume_from": ("resume_from", str, "checkpoint whose weights the first phase starts from"),
    "seed": ("seed", int, "seed of everything"),
    "resume": ("resume", str, "auto: go on from the newest sound checkpoint of this run; never"),
    "engine": ("engine", str, "deepspeed, fsdp or torch"),
    "precision": ("precision", str, "auto, fp32, bf16 or fp16"),
    "zero_stage": ("zero_stage", int, "ZeRO stage 0, 1, 2 or 3"),
    "deepspeed_config": ("deepspeed_config", str, "a DeepSpeed JSON of your own"),
    "batch_size": ("stage4.batch_size", int, "records per device and micro-batch"),
    "gradient_accumulation_steps": ("stage4.gradient_accumulation_steps", int, "micro-batches per update"),
    "max_reasoning_length": ("stage4.max_reasoning_length", int, "tokens of chain and answer"),
    "phase1_epochs": ("stage4.phase1.epochs", int, "epochs of phase 1"),
    "phase2_epochs": ("stage4.phase2.epochs", int, "epochs of phase 2"),
    "phase1_learning_rate": ("stage4.phase1.learning_rate", float, "peak rate of phase 1"),
    "phase2_learning_rate": ("stage4.phase2.learning_rate", float, "peak rate of phase 2"),
    "phase1_warmup_steps": ("stage4.phase1.warmup_steps", int, "warmup of phase 1"),
    "phase2_warmup_steps": ("stage4.phase2.warmup_steps", int, "warmup of phase 2"),
    "stage3_epochs": ("stage3.epochs", int, "epochs of Stage 3"),
    "max_steps": ("max_steps", int, "stop each phase after this many updates"),
    "save_steps": ("save_steps", int, "updates between checkpoints"),
    "eval_steps": ("eval_steps", int, "updates between evaluations on val"),
    "eval_cluster": ("eval_cluster", str, "evaluate in Slurm jobs of their own, on one GPU of this node recipe"),
    "keep_last": ("keep_last", int, "newest checkpoints to keep whole"),
    "keep_weights": ("keep_weights", int, "checkpoints before those to keep the weights of"),
    "keep_best": ("keep_best", int, "best evaluated checkpoints to keep besides"),
    "log_steps": ("log_steps", int, "updates between log lines"),
    "wandb_project": ("wandb_project", str, "Weights & Biases project; offline where W&B finds no key"),
    "wandb_run_name": ("wandb_run_name", str, "name of the run there"),
}
"""Flag -> (key in the YAML, type, help)."""


def parser() -> argparse.ArgumentParser:
    out = OneLineParser(prog="launch/train.py", description=__doc__, allow_abbrev=False)
    out.add_argument(
        "--config", type="path", default=str(REPOSITORY / "configs" / "training_stages.yaml"), help="the run's YAML"
    )
    out.add_argument(
        "--cluster",
        type="path",
        default=os.environ.get(CLUSTER_VARIABLE) or None,
        help=f"node recipe in configs/cluster/, or a YAML; its settings stand over --config, flags over it. "
        f"Default: ${CLUSTER_VARIABLE}",
    )
    out.add_argument("--stages", nargs="+", default=["4"], help="3, 4, baseline; several in order")
    out.add_argument("--phase", type=int, choices=(1, 2), help="only this phase of Stage 4")
    out.add_argument("--run_both_phases", action="store_true", help="phase 1, then phase 2 (the default)")
    out.add_argument("--gradient_checkpointing", action="store_true", default=None, help="recompute activations")
    out.add_argument("--allow_outside", action="store_true", default=None, help="pictures outside the data folder")
    out.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other key of the YAML")
    out.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    for flag, (_, kind, text) in FLAGS.items():
        out.add_argument(f"--{flag}", type=kind, help=text)
    return out


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value of the node recipe and, over it, of every flag that was given."""
    import yaml

    out = load_recipe(args.cluster).train_settings if args.cluster else {}
    out |= {key: getattr(args, flag) for flag, (key, _, _) in FLAGS.items() if getattr(args, flag) is not None}
    if args.gradient_checkpointing:
        out["stage4.gradient_checkpointing"] = True
    if args.allow_outside:
        out["allow_outside"] = True
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write KEY=VALUE")
        out[key] = yaml.safe_load(value)
    return out


def load_config(args: argparse.Namespace) -> TrainConfig:
    """The run that `args` describe; an error names the flag, the node recipe or the YAML that it comes from."""
    names = {key: f"--{flag}" for flag, (key, _, _) in FLAGS.items() if getattr(args, flag) is not None}
    names |= {key: f"--set {key}" for key in (item.partition("=")[0] for item in args.set)}
    overrides = overrides_of(args)
    names = {key: names.get(key, f"--cluster {args.cluster}: {key}") for key in overrides}
    return load_train_config(args.config, overrides, names)


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
    """ConfigError where `resume_from` would not be used."""
    if "3" in stages and config.resume_from:
        raise ConfigError(
            f"--stages {' '.join(stages)} trains Stage 3 from its beginning, so --resume_from {config.resume_from} "
            "would not be used; leave out 3 to start Stage 4 from that checkpoint, or leave out --resume_from (a Stage "
            "3 that was stopped goes on by itself in its --output_dir)"
        )


def main(argv: list[str] | None = None) -> None:
    with told_in_one_line():
        args = parser().parse_args(argv)
        if args.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        stages, config = stages_of(args), load_config(args)
        check_start(stages, config)
        if config.deepspeed_config is not None and not Path(config.deepspeed_config).is_file():
            raise ConfigError(f"--deepspeed_config {config.deepspeed_config}: no such file")
        if config.eval_cluster is not None:
            check_eval_cluster(config.eval_cluster)
        _train(args, stages, config)


def _train(args: argparse.Namespace, stages: list[str], config: TrainConfig) -> None:
    listen()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from embervlm.run.stages import Run
    from embervlm.world import World

    world = World.join()
    try:
        check_cluster(args.cluster, world.size)
        with _owned_by_all(config.output_dir, world):
            Run(config, world).go(stages, args.phase)
    except UserError:
        raise
    except Preempted as stopped:
        if world.rank == 0:
            print(stopped, file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    except Exception:  # no user's mistake: a process of another node is gone, a device fails
        traceback.print_exc()
        sys.exit(EXIT_FAULT)
    finally:
        _leave()
    if config.report and world.rank == 0 and "4" in stages:
        write_run_report(config)


@contextmanager
def _owned_by_all(output_dir: str, world: World) -> Iterator[None]:
    """`owning` for all processes of a run: the first one asks, and its error is everyone's."""
    with ExitStack() as stack:
        error = None
        if world.rank == 0:
            try:
                stack.enter_context(owning(output_dir))
            except UserError as refusal:
                error = refusal
        if (error := world.broadcast(error)) is not None:
            raise error
        yield


def write_run_report(config: TrainConfig) -> None:
    """Figures and pages of the run, and its figures in W&B. The run is trained: what fails here is only said."""
    from embervlm.report.build import write_report
    from embervlm.training.tracking import log_figures

    try:
        report = write_report(config.output_dir)
        print(f"Report: {report.index}")
        if config.wandb_project:
            log_figures(
                phase_dir(config.output_dir, 2),
                report.figures,
                project=config.wandb_project,
                run_name=config.wandb_run_name,
            )
    except Exception as error:  # drawing and W&B raise what they like
        print(f"no report ({type(error).__name__}: {error}); `embervlm report {config.output_dir}` tries again")


def check_cluster(name: str | None, num_processes: int) -> None:
    """Raise ConfigError where this many processes are not the recipe's, whose global batch would be another."""
    if name and num_processes != (wanted := load_recipe(name).num_gpus):
        raise ConfigError(
            f"--cluster {name} is for {wanted} processes, one per GPU; {num_processes} were started. "
            f"Start {wanted}, or choose another recipe"
        )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

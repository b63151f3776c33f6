"""`launch/train.py`: one process of a training run, from the command line to its stages (`stages.Run`)."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from embervlm.cluster import load_recipe
from embervlm.config import ConfigError, TrainConfig
from embervlm.errors import UserError, told_in_one_line
from embervlm.run.eval_jobs import check_eval_cluster
from embervlm.run.owner import owning
from embervlm.run.train_flags import check_start, load_config, parser, stages_of
from embervlm.run_dir import eval_results_path
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE, Preempted, listen

if TYPE_CHECKING:
    from embervlm.world import World


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
    from embervlm.run.report import write_run_report
    from embervlm.run.stages import Run
    from embervlm.world import World

    world = World.join()
    try:
        check_cluster(args.cluster, world.size)
        with _owned_by_all(config.output_dir, world):
            final = Run(config, world).go(stages, args.phase)
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
        world.leave()
    if world.rank == 0:
        if config.report and "4" in stages:
            write_run_report(config)
        print("\n".join(closing_lines(args, stages, config, final)))


def closing_lines(args: argparse.Namespace, stages: list[str], config: TrainConfig, final: Path) -> list[str]:
    """Where the result is, and the command that one would type next."""
    lines = [f"Checkpoint: {final}"]
    if "4" in stages and args.phase in (None, 2, 3):
        written = eval_results_path(config.output_dir)
        return [
            *lines,
            f'Ask it: embervlm ask PICTURE "QUESTION" --checkpoint {final}',
            f"Evaluate it: embervlm evaluate --checkpoint {final} --output_file {written} --save_reasoning_samples",
        ]
    if stages == ["baseline"]:
        return lines
    own = "" if args.config == parser().get_default("config") else f" --config {args.config}"
    what = "--stages 4 --phase 2" if "4" in stages else "--stages 4"
    return [
        *lines,
        f"Next: embervlm train{own} {what} --resume_from {final} --output_dir {config.output_dir} "
        f"--reasoning_data {config.reasoning_data}",
    ]


def check_cluster(name: str | None, num_processes: int) -> None:
    """Raise ConfigError if the number of processes is not the recipe's, because the global batch would change."""
    if name and num_processes != (wanted := load_recipe(name).num_gpus):
        raise ConfigError(
            f"--cluster {name} is for {wanted} processes, one per GPU; {num_processes} were started. "
            f"Start {wanted}, or choose another recipe"
        )


@contextmanager
def _owned_by_all(output_dir: str, world: World) -> Iterator[None]:
    """`owning` for all processes of a run: the first one takes the folder, and all raise its error."""
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

"""What the scripts in `slurm/` ask: which resources a job needs, and whether it goes back into the queue.

    python -m embervlm.slurm options --phase 1 FLAGS    options of sbatch for these flags of launch/train.py
    python -m embervlm.slurm fits --phase 1 FLAGS       exit status 0 in a job that has these nodes
    python -m embervlm.slurm output_dir FLAGS           the run's output folder
    python -m embervlm.slurm started --phase 1 FLAGS    in a job, before training
    python -m embervlm.slurm ended --exit_code N --phase 1 FLAGS     in a job, after it

Without `--phase` a job has one GPU of the recipe, for evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from embervlm import run_dir
from embervlm.cluster import CLUSTER_VARIABLE, ClusterRecipe, load_recipe, recipe_names
from embervlm.config import ConfigError
from embervlm.errors import told_in_one_line
from embervlm.training.cli import load_config
from embervlm.training.cli import parser as train_parser
from embervlm.training.signals import EXIT_FAULT, EXIT_REQUEUE

MAX_REQUEUES_VARIABLE = "EMBERVLM_MAX_REQUEUES"
MAX_REQUEUES = 20
KILLED = 128
"""A shell's exit status of a command that died of a signal is this and the signal's number."""


def _recipe(args: argparse.Namespace) -> ClusterRecipe:
    """The nodes of a job with these flags; one GPU where no phase is named, as for evaluation."""
    if not args.cluster:
        raise ConfigError(f"choose the nodes with --cluster or {CLUSTER_VARIABLE}: {', '.join(recipe_names())}")
    recipe = load_recipe(args.cluster)
    return recipe if args.phase else dataclasses.replace(recipe, nodes=1, gpus_per_node=1)


def fits(recipe: ClusterRecipe) -> bool:
    """Whether this process runs in a Slurm job of the recipe's size."""
    has = os.environ.get("SLURM_JOB_NUM_NODES"), os.environ.get("SLURM_NTASKS_PER_NODE")
    return has == (str(recipe.nodes), str(recipe.gpus_per_node))


class Requeues:
    """The starts of one job, in `<phase folder>/slurm-<job id>.json`, and whether it may start once more."""

    def __init__(self, phase_dir: Path) -> None:
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        limit = os.environ.get(MAX_REQUEUES_VARIABLE) or str(MAX_REQUEUES)
        if not limit.isdecimal():
            raise ConfigError(f"{MAX_REQUEUES_VARIABLE}={limit}: write a whole number in slurm/site.env")
        self.limit = int(limit)
        self._phase_dir = phase_dir
        self._path = phase_dir / f"slurm-{self.job_id}.json"

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none."""
        return max((found.step for found in run_dir.list_checkpoints(self._phase_dir)), default=0)

    def started(self) -> None:
        """Note where this start goes on. ConfigError where the job has been started too often, by whomever."""
        if self.restarts > self.limit:
            raise ConfigError(
                f"job {self.job_id} was requeued {self.restarts} times, more than "
                f"{MAX_REQUEUES_VARIABLE}={self.limit}; look into its log, and submit again to go on"
            )
        run_dir.write_json_atomic(self._path, {"restarts": self.restarts, "step": self.newest_step()})

    def refusal(self, exit_code: int) -> str | None:
        """Why the job may not be requeued after its training ended with `exit_code`; None where it may.

        The first start may fail without progress, as on a bad node; a requeue must have brought the run further.
        """
        if exit_code not in (EXIT_REQUEUE, EXIT_FAULT) and exit_code < KILLED:
            return f"exit status {exit_code} is an error that would come again"
        if self.restarts >= self.limit:
            return f"it was requeued {self.restarts} times ({MAX_REQUEUES_VARIABLE}={self.limit})"
        step = self.newest_step()
        if self.restarts and step <= run_dir.read_object(self._path, "step")["step"]:
            return f"the last requeue made no progress: the newest checkpoint is still of step {step}"
        return None


def job_state(job_id: str) -> str:
    """Slurm's word for the job, such as RUNNING or CANCELLED."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise ConfigError(f"scontrol show job {job_id}: {shown.stderr.strip()}")
    return dict(item.partition("=")[::2] for item in shown.stdout.split())["JobState"]


def ended(requeues: Requeues, exit_code: int) -> int:
    """Requeue the job, or say why not. Returns the exit status of the job."""
    if exit_code == 0:
        return 0
    if (state := job_state(requeues.job_id)) != "RUNNING":  # cancelled, or Slurm requeues it by itself
        print(f"job {requeues.job_id} is {state}: left to Slurm", file=sys.stderr)
        return exit_code
    if why := requeues.refusal(exit_code):
        print(f"error: job {requeues.job_id} is not requeued: {why}. See docs/slurm.md", file=sys.stderr)
        return exit_code
    print(f"job {requeues.job_id} is requeued at step {requeues.newest_step()}", file=sys.stderr)
    return subprocess.run(["scontrol", "requeue", requeues.job_id], check=False).returncode


def main(argv: list[str] | None = None) -> None:
    parser = train_parser()
    parser.prog, parser.description = "python -m embervlm.slurm", __doc__
    parser.add_argument("action", choices=("options", "fits", "output_dir", "started", "ended"))
    parser.add_argument("--exit_code", type=int, help="of the training that ended")
    args = parser.parse_args(argv)
    with told_in_one_line():
        sys.exit(_run(args))


def _run(args: argparse.Namespace) -> int:
    if args.action == "options":
        recipe = _recipe(args)
        print(" ".join(recipe.sbatch_options({1: recipe.phase1_minutes, 2: recipe.phase2_minutes}.get(args.phase))))
        return 0
    if args.action == "fits":
        return 0 if fits(_recipe(args)) else 1
    output_dir = Path(load_config(args).output_dir)
    if args.action == "output_dir":
        print(output_dir)
        return 0
    requeues = Requeues(run_dir.phase_dir(output_dir, args.phase))
    if args.action == "started":
        requeues.started()
        return 0
    return ended(requeues, args.exit_code)


if __name__ == "__main__":
    main()

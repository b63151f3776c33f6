"""Helper of the scripts in `slurm/`: where a job runs, and whether it is requeued.

    python -m embervlm.run.slurm ACTION

    place --script S --of_phase 1 FLAGS       options of srun where the job has the right nodes; elsewhere it submits S
                                              with them
    chain FLAGS                               phase 1, phase 2 and evaluation, one after the other
    output_dir FLAGS                          the run's output folder
    started --of_phase 1 FLAGS                in a job, before training
    ended --exit_code N --of_phase 1 FLAGS    in a job, after it

FLAGS are those of launch/train.py. Without `--of_phase` a job has one GPU of the recipe, for evaluation. `--batch`
says that Slurm runs the script as a job, `--submitted` that it was submitted from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embervlm import run_dir
from embervlm.cluster import CLUSTER_VARIABLE, GPU_OPTIONS_VARIABLE, ClusterRecipe, load_recipe, recipe_names
from embervlm.config import ConfigError
from embervlm.errors import OneLineParser, told_in_one_line
from embervlm.run.slurm_options import given
from embervlm.run.train_flags import load_config
from embervlm.run.train_flags import parser as train_parser
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE
from embervlm.slurm_commands import ask, fields, job_state, seconds, this_job

MAX_REQUEUES_VARIABLE = "EMBERVLM_MAX_REQUEUES"
MAX_REQUEUES = 20
KILLED = range(129, 193)
"""A shell's exit status of a command that a signal killed: 128 plus the signal's number."""
SIGNAL_DELAY_S = 180
"""Seconds before the time limit at which Slurm signals the job."""
SIGNAL_EARLY_S = 60
"""Slurm may send that signal this much earlier than requested (sbatch, `--signal`)."""


# -- where a job runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The resources of this job, or of the allocation of this shell."""

    nodes: int
    tasks_per_node: int | None
    """None if nothing says it."""
    gpus_per_node: int

    @classmethod
    def here(cls) -> Allocation | None:
        """None outside any job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            return None
        nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
        tasks = env.get("SLURM_NTASKS_PER_NODE")
        if tasks is None and int(env.get("SLURM_NTASKS", "1")) > 1:  # one is what a job has by default
            tasks = str(-(-int(env["SLURM_NTASKS"]) // nodes))
        return cls(nodes=nodes, tasks_per_node=int(tasks) if tasks else None, gpus_per_node=_gpus_per_node(env))

    @property
    def is_chosen(self) -> bool:
        """Whether the user has said what this job needs."""
        return self.nodes > 1 or (self.tasks_per_node or 1) > 1 or self.gpus_per_node > 0

    def __str__(self) -> str:
        tasks = f", tasks per node: {self.tasks_per_node}" if self.tasks_per_node else ""
        return f"nodes: {self.nodes}, GPUs per node: {self.gpus_per_node}{tasks}"


def _gpus_per_node(env: Mapping[str, str]) -> int:
    if env.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        return int(env["SLURM_GPUS_ON_NODE"])
    if "SLURM_PROCID" in env:
        return 0
    asked = fields("job", this_job()).get("TresPerNode", "")  # a shell under salloc runs on none of the nodes
    found = re.search(r"gpu(?::[A-Za-z][^:,]*)?[:=](\d+)", asked)
    return int(found[1]) if found else 0


def step_options(has: Allocation, recipe: ClusterRecipe | None, phase: int | None) -> list[str] | None:
    """Options of srun for one process per GPU of this job; None if its resources differ from the recipe."""
    overlap = ["--overlap"] if "SLURM_STEP_ID" in os.environ else []  # a shell that is a step itself holds the GPUs
    if recipe is not None and (has.nodes, has.tasks_per_node) == (recipe.nodes, recipe.gpus_per_node):
        return overlap  # as it was submitted
    per_node = (has.tasks_per_node or has.gpus_per_node) if phase else 1
    if recipe is not None and (has.tasks_per_node or has.nodes != recipe.nodes or not has.gpus_per_node):
        return None
    if recipe is not None and phase and has.gpus_per_node != recipe.gpus_per_node:
        return None
    cpus = int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)
    return [
        f"--nodes={has.nodes if phase else 1}",
        f"--ntasks={has.nodes * per_node if phase else 1}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={max(1, cpus // per_node)}",
        "--overcommit",
        *overlap,
    ]


def place(args: argparse.Namespace, flags: list[str], behind: list[str]) -> list[str]:
    """Options of srun, or the output of `sbatch` for the job that was submitted instead of this one."""
    train_args, has = _train_args(args, flags), Allocation.here()
    recipe = _recipe(train_args, args.of_phase)
    if has is not None and (recipe is not None or has.is_chosen):
        options = step_options(has, recipe, args.of_phase)
        if options is not None:
            if recipe is None:
                print(f"no --cluster: using the job's resources ({has})", file=sys.stderr)
            return options
    if recipe is None:
        raise ConfigError(
            f"the nodes are not given: give --cluster, set {CLUSTER_VARIABLE} in slurm/site.env (recipes: "
            f"{', '.join(recipe_names())}), or ask sbatch for GPUs, such as --gres=gpu:4"
        )
    if args.submitted:
        asked = " ".join(job_options(recipe, args.of_phase))
        raise ConfigError(
            f"Slurm gave other nodes ({has}) than --cluster {train_args.cluster} requests ({asked}); "
            f"check {GPU_OPTIONS_VARIABLE} and SBATCH_* in slurm/site.env"
        )
    if args.batch and has is not None and has.is_chosen:
        raise ConfigError(
            f"sbatch was given other nodes ({has}) than --cluster {train_args.cluster} has ({recipe.nodes} with "
            f"{recipe.gpus_per_node} GPUs each); leave them to the recipe, or choose one that has them"
        )
    carried = given(this_job(), args.script) if args.batch else []
    return [f"Submitted batch job {_submit(args, train_args, [*flags, *behind], carried)}"]


def chain(args: argparse.Namespace, flags: list[str]) -> str:
    """Submit the phases and the evaluation; each starts after the previous one."""
    config = load_config(_train_args(args, flags))
    output_dir = Path(config.output_dir)
    carried = given(this_job(), args.script) if args.batch else []
    carried = [option for option in carried if not option.startswith("--job-name=")]
    phases = (1, 2) if config.stage4.phase3 is None else (1, 2, 3)
    jobs: list[str] = []
    for phase in (*phases, None):
        script = "slurm/evaluate.sh" if phase is None else f"slurm/stage4_phase{phase}.sh"
        more = []
        if phase in (2, 3):  # it goes on from the phase before, wherever that started from
            before = run_dir.checkpoint_path(run_dir.phase_dir(output_dir, phase - 1), None)
            more = ["--resume_from", str(before)]
        args.of_phase, args.script = phase, script
        train_args = _train_args(args, flags)
        if train_args.cluster is None:
            raise ConfigError(f"choose the nodes with --cluster or {CLUSTER_VARIABLE}: {', '.join(recipe_names())}")
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(_submit(args, train_args, [*flags, *more], [*after, *carried]))
    named = ", ".join(f"phase {phase} {'is ' if phase == 1 else ''}job {job}" for phase, job in zip(phases, jobs))
    return f"{named}, evaluation job {jobs[-1]}"


def _submit(args: argparse.Namespace, train_args: argparse.Namespace, argv: list[str], carried: list[str]) -> str:
    """Submit the script on the recipe's nodes, and print the options. Returns the job's number."""
    recipe = _recipe(train_args, args.of_phase)
    assert recipe is not None
    options = [*job_options(recipe, args.of_phase), *carried]
    warn_of_short_limit(options)
    # the recipe may come from a variable that the site does not pass on
    said = ask("sbatch", "--parsable", *options, args.script, "--submitted", "--cluster", train_args.cluster, *argv)
    job = said.strip().splitlines()[-1].partition(";")[0]
    print(f"job {job}: {args.script} with {shlex.join(options)}", file=sys.stderr)
    return job


def job_options(recipe: ClusterRecipe, phase: int | None) -> list[str]:
    """Options of sbatch for one process per GPU of the recipe, with the phase's time limit."""
    return recipe.sbatch_options(recipe.minutes_of(phase))


def _recipe(train_args: argparse.Namespace, phase: int | None) -> ClusterRecipe | None:
    """The nodes of a job with these flags; one GPU where no phase is trained, as for evaluation."""
    if not train_args.cluster:
        return None
    recipe = load_recipe(train_args.cluster)
    return recipe if phase else dataclasses.replace(recipe, nodes=1, gpus_per_node=1)


def warn_of_short_limit(options: Sequence[str]) -> None:
    """Warn if Slurm's signal would come as soon as the job starts."""
    limit = next((item.partition("=")[2] for item in reversed(options) if item.startswith("--time=")), "")
    limit_s = 60 * int(limit) if limit.isdecimal() else seconds(limit)
    if limit_s <= SIGNAL_DELAY_S + SIGNAL_EARLY_S:
        print(
            f"warning: a time limit of {limit_s / 60:g} minutes: Slurm tells the job to stop {SIGNAL_DELAY_S} s before "
            f"it, or up to {SIGNAL_EARLY_S} s earlier, so the job would stop at once. Give 10 minutes or more",
            file=sys.stderr,
        )


# -- back into the queue ---------------------------------------------------------------------------------------------


class Requeues:
    """The starts of one job, in `<phase folder>/slurm-<job>.json`, and whether it may start again."""

    def __init__(self, phase_dir: Path) -> None:
        self.job = this_job()
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        limit = os.environ.get(MAX_REQUEUES_VARIABLE) or str(MAX_REQUEUES)
        if not limit.isdecimal():
            raise ConfigError(f"{MAX_REQUEUES_VARIABLE}={limit}: write a whole number in slurm/site.env")
        self.limit = int(limit)
        self._phase_dir = phase_dir
        self._path = phase_dir / f"slurm-{self.job}.json"

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; 0 if there is none."""
        return max((found.step for found in run_dir.list_checkpoints(self._phase_dir)), default=0)

    def started(self) -> None:
        """Note the step at which this start resumes. ConfigError if the job was started too often."""
        if self.restarts > self.limit:
            raise ConfigError(
                f"job {self.job} was requeued {self.restarts} times, more than "
                f"{MAX_REQUEUES_VARIABLE}={self.limit}; read its log, and submit it again to continue"
            )
        run_dir.write_json_atomic(self._path, {"restarts": self.restarts, "step": self.newest_step()})

    def refusal(self, exit_code: int) -> str | None:
        """Why the job may not be requeued after its training ended with `exit_code`; None if it may.

        The first start may fail without progress, as on a bad node; a requeue must have brought the run further.
        """
        if exit_code not in (EXIT_REQUEUE, EXIT_FAULT, *KILLED):
            return f"exit status {exit_code} means an error that would occur again"
        if self.restarts >= self.limit:
            return f"it was requeued {self.restarts} times ({MAX_REQUEUES_VARIABLE}={self.limit})"
        step = self.newest_step()
        if self.restarts and step <= run_dir.read_json(self._path)["step"]:
            return f"the last requeue made no progress: the newest checkpoint is still at step {step}"
        return None


def ended(requeues: Requeues, exit_code: int) -> int:
    """Requeue the job, or print why not. Returns the exit status of the job, 0 only if it continues."""
    if exit_code == 0:
        return 0
    if (state := job_state(requeues.job)) != "RUNNING":  # cancelled, or Slurm requeues it by itself
        print(f"job {requeues.job} is {state}: left to Slurm", file=sys.stderr)
        return exit_code
    if why := requeues.refusal(exit_code):
        print(f"error: job {requeues.job} is not requeued: {why}. See docs/slurm.md", file=sys.stderr)
        return exit_code
    print(f"job {requeues.job} is requeued at step {requeues.newest_step()}", file=sys.stderr)
    ask("scontrol", "requeue", requeues.job)
    return 0


# -- command line ----------------------------------------------------------------------------------------------------


def _parser() -> OneLineParser:
    out = OneLineParser(
        prog="python -m embervlm.run.slurm",
        description=__doc__,
        allow_abbrev=False,
        example="python -m embervlm.run.slurm output_dir --config configs/quickstart.yaml",
    )
    out.add_argument("action", choices=("place", "chain", "output_dir", "started", "ended"), help="what to say or do")
    out.add_argument("--script", help="script to submit, relative to the repository root")
    out.add_argument("--of_phase", type=int, choices=(1, 2, 3), help="the phase that the script trains")
    out.add_argument("--batch", action="store_true", help="Slurm runs the script as a job")
    out.add_argument("--submitted", action="store_true", help="the job was submitted from here")
    out.add_argument("--exit_code", type=int, help="exit code of the training")
    return out


def _train_args(args: argparse.Namespace, flags: list[str]) -> argparse.Namespace:
    out = train_parser().parse_args(flags)
    if args.of_phase and out.phase not in (None, args.of_phase):
        raise ConfigError(f"--phase {out.phase}: this script trains phase {args.of_phase}; remove the flag")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    given_argv = list(sys.argv[1:] if argv is None else argv)
    cut = given_argv.index("--") if "--" in given_argv else len(given_argv)
    with told_in_one_line():
        args, flags = _parser().parse_known_args(given_argv[:cut])
        sys.exit(_run(args, flags, given_argv[cut:]))


def _run(args: argparse.Namespace, flags: list[str], behind: list[str]) -> int:
    if args.action == "place":
        print("\n".join(place(args, flags, behind)))
        return 0
    if args.action == "chain":
        print(chain(args, flags))
        return 0
    output_dir = Path(load_config(_train_args(args, flags)).output_dir)
    if args.action == "output_dir":
        print(output_dir)
        return 0
    if not args.batch:  # a shell in somebody's allocation, which is not ours to put back into the queue
        return args.exit_code or 0
    requeues = Requeues(run_dir.phase_dir(output_dir, args.of_phase))
    if args.action == "started":
        warn_of_short_limit([f"--time={fields('job', requeues.job)['TimeLimit']}"])
        requeues.started()
        return 0
    return ended(requeues, args.exit_code)


if __name__ == "__main__":
    main()

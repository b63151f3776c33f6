"""Training jobs from Python (`launch/submit.py`): the node recipes through submitit, on Slurm or on this machine.

submitit calls `checkpoint()` on rank 0 alone, so nothing that needs all ranks may happen there. Training saves by
itself: its signal handlers set a flag, the ranks agree between two steps, save together and end with `EXIT_REQUEUE`.
Only then is submitit asked to put the job back into the queue.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from embervlm.cluster import CLUSTER_VARIABLE, ClusterRecipe, load_recipe, recipe_names
from embervlm.config import REPOSITORY, ConfigError
from embervlm.errors import OneLineParser, UserError, told_in_one_line
from embervlm.run.slurm import MAX_REQUEUES, SIGNAL_DELAY_S, SIGNAL_EARLY_S
from embervlm.run.train_flags import FLAGS, check_start, load_config, stages_of
from embervlm.run.train_flags import parser as train_parser
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE
from embervlm.slurm_commands import Patience, ask, is_away, job_state, this_job

SRUN_OPTIONS_VARIABLE, WRAPPER_VARIABLE = "EMBERVLM_SRUN_OPTIONS", "EMBERVLM_WRAPPER"
"""This site's options for `srun`, and its wrapper around the program; see `slurm/site.env`."""


class TrainingFailedError(UserError):
    """A training job ended with an error, which is in its log."""


class Requeue(SignalHandler):
    """submitit's handler, with a different test for why the job is stopped.

    submitit takes a stop in a job's last ten minutes for its time limit, and so every stop of a job that has no more
    than ten minutes: a few preemptions, and it would not be requeued any more. The limit is signalled a known time
    before it; what comes earlier is a preemption.
    """

    def __init__(self, installed: SignalHandler, signal_delay_s: int) -> None:
        super().__init__(installed.env, installed._job_paths, installed._delayed)
        self._start_time = installed._start_time
        self._signal_delay_s = signal_delay_s
        if isinstance(self.env, submitit.slurm.slurm.SlurmJobEnvironment):
            self.env._requeue = self._requeue  # type: ignore[method-assign]

    def _requeue(self, countdown: int) -> None:
        """Like submitit's, but it waits for a controller that is away."""
        ask("scontrol", "requeue", this_job())
        self._logger.info(f"Requeued job {this_job()} ({countdown} remaining timeouts)")

    def has_timed_out(self) -> bool:
        limit_s = 60 * self._delayed._timeout_min
        return time.time() - self._start_time >= limit_s - self._signal_delay_s - SIGNAL_EARLY_S


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """`launch/train.py` as one process of a submitit job."""

    argv: tuple[str, ...]
    """Flags of `launch/train.py`."""
    output_dir: str
    signal_delay_s: int = SIGNAL_DELAY_S

    def __call__(self) -> str:
        """Train and return the run's output folder. Every process of the job calls it."""
        from embervlm.run.train import main

        environment = submitit.JobEnvironment()
        number = environment._usr_sig()
        requeue = Requeue(signal.getsignal(number).__self__, self.signal_delay_s)  # type: ignore[union-attr]
        signal.signal(number, requeue.checkpoint_and_try_requeue)  # until training listens itself
        if environment.name() != "slurm":  # there training reads Slurm's own variables
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            main(list(self.argv))
        except SystemExit as ended:
            if ended.code == EXIT_REQUEUE:
                if environment.global_rank > 0:
                    sys.exit(0)  # an error here would end rank 0 before it has asked for its requeue
                if _may_requeue():
                    requeue.checkpoint_and_try_requeue(number)
                sys.exit(EXIT_REQUEUE)  # stopped and not requeued is not done
            if ended.code == EXIT_FAULT:
                raise TrainingFailedError("an unforeseen error, with its traceback in the log") from None
            raise TrainingFailedError(str(ended.code).removeprefix("error: ")) from None
        return self.output_dir

    def checkpoint(self) -> DelayedSubmission:
        """The same call again; it resumes from the newest checkpoint. Runs only on rank 0 and saves nothing."""
        return DelayedSubmission(self)


def _may_requeue() -> bool:
    """False for a Slurm job that is no longer running: cancelled, or requeued by Slurm itself."""
    return "SLURM_JOB_ID" not in os.environ or job_state(this_job()) == "RUNNING"


# -- what to submit --------------------------------------------------------------------------------------------------


def swept_flags(key: str, value: str, phase: int | None) -> list[str]:
    """Flags of `launch/train.py` that set `key`, for the phase that is trained or for both.

    Args:
        key: A flag, one that exists for each phase without its `phase<n>_`, or a dotted key of the YAML.
    """
    if key in FLAGS:
        return [f"--{key}", value]
    phases = [f"phase{number}_{key}" for number in ([phase] if phase else [1, 2])]
    if all(name in FLAGS for name in phases):
        return [item for name in phases for item in (f"--{name}", value)]
    if "." in key:
        return ["--set", f"{key}={value}"]
    known = [*FLAGS, *(name.removeprefix("phase1_") for name in FLAGS if name.startswith("phase1_"))]
    close = difflib.get_close_matches(key, known, n=1)
    raise ConfigError(
        f"--sweep {key}: no such flag of launch/train.py"
        + (
            f"; did you mean {close[0]}?"
            if close
            else "; a key of the YAML is written with its dots, as stage4.phase1.epochs"
        )
    )


def training_jobs(argv: Sequence[str], sweeps: Sequence[str], signal_delay_s: int = SIGNAL_DELAY_S) -> list[TrainJob]:
    """One job per combination of the swept values, each with its own output folder below the run's.

    Every flag is checked here, before anything is submitted. A mistake of the user raises a ConfigError.

    Args:
        argv: Flags of `launch/train.py`.
        sweeps: Each `key=value,value`.
    """
    given = train_parser().parse_args(list(argv))
    stages = stages_of(given)
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--sweep {sweep}: write KEY=VALUE,VALUE")
        axes.append([(key, value) for value in values.split(",")])
    if sweeps and "3" not in stages and not given.resume_from:
        raise ConfigError("--sweep: each run has its own folder, so give the starting checkpoint with --resume_from")
    config = load_config(given)
    check_start(stages, config)
    base = config.output_dir
    jobs = []
    for combination in itertools.product(*axes):
        flags = [flag for key, value in combination for flag in swept_flags(key, value, given.phase)]
        settings = [item for item in flags if "=" in item]
        full = [*argv, *(flag for flag in flags if flag != "--set" and "=" not in flag)]
        full += ["--set", *settings] if settings else []
        output = base
        if combination:
            name = ",".join(f"{key}={value}" for key, value in combination)
            output = str(Path(base) / name.replace("/", "_"))
            full += ["--output_dir", output]
        args = train_parser().parse_args(full)
        load_config(args)
        jobs.append(TrainJob(argv=tuple(full), output_dir=output, signal_delay_s=signal_delay_s))
    return jobs


def limit_minutes(recipe: ClusterRecipe, phase: int | None) -> int:
    """The recipe's time limit of a phase, or of phases 1 and 2."""
    return recipe.minutes_of(phase) or recipe.phase1_minutes + recipe.phase2_minutes


# -- executors -------------------------------------------------------------------------------------------------------


class _SlurmText(submitit.SlurmExecutor):
    """A Slurm executor that only writes its script, so it needs no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def slurm_parameters(
    recipe: ClusterRecipe, minutes: int, *, signal_delay_s: int = SIGNAL_DELAY_S, sbatch: Sequence[str] = ()
) -> dict[str, Any]:
    """submitit's parameters for a job on the recipe's nodes.

    Args:
        sbatch: The site's options of sbatch, `key=value` or a bare key; they override the recipe's.
    """
    options: dict[str, Any] = {"requeue": True}
    for item in (*recipe.sbatch_options(minutes), *sbatch):
        key, equals, value = item.removeprefix("--").partition("=")
        options[key] = value if equals else True
    own = {"nodes": recipe.nodes, "ntasks_per_node": recipe.gpus_per_node, "time": minutes}
    for key in ("nodes", "ntasks-per-node", "time"):  # submitit has to know these itself
        if str(options.pop(key)) != str(own[key.replace("-", "_")]):
            raise ConfigError(f"--sbatch {key}: the recipe sets this, and --minutes the time")
    path, site = shlex.quote(str(REPOSITORY)), shlex.quote(str(REPOSITORY / "slurm" / "site.env"))
    return {
        **own,
        "job_name": "embervlm",
        "signal_delay_s": signal_delay_s,
        "setup": [
            f"if [[ -f {site} ]]; then set -a; source {site}; set +a; fi",
            f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--export=ALL",
            f"--cpus-per-task={options.get('cpus-per-task', 1)}",
            *shlex.split(os.environ.get(SRUN_OPTIONS_VARIABLE, "")),
        ],
        "additional_parameters": options,
    }


def _python() -> str:
    """The command that starts Python in the job: this interpreter, in the site's wrapper."""
    return shlex.join([*shlex.split(os.environ.get(WRAPPER_VARIABLE, "")), sys.executable])


def sbatch_script(folder: Path, parameters: dict[str, Any], num_jobs: int) -> str:
    """The script that submitit would give to sbatch; of more than one job, as an array."""
    executor = _SlurmText(folder, python=_python())
    executor.update_parameters(**parameters)
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_to_slurm(
    jobs: Sequence[TrainJob], folder: Path | str, parameters: dict[str, Any], max_timeouts: int
) -> list[submitit.Job[str]]:
    """Submit `jobs`, several as one array. ConfigError if there is no Slurm or it refuses."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError("this machine has no sbatch; --dry_run prints the script, --local trains here")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=max_timeouts, python=_python())
    executor.update_parameters(**parameters)
    patience = Patience()
    while True:
        try:
            return executor.submit_array(jobs)
        except FailedJobError as error:
            if not is_away("sbatch", str(error)):
                raise ConfigError(f"Slurm refuses the job: {error}") from error
            patience.pause(str(error).strip().splitlines()[-1])


def run_locally(
    job: TrainJob, folder: Path, recipe: ClusterRecipe, minutes: float, max_timeouts: int
) -> submitit.Job[str]:
    """Start `job` on this machine, one process per GPU of the recipe, under submitit without Slurm."""
    if recipe.nodes > 1:
        raise ConfigError(
            f"--local: the recipe has {recipe.nodes} nodes, but this is one machine; choose another recipe"
        )
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    executor = submitit.LocalExecutor(folder, max_num_timeout=max_timeouts)
    executor.update_parameters(
        timeout_min=minutes,
        tasks_per_node=recipe.gpus_per_node,
        gpus_per_node=recipe.gpus_per_node,
        signal_delay_s=job.signal_delay_s,
    )
    return executor.submit(job)


def result_of(job: submitit.Job[str]) -> str:
    """The run's output folder once `job` has ended. TrainingFailedError names the log otherwise."""
    try:
        return job.results()[0]
    except UncompletedJobError as error:
        lines = str(error).strip().splitlines()
        own = [line.partition(": ")[2] for line in lines if line.startswith(f"{__name__}.TrainingFailedError: ")]
        raise TrainingFailedError(f"job {job.job_id}: {(own or lines)[0]}; see {job.paths.stderr}") from None


# -- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = OneLineParser(
        prog="launch/submit.py",
        allow_abbrev=False,
        example="python launch/submit.py --cluster a100x4 --stages 3 4 --output_dir outputs",
        description="Submit a training job on the nodes of a recipe. All other flags are those of launch/train.py.",
    )
    out.add_argument(
        "--cluster", type="path", default=os.environ.get(CLUSTER_VARIABLE) or None, help="recipe in configs/cluster/"
    )
    out.add_argument("--dry_run", action="store_true", help="print the sbatch script and submit nothing")
    out.add_argument("--local", action="store_true", help="train on this machine, without Slurm, and wait")
    out.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="one job per value; repeat for another key to get one job per combination",
    )
    out.add_argument("--minutes", type=int, help="time limit; default: the recipe's")
    out.add_argument(
        "--max_timeouts", type=int, default=MAX_REQUEUES, help="time limits after which the job is not requeued"
    )
    out.add_argument(
        "--sbatch", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="more options of sbatch"
    )
    out.add_argument("--folder", type=Path, help="logs and pickles; default: submitit/ in the output folder")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line():
        args, rest = parser().parse_known_args(argv)
        _submit(args, rest)


def _submit(args: argparse.Namespace, rest: list[str]) -> None:
    if not args.cluster:
        raise ConfigError(f"choose the nodes with --cluster or {CLUSTER_VARIABLE}: {', '.join(recipe_names())}")
    if args.minutes is not None and 60 * args.minutes <= SIGNAL_DELAY_S + SIGNAL_EARLY_S:
        raise ConfigError(
            f"--minutes {args.minutes}: the job is told to stop {SIGNAL_DELAY_S} s before its limit, and Slurm may do "
            f"so {SIGNAL_EARLY_S} s early; give 10 or more"
        )
    recipe = load_recipe(args.cluster)
    jobs = training_jobs(["--cluster", args.cluster, *rest], args.sweep)
    phase = train_parser().parse_args(rest).phase
    minutes = args.minutes or limit_minutes(recipe, phase)
    base = Path(jobs[0].output_dir).parent if args.sweep else Path(jobs[0].output_dir)
    folder = args.folder or base / "submitit"
    if args.local:
        for job in jobs:  # one after the other: each takes all GPUs
            started = run_locally(job, folder, recipe, minutes, args.max_timeouts)
            print(f"{job.output_dir}: log in {started.paths.stdout}", flush=True)
            print(f"{result_of(started)}: done", flush=True)
        return
    parameters = slurm_parameters(recipe, minutes, sbatch=args.sbatch)
    if args.dry_run:
        print(sbatch_script(folder, parameters, len(jobs)))
        for number, job in enumerate(jobs):
            print(f"# job {number}: launch/train.py {shlex.join(job.argv)}")
        return
    for job, submitted in zip(jobs, submit_to_slurm(jobs, folder, parameters, args.max_timeouts)):
        print(f"job {submitted.job_id}: {job.output_dir}, log in {submitted.paths.stdout}")

"""Slurm's commands: retried while the controller is away, and run without this job's variables."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from embervlm import run_dir
from embervlm.config import REPOSITORY
from embervlm.errors import UserError

EVALUATED_SPLIT = "val"
"""The split on which a run evaluates its checkpoints in jobs of their own."""
PATIENCE_VARIABLE = "EMBERVLM_SLURM_PATIENCE_S"
PATIENCE_S = 900
"""How long to retry while the controller is away, for example during a restart."""
LONGEST_PAUSE_S = 30
_OF_THIS_JOB = re.compile(
    r"SLURM_(?!CONF$)|SLURMD_|SRUN_|SUBMITIT_|TORCHELASTIC_|OMP_NUM_THREADS$|CUDA_VISIBLE_DEVICES$"
    r"|(LOCAL_|GROUP_|ROLE_|CROSS_)?(RANK|SIZE|WORLD_SIZE)$|LOCAL_WORLD_SIZE$|MASTER_(ADDR|PORT)$"
)
_ANSWER = re.compile(r"Invalid (job|user|partition)|denied|disabled|already complet|process configuration|No such")
"""What `scontrol` and `squeue` print if a retry would change nothing."""
_AWAY = re.compile(r"[Uu]nable to contact|connect failure|Connection refused|temporarily")
"""What `sbatch` prints if nothing was submitted and a retry is safe. After a time-out this is unknown."""
_WHOLE_LINE = re.compile(r"(Command|WorkDir|Comment|AdminComment|SystemComment|StdErr|StdIn|StdOut)=(.*)")
_FIELD = re.compile(r"([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|$)")


class SlurmError(UserError):
    """Slurm refused, or its controller did not come back."""


class Patience:
    """Pauses between the attempts of one call, longer each time; SlurmError when they are used up."""

    def __init__(self) -> None:
        self._limit_s = float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE_S)
        self._until, self._pause_s = time.monotonic() + self._limit_s, 1.0

    def pause(self, said: str) -> None:
        if time.monotonic() >= self._until:
            raise SlurmError(f"Slurm's controller has not answered for {self._limit_s:g} s: {said}")
        if self._pause_s == 1:
            print(f"Slurm's controller does not answer ({said}); trying for {self._limit_s:g} s", file=sys.stderr)
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def is_away(program: str, said: str) -> bool:
    """Whether a command of Slurm failed because the controller is away, so that it can be retried."""
    return bool(_AWAY.search(said)) if program == "sbatch" else not _ANSWER.search(said)


def ask(*argv: str) -> str:
    """What a command of Slurm prints when it runs outside any job.

    Raises:
        SlurmError: Slurm refuses, or does not answer for too long.
    """
    patience = Patience()
    while True:
        try:
            found = subprocess.run(argv, cwd=REPOSITORY, env=outside(), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise SlurmError(f"this machine has no {argv[0]}") from None
        if found.returncode == 0:
            return found.stdout
        said = ((found.stderr or found.stdout).strip() or f"exit status {found.returncode}").splitlines()[-1]
        if argv[0] == "sbatch" and "timed out" in said:
            raise SlurmError(f"{said}. The job may have been submitted nevertheless: check `squeue --me` first")
        if not is_away(argv[0], said):
            raise SlurmError(f"`{shlex.join(argv)}`: {said}")
        patience.pause(said)


def outside() -> dict[str, str]:
    """The environment without the variables that make a process part of this job or training."""
    return {name: value for name, value in os.environ.items() if not _OF_THIS_JOB.match(name)}


def this_job() -> str:
    """Slurm's id of this job; in an array, the id of this element.

    SLURM_JOB_ID does not work: for one element it can be the number of the array, which means all elements.
    """
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def fields(kind: str, name: str) -> dict[str, str]:
    """What `scontrol show` says of a `job` or `partition`: JobState, TimeLimit, Comment, ..."""
    record = ask("scontrol", "show", kind, name).strip().split("\n\n")[0]
    out: dict[str, str] = {}
    for line in record.splitlines():
        if whole := _WHOLE_LINE.fullmatch(line.strip()):  # a path or a text, which may hold anything
            out[whole[1]] = whole[2]
        else:
            out.update(_FIELD.findall(line.strip()))
    return out


def job_state(job: str) -> str:
    """Slurm's word for the job, such as RUNNING or CANCELLED."""
    return fields("job", job)["JobState"]


def seconds(limit: str) -> float:
    """Slurm's time limit, such as 1-12:00:00, in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if found is None:  # UNLIMITED, Partition_Limit
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + rest


def awaiting_evaluation(folder: Path) -> list[Path]:
    """Checkpoints of `folder` that an unfinished job will still evaluate: they must not be deleted."""
    out = []
    for found in run_dir.list_checkpoints(folder):
        note = run_dir.eval_job_path(found.path, EVALUATED_SPLIT)
        if note.exists() and not run_dir.eval_path(found.path, EVALUATED_SPLIT).exists():
            job = str(run_dir.read_object(note, "job_id")["job_id"])
            if _is_queued(job):
                out.append(found.path)
    return out


def _is_queued(job: str) -> bool:
    """Whether Slurm still has the job, waiting or running; True if Slurm does not answer."""
    shown = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False
    )
    if shown.returncode:
        return "Invalid job id" not in shown.stderr
    return bool(shown.stdout.strip())

"""Which of several processes this is, from the launcher's variables; usable before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several tasks.

    False in a batch script, a shell under `salloc` or a notebook: they have the allocation's SLURM_NTASKS, and often a
    SLURM_PROCID, but nobody starts the others. Nor in the shell of `srun --pty`, which has its step's terminal; what a
    second `srun` starts from that shell has none.
    """
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) < 2 or "SLURM_PROCID" not in env:
        return False
    return not ("SLURM_PTY_PORT" in env and env.get("SLURM_TASK_PID") != str(os.getpid()) and _has_terminal())


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def is_first_process(env: Mapping[str, str]) -> bool:
    """Whether this is process 0; True for a single process."""
    if "RANK" not in env and is_slurm_task(env):
        return env["SLURM_PROCID"] == "0"
    return env.get("RANK", "0") == "0"

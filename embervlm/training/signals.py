"""Stopping on request: a signal sets a flag, and the processes agree on it between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embervlm.training.engine import World

EXIT_REQUEUE = os.EX_TEMPFAIL
"""Exit status of a run that was asked to stop, has saved, and goes on when it is started again."""
EXIT_FAULT = os.EX_SOFTWARE
"""Exit status of a run that met an error nobody foresaw, such as a process of another node that is gone."""
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Time limit (`sbatch --signal`), preemption or `scancel`, and Ctrl-C."""

_received: list[int] = []


class Preempted(Exception):
    """A signal asked this run to stop, and everything up to `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to stop: saved at step {step}; the same command goes on from there")


def listen() -> None:
    """From now on the signals only set a flag, for the rest of this process's life. A second SIGINT kills.

    The handlers stay until the end: the first process that leaves makes Slurm terminate the others, which may still
    be closing.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_noted() -> bool:
    """Whether this process got a signal; `stop_wanted` asks the others as well."""
    return bool(_received)


def stop_wanted(world: World) -> bool:
    """Whether any process got a signal. Collective: every process gets the same answer, so all save or none does."""
    return world.any(stop_noted())

"""How a process ends. On request: a signal sets a flag, and the processes agree on it between two steps."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

EXIT_REQUEUE = os.EX_TEMPFAIL
"""Exit status of a run that was asked to stop and has saved; the next start resumes it."""
EXIT_FAULT = os.EX_SOFTWARE
"""Exit status of a run with an unforeseen error, such as a lost process on another node."""
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Time limit (`sbatch --signal`), preemption or `scancel`, Ctrl-C, and a terminal that was closed."""

_received: list[int] = []
_launchers: list[int] = []
"""Processes that started this one: its parent and, with DeepSpeed, the parent's parent."""
_terminals: list[int] = []


@dataclass(frozen=True)
class ProcessStatus:
    """A process that has not ended."""

    parent: int
    started: str
    """Distinguishes it from a later process with the same pid; empty if the system does not report it."""


def process_status(pid: int) -> ProcessStatus | None:
    """None for a process that has ended, waited for or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        fields = []
    if fields:
        return None if fields[0] == "Z" else ProcessStatus(parent=int(fields[1]), started=fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user, whose processes some systems hide
        return ProcessStatus(parent=0, started="")
    return None if Path("/proc/self").exists() else ProcessStatus(parent=0, started="")


class Preempted(Exception):
    """A signal asked this run to stop, and everything up to `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to stop: saved at step {step}; the same command resumes from there")


def end_after(main: Callable[[], object]) -> None:
    """Run `main`, and leave this process with its exit status when everything registered for the exit has run.

    The interpreter is not torn down: a thread of torch that lets go of a tensor meanwhile would abort the process, and
    its launcher would call a finished training failed (`terminate called without an active exception`,
    pytorch/pytorch#179291). To be called first, because what is registered last runs first.
    """
    status = 1  # of an exception, whose traceback Python prints

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    except BrokenPipeError:
        if _is_read(sys.stdout):
            raise
        status = 128 + signal.SIGPIPE  # `embervlm plan | head`


def _is_read(stream: TextIO) -> bool:
    """False if `stream` is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def listen() -> None:
    """From now on the signals only set a flag, for the rest of this process's life. A second SIGINT kills.

    The handlers stay until the end: the first process that leaves makes Slurm terminate the others, which may still
    be closing.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup`
            signal.signal(number, _note)
    _launchers[:] = _started_by()
    _terminals[:] = [stream for stream in (1, 2) if os.isatty(stream)]


def _started_by() -> list[int]:
    """The launcher's processes, if one started this rank: `deepspeed` has two, and the outer one can die alone.

    A shell is none: it may end before what it has started in the background.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    if "CROSS_RANK" in os.environ and (status := process_status(parent)) is not None:
        return [parent, status.parent]
    return []


def _launcher_is_gone() -> bool:
    if not _launchers:
        return False
    if os.getppid() != _launchers[0]:
        return True
    return len(_launchers) > 1 and getattr(process_status(_launchers[0]), "parent", None) != _launchers[1]


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if number == signal.SIGHUP:
        _write_no_more_to_terminals()


def _write_no_more_to_terminals() -> None:
    """Ignores write errors of a closed terminal: a progress bar must not stop the last save."""
    for stream in _terminals:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)


def stop_noted() -> bool:
    """Whether this process got a signal or lost its launcher; ask the other processes with `World.any`."""
    if not _received and _launcher_is_gone():
        _received.append(signal.SIGHUP)
        _write_no_more_to_terminals()
        print(f"process {os.getpid()}: its launcher has died; this run saves and ends", file=sys.stderr)
    return bool(_received)

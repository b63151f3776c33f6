"""One run at a time in an output folder: `owner.json` names it, and exists as long as that run is alive.

Its modification time is the run's sign of life. A run that ended without deleting it is recognised: on the same machine
its process is gone, elsewhere the sign of life stands still, and a requeued Slurm job knows its own number.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from embervlm.errors import UserError
from embervlm.run_dir import naming_unwritten
from embervlm.signals import EXIT_FAULT, process_status, stop_noted

OWNER = "owner.json"
HEARTBEAT_S = 10.0
"""Seconds between signs of life."""
STALE_S = 60.0
"""An owner on another machine counts as dead after this time without a sign of life."""


class OwnedError(UserError):
    """Another live run writes into the output folder. The message names it."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The first process of a run, which acts for all of them."""

    token: str
    host: str
    pid: int
    started: str
    """When the run started, by the clock of its machine."""
    process: str
    """Distinguishes the process from a later one with the same pid; empty if the system does not report it."""
    machine: str
    """Distinguishes the machine, and the container, from others of the same name."""
    job: str
    """Slurm's number of the job; empty outside."""
    restarts: str
    """How often Slurm has requeued it."""

    @classmethod
    def of_this_process(cls) -> Owner:
        env = os.environ
        status = process_status(os.getpid())
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            process=status.started if status else "",
            machine=_machine(),
            job=env.get("SLURM_JOB_ID", ""),
            restarts=env.get("SLURM_RESTART_COUNT", "0"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"

    def is_dead(self, other: Owner) -> bool | None:
        """Whether this owner has ended, as far as its successor `other` can tell; None: it cannot tell."""
        if self.machine == other.machine and self.host == other.host:
            status = process_status(self.pid)
            return status is None or (bool(status.started) and status.started != self.process)
        if self.job and self.job == other.job and self.restarts != other.restarts:
            return True  # Slurm requeues no job that still runs
        return None


@contextmanager
def owning(output_dir: str | Path) -> Iterator[None]:
    """A context that owns `output_dir`. Only the first process of a run may use it, for all of them.

    Raises:
        OwnedError: a live run owns it.
        WriteError: the folder cannot be written.
    """
    path = Path(output_dir) / OWNER
    mine = Owner.of_this_process()
    _take(path, mine)
    ended = threading.Event()
    threading.Thread(target=_keep, args=(path, mine, ended), name="owner", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if (found := _read(path)) is not None and found.token == mine.token:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: Owner) -> None:
    """Write the owner file `path` as soon as there is none. OwnedError if its owner is alive."""
    while not _create(path, mine):
        _remove_dead(path, mine)


def _create(path: Path, owner: Owner) -> bool:
    """False if there is an owner already."""
    with naming_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(owner), file)
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> Owner | None:
    """None if there is none, or its file is empty or damaged."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remove_dead(path: Path, mine: Owner) -> None:
    """Delete the file of an owner that has ended. OwnedError if it is alive."""
    seen = _sign_of_life(path)
    owner = _read(path)
    dead = owner.is_dead(mine) if owner is not None else None
    if dead is None and seen is not None:
        dead = _stands_still(path, seen)
    if _sign_of_life(path) is None:
        return  # its run has ended and deleted it
    if not dead:
        raise OwnedError(
            f"{path.parent}: another run is writing there ({owner or f'see {path}'}); wait until it ends, stop it, or "
            "choose another --output_dir"
        )
    # Looking again and deleting are two steps, so one run at a time does both. Without that, a run that looked before
    # another one followed the dead one would delete the file of the living.
    claim = path.with_name(f"{path.name}-after-{owner.token if owner is not None else 'damaged'}")
    _take(claim, mine)
    try:
        if _sign_of_life(path) == seen and _read(path) == owner:
            with naming_unwritten(path):
                path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)


def _stands_still(path: Path, first: int) -> bool:
    """Wait for a sign of life other than `first`, independent of the machines' clocks; False as soon as one comes."""
    began = time.monotonic()
    print(f"{path}: waiting up to {STALE_S:.0f} s for a sign of life of the run it names", file=sys.stderr)
    while time.monotonic() - began < STALE_S:
        time.sleep(min(1.0, HEARTBEAT_S))
        if _sign_of_life(path) != first or stop_noted():
            return False
    return True


def _sign_of_life(path: Path) -> int | None:
    with suppress(OSError), path.open("rb"):
        pass  # opened, so that a network file system asks its server
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _keep(path: Path, mine: Owner, ended: threading.Event) -> None:
    """In a thread: write signs of life until the run ends."""
    while not ended.wait(HEARTBEAT_S):
        found = _read(path)
        if ended.is_set():
            return
        if found is not None and found.token != mine.token:  # this run was taken for dead, suspended perhaps
            print(f"{path.parent}: now belongs to {found}; this run ends", file=sys.stderr, flush=True)
            os._exit(EXIT_FAULT)
        with suppress(OSError):  # a disk that is gone for a while; saving says so
            os.utime(path)


def _machine() -> str:
    """Id of this boot and this container."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)

"""A real Slurm on this machine: a controller and its nodes, all on loopback, gone afterwards.

Started by root from Debian's `slurm-wlm` and `munge` (`make install-slurm`). Each node has four GPUs that nothing
stands behind, and a feature that names their type, so that the scripts ask for GPUs as they would elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NODES = {
    "n1": "a100",
    "n2": "a100",
    "n3": "a100",
    "n4": "a100",
    "n5": "v100",
    "n6": "v100",
    "n7": "v100",
    "n8": "h100",
    "n9": "h100",
}
"""Node -> type of its GPUs. Where a node is lost or a job preempted, others would suffer; hence the several types."""
DAEMONS = ("munged", "slurmctld", "slurmd")
TRAINING = {"launch/train.py", "submitit.core._submit"}
"""What a training process is started with, by the scripts and by submitit."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own is started by root"
    if absent := [name for name in DAEMONS if not _daemon(name)]:
        return f"{', '.join(absent)} not installed: make install-slurm"
    return None


def _daemon(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class SlurmCluster:
    """Use it as a context; `env` is what commands need to reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._left = threading.Event()

    def __enter__(self) -> SlurmCluster:
        # reads to the end of its input, which comes when this process ends, however it ends
        self._guard = subprocess.Popen(
            [sys.executable, __file__, self.env["SLURM_CONF"]], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait("idle nodes", lambda: self.states().count("idle") == len(NODES), 300)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._guard is not None and self._guard.stdin is not None
        self._left.set()
        self._guard.stdin.close()
        for process in (self._guard, *self._processes.values()):
            process.wait(60)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ctld, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=1000 TmpDisk=1000 "
            f"Features={feature} Gres=gpu:4 State=UNKNOWN"
            for (node, feature), port in zip(NODES.items(), ports, strict=True)
        )
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        (self.folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job starts when its old credential has expired: in seconds instead of minutes
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
MinJobAge=3600
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=other Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
""")

    def _start_munge(self) -> None:
        self.folder.chmod(0o755)  # munged refuses a folder that others may write to, and clients must reach its socket
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._start(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munge.pid",
            f"--seed-file={self.folder}/munge.seed",
            f"--log-file={self.folder}/munge.log",
        )
        self.wait("munge's socket", (self.folder / "munge.socket").exists, 60)

    def _start(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [str(_daemon(program)), *args], stdout=out, stderr=out, env=self.env, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """SIGKILL for the node's slurmd and everything of jobs there, as when the machine goes."""
        slurmd = self._processes.pop(node)
        slurmd.kill()
        slurmd.wait()
        tasks = self.processes(f"SLURMD_NODENAME={node}")
        steps = {_parent(pid) for pid in tasks}  # among them Slurm's slurmstepd, which would report the loss
        for pid in [*steps, *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def run(self, *argv: str | Path, **env: str) -> str:
        """What a command prints that must succeed."""
        found = subprocess.run(
            list(map(str, argv)), env=self.env | env, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, f"{argv}: {found.stdout}{found.stderr}\n{self.logs()}"
        return found.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Slurm's fields of a job: JobState, Restarts, NodeList, ..."""
        return dict(item.partition("=")[::2] for item in self.run("scontrol", "show", "job", "-o", job_id).split())

    def nodes_of(self, job_id: str) -> list[str]:
        return self.run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

    def wait(self, what: str, holds: Callable[[], object], timeout_s: float, pause_s: float = 0.2) -> None:
        """Wait until `holds()` is true; fails with `what` where it does not become so in time."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}\n{self.logs()}"
            assert not self._left.wait(pause_s), f"the cluster was stopped before: {what}"

    def processes(self, *environment: str) -> list[int]:
        """Processes of the cluster and its jobs that have all of these `NAME=value` in their environment."""
        return _processes(f"SLURM_CONF={self.env['SLURM_CONF']}", *environment)

    def ranks(self, job_id: str) -> dict[int, int]:
        """Rank -> process number of a job's training processes."""
        found = {}
        for pid in self.processes(f"SLURM_JOB_ID={job_id}"):
            with contextlib.suppress(OSError):
                program, *args = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if Path(program).name.startswith("python") and TRAINING & set(args[:3]):  # srun has them, too
                    has = Path(f"/proc/{pid}/environ").read_text().split("\0")
                    found |= {int(item.partition("=")[2]): pid for item in has if item.startswith("SLURM_PROCID=")}
        return found

    def states(self) -> list[str]:
        """Each node's state, by name."""
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"], env=self.env, capture_output=True, text=True, check=False
        )
        return shown.stdout.split()

    def logs(self) -> str:
        """The daemons' last words."""
        return "\n".join(f"-- {path.name}\n{path.read_text()[-600:]}" for path in sorted(self.folder.glob("*.out")))


def _processes(*environment: str) -> list[int]:
    """Running processes that have all of these `NAME=value` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            has = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # not a process, or ended just now
            continue
        if set(environment) <= set(has):
            found.append(int(folder.name))
    return found


def is_held(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process still is, and has not been sent the signal either."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # gone
        return False
    state, pending = (re.search(rf"^{key}:\s*(\w+)", status, re.MULTILINE) for key in ("State", "ShdPnd"))
    assert state is not None and pending is not None
    return state[1] == "T" and not int(pending[1], 16) >> (number - 1) & 1


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _kill_when_left(slurm_conf: str) -> None:
    """Wait for the end of the input, then kill the cluster and its jobs."""
    sys.stdin.read()
    while pids := _processes(f"SLURM_CONF={slurm_conf}"):  # again for what was being started meanwhile
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _kill_when_left(sys.argv[1])

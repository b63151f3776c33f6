"""A real Slurm on this machine: a controller and four nodes, all on loopback, gone afterwards.

Started by root from Debian's `slurm-wlm` and `munge` (`make install-slurm`). Nodes n1 to n4 have the features v100
and a100 and four GPUs each that nothing stands behind, so that the scripts ask for GPUs as they would elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from training_helpers import REPOSITORY

NODES = ("n1", "n2", "n3", "n4")
DAEMONS = ("munged", "slurmctld", "slurmd")
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


def wait_for(
    what: str, holds: Callable[[], object], timeout_s: float, log: Callable[[], str] = str, pause_s: float = 0.2
) -> float:
    """Wait until `holds()` is true and return the seconds that took; fails with `what` and the end of `log()`."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}\n{log()[-6000:]}"
        time.sleep(pause_s)
    return time.monotonic() - began


class SlurmCluster:
    """Use it as a context; `env` is what commands need to reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            wait_for("four idle nodes", lambda: self.states().count("idle") == len(NODES), 300, self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.processes():  # jobs of a test that failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ctld, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=1000 "
            "Features=v100,a100 Gres=gpu:4 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
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
SlurmdTimeout=10
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")

    def _start_munge(self) -> None:
        self.folder.chmod(0o755)  # munged refuses a folder that others may write to, and clients must reach its socket
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid",
            f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log",
        )  # fmt: skip
        wait_for("munge's socket", (self.folder / "munge.socket").exists, 10, self.logs)

    def _start(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [str(_daemon(program)), *args], stdout=out, stderr=out, env=self.env, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """SIGKILL for the node's slurmd and everything of jobs there, as when the machine goes."""
        self._processes.pop(node).kill()
        for pid in self.processes(f"SLURMD_NODENAME={node}"):
            with contextlib.suppress(OSError):  # gone by now
                os.kill(_parent(pid), signal.SIGKILL)  # Slurm's slurmstepd, which would report the loss
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

    def finish(self, job_id: str, timeout_s: float, log: Callable[[], str]) -> str:
        """Wait for the end of a job and return its state."""
        wait_for(f"the end of job {job_id}", lambda: self.job(job_id)["JobState"] in ENDED, timeout_s, log)
        return self.job(job_id)["JobState"]

    def processes(self, *environment: str) -> list[int]:
        """Running tasks that have all of these `NAME=value` in their environment."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                has = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # not a process, or ended just now
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf" in has and set(environment) <= set(has):
                found.append(int(folder.name))
        return found

    def ranks(self, job_id: str) -> dict[int, int]:
        """Rank -> process number of a job's training processes."""
        found = {}
        for pid in self.processes(f"SLURM_JOB_ID={job_id}"):
            with contextlib.suppress(OSError):
                if "launch/train.py" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:3]:
                    has = Path(f"/proc/{pid}/environ").read_text().split("\0")
                    found |= {int(item.partition("=")[2]): pid for item in has if item.startswith("SLURM_PROCID=")}
        return found

    def states(self) -> list[str]:
        """Each node's state, by name."""
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%t"], env=self.env, capture_output=True, text=True, check=False
        )
        return shown.stdout.split()

    def logs(self) -> str:
        """The daemons' last words."""
        return "\n".join(f"-- {path.name}\n{path.read_text()[-600:]}" for path in sorted(self.folder.glob("*.out")))


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

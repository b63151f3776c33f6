"""How the processes of a training find each other: Slurm's variables, ports, and what a missing process means."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import REPOSITORY, free_port

from embervlm.ranks import is_slurm_task
from embervlm.rendezvous import FIRST_PORT, NUM_PORTS, RendezvousError, adopt_slurm, first_host, joining, tell_gloo
from embervlm.signals import EXIT_REQUEUE

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",  # a login node, where nobody listens
}
"""What a task of `srun` finds."""
JOIN = """
from embervlm.engines.base import World
world = World.join()
print(world.rank, world.size, world.gather(world.rank * 10), flush=True)
"""


def without_launcher(**env: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE"))
    }
    return kept | {"OMP_NUM_THREADS": "1"} | env


def start(*argv: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=REPOSITORY,
        env=without_launcher(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("node_list", "host"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("n[03-05,9],m1", "n03"), ("m1,n[03-05]", "m1"), ("r[2-3]n[01,4]-ib", "r2n01-ib")],
)
def test_the_first_host_of_a_node_list_is_found_without_scontrol(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a shell under salloc
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        # a shell that salloc opens on the node (LaunchParameters=use_interactive_step)
        {**TASK, "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"},
    ],
    ids=["salloc", "batch", "interactive step"],
)
def test_a_process_that_srun_did_not_start_is_alone(env: dict[str, str]) -> None:
    before = dict(env)
    adopt_slurm(env)
    assert env == before and not is_slurm_task(env)


def test_two_tasks_whose_srun_was_called_on_a_login_node_join() -> None:
    tasks = [start("-c", JOIN, **{**TASK, "SLURM_PROCID": str(rank)}) for rank in range(2)]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [out for out, _ in said] == ["0 2 [0, 10]\n", "1 2 [0, 10]\n"], said


def test_jobs_steps_and_restarts_have_ports_of_their_own_below_the_ephemeral_ones() -> None:
    ports = set()
    for job, step, restarts in ((7, 0, 0), (7, 1, 0), (8, 0, 0), (7, 0, 1), (19_876_543, 0, 0)):
        env = {**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restarts)}
        adopt_slurm(env)
        ports.add(int(env["MASTER_PORT"]))
    assert len(ports) == 5 and FIRST_PORT <= min(ports) and max(ports) < FIRST_PORT + NUM_PORTS <= 32768


@pytest.mark.parametrize(
    ("told", "gloo"), [("lo", "lo"), ("=lo", "lo"), ("nothere,l", "lo"), ("=l", None), ("^eth", None), ("lo:1", "lo")]
)
def test_gloo_takes_the_network_that_nccl_was_told(told: str, gloo: str | None) -> None:
    env = {"NCCL_SOCKET_IFNAME": told}
    tell_gloo(env)
    assert env.get("GLOO_SOCKET_IFNAME") == gloo


def test_a_process_that_waits_for_others_stops_when_it_is_told_to(tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    waiting = start("launch/train.py", "--output_dir", str(tmp_path), **env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(env["MASTER_PORT"]))) == 0:
                break
        time.sleep(0.1)
    waiting.send_signal(signal.SIGTERM)
    out, said = waiting.communicate(timeout=30)
    assert waiting.returncode == EXIT_REQUEUE, (out, said)
    assert "error: asked to stop while waiting for the other processes" in said and "Traceback" not in said


def test_a_port_in_use_is_one_line_that_says_how_to_name_another(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        second = start("launch/train.py", "--output_dir", str(tmp_path), **env)
        _, said = second.communicate(timeout=120)
    assert second.returncode == EXIT_REQUEUE
    assert f"error: port {port} of this machine is taken" in said and "Traceback" not in said


def test_a_network_error_at_the_start_is_one_line_and_another_start_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "10007")
    with pytest.raises(
        RendezvousError, match="process 1 of 4 cannot reach the others at n1:10007: Connection reset"
    ) as e:
        with joining(1, 4):
            raise RuntimeError("Connection reset by peer\nC++ frames")
    assert e.value.exit_status == EXIT_REQUEUE and "C++" not in str(e.value)


def test_a_wrong_flag_is_one_line_of_process_0_also_where_torchrun_ends() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "launch/train.py", "--max_stps", "3"],
        cwd=REPOSITORY,
        env=without_launcher(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    own, _, of_torchrun = found.stderr.partition("Traceback")
    said = "error: unrecognized arguments: --max_stps 3; did you mean --max_steps?"
    assert own.count(said) == 1 and "usage:" not in own
    assert said in of_torchrun.strip().splitlines()[-2]


def test_the_shell_of_srun_pty_is_alone_and_what_srun_starts_from_it_is_not() -> None:
    """Both have the variables of a step of several tasks; the shell alone has its terminal."""
    look = [sys.executable, "-c", "import os; from embervlm.ranks import *; print(is_slurm_task(os.environ))"]
    env = without_launcher(**TASK, SLURM_PTY_PORT="4242", SLURM_TASK_PID="1", PYTHONPATH=str(REPOSITORY))
    nested = subprocess.run(look, env=env, capture_output=True, text=True, check=True, start_new_session=True)
    assert nested.stdout == "True\n"
    child, terminal = pty.fork()
    if child == 0:
        os.execve(look[0], look, env)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal's output
        while part := os.read(terminal, 1000):
            said += part
    os.waitpid(child, 0)
    assert said.strip() == b"False"

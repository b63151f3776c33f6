"""How the processes of one training find each other: as tasks of Slurm, or by another launcher's variables."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from embervlm.errors import UserError
from embervlm.ranks import is_slurm_task
from embervlm.signals import EXIT_REQUEUE, stop_noted

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(minutes=15)
"""How long to wait for the other processes: the first start on a busy file system takes minutes."""
FIRST_PORT, NUM_PORTS = 10_000, 22_000
"""Below 32768, where Linux takes the ports of outgoing connections from."""


class RendezvousError(UserError):
    """The processes did not find each other. Nothing has been trained; another start may succeed."""

    exit_status = EXIT_REQUEUE
    is_of_one_process = True


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Set torch's variables for a task of Slurm. Variables that are already set stay, also another launcher's RANK."""
    if "RANK" in env or not is_slurm_task(env):
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    env.setdefault("MASTER_ADDR", _address_of_first_node(env))
    # another one for each job, step and restart, so that what still holds the last one's does no harm
    number = 31 * int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    number += 7 * int(env.get("SLURM_RESTART_COUNT") or 0)
    env.setdefault("MASTER_PORT", str(FIRST_PORT + number % NUM_PORTS))


def first_host(node_list: str) -> str:
    """The first node of Slurm's node list: `n03` of `n[03-05,9],m1`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else node_list


def _address_of_first_node(env: MutableMapping[str, str]) -> str:
    """Where task 0 of the step runs; `srun` itself may have been called on a login node."""
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    host = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    with suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    with suppress(OSError):  # a name of Slurm's alone, and its commands may be absent in a container
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
        if address := re.search(r"\bNodeAddr=(\S+)", shown.stdout):
            return address[1]
    return env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def tell_gloo(env: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME like NCCL_SOCKET_IFNAME, so gloo uses the same network as NCCL."""
    told = env.get("NCCL_SOCKET_IFNAME", "")
    if not told or told.startswith("^") or "GLOO_SOCKET_IFNAME" in env:
        return
    names = [name for _, name in socket.if_nameindex()]
    for wanted in told.removeprefix("=").split(","):
        wanted = wanted.partition(":")[0]
        prefix = () if told.startswith("=") else tuple(name for name in names if name.startswith(wanted))
        if found := [name for name in names if name == wanted] or list(prefix):
            env["GLOO_SOCKET_IFNAME"] = found[0]
            return


def meet() -> Store:
    """The store that all processes share, once all of them have joined.

    The wait happens in a thread, because one in C++ would keep the signals' handlers from running.
    """
    import torch.distributed as dist

    outcome: list[Store | Exception] = []

    def wait() -> None:
        try:
            outcome.append(next(dist.rendezvous("env://", timeout=PATIENCE))[0])
        except Exception as error:  # raised below, where somebody sees it
            outcome.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if stop_noted() and thread.is_alive():
            raise RendezvousError("asked to stop while waiting for the other processes; nothing has been trained yet")
    (found,) = outcome
    if isinstance(found, Exception):
        raise found
    return found


@contextmanager
def joining(rank: int, size: int) -> Iterator[None]:
    """Turns network errors inside into a RendezvousError that says what to do."""
    try:
        yield
    except RendezvousError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in said or "already in use" in said.lower():
            raise RendezvousError(
                f"port {os.environ.get('MASTER_PORT')} of this machine is taken, perhaps by another "
                f"training. Choose a "
                "free one: `deepspeed --master_port N`, `torchrun --master_port N`, or MASTER_PORT=N before srun"
            ) from None
        raise RendezvousError(
            f"process {rank} of {size} cannot reach the others at {place}: {said}. Look for an earlier error of "
            "another process; if the nodes have several networks, set NCCL_SOCKET_IFNAME to the one to use"
        ) from None

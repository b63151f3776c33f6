"""Real processes of their own that need no 5 seconds of imports: forked from one that has imported everything.

`start(argv, ...)` does what `subprocess.Popen([sys.executable, *argv])` does, in its own session, with its output in
files. There are two such parents with different hash seeds, used in turn, because two processes that are started the
usual way do not agree on the order of a set either.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIXED = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "PYTHONPATH")
"""Variables that are read at import, so a process that wants others cannot be forked."""
_lock = threading.Lock()
_parents: dict[int, subprocess.Popen[str]] = {}
_turn = itertools.count()


@dataclasses.dataclass
class Started:
    """What tests use of `subprocess.Popen`."""

    pid: int
    _status: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a warm process", timeout_s)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """SIGKILL for the process and all that it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> Started:
    """Run `python ARGV` (`-c CODE`, `-m MODULE` or a script, then its arguments)."""
    handle, status = tempfile.mkstemp(prefix="warm-start-")
    os.close(handle)
    os.unlink(status)  # it is there when the process has ended
    order = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "out": str(out), "err": str(err), "status": status}
    with _lock:
        parent = _parent(next(_turn) % 2, env)
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps(order) + "\n")
        parent.stdin.flush()
        return Started(int(parent.stdout.readline()), Path(status))


def _parent(number: int, env: Mapping[str, str]) -> subprocess.Popen[str]:
    found = _parents.get(number)
    if found is None or found.poll() is not None:
        _parents[number] = found = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(env) | {"PYTHONHASHSEED": "random"},
            start_new_session=True,
        )
    return found


# -- in the parent ---------------------------------------------------------------------------------------------------


def _serve() -> dict[str, Any]:
    """Fork for every order; returns in the forked process, with its order."""
    answers = os.dup(1)
    os.dup2(2, 1)  # imports may print
    import deepspeed  # noqa: F401
    import torch._dynamo.testing
    import torch._inductor.compile_fx  # noqa: F401  DeepSpeed's engine imports it
    import transformers.models.llama.modeling_llama
    import transformers.models.vit.modeling_vit  # noqa: F401

    import embervlm.engines.deepspeed
    import embervlm.run.stages  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes one thread along, and this process has more"
    children: dict[int, str] = {}
    unread = b""
    while True:
        if select.select([0], [], [], 0.02 if children else None)[0]:
            if not (part := os.read(0, 1 << 16)):
                os._exit(0)  # pytest has ended
            *orders, unread = (unread + part).split(b"\n")
            for order in map(json.loads, orders):
                if not (pid := os.fork()):
                    os.close(answers)
                    return order
                children[pid] = order["status"]
                os.write(answers, f"{pid}\n".encode())
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = Path(children.pop(ended[0]))
            part_file = status.with_suffix(".part")
            part_file.write_text(str(os.waitstatus_to_exitcode(ended[1])))
            part_file.rename(status)


def _become(order: dict[str, Any]) -> None:
    """Run what was ordered, as its own main program."""
    os.setsid()
    os.chdir(order["cwd"])
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, order["out"], None), (2, order["err"], None)):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND if mode is None else mode)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(order["env"])
    random.seed()
    kind, *rest = order["argv"]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = order["argv"], str(Path(order["cwd"], kind).parent)
        runpy.run_path(str(Path(order["cwd"], kind)), run_name="__main__")


if __name__ == "__main__":
    _become(_serve())

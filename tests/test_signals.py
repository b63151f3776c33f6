"""A run that is asked to stop saves on all its processes and leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import (
    REPOSITORY,
    TINY,
    free_port,
    make_data,
    ok,
    save_stage3,
    train,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.signals import EXIT_REQUEUE

LISTENING = """
import sys
from embervlm import signals
signals.listen()
print("listening", flush=True)
sys.stdin.readline()
print(len(signals._received), flush=True)
"""
STEPS = 30
BUSY_AT_THE_END = """
import atexit, sys, threading, time
from datetime import timedelta
import torch.distributed as dist
from embervlm.signals import end_after

class Slow:
    def __del__(self):
        time.sleep(1.5)  # the interpreter is torn down meanwhile

def wait():
    dist.HashStore().wait(["never"], timedelta(seconds=0.7))

def main():
    sys.modules["slow"] = Slow()
    threading.Thread(target=wait, daemon=True).start()
    atexit.register(print, "registered")
    print("done")
    {ends}

{run}
"""
"""A thread is in torch while the interpreter goes away, as gloo's threads may be."""


def listening() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    process = listening()
    process.send_signal(number)
    out, _ = process.communicate("\n", timeout=30)
    assert (out, process.returncode) == ("1\n", 0)


def ended(ends: str, run: str = "end_after(main)") -> subprocess.CompletedProcess[str]:
    code = BUSY_AT_THE_END.format(ends=ends, run=run)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('error: no such file')", 1, "error: no such file\n"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
def test_a_thread_that_is_still_in_torch_does_not_abort_a_process_that_has_ended(
    ends: str, status: int, said: str
) -> None:
    found = ended(ends)
    assert (found.stdout, found.returncode) == ("done\nregistered\n", status), found.stderr
    assert found.stderr.endswith(said) and "terminate called" not in found.stderr


def test_such_a_thread_aborts_python_itself() -> None:
    found = ended("sys.exit(75)", "main()")
    assert found.returncode == -signal.SIGABRT and "terminate called without an active exception" in found.stderr


@pytest.mark.parametrize("command", ["embervlm cluster", "embervlm --help"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(command: str) -> None:
    python = f"{sys.executable} -m embervlm.cli {command.removeprefix('embervlm ')}"
    found = subprocess.run(
        ["bash", "-c", f"{{ {python}; echo $? >&2; }} | true"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stderr.split()[-1] in ("0", "141") and "Traceback" not in found.stderr


def test_a_second_sigint_kills() -> None:
    process = listening()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)  # two at once would count as one
    assert process.wait(30) == -signal.SIGINT


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_the_same_command_ends_as_if_there_had_been_none(
    tmp_path: Path,
) -> None:
    data = make_data(tmp_path)
    stage3 = save_stage3(tmp_path / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data, stage4__phase2__epochs=90)
    flags = [
        "--config",
        config,
        "--stages",
        "4",
        "--phase",
        "2",
        "--resume_from",
        stage3,
        "--engine",
        "torch",
        "--max_steps",
        str(STEPS),
    ]
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "launch" / "train.py"),
                *map(str, flags),
                "--output_dir",
                str(tmp_path / "again"),
            ],
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        log = run_dir.metrics_log_path(run_dir.phase_dir(tmp_path / "again", 2))
        while not log.exists() or not log.read_text():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGUSR2)
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [EXIT_REQUEUE] * 2, errors
    (saved,) = run_dir.list_checkpoints(run_dir.phase_dir(tmp_path / "again", 2))
    assert 0 < saved.step < STEPS and f"saved at step {saved.step}" in errors[0]
    assert len(log.read_text().splitlines()) == saved.step  # nothing is done twice

    for launcher, name in (("torchrun", "again"), ("ranks", "straight")):
        ok(train(launcher, *flags, "--output_dir", tmp_path / name))
    finals = [run_dir.checkpoint_path(run_dir.phase_dir(tmp_path / name, 2), None) for name in ("again", "straight")]
    again, straight = map(weights_of, finals)
    assert all(torch.equal(again[key], straight[key]) for key in straight)

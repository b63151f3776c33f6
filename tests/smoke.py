"""One smoke run of the quickstart for all test files that look at its output."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from training_helpers import run, timed

TARGETS = ("reasoning_consistency", "step_completeness", "logical_flow_score", "final_answer_accuracy")
"""The rows of the table."""


@dataclass
class Smoke:
    output: Path
    first: subprocess.CompletedProcess[str]
    seconds: float
    busy_s: float
    """Time that its processes kept a processor busy: what others do on the machine stretches only the clock."""

    def again(self) -> subprocess.CompletedProcess[str]:
        return quickstart(self.output)


def quickstart(output: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`embervlm quickstart --smoke`, with both baselines."""
    argv = [sys.executable, "-m", "embervlm.cli", "quickstart", "--smoke", "--same_time_baseline"]
    argv += ["--output_dir", str(output)]
    return run(argv, timeout_s=600, cold=True, **env)  # beside other tests on a slow machine


def smoke_run(factory: pytest.TempPathFactory) -> Smoke:
    """The same run for everyone who asks in this session, in whatever worker of pytest-xdist."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "smoke.lock"):
        kept = shared / "smoke.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(Smoke(shared / "smoke", *timed(quickstart, shared / "smoke"))))
    return pickle.loads(kept.read_bytes())

"""One smoke run of the quickstart for all test files that look at its output."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_helpers import run, timed


@dataclass
class Smoke:
    output: Path
    first: subprocess.CompletedProcess[str]
    seconds: float
    busy_s: float
    """Time that its processes kept a processor busy: what others do on the machine stretches only the clock."""

    def again(self) -> subprocess.CompletedProcess[str]:
        return _quickstart(self.output)


def _quickstart(output: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "embervlm.cli", "quickstart", "--smoke", "--output_dir", str(output)]
    return run(argv, timeout_s=240)


@functools.cache
def _smoke_run(base: Path) -> Smoke:
    output = base / "smoke"
    return Smoke(output, *timed(_quickstart, output))


def smoke_run(factory: pytest.TempPathFactory) -> Smoke:
    """The same run for everyone who asks in this session."""
    return _smoke_run(factory.getbasetemp())

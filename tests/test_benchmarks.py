"""Benchmarks that few machines can run do their parts in small on a CPU."""

import json
import subprocess

import pytest
from training_helpers import REPOSITORY


@pytest.mark.slow
def test_what_needs_a_gpu_runs_in_small_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = ["bash", "benchmarks/gpu.sh", str(output), "--small"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    parts = json.loads(output.read_text())
    assert {name: part["exit"] for name, part in parts.items() if name != "machine"} == dict.fromkeys(
        ("data", "plan", "start", "plain auto", "zero0 auto"), 0
    )
    assert "GB" in parts["plan"]["said"]
    for name in ("plain auto", "zero0 auto"):
        for phase in ("phase 1", "phase 2"):
            assert parts[name][phase]["steps"] == 2 and parts[name][phase]["last"]["loss"]["reasoning"] > 0

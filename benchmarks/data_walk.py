"""From nothing to a checked data set: every data command on 50,000 records, with what it prints, takes and holds.

    python benchmarks/data_walk.py --work_dir /tmp/walk --output_file walk.json

Runs the walk of docs/data.md in an empty folder and prints the commands with their output. Of each: wall time,
processor time of all its processes, and the most memory that they held together (proportional set size: a page that
several share counts once).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tiny_run import REPOSITORY

from embervlm import run_dir

SAMPLE_S = 0.5
CURRICULUM = {
    "stage1": {"max_steps": 3, "complexity": "simple", "epochs": [1, 3]},
    "stage2": {"max_steps": 5, "complexity": "medium", "epochs": [4, 7]},
    "stage3": {"max_steps": 10, "complexity": "complex", "epochs": [8, 10]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder, or one of an earlier part")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--num_samples", type=int, default=50_000)
    parser.add_argument("--num_given", type=int, default=2_000, help="records that are augmented to --num_samples")
    parser.add_argument("--first", type=int, default=1, help="command to begin with, counted from 1")
    parser.add_argument("--last", type=int, help="command to end with")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run_file = args.work_dir / "run.yaml"
    run_file.write_text(yaml.safe_dump({"model": "quickstart", "curriculum": CURRICULUM}), encoding="utf-8")
    data, given = "data/stage4", f"--num_samples {args.num_given}"
    walk = {
        "generate": f"data generate --num_samples {args.num_samples} --output_file {data}/reasoning_data.json",
        "validate": f"data validate --data_file {data}/reasoning_data.json --output_report {data}/report.txt",
        "filter": f"data filter --input {data}/reasoning_data.json --min_quality_score 0.8 "
        f"--output {data}/filtered.json",
        "generate a few": f"data generate {given} --output_file {data}/few/reasoning_data.json",
        "augment": f"data augment --input {data}/few/reasoning_data.json --output_file {data}/few/augmented.json "
        f"--target_samples {args.num_samples}",
        "validate augmented": f"data validate --data_file {data}/few/augmented.json "
        f"--output_report {data}/few/report.txt",
        "stage 3": f"train --config run.yaml --stages 3 --reasoning_data {data}/few/augmented.json --max_steps 2",
        "stage 4": f"train --config run.yaml --stages 4 --reasoning_data {data}/few/augmented.json --max_steps 2",
    }
    part = list(walk.items())[args.first - 1 : args.last]
    report = {name: run(command.split(), args.work_dir) for name, command in part}
    print()
    for name, row in report.items():
        print(f"{name:<20}" + ", ".join(f"{key} {value:,.0f}" for key, value in row.items()))
    before = run_dir.read_json(args.output_file) if args.first > 1 and args.output_file.exists() else {}
    run_dir.write_json_atomic(args.output_file, {**before, **report})


def run(command: list[str], folder: Path) -> dict[str, float]:
    """Run `embervlm COMMAND` in `folder` and measure it; exits where it fails."""
    print("$ embervlm " + " ".join(command), flush=True)
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "embervlm.cli", *command], cwd=folder, env=env)
    most = 0
    while process.poll() is None:
        most = max(most, held_by(process.pid))
        time.sleep(SAMPLE_S)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"error: it ended with {process.returncode}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "memory_mb": most / 1e6}


def held_by(pid: int) -> int:
    """Bytes of a process and all its descendants; 0 once it has ended."""
    total, left = 0, [pid]
    while left:
        proc = Path("/proc") / str(left.pop())
        try:
            fields: Any = dict(line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
            total += int(fields["Pss"].split()[0]) * 1024
            for thread in (proc / "task").iterdir():
                left += map(int, (thread / "children").read_text().split())
        except (OSError, KeyError):
            continue
    return total


if __name__ == "__main__":
    main()

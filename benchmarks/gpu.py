"""All that needs a GPU, in one command of at most eight minutes; `benchmarks/gpu.sh` starts it.

    bash benchmarks/gpu.sh gpu.json            # on a machine with a GPU
    bash benchmarks/gpu.sh gpu.json --small    # what it does, in small, on a CPU; the figures mean nothing

Every part has a time limit of its own, and its result is in the file before the next one begins. Trainings are those of
`configs/training_stages.yaml` with 32 records a step. Of each: records a second, and of the newest log line the losses,
the seconds that were waited for data, and the most memory that was in use. `plan` is what `embervlm plan` says of the
same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import REPOSITORY, write_run

from embervlm import run_dir

ENGINES = {
    "plain": ["--engine", "torch"],
    "zero0": ["--zero_stage", "0"],
    "zero1": ["--zero_stage", "1"],
    "zero2": ["--zero_stage", "2"],
    "zero3": ["--zero_stage", "3"],
    "fsdp2": ["--engine", "fsdp"],
}

RECIPE = {
    "nodes": 1,
    "gpus_per_node": 1,
    "gpu_type": "a100",
    "precision": "bf16",
    "zero_stage": 2,
    "batch_size": 32,
    "gradient_accumulation_steps": 1,
    "cpus_per_task": 8,
    "phase1_minutes": 10,
    "phase2_minutes": 10,
}
"""What `embervlm plan` is asked about: one GPU, of the newest kind that it knows."""


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    samples: int
    steps: int
    limit_s: int
    """Of each training."""


FULL, SMALL = Scale(samples=2_000, steps=60, limit_s=70), Scale(samples=60, steps=2, limit_s=240)


class Bench:
    """The parts, and the file that their results are written to."""

    def __init__(self, output: Path, work: Path, small: bool) -> None:
        self.output, self.work, self.small = output, work, small
        self.scale = SMALL if small else FULL
        self.data = work / "data" / "reasoning_data.json"
        self.config = REPOSITORY / "configs" / "training_stages.yaml"
        if small:
            self.config = write_run(work, self.data, None)
        self.results: dict[str, Any] = {"machine": machine()}

    def run(self) -> bool:
        """Whether every part ended well."""
        limit_s = self.scale.limit_s if self.small else 60
        generate = ["data", "generate", "--teacher_model", "rules", "--num_samples", str(self.scale.samples)]
        self.part("data", ["-m", "embervlm.cli", *generate, "--output_file", str(self.data)], limit_s)
        recipe = self.work / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
        planned = ["--cluster", str(recipe), "--config", str(self.config), "--records", str(self.scale.samples)]
        self.part("plan", ["-m", "embervlm.cli", "plan", *planned], limit_s)
        first = self.training("start", ["--stages", "3"], [])
        precisions = ["auto"] if self.small else ["bf16", "fp16"]
        for precision in precisions:
            names = list(ENGINES) if precision != "fp16" else ["zero2", "plain"]
            for name in names[: 2 if self.small else None]:
                flags = ["--stages", "4", "--resume_from", str(first), *ENGINES[name], "--precision", precision]
                self.training(f"{name} {precision}", flags, ["1", "2"])
        if not self.small:
            self.part("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], 240)
        return all(found["exit"] == 0 for name, found in self.results.items() if name != "machine")

    def flags(self, name: str) -> list[str]:
        return [
            *("--config", str(self.config), "--output_dir", str(self.work / name), "--reasoning_data", str(self.data))
        ]

    def training(self, name: str, flags: list[str], phases: list[str]) -> Path:
        """One run of `launch/train.py`, with what its log says of each of `phases`; its last checkpoint."""
        folder = self.work / name.replace(" ", "-")
        command = ["launch/train.py", *self.flags(folder.name), *flags, "--max_steps", str(self.scale.steps)]
        found = self.part(name, [*command, "--log_steps", "1", "--set", "sample_records=0"], self.scale.limit_s)
        stage3 = run_dir.stage3_dir(folder)
        for phase in phases:
            found[f"phase {phase}"] = figures(run_dir.phase_dir(folder, int(phase)))
        if not phases:
            found["stage 3"] = figures(stage3)
        self.save()
        return run_dir.checkpoint_path(stage3, None)

    def part(self, name: str, command: list[str], limit_s: int) -> dict[str, Any]:
        began = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        found: dict[str, Any] = {"command": " ".join(command), "limit_s": limit_s}
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
            found |= {"exit": done.returncode, "said": (done.stdout if name == "plan" else done.stdout[-2000:])}
            if done.returncode:
                found["error"] = done.stderr[-2000:]
                print(done.stderr[-500:], flush=True)
        except subprocess.TimeoutExpired:
            found["exit"] = "cut off by its limit"
        found["took_s"] = time.monotonic() - began
        print(f"{found['exit']}, {found['took_s']:.0f} s", flush=True)
        self.results[name] = found
        self.save()
        return found

    def save(self) -> None:
        run_dir.write_json_atomic(self.output, self.results)


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}


def figures(folder: Path) -> dict[str, Any]:
    """Of a phase's log: records a second over the second half of its steps, and its last line."""
    path = run_dir.metrics_log_path(folder)
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "elapsed_s" in line]
    half, last = lines[len(lines) // 2 - 1], lines[-1]
    steps_per_s = (last["step"] - half["step"]) / max(1e-9, last["elapsed_s"] - half["elapsed_s"])
    return {"steps": last["step"], "steps_per_s": steps_per_s, "last": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON that the results are written to")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        sys.exit("error: no GPU here; --small does the same in small on the CPU")
    with tempfile.TemporaryDirectory() as work:
        all_well = Bench(options.output, Path(work), options.small).run()
    print(f"Results: {options.output}")
    if not all_well:
        sys.exit("error: some parts did not end well; see `error` and `exit` there")


if __name__ == "__main__":
    main()

"""How long a killed run takes to its next step, early and late in an epoch.

    python benchmarks/resume_time.py --model embervlm-39m --work_dir /tmp/resume

Trains most of an epoch through `launch/train.py`, then starts it again from its first checkpoint and from its last, in
turn: seconds from the command to the line of the next step in the log.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tiny_run import ANSWERS_ALONE, finish, make_data, metrics, start, write_run

from embervlm import run_dir
from embervlm.progress import progress_bar
from embervlm.run_dir import write_json_atomic

TARGET_S = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embervlm-39m", help="preset in configs/model/")
    parser.add_argument("--engine", default="torch", choices=("deepspeed", "fsdp", "torch"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--output_file", type=Path, help="JSON with the figures")
    args = parser.parse_args()
    folder = args.work_dir / args.model
    folder.mkdir(parents=True, exist_ok=True)
    epoch_steps = int(0.8 * args.records) // (args.batch_size * args.processes)  # four of five are trained on
    config = write_run(
        folder,
        make_data(folder, args.records),
        args.model,
        engine=args.engine,
        stage3_batch_size=args.batch_size,
        save_steps=epoch_steps // 4,
        keep_last=1000,
        max_steps=epoch_steps - 1,
        stage3={"epochs": 2, **ANSWERS_ALONE, "learning_rate": 1e-4},
    )
    whole = folder / "whole"
    if whole.exists():
        sys.exit(f"error: {whole} exists; name a new --work_dir")
    finish(start(config, whole, args.processes, args.threads), whole)
    saved = [found for found in run_dir.list_checkpoints(run_dir.stage3_dir(whole)) if not found.is_final]
    seconds: dict[int, list[float]] = {saved[0].step: [], saved[-1].step: []}
    for number in progress_bar(range(2 * args.repeats), desc="resumes"):
        checkpoint = (saved[0], saved[-1])[number % 2]
        seconds[checkpoint.step].append(resume(config, whole, checkpoint, args))
    medians = {step: statistics.median(found) for step, found in seconds.items()}
    report: dict[str, Any] = {
        "model": args.model,
        "engine": args.engine,
        "processes": args.processes,
        "steps_per_epoch": epoch_steps,
        **{f"seconds_from_step_{step}": [round(value, 1) for value in found] for step, found in seconds.items()},
        "target_s": TARGET_S,
        "passed": max(medians.values()) < TARGET_S,
    }
    for name, value in report.items():
        print(f"{name:<24} {value}")
    if args.output_file:
        write_json_atomic(args.output_file, report)


def resume(config: Path, whole: Path, checkpoint: run_dir.Checkpoint, args: argparse.Namespace) -> float:
    """Seconds to the next step of a copy of the run that was cut off at `checkpoint`."""
    output = whole.with_name("again")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(whole / "cache", output / "cache")
    shutil.copytree(checkpoint.path, run_dir.stage3_dir(output) / checkpoint.path.name)
    began, process = time.monotonic(), start(config, output, args.processes, args.threads)
    try:
        while not metrics(output):
            if process.poll() is not None:
                finish(process, output)
            time.sleep(0.02)
        found = time.monotonic() - began
        assert metrics(output)[0]["step"] == checkpoint.step + 1
        return found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()

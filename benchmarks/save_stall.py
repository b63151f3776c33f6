"""How long training stands still per checkpoint: written in the background, and waited for.

    python benchmarks/save_stall.py --model quickstart --work_dir /tmp/stall
    python benchmarks/save_stall.py --model embervlm-39m --work_dir /tmp/stall --batch_size 1 --save_steps 10

Three runs of the same steps through `launch/train.py`: checkpoints in the background, checkpoints that training waits
for, and none. Medians over the saves; the last checkpoint of a run is always waited for and does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from tiny_run import ANSWERS_ALONE, finish, make_data, metrics, start, write_run

from embervlm.progress import progress_bar
from embervlm.run_dir import write_json_atomic

TARGET_RATIO = 0.05
MODES = {
    "background": ("background_saves=true",),
    "synchronous": ("background_saves=false",),
    "none": ("save_steps=1000000",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="preset in configs/model/")
    parser.add_argument("--engine", default="torch", choices=("deepspeed", "fsdp", "torch"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--save_steps", type=int, default=15, help="enough for a checkpoint to be written meanwhile")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--work_dir", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--output_file", type=Path, help="JSON with the figures")
    args = parser.parse_args()
    folder = args.work_dir / args.model
    folder.mkdir(parents=True, exist_ok=True)
    steps = args.saves * args.save_steps + args.save_steps // 2
    config = write_run(
        folder,
        make_data(folder, 200),
        args.model,
        engine=args.engine,
        stage3_batch_size=args.batch_size,
        save_steps=args.save_steps,
        keep_last=1,
        max_steps=steps,
        stage3={"epochs": 1000, **ANSWERS_ALONE, "learning_rate": 1e-4},
    )
    runs = {}
    for mode in progress_bar(MODES, desc=args.model):
        output = folder / mode
        if output.exists():
            sys.exit(f"error: {output} exists; name a new --work_dir")
        finish(start(config, output, args.processes, args.threads, "--set", *MODES[mode]), output)
        runs[mode] = metrics(output)
    report = report_of(args, runs)
    for name, value in report.items():
        print(f"{name:<36} {value}")
    if args.output_file:
        write_json_atomic(args.output_file, report)


def report_of(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    stalls = {mode: stalls_of(runs[mode], args.save_steps) for mode in ("background", "synchronous")}
    medians = {mode: statistics.median(found) for mode, found in stalls.items()}
    per_step = {
        f"seconds_per_step_{mode}": round((lines[-1]["elapsed_s"] - lines[0]["elapsed_s"]) / (len(lines) - 1), 4)
        for mode, lines in runs.items()
    }
    ratio = medians["background"] / medians["synchronous"]
    return {
        "model": args.model,
        "engine": args.engine,
        "processes": args.processes,
        **{f"stalls_{mode}_s": [round(value, 4) for value in found] for mode, found in stalls.items()},
        **{f"median_stall_{mode}_s": round(value, 4) for mode, value in medians.items()},
        "ratio": round(ratio, 4),
        "target_ratio": TARGET_RATIO,
        "passed": ratio <= TARGET_RATIO,
        **per_step,
    }


def stalls_of(lines: list[dict[str, Any]], save_steps: int) -> list[float]:
    """Seconds that each save held the loop up. A save is counted in the line after its step."""
    by_step = {line["step"]: line["save_stall_s"] for line in lines}
    return [by_step[step + 1] - by_step[step] for step in range(save_steps, max(by_step), save_steps)]


if __name__ == "__main__":
    main()

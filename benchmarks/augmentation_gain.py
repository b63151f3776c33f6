"""Does training on augmented chains beat training on the given ones, for the same number of steps?

    python benchmarks/augmentation_gain.py --stage3 outputs/quickstart/stage3/checkpoint-final \\
        --data outputs/quickstart/data/reasoning_data.json --work_dir /tmp/gain --output_file gain.json

Takes a few training records of the quickstart's data, trains both phases of Stage 4 with the quickstart's recipe from
its Stage 3 checkpoint, once on those records and once on them and what augmentation makes of them, and asks both models
the same records of the test split, which augmentation does not touch. The intervals are of 95%, from a bootstrap over
the test records; that of the difference pairs the two answers to a record.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tiny_run import REPOSITORY

from embervlm import run_dir
from embervlm.data.records import read_records, write_records
from embervlm.data.splits import split_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

METRICS = ("correct", "reasoning_consistency", "step_completeness", "logical_flow_score")
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage3", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="the same folder again goes on where it stopped")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--given", type=int, default=1000, help="training records of the first run")
    parser.add_argument("--target", type=int, default=8000, help="training records of the second, the given ones too")
    parser.add_argument("--phase1_steps", type=int, default=150)
    parser.add_argument("--phase2_steps", type=int, default=350)
    parser.add_argument("--num_test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of records and of both trainings")
    args = parser.parse_args()
    data = choose_records(args)
    runs = {
        "given": train(args, data, "given"),
        "augmented": train(args, data, "augmented", f"stage4.reasoning_augmentation.target_samples={args.target}"),
    }
    scores = {name: score(checkpoint, args) for name, checkpoint in runs.items()}
    report: dict[str, Any] = {name: str(value) for name, value in vars(args).items()}
    for metric in METRICS:
        given, augmented = (scores[name][metric] for name in ("given", "augmented"))
        report[metric] = {
            "given": with_interval(given),
            "augmented": with_interval(augmented),
            "difference": with_interval(augmented - given),
        }
        print(
            f"{metric:<24}"
            + "".join(
                f"{name} {mean:.3f} [{low:.3f}, {high:.3f}]   " for name, (mean, low, high) in report[metric].items()
            )
        )
    run_dir.write_json_atomic(args.output_file, report)


def choose_records(args: argparse.Namespace) -> Path:
    """A file with `--given` training records and all of the other splits, which a training run looks at as well."""
    path = args.work_dir / "seed.jsonl"
    if not path.exists():
        splits = {
            str(name): records for name, records in split_records(read_records(args.data, candidates=ROBOTS)).items()
        }
        chosen = random.Random(args.seed).sample(splits["train"], args.given)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        write_records(path, [*chosen, *splits["val"], *splits["test"]], image_root=args.data.parent)
    return path


def train(args: argparse.Namespace, data: Path, name: str, *settings: str) -> Path:
    """Both phases, each for its number of steps however many records there are."""
    output = args.work_dir / name
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for phase, steps in ((1, args.phase1_steps), (2, args.phase2_steps)):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(REPOSITORY / "launch" / "train.py"),
            "--config",
            str(REPOSITORY / "configs" / "quickstart.yaml"),
            "--stages",
            "4",
            "--phase",
            str(phase),
            "--output_dir",
            str(output),
            "--reasoning_data",
            str(data),
            "--image_root",
            str(args.data.parent),
            "--max_steps",
            str(steps),
            "--phase1_epochs",
            "1000",
            "--phase2_epochs",
            "1000",
            "--seed",
            str(args.seed),
            "--set",
            "sample_records=1",
            *settings,
        ]
        if phase == 1:
            command += ["--resume_from", str(args.stage3)]
        print("$ " + " ".join(command), flush=True)
        if subprocess.run(command, env=env, cwd=REPOSITORY, check=False).returncode:
            sys.exit("error: the training failed, see above")
    return run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)


def score(checkpoint: Path, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Metric -> its value for each test record."""
    from embervlm.evaluation.eval_data import Evaluation
    from embervlm.evaluation.evaluate import evaluate

    _, samples = evaluate(
        Evaluation(
            checkpoint=checkpoint,
            split="test",
            num_samples=args.num_test,
            reasoning_data=str(args.data),
            compare=False,
            image_root=str(args.data.parent),
        )
    )
    values = [{"correct": sample["correct"], **sample["scores"]} for sample in samples]
    return {metric: np.array([float(value[metric]) for value in values]) for metric in METRICS}


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the ends of its interval."""
    places = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[places].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


if __name__ == "__main__":
    main()

"""Kill a training again and again at random moments; it must end as if nothing had happened.

    python benchmarks/soak.py --kills 100 --work_dir /tmp/soak --output_file soak.json

Trains a tiny model once undisturbed, and once with SIGKILL to all of its processes at random moments: while it starts,
between steps, and while it writes a checkpoint. Afterwards: every sample was seen exactly once per epoch, no checkpoint
was damaged at any time, weights and optimizer are bit for bit those of the undisturbed run. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tiny_run import finish, make_data, metrics, start, write_run

from embervlm import run_dir
from embervlm.data.records import read_records
from embervlm.data.splits import split_records
from embervlm.progress import progress_bar

MOST_STEPS_PER_LIFE = 12
SAVE_STEPS = 2
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--engine", default="torch", choices=("deepspeed", "fsdp", "torch"))
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder for data and both runs")
    parser.add_argument("--output_file", type=Path, help="JSON with the figures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    if args.work_dir.exists():
        sys.exit(f"error: --work_dir {args.work_dir} exists; name a new folder")
    args.work_dir.mkdir(parents=True)
    report = Soak(args).run()
    for name, value in report.items():
        print(f"{name:<32} {value}")
    if args.output_file:
        run_dir.write_json_atomic(args.output_file, report)
    sys.exit(0 if report["passed"] else 1)


class Soak:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.random = random.Random(args.seed)
        self.data = make_data(args.work_dir, 48)
        # no life gets further than this, so that the run cannot end before its last kill
        self.steps = (args.kills + 1) * MOST_STEPS_PER_LIFE
        self.ids = [record.record_id for record in split_records(read_records(self.data))["train"]]
        batches_per_epoch = -(-len(self.ids) // (BATCH * args.processes))
        self.config = write_run(
            args.work_dir, self.data, None, engine=args.engine, stage3_batch_size=BATCH, save_steps=SAVE_STEPS,
            keep_last=2, log_records=True, max_steps=self.steps,
            stage3={"epochs": -(-self.steps // batches_per_epoch), "direct_loss_weight": 1.0, "learning_rate": 1e-3},
        )  # fmt: skip
        self.undisturbed, self.disturbed = args.work_dir / "undisturbed", args.work_dir / "disturbed"
        self.folder = run_dir.stage3_dir(self.disturbed)
        self.in_save = self.while_starting = self.redone = 0
        self.damaged: list[str] = []

    def run(self) -> dict[str, object]:
        began = time.monotonic()
        straight = self.start(self.undisturbed)
        finish(straight, self.undisturbed)
        self.startup_s = 10.0
        for _ in progress_bar(range(self.args.kills), desc="kills"):
            self.live_and_die()
        finish(self.start(self.disturbed), self.disturbed)
        self.look_for_damage()
        same_weights, same_optimizer = self.compare("pytorch_model.bin"), self.compare("training_state.pt")
        wrong_epochs = self.wrong_epochs()
        return {
            "kills": self.args.kills,
            "kills_while_starting": self.while_starting,
            "kills_while_saving": self.in_save,
            "steps": self.steps,
            "steps_done_again": self.redone,
            "epochs": metrics(self.disturbed)[-1]["epoch"],
            "epochs_with_a_sample_not_once": wrong_epochs,
            "damaged_checkpoints": self.damaged,
            "same_final_weights": same_weights,
            "same_final_optimizer": same_optimizer,
            "seconds": round(time.monotonic() - began),
            "passed": same_weights and same_optimizer and not self.damaged and not wrong_epochs,
        }

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        return start(self.config, output, self.args.processes, 1)

    def live_and_die(self) -> None:
        """One start, killed at a random moment."""
        saved, log_before = self.newest(), self.log_id()
        began, process = time.monotonic(), self.start(self.disturbed)
        steps = self.random.randrange(MOST_STEPS_PER_LIFE)
        if steps == 0:
            self.while_starting += 1
            self.sleep_unless_ended(process, self.random.uniform(0, self.startup_s))
        else:
            # a start replaces the log first: without the lines of steps that it does again
            while self.log_id() == log_before or self.last_step() < saved + steps:
                self.sleep_unless_ended(process, 0.002)
            self.startup_s = min(self.startup_s, time.monotonic() - began)
            time.sleep(self.random.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.in_save += any(path.is_dir() for path in self.folder.glob(".tmp-*"))
        self.redone += max(0, self.last_step() - self.newest())
        self.look_for_damage()

    def sleep_unless_ended(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        finish(process, self.disturbed)
        sys.exit(f"error: the run ended before its kill; see {self.disturbed}.log")

    def newest(self) -> int:
        return max([found.step for found in run_dir.list_checkpoints(self.folder)], default=0)

    def log_id(self) -> int | None:
        path = run_dir.metrics_log_path(self.folder)
        return path.stat().st_ino if path.exists() else None

    def last_step(self) -> int:
        """Of the log; its end alone is read, because it is asked all the time."""
        with run_dir.metrics_log_path(self.folder).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            complete = log.read().rpartition(b"\n")[0]
        return json.loads(complete.rpartition(b"\n")[2])["step"] if complete else 0

    def look_for_damage(self) -> None:
        for found in run_dir.list_checkpoints(self.folder):
            try:
                run_dir.verify_checkpoint(found.path)
            except run_dir.DamagedCheckpointError as error:
                self.damaged.append(str(error))
        self.damaged += [str(path) for path in self.folder.glob("damaged-*") if str(path) not in self.damaged]

    def compare(self, name: str) -> bool:
        """Whether the tensors of `name` are the same, bit for bit, in both final checkpoints."""
        found = [
            torch.load(run_dir.checkpoint_path(run_dir.stage3_dir(output), None) / name, weights_only=True)
            for output in (self.undisturbed, self.disturbed)
        ]
        if name == "training_state.pt":
            found = [state["optimizer"] for state in found]
        first, second = ({path: value for path, value in _leaves(state)} for state in found)
        return first.keys() == second.keys() and all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(second[path])) for path, value in first.items()
        )

    def wrong_epochs(self) -> list[int]:
        """Epochs of the log in which a record of the train split does not stand exactly once."""
        seen: dict[int, Counter[str]] = {}
        lines = metrics(self.disturbed)
        steps = [line["step"] for line in lines]
        if steps != list(range(1, self.steps + 1)):
            sys.exit(f"error: the log does not hold every step once: {steps[:20]} ...")
        for line in lines:
            seen.setdefault(line["epoch"], Counter()).update(line["records"])
        last = max(seen)  # may be cut off by max_steps
        return [epoch for epoch, found in seen.items()
                if (found != Counter(self.ids) if epoch != last else max(found.values()) > 1)]  # fmt: skip


def _leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}")]
    return [(path, tree)]


if __name__ == "__main__":
    main()

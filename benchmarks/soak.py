"""Kill a training again and again at random moments; it must end as if nothing had happened.

    python benchmarks/soak.py --kills 100 --work_dir /tmp/soak --output_file soak.json
    python benchmarks/soak.py --kills 25 --phase 3 --work_dir /tmp/soak3

Trains a tiny model once undisturbed, and once with SIGKILL to all of its processes at random moments: while it starts,
between steps, while it writes a checkpoint and, with `--phase 3`, while it draws chains. Afterwards: no checkpoint was
damaged at any time, both runs read the same records and had the same losses and rewards at every step, weights and
optimizer are bit for bit those of the undisturbed run, and Stage 3 saw every sample exactly once an epoch. Exit code 1
otherwise.
It may be stopped at any time; the same command resumes with the next kill.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_run import ANSWERS_ALONE, TINY_MODEL, finish, make_data, metrics_of, start, write_run

from embervlm import run_dir
from embervlm.data.records import ReasoningRecord, read_records
from embervlm.data.splits import split_records
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.model.embervlm import build_model
from embervlm.progress import progress_bar
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.words.chain_text import format_reasoning

MOST_STEPS_PER_LIFE = 8
STARTING_RATIO = 0.2
"""Share of the kills that fall into the start, before a step is done."""
SAVE_STEPS = 2
BATCH = 4
HANGS_AFTER_S = 3600
DRAWING: dict[str, object] = {
    "prompts_per_rollout": BATCH,
    "num_generations": 4,
    "rollout_batch_size": 4,
    "max_completion_length": 24,
    "learning_rate": 2e-3,
    "warmup_steps": 1,
    "reward": {"answer": 1.0, "form": 0.2, "soundness": 0.2, "length": 0.1},
}
"""Phase 3 of short chains. That it teaches nothing does not matter here, and a seldom right answer does not stop it."""


@dataclass
class Tally:
    """What has happened so far; kept in the work folder."""

    settings: dict[str, object]
    kills: int = 0
    while_starting: int = 0
    while_saving: int = 0
    steps_done_again: int = 0
    most_steps_done_again: int = 0
    """After one kill."""
    startup_s: float = 10.0
    """Until the first step, in the fastest life."""
    damaged: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--engine", default="torch", choices=("deepspeed", "fsdp", "torch"))
    parser.add_argument("--phase", type=int, choices=(3,), help="phase 3 of Stage 4 in place of Stage 3")
    parser.add_argument("--work_dir", type=Path, required=True, help="data and both runs; a folder of its own")
    parser.add_argument("--output_file", type=Path, help="JSON with the figures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command resumes"))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report = Soak(args).run()
    for name, value in report.items():
        print(f"{name:<32} {value}")
    if args.output_file:
        run_dir.write_json_atomic(args.output_file, report)
    sys.exit(0 if report["passed"] else 1)


class Soak:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = make_data(args.work_dir, 48)
        # a life gets half as far on average, so the run does not end before its last kill
        self.steps = (args.kills + 1) * MOST_STEPS_PER_LIFE
        records = read_records(self.data, candidates=ROBOTS)
        self.ids = [record.record_id for record in split_records(records)["train"]]
        epochs = -(-self.steps // -(-len(self.ids) // (BATCH * args.processes)))
        self.config = write_run(
            args.work_dir,
            self.data,
            None,
            engine=args.engine,
            stage3_batch_size=BATCH,
            save_steps=SAVE_STEPS,
            keep_last=2,
            log_records=True,
            max_steps=self.steps,
            **(
                {"stage4": {"phase3": {**DRAWING, "epochs": epochs}}}
                if args.phase
                else {"stage3": {"epochs": epochs, **ANSWERS_ALONE, "learning_rate": 1e-3}}
            ),
        )
        self.stages = ["3"]
        if args.phase:
            self.stages = ["4", "--phase", "3", "--resume_from", str(save_stage4(args.work_dir / "start", records))]
        self.undisturbed, self.disturbed = args.work_dir / "undisturbed", args.work_dir / "disturbed"
        self.folder = self.folder_of(self.disturbed)
        self.tally = self._tally()

    def _tally(self) -> Tally:
        self.tally_path = self.args.work_dir / "tally.json"
        settings = {name: getattr(self.args, name) for name in ("kills", "processes", "engine", "seed", "phase")}
        if not self.tally_path.exists():
            return Tally(settings=settings)
        tally = Tally(**run_dir.read_json(self.tally_path))
        if tally.settings != settings:
            sys.exit(f"error: {self.args.work_dir} is of {tally.settings}; give the same, or another --work_dir")
        return tally

    def run(self) -> dict[str, object]:
        began = time.monotonic()
        if not run_dir.checkpoint_path(self.folder_of(self.undisturbed), None).exists():
            finish(self.start(self.undisturbed, "--set", "save_steps=1000000"), self.undisturbed)
        tally = self.tally
        for number in progress_bar(range(tally.kills, self.args.kills), desc="kills"):
            self.live_and_die(random.Random(f"{self.args.seed}:{number}"))
            tally.kills += 1
            began, tally.seconds = time.monotonic(), tally.seconds + time.monotonic() - began
            run_dir.write_json_atomic(self.tally_path, asdict(tally))
        finish(self.start(self.disturbed), self.disturbed)
        self.look_for_damage()
        same_weights, same_optimizer = self.compare("pytorch_model.bin"), self.compare("training_state.pt")
        other_steps, wrong_epochs = self.other_steps(), [] if self.args.phase else self.wrong_epochs()
        return {
            "kills": tally.kills,
            "kills_while_starting": tally.while_starting,
            "kills_while_saving": tally.while_saving,
            "steps": self.steps,
            "save_steps": SAVE_STEPS,
            "steps_done_again": tally.steps_done_again,
            "most_steps_done_again_after_a_kill": tally.most_steps_done_again,
            "epochs": metrics_of(self.folder)[-1]["epoch"],
            "epochs_with_a_sample_not_once": wrong_epochs,
            "steps_unlike_the_undisturbed": other_steps,
            "damaged_checkpoints": tally.damaged,
            "same_final_weights": same_weights,
            "same_final_optimizer": same_optimizer,
            "seconds": round(tally.seconds + time.monotonic() - began),
            "passed": same_weights and same_optimizer and not (tally.damaged or other_steps or wrong_epochs),
        }

    def start(self, output: Path, *flags: str) -> subprocess.Popen[bytes]:
        return start(self.config, output, self.args.processes, 1, *flags, stages=self.stages)

    def folder_of(self, output: Path) -> Path:
        return run_dir.phase_dir(output, 3) if self.args.phase else run_dir.stage3_dir(output)

    def live_and_die(self, rng: random.Random) -> None:
        """One start, killed at a random moment."""
        tally, saved, log_before = self.tally, self.newest(), self.log_id()
        began, process = time.monotonic(), self.start(self.disturbed)
        try:
            if rng.random() < STARTING_RATIO:
                tally.while_starting += 1
                self.sleep_unless_ended(process, rng.uniform(0, tally.startup_s))
            else:
                # a start replaces the log first: without the lines of steps that it does again
                self.wait_for_step(saved + 1, process, log_before)
                tally.startup_s = min(tally.startup_s, time.monotonic() - began)
                self.wait_for_step(saved + rng.randrange(1, MOST_STEPS_PER_LIFE), process, log_before)
                time.sleep(rng.uniform(0, 0.1))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tally.while_saving += any(path.is_dir() for path in self.folder.glob(".tmp-*"))
        again = max(0, self.last_step() - self.newest())
        tally.steps_done_again += again
        tally.most_steps_done_again = max(tally.most_steps_done_again, again)
        self.look_for_damage()

    def wait_for_step(self, step: int, process: subprocess.Popen[bytes], log_before: int | None) -> None:
        began = time.monotonic()
        while self.log_id() == log_before or self.last_step() < step:
            self.sleep_unless_ended(process, 0.002)
            if time.monotonic() - began > HANGS_AFTER_S:
                sys.exit(f"error: no step {step} after {HANGS_AFTER_S} s; see {self.disturbed}.log")

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
        path = run_dir.metrics_log_path(self.folder)
        if not path.exists():
            return 0
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            complete = log.read().rpartition(b"\n")[0]
        return json.loads(complete.rpartition(b"\n")[2])["step"] if complete else 0

    def look_for_damage(self) -> None:
        damaged = self.tally.damaged
        for found in run_dir.list_checkpoints(self.folder):
            try:
                run_dir.verify_checkpoint(found.path)
            except run_dir.DamagedCheckpointError as error:
                damaged.append(str(error))
        damaged += [str(path) for path in self.folder.glob("damaged-*") if str(path) not in damaged]

    def compare(self, name: str) -> bool:
        """Whether the tensors of `name` are the same, bit for bit, in both final checkpoints."""
        found = [
            torch.load(run_dir.checkpoint_path(self.folder_of(output), None) / name, weights_only=True)
            for output in (self.undisturbed, self.disturbed)
        ]
        if name == "training_state.pt":
            found = [state["optimizer"] for state in found]
        first, second = ({path: value for path, value in _leaves(state)} for state in found)
        return first.keys() == second.keys() and all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(second[path])) for path, value in first.items()
        )

    def other_steps(self) -> list[int]:
        """Steps whose records, losses or drawn chains are not those of the undisturbed run."""
        logs = [
            {line["step"]: _without_times(line) for line in metrics_of(folder)}
            for folder in (self.folder, self.folder_of(self.undisturbed))
        ]
        return sorted(step for step in logs[0].keys() | logs[1].keys() if logs[0].get(step) != logs[1].get(step))

    def wrong_epochs(self) -> list[int]:
        """Epochs of the log in which a record of the train split does not stand exactly once."""
        seen: dict[int, Counter[str]] = {}
        lines = metrics_of(self.folder)
        steps = [line["step"] for line in lines]
        if steps != list(range(1, self.steps + 1)):
            sys.exit(f"error: the log does not hold every step once: {steps[:20]} ...")
        for line in lines:
            seen.setdefault(line["epoch"], Counter()).update(line["records"])
        last = max(seen)  # may be cut off by max_steps
        return [
            epoch
            for epoch, found in seen.items()
            if (found != Counter(self.ids) if epoch != last else max(found.values()) > 1)
        ]


def save_stage4(folder: Path, records: Sequence[ReasoningRecord]) -> Path:
    """A model that has learned nothing, but writes chains of all kinds, so that groups differ in their rewards."""
    final = run_dir.checkpoint_path(folder, None)
    if final.exists():
        return final
    torch.manual_seed(1)
    model = build_model({**TINY_MODEL, "stage": 4, "candidates": ROBOTS}, load_pretrained=False)
    head = model.reasoning_module.reasoning_head
    torch.nn.init.normal_(head.output.weight, std=0.02)
    torch.nn.init.normal_(head.token_embedding.weight, std=0.15)  # structure tokens are drawn often
    texts = [text for record in records for text in (record.instruction, format_reasoning(record.steps))]
    model.attach_tokenizer(ReasoningTokenizer(train_tokenizer(texts, model.language_model.vocab_size, set(ROBOTS))))
    part = run_dir.new_tmp_dir(folder)
    model.save_pretrained(part)
    return run_dir.publish_checkpoint(part, final, step=0)


def _without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a step of the log was about, and what came out."""
    policy = {name: value for name, value in line.get("policy", {}).items() if not name.endswith("_s")}
    return {"policy": policy, **{name: line.get(name) for name in ("epoch", "records", "loss")}}


def _leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}")]
    return [(path, tree)]


if __name__ == "__main__":
    main()

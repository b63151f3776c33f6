"""A small complete run: data, Stage 3, both phases, baselines, evaluation, best checkpoint, one after the other."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.config import REPOSITORY, ConfigError
from embervlm.config_file import read_yaml
from embervlm.options import add_flag
from embervlm.report.table import cut_off_lines, faithfulness_lines, gold_chain_lines, metrics_table, own_steps_lines
from embervlm.run.owner import owning

CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
NUM_SAMPLES, QUESTIONS_PER_PICTURE = 5_600, 2
SMOKE_SAMPLES = 360
SMOKE_RECORDS = 4
"""That its evaluations ask."""
SMOKE_TOKENS = 160
SMOKE_FLAGS = ("--max_steps", "2", "--max_reasoning_length", str(SMOKE_TOKENS))
SMOKE_SETTINGS = ("sample_records=2", "compared_records=4", "log_steps=1")


@dataclass(kw_only=True)
class Quickstart:
    """One quickstart run; every part that is already finished in `output_dir` is skipped."""

    output_dir: Path = Path("outputs/quickstart")
    """Folder for data, checkpoints, evaluation and report."""
    smoke: bool = False
    """The same steps in under a minute; the figures mean nothing."""
    input_dataset: Path | None = None
    """External tasks to make scenes for, such as robot_selection.json, instead of the built-in questions."""
    same_time_baseline: bool = False
    """Also train direct answers for as long as both phases took, which takes as long again. Given to a finished run,
    it adds this baseline and evaluates anew."""
    num_test: int = 500

    def run(self) -> dict[str, float]:
        """Seconds of each part."""
        seconds: dict[str, float] = {}
        data = self.output_dir / "data" / "reasoning_data.json"
        parts = {
            "data": lambda: self._make_data(data),
            # a launch costs as much as a smoke run's training, so that one makes do with a single launch
            "training": lambda: self._launch("3", "4", *(["baseline"] if self.smoke else [])),
            "best checkpoint": self._select,
            "baselines": lambda: None if self.smoke else self._launch("baseline"),
            "evaluation": self._evaluate,
            "report": self._report,
        }
        for name, part in parts.items():
            began = time.monotonic()
            print(f"\n== {name} ==", flush=True)
            # a training owns the folder itself
            with nullcontext() if name in ("training", "baselines") else owning(self.output_dir):
                part()
            seconds[name] = time.monotonic() - began
        self._show(seconds)
        return seconds

    def _make_data(self, path: Path) -> None:
        if path.exists():
            print(f"already made: {path}")
            return
        from embervlm.curate.commands import generate

        generate(
            output_file=path,
            input_dataset=self.input_dataset,
            seed=0,
            num_samples=SMOKE_SAMPLES if self.smoke else NUM_SAMPLES,
            questions_per_picture=QUESTIONS_PER_PICTURE,
        )

    def _launch(self, *stages: str) -> None:
        """`deepspeed launch/train.py`, with as many processes as the machine has GPUs, or two on the CPU."""
        processes, env = _processes()
        deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if deepspeed is None:
            raise ConfigError("the deepspeed command is not installed; run `make install`")
        command = [
            deepspeed,
            "--quiet",
            "--num_gpus",
            str(processes),
            "--master_port",
            str(_free_port()),
            str(REPOSITORY / "launch" / "train.py"),
            "--config",
            str(CONFIG),
            "--output_dir",
            str(self.output_dir),
            "--reasoning_data",
            str(self.output_dir / "data" / "reasoning_data.json"),
            "--stages",
            *stages,
            *(SMOKE_FLAGS if self.smoke else ()),
        ]
        if settings := self._settings():
            command += ["--set", *settings]
        print("$ " + " ".join(command), flush=True)
        threading.Thread(target=_load_evaluation, daemon=True).start()
        code = subprocess.run(command, env=env, check=False).returncode
        if code != 0:
            raise ConfigError(
                f"training ended with exit code {code}; the error is printed above. The same command resumes"
            )

    def _settings(self) -> list[str]:
        second = ["baseline.same_time=true"] if self.same_time_baseline else []
        return [*second, *(SMOKE_SETTINGS if self.smoke else ())]

    def _select(self) -> None:
        from embervlm.evaluation.evaluate import evaluate_checkpoint
        from embervlm.select_best import select_best_checkpoint

        config = read_yaml(CONFIG)

        def evaluate(path: Path, split: str) -> dict[str, object]:
            samples = SMOKE_RECORDS if self.smoke else config["eval_samples"]
            return evaluate_checkpoint(path, split, num_samples=samples)

        self._best = select_best_checkpoint(run_dir.phase_dir(self.output_dir, 2), evaluate=evaluate)
        print(f"Best checkpoint: {self._best}")

    def _evaluate(self) -> None:
        output_file = run_dir.eval_results_path(self.output_dir)
        if self.smoke:  # starting processes would take longer
            from embervlm.run.evaluate import evaluate_to_file

            evaluate_to_file(
                self._best, split="test", output_file=output_file, num_samples=SMOKE_RECORDS, save_samples=True
            )
            return
        processes, env = _processes()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        flags = ["--checkpoint", str(self._best), "--output_file", str(output_file)]
        command = [*launcher, "-m", "embervlm.cli", "evaluate", *flags, "--num_samples", str(self.num_test)]
        command += ["--save_reasoning_samples", "--no_wandb"]
        # what it prints comes behind the report, with the rest
        code = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False).returncode
        if code != 0:
            raise ConfigError(
                f"the evaluation ended with exit code {code}; the error is printed above. The same command resumes"
            )

    def _report(self) -> None:
        from embervlm.report.build import write_report

        self._page = write_report(self.output_dir).index

    def _show(self, seconds: dict[str, float]) -> None:
        path = run_dir.eval_results_path(self.output_dir)
        result = run_dir.read_json(path)
        print("\n" + metrics_table(result))
        print("\nanswer accuracy by complexity: " + _figures(result["accuracy_by_complexity"]))
        if result["faithfulness"] is not None:
            print(faithfulness_lines(result["faithfulness"]))
        for warning in filter(None, (cut_off_lines(result), gold_chain_lines(result))):
            print(warning)
        print("validator, balanced accuracy by kind of invalid step: " + _figures(result["validator"]))
        print(own_steps_lines(result))
        print("\n" + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
        print(f"{sum(seconds.values()) / 60:.1f} minutes in total")
        if self.smoke:
            print("This was a smoke run: it checks every step, and its figures mean nothing.")
        run_dir.write_json_atomic(self.output_dir / "results" / "timings.json", seconds)
        print(f"Evaluation: {path}")
        print(f"Report: {self._page}")
        picture = self.output_dir / "data" / "images" / "000000.jpg"
        question = "Take the load to the flag. Which robots are suited?"
        print(f'Ask it: embervlm ask {picture} "{question}" --checkpoint {self._best}')
        print(f"Best checkpoint: {self._best}")


def quickstart_options(parser: argparse.ArgumentParser) -> None:
    for name in ("output_dir", "smoke", "input_dataset", "same_time_baseline"):
        add_flag(parser, Quickstart, name)


def quickstart(**options: Any) -> None:
    """A small complete run, from data to evaluation."""
    Quickstart(**options).run()


def _processes() -> tuple[int, dict[str, str]]:
    """How many processes work together, one for each GPU, or two on the CPU; and their environment."""
    import torch

    processes = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    return processes, env


def _load_evaluation() -> None:
    """What comes behind a training, imported while the launcher starts and leaves a core idle: that takes seconds."""
    import embervlm.report.build
    import embervlm.run.evaluate
    import embervlm.select_best  # noqa: F401


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items()) or "none"

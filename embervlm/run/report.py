"""`embervlm report`, and sending its figures to the W&B run of the training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embervlm.config import ConfigError, TrainConfig
from embervlm.report.build import Report, write_report
from embervlm.report.figures import write_figures
from embervlm.report.recorded import evaluation_alone
from embervlm.run_dir import phase_dir, trained_with
from embervlm.training.tracking import log_evaluation, log_figures, wandb_mode


def report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="--output_dir of the training")
    parser.add_argument(
        "--results",
        type=Path,
        help="evaluation to show; default: RUN_DIR/results/"
        "stage4_eval.json, else the newest test evaluation that a checkpoint has",
    )
    parser.add_argument("--num_samples", type=int, default=200, help="number of samples on the page")
    parser.add_argument("--wandb", action="store_true", help="also add the figures to the run's W&B run")


def report(run_dir: Path, *, results: Path | None, num_samples: int, wandb: bool) -> None:
    """Write figures and pages of a run, print their paths, and with `wandb` add them to its W&B run."""
    written = write_report(run_dir, results=results, num_samples=num_samples)
    for notice in written.notices:
        print(notice)
    if written.result_path is not None:
        print(f"Evaluation: {written.result_path}")
    print(f"Report: {written.index}")
    if not wandb:
        return
    if wandb_mode() == "disabled":
        raise ConfigError("--wandb: W&B is disabled (WANDB_MODE); the report is written, but nothing is sent")
    if not _send_figures(written, run_dir):
        raise ConfigError(f"--wandb: {run_dir} was trained without --wandb_project, so there is no W&B run")


def write_run_report(config: TrainConfig) -> None:
    """Write figures and pages of a run that was just trained; an error is only printed."""
    try:
        written = write_report(config.output_dir)
        print(f"Report: {written.index}")
        _send_figures(written, Path(config.output_dir))
    except Exception as error:  # drawing and W&B raise what they like
        print(f"no report ({type(error).__name__}: {error}); `embervlm report {config.output_dir}` tries again")


def _send_figures(written: Report, run_dir: Path) -> bool:
    """Add the figures to the W&B run of phase 2; False if there is none."""
    project, name = written.config.get("wandb_project"), written.config.get("wandb_run_name")
    folder = phase_dir(run_dir, 2)
    return project is not None and log_figures(folder, written.figures, project=project, run_name=name)


def send_evaluation(checkpoint: Path, result: Mapping[str, Any], output_file: Path, project: str | None) -> None:
    """Send an evaluation's numbers and figures to W&B if a project is known; an error is only printed."""
    config = trained_with(checkpoint)
    project = project or config.get("wandb_project")
    if not project:
        return
    folder, name = checkpoint.absolute().parent, config.get("wandb_run_name")
    try:
        with TemporaryDirectory() as drawn:
            figures = write_figures(evaluation_alone(output_file), drawn)
            sent = log_evaluation(folder, result, figures, project=project, run_name=name)
        print(f"sent to W&B: project {project}" if sent else "not sent to W&B, because it is disabled (WANDB_MODE)")
    except Exception as error:  # drawing and W&B raise what they like
        print(f"not sent to W&B ({type(error).__name__}: {error})")

"""`embervlm evaluate`: evaluate, write the files, print the table."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.evaluation import evaluate as evaluation
from embervlm.evaluation.eval_data import Evaluation
from embervlm.evaluation.evaluate import keep_in_checkpoint
from embervlm.evaluation.result import METRICS
from embervlm.model.decoding import Decoding
from embervlm.options import add_flag, chosen
from embervlm.report.table import (
    cut_off_lines,
    faithfulness_lines,
    gold_chain_lines,
    group_lines,
    metrics_table,
    own_steps_lines,
)
from embervlm.run.report import send_evaluation
from embervlm.run.score_chains import judge_options
from embervlm.world import World

METRIC_GROUPS = {
    "consistency": ("reasoning_consistency", "adjacent_similarity"),
    "completeness": ("step_completeness",),
    "flow": ("logical_flow_score",),
    "accuracy": ("final_answer_accuracy", "conclusion_agreement", "head_accuracy", "head_agreement"),
}
"""Groups for `--reasoning_metrics` besides `all`; it also accepts the name of any metric."""


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, default=4, choices=(3, 4), help="which stage the checkpoint is of")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--reasoning_metrics", nargs="+", default=["all"], help="all, a group, or names of metrics")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="of the records")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON to write")
    parser.add_argument("--save_reasoning_samples", action="store_true", help="write the chains beside the output file")
    parser.add_argument(
        "--explain_samples", type=int, default=200, help="number of chains saved with attention and step scores"
    )
    add_flag(parser, Evaluation, "faithfulness_samples")
    parser.add_argument("--num_samples", type=int, help="at most this many records of the split")
    data_options(parser)
    parser.add_argument(
        "--no_comparisons", action="store_true", help="evaluate only the chains: no baselines, no other picture"
    )
    parser.add_argument(
        "--wandb_project", help="W&B project for numbers and figures; default: the project of the training"
    )
    parser.add_argument("--no_wandb", action="store_true", help="send nothing there")
    judge_options(parser)
    decoding_options(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher


def data_options(parser: argparse.ArgumentParser) -> None:
    """The records on which a checkpoint is evaluated."""
    parser.add_argument("--reasoning_data", type="path", help="default: the data that the checkpoint was trained on")
    parser.add_argument("--image_root", type="path", help="folder that picture paths are relative to")
    parser.add_argument(
        "--allow_outside", action="store_true", default=None, help="accept pictures outside the data folder"
    )


def decoding_options(parser: argparse.ArgumentParser) -> None:
    for name in ("max_reasoning_steps", "max_new_tokens", "temperature", "top_p", "seed"):
        add_flag(parser, Decoding, name)


def evaluate(
    checkpoint: Path,
    *,
    output_file: Path,
    stage: int,
    save_reasoning_samples: bool,
    no_comparisons: bool,
    wandb_project: str | None,
    no_wandb: bool,
    local_rank: int | None,
    **options: Any,
) -> None:
    """Evaluate, write the files, print the table, and send it to W&B if the training was logged there."""
    options["reasoning_metrics"] = tuple(options["reasoning_metrics"])
    options["decoding"] = Decoding(**chosen(options, Decoding))
    with evaluating_processes(local_rank) as world:
        result = evaluate_to_file(
            checkpoint,
            output_file=output_file,
            save_samples=save_reasoning_samples,
            compare=not no_comparisons,
            world=world,
            **options,
        )
        if world.rank == 0:
            print_result(result, output_file)
            if not no_wandb:
                send_evaluation(checkpoint, result, output_file, wandb_project)


@contextmanager
def evaluating_processes(local_rank: int | None = None) -> Iterator[World]:
    """The processes that `deepspeed`, `torchrun` or `srun` started for this evaluation; without a launcher only this
    one."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    world = World.join()
    try:
        yield world
    finally:
        world.leave()


def _check_names(names: Sequence[str]) -> None:
    """ConfigError for an unknown metric, before anything is computed."""
    known = ["all", *METRIC_GROUPS, *METRICS]
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"--reasoning_metrics {' '.join(wrong)}: unknown; choose from {', '.join(known)}")


def evaluate_to_file(
    checkpoint: Path,
    *,
    split: str,
    output_file: Path,
    save_samples: bool = False,
    explain_samples: int = 200,
    reasoning_metrics: tuple[str, ...] = ("all",),
    **options: Any,
) -> dict[str, Any]:
    """Write the evaluation of `checkpoint` to `output_file`, and with `save_samples` the chains beside it.

    A copy for the test split goes into the checkpoint, so the report finds it wherever `output_file` is.
    The same call again resumes where a killed one stopped. Call it on every process of `world`.
    """
    _check_names(reasoning_metrics)
    partial = output_file.with_name(f"{output_file.stem}.partial")
    job = Evaluation(
        checkpoint=checkpoint, split=split, explained=explain_samples if save_samples else 0, partial=partial, **options
    )
    result, samples = evaluation.evaluate(job)
    if job.world.rank > 0:
        return result
    whole = "all" in reasoning_metrics
    if not whole:
        wanted = {name for group in reasoning_metrics for name in METRIC_GROUPS.get(group, (group,))}
        for part in ("metrics", "targets", "intervals", "gains"):
            result[part] = {name: value for name, value in result[part].items() if name in wanted}
    run_dir.write_json_atomic(output_file, result)
    if save_samples:
        run_dir.write_json_atomic(output_file.with_name(f"{output_file.stem}_samples.json"), samples)
    # not of val: its evaluations are compared with each other, so they are made by one rule
    whole &= split == "test" and job.test_set is None
    keep_in_checkpoint(job, result, samples if save_samples else None, whole=whole)
    with run_dir.naming_unwritten(partial):
        run_dir.remove_tree(partial)
    return result


def print_result(result: dict[str, Any], output_file: Path) -> None:
    print(metrics_table(result))
    if result["metrics"].get("final_answer_accuracy", 0.0) is None:
        print(
            "\nA Stage 3 checkpoint writes no chains: stage4_direct_accuracy is how often its direct answers are right."
        )
        print(f"written: {output_file}")
        return
    if result["faithfulness"] is not None:
        print("\n" + faithfulness_lines(result["faithfulness"]))
    for lines in filter(None, (group_lines(result), own_steps_lines(result))):
        print("\n" + lines)
    for warning in filter(None, (cut_off_lines(result), gold_chain_lines(result))):
        print(warning)
    print(f"written: {output_file}")

"""`embervlm evaluate`: evaluate, write the files, print the table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.evaluation.evaluate import METRICS, Evaluation, evaluate, keep_in_checkpoint
from embervlm.report.table import cut_off_lines, faithfulness_lines, metrics_table, own_steps_lines
from embervlm.world import World

METRIC_GROUPS = {
    "consistency": ("reasoning_consistency", "adjacent_similarity"),
    "completeness": ("step_completeness",),
    "flow": ("logical_flow_score",),
    "accuracy": ("final_answer_accuracy", "head_accuracy", "head_agreement"),
}
"""What `--reasoning_metrics` can name besides `all`; any metric's own name does as well."""


@contextmanager
def evaluating_processes(local_rank: int | None = None) -> Iterator[World]:
    """The processes that `deepspeed`, `torchrun` or `srun` started for this evaluation; this one alone without."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    world = World.join()
    try:
        yield world
    finally:
        torch.distributed.destroy_process_group()


def _check_names(names: Sequence[str]) -> None:
    """ConfigError for a metric that does not exist, before anything is computed."""
    known = ["all", *METRIC_GROUPS, *METRICS]
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"--reasoning_metrics {' '.join(wrong)}: there are {', '.join(known)}")


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

    Of the test split the checkpoint keeps a copy, which the report finds wherever `output_file` is.
    The same call again goes on where a killed one stopped. Call it on every process of `world`.
    """
    _check_names(reasoning_metrics)
    partial = output_file.with_name(f"{output_file.stem}.partial")
    job = Evaluation(
        checkpoint=checkpoint, split=split, explained=explain_samples if save_samples else 0, partial=partial, **options
    )
    result, samples = evaluate(job)
    if job.world is not None and job.world.rank > 0:
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
    if result["faithfulness"] is not None:
        print("\n" + faithfulness_lines(result["faithfulness"]))
    if lines := own_steps_lines(result):
        print("\n" + lines)
    if warning := cut_off_lines(result):
        print(warning)
    print(f"written: {output_file}")

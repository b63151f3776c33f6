"""`embervlm evaluate`: evaluate, write the files, print the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.evaluation.evaluate import Evaluation, evaluate
from embervlm.report.table import metrics_table

METRIC_GROUPS = {
    "consistency": ("reasoning_consistency", "adjacent_similarity"),
    "completeness": ("step_completeness",),
    "flow": ("logical_flow_score",),
    "accuracy": ("final_answer_accuracy", "head_accuracy", "head_agreement"),
}
"""What `--reasoning_metrics` can name besides `all`; any metric's own name does as well."""


def evaluate_to_file(
    checkpoint: Path, *, split: str, output_file: Path, save_samples: bool = False,
    reasoning_metrics: tuple[str, ...] = ("all",), **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write the evaluation of `checkpoint` to `output_file`, and with `save_samples` the chains beside it."""
    result, samples = evaluate(Evaluation(checkpoint=checkpoint, split=split, **options))
    if "all" not in reasoning_metrics:
        wanted = {name for group in reasoning_metrics for name in METRIC_GROUPS.get(group, (group,))}
        result["metrics"] = {name: value for name, value in result["metrics"].items() if name in wanted}
        result["targets"] = {name: value for name, value in result["targets"].items() if name in wanted}
    output_file.parent.mkdir(parents=True, exist_ok=True)
    run_dir.write_json_atomic(output_file, result)
    if save_samples:
        run_dir.write_json_atomic(output_file.with_name(f"{output_file.stem}_samples.json"), samples)
    return result


def print_result(result: dict[str, Any], output_file: Path) -> None:
    print(metrics_table(result))
    print(f"written: {output_file}")

"""What the benchmarks share: data, a run's YAML, and starting `launch/train.py` as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from embervlm import run_dir  # noqa: E402

TINY_MODEL: dict[str, Any] = {
    "vision": {
        "config": {
            "model_type": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 36,
            "patch_size": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    },
    "language": {
        "config": {
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    },
    "image_size": 36,
    "projection_hidden_size": 24,
    "reasoning_width": 16,
    "reasoning_ffn": 24,
    "reasoning_heads": 2,
    "validator_width": 16,
    "validator_ffn": 24,
    "validator_heads": 2,
}
"""For runs whose subject is not the model."""
ANSWERS_ALONE = {
    "direct_loss_weight": 1.0,
    "dense_loss_weight": 0.0,
    "caption_records_ratio": 0.0,
    "glossary_records_ratio": 0.0,
    "warmup_steps": 0,
}
"""Settings of a Stage 3 that sees each record once an epoch and nothing else."""


def make_data(folder: Path, num_samples: int) -> Path:
    """Rendered scenes with their records; made once per folder."""
    path = folder / "data" / "reasoning_data.json"
    if not path.exists():
        from embervlm.robots.generate import generate_scenes

        generate_scenes(path, num_samples=num_samples, questions_per_picture=1, seed=0, workers=1, progress=False)
    return path


def write_run(folder: Path, data: Path, model: str | None, **settings: Any) -> Path:
    """The YAML of a run in `folder`; None is the tiny model."""
    if model is None:
        model = str(folder / "tiny.yaml")
        Path(model).write_text(yaml.safe_dump(TINY_MODEL), encoding="utf-8")
    values = {"model": model, "reasoning_data": str(data), "precision": "fp32", "log_steps": 1, **settings}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(
    config: Path, output: Path, processes: int, threads: int, *flags: str, stages: Sequence[str] = ("3",)
) -> subprocess.Popen[bytes]:
    """A training in a process group of its own; its log is appended to `<output>.log`."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(REPOSITORY / "launch" / "train.py"), "--config", str(config), "--stages", *stages]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with Path(f"{output}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--output_dir", str(output), *flags],
            stdout=log,
            stderr=log,
            env=env,
            cwd=REPOSITORY,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for a training; exits with the end of its log where it failed."""
    if process.wait() != 0:
        sys.exit(
            f"error: the training ended with {process.returncode}; the end of {output}.log:\n"
            + Path(f"{output}.log").read_text(errors="replace")[-3000:]
        )


def metrics(output: Path) -> list[dict[str, Any]]:
    """The complete lines of the log of a run's Stage 3 so far."""
    return metrics_of(run_dir.stage3_dir(output))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of the log of a stage so far."""
    path = run_dir.metrics_log_path(folder)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]

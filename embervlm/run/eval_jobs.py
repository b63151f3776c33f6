"""Evaluations of a running training in separate Slurm jobs (`eval_cluster`): `slurm/evaluate.sh` on one GPU.

Light: read by commands that must start where torch is not installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from embervlm import run_dir
from embervlm.cluster import load_recipe
from embervlm.config import REPOSITORY, ConfigError, TrainConfig
from embervlm.slurm_commands import EVALUATED_SPLIT, PATIENCE_VARIABLE, outside

SCRIPT = "slurm/evaluate.sh"
PATIENCE_S = 60
"""How long the training waits for a controller that is away; a checkpoint can also be evaluated later."""


def check_eval_cluster(name: str) -> None:
    """ConfigError if no evaluation can be submitted."""
    load_recipe(name)
    if shutil.which("sbatch") is None:
        raise ConfigError(f"eval_cluster: {name}: this machine has no sbatch; leave it out to evaluate in training")


def evaluation_command(checkpoint: Path, config: TrainConfig) -> list[str]:
    """Command, run in the repository, that submits the evaluation for `select_best`."""
    assert config.eval_cluster is not None
    cluster = config.eval_cluster
    if cluster.endswith((".yaml", ".yml")):
        cluster = str(Path(cluster).absolute())
    root = ["--image_root", str(Path(config.image_root).absolute())] if config.image_root else []
    return [
        "bash",
        SCRIPT,
        "--cluster",
        cluster,
        "--",
        "--checkpoint",
        str(checkpoint.absolute()),
        "--split",
        EVALUATED_SPLIT,
        "--num_samples",
        str(config.eval_samples),
        "--no_comparisons",
        "--no_wandb",
        "--output_file",
        str(run_dir.eval_path(checkpoint.absolute(), EVALUATED_SPLIT)),
        "--reasoning_data",
        str(Path(config.reasoning_data).absolute()),
        *root,
        *(["--allow_outside"] if config.allow_outside else []),
    ]


def submit_evaluation(checkpoint: Path, config: TrainConfig) -> str:
    """The job that evaluates `checkpoint`; its id is written beside the place of the evaluation.

    Raises:
        ConfigError: Slurm refuses.
    """
    env = outside() | {PATIENCE_VARIABLE: str(PATIENCE_S)}
    command = evaluation_command(checkpoint, config)
    found = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    job = re.search(r"Submitted batch job (\d+)", found.stdout)
    if found.returncode or job is None:
        said = (found.stderr or found.stdout).strip().splitlines() or ["it printed nothing"]
        raise ConfigError(f"{SCRIPT} submitted nothing: {said[-1]}")
    run_dir.write_json_atomic(run_dir.eval_job_path(checkpoint, EVALUATED_SPLIT), {"job_id": job[1]})
    return job[1]

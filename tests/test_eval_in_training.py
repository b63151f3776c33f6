"""Evaluation while a training runs: it changes nothing of the training, and leaves what `select_best` reads."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    BIN,
    REPOSITORY,
    TINY,
    make_data,
    ok,
    save_stage3,
    train,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)
from wandb_file import history

from embervlm import run_dir
from embervlm.config import TrainConfig
from embervlm.config_file import from_mapping
from embervlm.data.records import read_records
from embervlm.data.splits import split_records
from embervlm.evaluation.evaluate import evaluate_checkpoint
from embervlm.ranking import rank_checkpoints
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.eval_jobs import evaluation_command
from embervlm.run.train import main
from embervlm.slurm_commands import awaiting_evaluation, outside

STEPS = 4
DROPPING = {"config": {**TINY["vision"]["config"], "hidden_dropout_prob": 0.2}}
"""Draws random numbers in every step, which an evaluation must not disturb."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the YAML of a run and a Stage 3 checkpoint to start from."""
    folder = tmp_path_factory.mktemp("evals")
    data = make_data(folder, 60)
    settings = {**TINY, "vision": DROPPING}
    write_run_yaml(
        folder, write_model_yaml(folder, vision=DROPPING), data, max_steps=STEPS, save_steps=2, eval_samples=3
    )
    save_stage3(folder / "start" / "stage3", settings, read_records(data, candidates=ROBOTS))
    return folder


def trained(bench: Path, output: Path, *flags: str | Path, processes: int = 1) -> tuple[Path, str]:
    """Phase 2's folder of a run, and what the run printed."""
    launcher = "python" if processes == 1 else "ranks"
    found = ok(
        train(
            launcher,
            "--config",
            bench / "run.yaml",
            "--stages",
            "4",
            "--phase",
            "2",
            "--engine",
            "torch",
            "--resume_from",
            bench / "start" / "stage3" / "checkpoint-final",
            "--output_dir",
            output,
            *flags,
            processes=processes,
        )
    )
    return run_dir.phase_dir(output, 2), found.stdout


def learned(folder: Path) -> tuple[dict[str, torch.Tensor], Any, list[Any]]:
    """Weights, optimizer state and losses of a finished phase."""
    final = run_dir.checkpoint_path(folder, None)
    state = torch.load(final / "training_state.pt", weights_only=True)
    lines = run_dir.metrics_log_path(folder).read_text().splitlines()
    return weights_of(final), state["optimizer"]["moments"], [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_with_evaluations_learns_bit_for_bit_what_one_without_learns(
    processes: int, bench: Path, tmp_path: Path
) -> None:
    without, _ = trained(bench, tmp_path / "without", processes=processes)
    evaluated, _ = trained(bench, tmp_path / "evaluated", "--eval_steps", "2", processes=processes)
    weights, moments, losses = learned(without)
    found_weights, found_moments, found_losses = learned(evaluated)
    assert len(losses) == STEPS and found_losses == losses
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(found_weights[key], value) for key, value in weights.items())
    for name, pair in moments.items():
        assert all(torch.equal(found_moments[name][key], value) for key, value in pair.items()), name
    assert not run_dir.eval_path(run_dir.checkpoint_path(without, None), "val").exists()

    def no_model(path: Path, split: str) -> dict[str, Any]:
        raise AssertionError(f"{path} has no evaluation")

    ranking = rank_checkpoints(evaluated, evaluate=no_model)
    assert {entry.step for entry in ranking} == {2, STEPS}
    for found in run_dir.list_checkpoints(evaluated):
        written = run_dir.read_eval(run_dir.eval_path(found.path, "val"))
        assert written["step"] == found.step and written["num_samples"] == 3
        run_dir.eval_path(found.path, "val").unlink()
        again = evaluate_checkpoint(found.path, num_samples=3, progress=False)  # by this process alone
        assert json.loads(json.dumps(again)) == written


@pytest.mark.slow
def test_an_evaluation_that_fails_is_said_and_does_not_end_the_training(bench: Path, tmp_path: Path) -> None:
    data = tmp_path / "only_train.json"
    raw = json.loads((bench / "reasoning_data.json").read_text())
    kept = {
        record.record_id
        for record in split_records(read_records(bench / "reasoning_data.json", candidates=ROBOTS))["train"]
    }
    data.write_text(json.dumps([item for item in raw if item["id"] in kept]))
    folder, said = trained(
        bench, tmp_path, "--eval_steps", "2", "--reasoning_data", data, "--set", f"image_root={bench}", processes=2
    )
    assert "checkpoint-2: not evaluated (ConfigError" in said and "the val split is empty" in said
    assert run_dir.checkpoint_path(folder, None).exists()


@pytest.mark.slow
def test_evaluations_of_a_training_reach_its_wandb_run(bench: Path, tmp_path: Path) -> None:
    folder, _ = trained(bench, tmp_path, "--eval_steps", "2", "--wandb_project", "embervlm")
    sent = history(folder)
    evaluated = {line["val/step"]: line for line in sent if "val/step" in line}
    assert set(evaluated) == {2, STEPS}
    for found in run_dir.list_checkpoints(folder):
        metrics = run_dir.read_eval(run_dir.eval_path(found.path, "val"))["metrics"]
        line = evaluated[found.step]
        assert line["val/reasoning_consistency"] == pytest.approx(metrics["reasoning_consistency"])
        assert line["val/final_answer_accuracy"] == metrics["final_answer_accuracy"]


# -- as Slurm jobs of their own; on a real Slurm in test_slurm_scenarios.py ------------------------------------------


def test_evaluation_jobs_need_sbatch_and_a_recipe_that_exists(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--config", str(bench / "run.yaml"), "--output_dir", str(tmp_path), "--eval_steps", "2"]
    with pytest.raises(SystemExit, match="eval_cluster: a100x4: this machine has no sbatch"):
        main([*flags, "--eval_cluster", "a100x4"])
    with pytest.raises(SystemExit, match="no recipe 'a100'"):
        main([*flags, "--eval_cluster", "a100"])


def test_the_job_writes_where_select_best_reads_whatever_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"eval_cluster": "v100x1", "eval_samples": 7, "reasoning_data": "data/records.json", "image_root": "img"}
    checkpoint = Path("outputs/stage4/phase2/checkpoint-500")
    command = evaluation_command(checkpoint, from_mapping(TrainConfig, values))
    script, behind = command[: command.index("--")], command[command.index("--") + 1 :]
    assert script == ["bash", "slurm/evaluate.sh", "--cluster", "v100x1"]
    given = dict(zip(behind, behind[1:]))
    assert given["--output_file"] == str(run_dir.eval_path(tmp_path / checkpoint, "val"))
    assert given["--checkpoint"] == str(tmp_path / checkpoint) and given["--num_samples"] == "7"
    assert given["--reasoning_data"] == str(tmp_path / "data/records.json")
    assert given["--image_root"] == str(tmp_path / "img") and {"--no_comparisons", "--no_wandb"} <= set(behind)


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_JOB_ID",
        "SLURM_NTASKS",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
    ],
)
def test_the_job_does_not_take_itself_for_a_process_of_the_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert name not in outside()


@pytest.mark.parametrize("name", ["SLURM_CONF", "SBATCH_PARTITION", "EMBERVLM_VENV", "PATH", "MASTER_PLAN", "RANKS"])
def test_the_job_keeps_the_sites_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert outside()[name] == "x"


def test_the_script_evaluates_what_stands_behind_the_dashes_and_phase_2_without(tmp_path: Path) -> None:
    """`slurm/evaluate.sh` inside a job of the right size; what would be srun prints its command."""
    for name, script in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo 'JobId=1 JobState=RUNNING NumNodes=1'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    inside = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "EMBERVLM_VENV": str(BIN.parent),
        "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}",
    }

    def started(*flags: str) -> list[str]:
        script = ["bash", "slurm/evaluate.sh", "--cluster", "v100x1", *flags]
        env = os.environ | inside
        found = subprocess.run(script, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return found.stdout.split()

    assert started("--", "--checkpoint", "c", "--split", "val")[-4:] == ["--checkpoint", "c", "--split", "val"]
    words = started("--output_dir", "out")
    assert "out/stage4/phase2/checkpoint-final" in words and "out/results/stage4_eval.json" in words


def test_a_checkpoint_that_a_queued_job_will_evaluate_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 6):
        part = run_dir.new_tmp_dir(tmp_path)
        (part / "weights").write_text(str(step))
        path = run_dir.publish_checkpoint(part, run_dir.checkpoint_path(tmp_path, step), step)
        if step < 4:
            run_dir.write_json_atomic(run_dir.eval_job_path(path, "val"), {"job_id": f"{step}"})
    run_dir.write_json_atomic(run_dir.eval_path(run_dir.checkpoint_path(tmp_path, 3), "val"), {})
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *--jobs=1*) echo PENDING;; *) echo "Invalid job id" >&2; exit 1;; esac\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    awaited = awaiting_evaluation(tmp_path)
    assert awaited == [run_dir.checkpoint_path(tmp_path, 1)]  # 2's job is gone, 3 is evaluated, 4 and 5 have no job
    run_dir.prune_checkpoints(tmp_path, 1, keep=awaited)
    assert [found.step for found in run_dir.list_checkpoints(tmp_path)] == [1, 5]

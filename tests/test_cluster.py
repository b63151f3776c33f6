"""Node recipes, and what the job scripts decide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embervlm import run_dir
from embervlm.cli import main as embervlm
from embervlm.cluster import GPU_OPTIONS_VARIABLE, check_recipes, load_recipe, recipe_names
from embervlm.config import REPOSITORY, ConfigError, load_train_config
from embervlm.slurm import MAX_REQUEUES_VARIABLE, Requeues
from embervlm.slurm import main as slurm
from embervlm.training.cli import check_cluster, overrides_of, parser
from embervlm.training.signals import EXIT_FAULT, EXIT_REQUEUE

STAGES = str(REPOSITORY / "configs" / "training_stages.yaml")
KILLED_BY_9 = 137


@pytest.mark.parametrize("name", recipe_names())
def test_a_run_accepts_every_shipped_recipe(name: str) -> None:
    recipe = load_recipe(name)
    config = load_train_config(STAGES, recipe.train_settings)
    per_gpu = config.stage4.batch_size * config.stage4.gradient_accumulation_steps
    assert per_gpu * recipe.num_gpus == recipe.global_batch
    assert (config.precision, config.zero_stage) == (recipe.precision, recipe.zero_stage)


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "gpu_type"),
    [("v100x1", 1, 1, "v100"), ("v100x2", 1, 2, "v100"), ("a100x4", 1, 4, "a100"), ("a100x8", 1, 8, "a100"),
     ("a100x8x2", 2, 8, "a100")],
)  # fmt: skip
def test_the_guides_machines_have_a_recipe(name: str, nodes: int, gpus: int, gpu_type: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.nodes, recipe.gpus_per_node, recipe.gpu_type) == (nodes, gpus, gpu_type)


def test_a_v100_gets_no_bf16() -> None:
    assert {load_recipe(name).precision for name in recipe_names() if load_recipe(name).gpu_type == "v100"} == {"fp16"}


def test_the_shipped_check_prints_the_global_batch_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    embervlm(["cluster"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [(name, "128") for name in recipe_names()]


def test_the_shipped_check_refuses_recipes_of_different_global_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, batch in (("small", 4), ("large", 8)):
        text = (REPOSITORY / "configs" / "cluster" / "v100x1.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("batch_size: 16", f"batch_size: {batch}"))
    monkeypatch.setattr("embervlm.cluster.RECIPES", tmp_path)
    with pytest.raises(ConfigError, match="64\n.* 32\nthe global batches differ"):
        check_recipes()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("nodes: 1", "nodes: 0"), "nodes: 0 is less than 1"),
        (("nodes: 1", ""), "nodes missing"),
        (("nodes: 1", "nodes: 1\nnode: 1"), "node: unknown key; did you mean nodes"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_file(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((REPOSITORY / "configs" / "cluster" / "v100x1.yaml").read_text().replace(*change))
    with pytest.raises(ConfigError) as found:
        load_recipe(str(path))
    assert str(path) in str(found.value) and expected in str(found.value)


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no recipe 'h100'; known are v100x1, v100x2, a100x4, a100x8, a100x8x2"):
        load_recipe("h100")


def test_a_flag_stands_over_the_recipe_and_the_recipe_over_the_yaml() -> None:
    settings = overrides_of(parser().parse_args(["--cluster", "v100x2", "--batch_size", "8"]))
    config = load_train_config(STAGES, settings)
    assert (config.stage4.batch_size, config.stage4.gradient_accumulation_steps, config.precision) == (8, 4, "fp16")


def test_the_environment_variable_stands_for_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBERVLM_CLUSTER", "a100x8")
    assert overrides_of(parser().parse_args([])) == load_recipe("a100x8").train_settings


def test_another_number_of_processes_than_the_recipes_is_refused() -> None:
    with pytest.raises(ConfigError, match="a100x4 is for 4 processes, one per GPU; 2 were started"):
        check_cluster("a100x4", 2)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--phase", "1", "--cluster", "a100x8x2"],
         "--nodes=2 --ntasks-per-node=8 --cpus-per-task=8 --gres=gpu:8 --constraint=a100 --time=45"),
        (["--phase", "2", "--cluster", "v100x2"],
         "--nodes=1 --ntasks-per-node=2 --cpus-per-task=8 --gres=gpu:2 --constraint=v100 --time=420"),
        (["--cluster", "a100x8"], "--nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --gres=gpu:1 --constraint=a100"),
    ],
)  # fmt: skip
def test_the_scripts_ask_for_the_recipes_nodes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: str
) -> None:
    monkeypatch.delenv(GPU_OPTIONS_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as ended:
        slurm(["options", *argv])
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == expected


def test_the_site_says_how_gpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPU_OPTIONS_VARIABLE, "--partition={type} --gres=gpu:{type}:{count}")
    assert load_recipe("a100x4").sbatch_options(None)[3:] == ["--partition=a100", "--gres=gpu:a100:4"]


def test_the_shipped_site_file_asks_as_the_recipes_do_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"source slurm/site.env; echo ${GPU_OPTIONS_VARIABLE}"], cwd=REPOSITORY, capture_output=True,
        text=True, check=True, env={},
    ).stdout.strip()  # fmt: skip
    monkeypatch.delenv(GPU_OPTIONS_VARIABLE, raising=False)
    default = load_recipe("a100x4").sbatch_options(None)
    monkeypatch.setenv(GPU_OPTIONS_VARIABLE, shown)
    assert load_recipe("a100x4").sbatch_options(None) == default


def test_without_a_recipe_the_scripts_list_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBERVLM_CLUSTER", raising=False)
    with pytest.raises(SystemExit, match="choose the nodes with --cluster or EMBERVLM_CLUSTER: v100x1"):
        slurm(["options", "--phase", "1"])


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_valid_bash(script: Path) -> None:
    found = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_nothing_is_chained_to_a_job_that_slurm_refuses(tmp_path: Path) -> None:
    """With a Slurm here that is not set up, and without one: sbatch fails alike."""
    (tmp_path / "slurm.conf").touch()
    found = subprocess.run(
        ["bash", "slurm/stage4.sh", "--cluster", "v100x1"], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "EMBERVLM_VENV": str(Path(sys.executable).parent.parent),
             "SLURM_CONF": f"{tmp_path}/slurm.conf"},
    )  # fmt: skip
    assert found.returncode != 0 and "phase 1 is job" not in found.stdout
    assert found.stderr.count("sbatch: fatal") + found.stderr.count("command not found") <= 1


# -- requeues -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> None:
    part = run_dir.new_tmp_dir(folder)
    (part / "weights").write_bytes(b"w")
    run_dir.publish_checkpoint(part, run_dir.checkpoint_path(folder, step), step)


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, restarts: int, limit: int = 3) -> Requeues:
    """The job's start after `restarts` requeues."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    monkeypatch.setenv(MAX_REQUEUES_VARIABLE, str(limit))
    requeues = Requeues(folder)
    requeues.started()
    return requeues


@pytest.mark.parametrize("code", [EXIT_REQUEUE, EXIT_FAULT, KILLED_BY_9])
def test_a_job_that_was_asked_to_stop_or_killed_or_lost_a_process_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert start(monkeypatch, tmp_path, restarts=0).refusal(code) is None


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_run_is_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    assert "an error that would come again" in str(start(monkeypatch, tmp_path, restarts=0).refusal(code))


def test_a_requeue_without_progress_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 40)
    requeues = start(monkeypatch, tmp_path, restarts=1)
    assert "no progress: the newest checkpoint is still of step 40" in str(requeues.refusal(KILLED_BY_9))


def test_a_requeue_with_progress_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 40)
    requeues = start(monkeypatch, tmp_path, restarts=1)
    checkpoint(tmp_path, 41)
    assert requeues.refusal(KILLED_BY_9) is None


def test_a_checkpoint_that_is_not_complete_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeues = start(monkeypatch, tmp_path, restarts=1)
    (tmp_path / "checkpoint-9").mkdir()
    assert "no progress" in str(requeues.refusal(EXIT_REQUEUE))


def test_there_are_only_so_many_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeues = start(monkeypatch, tmp_path, restarts=3)
    checkpoint(tmp_path, 1)
    assert "requeued 3 times (EMBERVLM_MAX_REQUEUES=3)" in str(requeues.refusal(EXIT_REQUEUE))


def test_a_job_that_slurm_requeued_too_often_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="job 7 was requeued 4 times, more than EMBERVLM_MAX_REQUEUES=3"):
        start(monkeypatch, tmp_path, restarts=4)

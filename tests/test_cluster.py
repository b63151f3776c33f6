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
from embervlm.config import REPOSITORY, ConfigError
from embervlm.config_file import load_train_config
from embervlm.run.slurm import (
    MAX_REQUEUES_VARIABLE,
    Allocation,
    Requeues,
    ended,
    job_options,
    step_options,
    warn_of_short_limit,
)
from embervlm.run.slurm import main as slurm
from embervlm.run.train import check_cluster
from embervlm.run.train_flags import overrides_of, parser
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE

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
    [
        ("v100x1", 1, 1, "v100"),
        ("v100x2", 1, 2, "v100"),
        ("a100x4", 1, 4, "a100"),
        ("a100x8", 1, 8, "a100"),
        ("a100x8x2", 2, 8, "a100"),
    ],
)
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


def test_a_setting_is_not_lost_where_the_flag_is_given_again() -> None:
    settings = overrides_of(parser().parse_args(["--set", "seed=3", "log_steps=9", "--set", "seed=4", "keep_last=2"]))
    assert {"seed": 4, "log_steps": 9, "keep_last": 2}.items() <= settings.items()


def test_the_environment_variable_stands_for_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBERVLM_CLUSTER", "a100x8")
    assert overrides_of(parser().parse_args([])) == load_recipe("a100x8").train_settings


def test_another_number_of_processes_than_the_recipes_is_refused() -> None:
    with pytest.raises(ConfigError, match="a100x4 is for 4 processes, one per GPU; 2 were started"):
        check_cluster("a100x4", 2)


@pytest.mark.parametrize(
    ("cluster", "phase", "expected"),
    [
        ("a100x8x2", 1, "--nodes=2 --ntasks-per-node=8 --cpus-per-task=8 --gres=gpu:8 --constraint=a100 --time=45"),
        ("v100x2", 2, "--nodes=1 --ntasks-per-node=2 --cpus-per-task=8 --gres=gpu:2 --constraint=v100 --time=420"),
    ],
)
def test_the_scripts_ask_for_the_recipes_nodes(
    monkeypatch: pytest.MonkeyPatch, cluster: str, phase: int, expected: str
) -> None:
    monkeypatch.delenv(GPU_OPTIONS_VARIABLE, raising=False)
    assert " ".join(job_options(load_recipe(cluster), phase)) == expected


def test_a_limit_within_slurms_signal_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for limit, minutes in (("00:03:00", "3"), ("4", "4")):
        warn_of_short_limit(["--time=600", f"--time={limit}"])
        assert f"warning: a time limit of {minutes} minutes" in capsys.readouterr().err
    for limit in ("00:10:00", "1-00:00:00", "UNLIMITED", "45"):
        warn_of_short_limit([f"--time={limit}"])
        assert not capsys.readouterr().err


FOUR_GPUS = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
HERE = ["--nodes=1", "--ntasks=4", "--ntasks-per-node=4", "--cpus-per-task=8", "--overcommit"]
ONE_TASK = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=32", "--overcommit"]


@pytest.mark.parametrize(
    ("env", "cluster", "phase", "options"),
    [
        (FOUR_GPUS | {"SLURM_NTASKS_PER_NODE": "4"}, "a100x4", 1, []),  # as it was submitted
        (FOUR_GPUS, "a100x4", 1, HERE),  # sbatch --gres=gpu:4
        (FOUR_GPUS, None, 2, HERE),
        (FOUR_GPUS | {"SLURM_NTASKS": "1"}, "a100x4", 1, HERE),  # some Slurms set it unasked
        (FOUR_GPUS | {"SLURM_STEP_ID": "0"}, None, 2, [*HERE, "--overlap"]),  # in the shell of srun --pty
        (
            FOUR_GPUS | {"SLURM_NTASKS": "2"},
            None,
            1,
            ["--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--cpus-per-task=16", "--overcommit"],
        ),
        (FOUR_GPUS, "a100x8", 1, None),
        (FOUR_GPUS | {"SLURM_JOB_NUM_NODES": "2"}, "a100x4", 1, None),
        (FOUR_GPUS, None, None, ONE_TASK),  # an evaluation takes one process
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}, "a100x4", 1, None),  # by default
    ],
)
def test_a_job_that_has_the_gpus_trains_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    cluster: str | None,
    phase: int | None,
    options: list[str] | None,
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    has = Allocation.here()
    assert has is not None
    assert step_options(has, load_recipe(cluster) if cluster else None, phase) == options


def test_the_site_says_how_gpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPU_OPTIONS_VARIABLE, "--partition={type} --gres=gpu:{type}:{count}")
    assert load_recipe("a100x4").sbatch_options(None)[3:] == ["--partition=a100", "--gres=gpu:a100:4"]


def test_the_shipped_site_file_asks_as_the_recipes_do_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"source slurm/site.env; echo ${GPU_OPTIONS_VARIABLE}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env={},
    ).stdout.strip()
    monkeypatch.delenv(GPU_OPTIONS_VARIABLE, raising=False)
    default = load_recipe("a100x4").sbatch_options(None)
    monkeypatch.setenv(GPU_OPTIONS_VARIABLE, shown)
    assert load_recipe("a100x4").sbatch_options(None) == default


def test_without_a_recipe_the_scripts_list_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBERVLM_CLUSTER", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit, match=r"the nodes are not given: give --cluster, set EMBERVLM_CLUSTER.*v100x1"):
        slurm(["place", "--script", "slurm/stage4_phase1.sh", "--of_phase", "1"])


def test_a_script_says_a_wrong_flag_once(tmp_path: Path) -> None:
    found = script(tmp_path, "slurm/stage4_phase1.sh", "--clustr", "a100x4")
    assert found.returncode == 2
    assert (
        found.stderr == "error: unrecognized arguments: --clustr a100x4; did you mean --cluster? "
        "(--help lists the flags)\n"
    )


def test_a_script_that_is_given_another_phase_says_so(tmp_path: Path) -> None:
    found = script(tmp_path, "slurm/stage4_phase1.sh", "--cluster", "a100x4", "--phase", "2")
    assert found.returncode == 1 and "--phase 2: this script trains phase 1" in found.stderr


def test_without_a_virtual_environment_a_script_says_what_to_do(tmp_path: Path) -> None:
    found = script(tmp_path, "slurm/stage4_phase1.sh", EMBERVLM_VENV=str(tmp_path))
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: no virtual environment in {tmp_path}: run `make install`")


def test_a_script_finds_its_repository_from_any_folder_of_any_job(tmp_path: Path) -> None:
    """As in a shell that salloc, srun or a notebook server opened elsewhere."""
    found = script(
        tmp_path, REPOSITORY / "slurm" / "stage4_phase1.sh", "--clustr", cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path)
    )
    assert "did you mean --cluster?" in found.stderr
    elsewhere = tmp_path / "slurm_script"  # what Slurm makes of a job's script
    elsewhere.write_text((REPOSITORY / "slurm" / "stage4_phase1.sh").read_text())
    found = script(tmp_path, elsewhere, cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert found.stderr == f"error: no slurm/job.sh in {tmp_path}; submit from the repository root\n"
    found = script(tmp_path, elsewhere, "--clustr", cwd=tmp_path, SLURM_SUBMIT_DIR=str(REPOSITORY))
    assert "did you mean --cluster?" in found.stderr


def script(
    folder: Path, path: Path | str, *argv: str, cwd: Path = REPOSITORY, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of slurm/ where Slurm is not set up."""
    (folder / "slurm.conf").touch()
    return subprocess.run(
        ["bash", path, *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "EMBERVLM_VENV": str(Path(sys.executable).parent.parent),
            "SLURM_CONF": f"{folder}/slurm.conf",
            **env,
        },
    )


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_valid_bash(script: Path) -> None:
    found = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_nothing_is_chained_to_a_job_that_slurm_refuses(tmp_path: Path) -> None:
    """With a Slurm here that is not set up, and without one: sbatch fails alike."""
    found = script(tmp_path, "slurm/stage4.sh", "--cluster", "v100x1")
    assert found.returncode != 0 and "phase 1 is job" not in found.stdout
    assert found.stderr.count("error: ") == 1 and found.stderr.startswith(("error: `sbatch", "error: this machine has"))


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


def test_elements_of_an_array_keep_their_starts_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last element's SLURM_JOB_ID is the array's number."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    for element in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", element)
        assert start(monkeypatch, tmp_path, restarts=0).job == f"7_{element}"
    assert sorted(path.name for path in tmp_path.glob("slurm-*")) == ["slurm-7_0.json", "slurm-7_1.json"]


@pytest.mark.parametrize("code", [1, 2, 255])  # 255: srun does not know an option
def test_an_error_of_the_run_is_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    assert "an error that would occur again" in str(start(monkeypatch, tmp_path, restarts=0).refusal(code))


@pytest.mark.parametrize(("state", "code", "status"), [("CANCELLED", EXIT_REQUEUE, EXIT_REQUEUE), ("RUNNING", 0, 0)])
def test_a_stop_after_which_nobody_requeues_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int, status: int
) -> None:
    monkeypatch.setattr("embervlm.run.slurm.job_state", lambda job: state)
    assert ended(start(monkeypatch, tmp_path, restarts=0), code) == status


def test_a_requeue_without_progress_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 40)
    requeues = start(monkeypatch, tmp_path, restarts=1)
    assert "no progress: the newest checkpoint is still at step 40" in str(requeues.refusal(KILLED_BY_9))


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

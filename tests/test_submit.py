"""`launch/submit.py`: what it hands to Slurm, and real jobs under submitit on this machine."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import submitit
import torch
import yaml
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import JobPaths
from training_helpers import (
    REPOSITORY,
    TINY,
    command,
    make_data,
    ok,
    run,
    save_stage3,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.cluster import load_recipe
from embervlm.config import ConfigError
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run import submit
from embervlm.run.submit import Requeue, TrainingFailedError, TrainJob, result_of, run_locally, training_jobs
from embervlm.run.train_flags import overrides_of, parser

START = ["--resume_from", "stage3/checkpoint-final"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    submit.main(list(argv))
    return capsys.readouterr().out


def message(*argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        submit.main(list(argv))
    return str(ended.value.code)


# -- the script, without Slurm -----------------------------------------------------------------------------------------


def test_the_dry_run_asks_for_the_recipes_nodes_and_starts_one_process_per_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = printed(capsys, "--cluster", "a100x8x2", "--dry_run", "--phase", "2", "--folder", str(tmp_path))
    recipe = load_recipe("a100x8x2")
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        f"time={recipe.phase2_minutes}",
        "gres=gpu:8",
        "constraint=a100",
        f"cpus-per-task={recipe.cpus_per_task}",
    ):
        assert f"#SBATCH --{option}\n" in script
    (started,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "submitit.core._submit" in started and f"--cpus-per-task={recipe.cpus_per_task}" in started
    assert "launch/train.py --cluster a100x8x2 --phase 2" in script
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_the_job_is_signalled_before_its_limit_and_may_be_requeued(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "--cluster", "v100x1", "--dry_run")
    for option in ("signal=USR2@180", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in script
    assert " --kill-on-bad-exit=1 " in script


def test_options_of_the_site_reach_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "--cluster", "v100x1", "--dry_run", "--sbatch", "partition=gpu", "exclusive", "gres=gpu:v")
    for option in ("partition=gpu", "exclusive", "gres=gpu:v"):
        assert f"#SBATCH --{option}\n" in script
    assert "gres=gpu:1" not in script


def test_the_sites_srun_options_and_wrapper_reach_the_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBERVLM_SRUN_OPTIONS", "--container-mounts='/my data:/data' --label")
    monkeypatch.setenv("EMBERVLM_WRAPPER", "apptainer exec '/my images/torch.sif'")
    monkeypatch.setenv("EMBERVLM_SBATCH_GPU", "--gres=gpu:{count} --comment='two words'")
    script = printed(capsys, "--cluster", "v100x1", "--dry_run")
    (started,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(started)
    assert {"--export=ALL", "--container-mounts=/my data:/data", "--label"} < set(words)
    assert words[words.index("apptainer") :][:4] == ["apptainer", "exec", "/my images/torch.sif", sys.executable]
    assert "#SBATCH --comment='two words'\n" in script


def test_a_sweep_is_one_array_with_a_folder_for_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(
        capsys, "--cluster", "a100x4", "--dry_run", "--phase", "1", "--sweep", "learning_rate=1e-4,5e-5", *START
    )
    assert "#SBATCH --array=0-1%2\n" in script
    for number, rate in enumerate(("1e-4", "5e-5")):
        assert f"# job {number}: launch/train.py " in script
        assert f"--phase1_learning_rate {rate} --output_dir outputs/learning_rate={rate}\n" in script


def test_two_sweeps_give_every_combination() -> None:
    jobs = training_jobs([*START, "--set", "log_steps=5"], ["seed=0,1", "stage4.phase1.weight_decay=0.0,0.1"])
    assert [Path(job.output_dir).name for job in jobs] == [
        f"seed={seed},stage4.phase1.weight_decay={decay}" for seed in (0, 1) for decay in ("0.0", "0.1")
    ]
    settings = overrides_of(parser().parse_args(jobs[-1].argv))
    assert {"seed": 1, "log_steps": 5, "stage4.phase1.weight_decay": 0.1}.items() <= settings.items()


def test_a_rate_is_swept_in_both_phases_where_both_are_trained() -> None:
    (job,) = training_jobs(START, ["learning_rate=3e-5"])
    assert {"--phase1_learning_rate", "--phase2_learning_rate"} < set(job.argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "choose the nodes with --cluster"),
        (["--cluster", "h100x4"], "no recipe 'h100x4'"),
        (["--cluster", "a100x4", "--batch_size", "0"], "batch_size: 0 is less than 1"),
        (["--cluster", "a100x4", "--sweep", "learning_rat=1,2", *START], "did you mean learning_rate"),
        (["--cluster", "a100x4", "--sweep", "learning_rate=1e-4,0", *START], "learning_rate: 0.0 is not positive"),
        (["--cluster", "a100x4", "--sweep", "seed=", *START], "write KEY=VALUE,VALUE"),
        (["--cluster", "a100x4", "--sweep", "seed=0,1"], "give the starting checkpoint with --resume_from"),
        (["--cluster", "a100x4", "--stages", "3", "4", *START], "would not be used"),
        (["--cluster", "a100x4", "--minutes", "3"], "told to stop 180 s before its limit"),
        (["--cluster", "a100x4", "--sbatch", "nodes=3"], "--sbatch nodes: the recipe"),
        (["--cluster", "a100x8x2", "--local"], "the recipe has 2 nodes, but this is one machine"),
    ],
)
def test_a_mistake_is_named_before_anything_is_submitted(argv: list[str], expected: str) -> None:
    assert expected in message("--dry_run", *argv) if "--local" not in argv else expected in message(*argv)


def test_without_slurm_the_message_says_what_there_is_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--dry_run prints the script, --local trains here" in message("--cluster", "a100x4")


@pytest.mark.parametrize(
    ("limit_min", "ran_s", "timed_out"), [(5, 60, False), (5, 250, True), (600, 300 * 60, False), (600, 599 * 60, True)]
)
def test_a_stop_is_a_time_out_only_near_the_limit_also_in_a_short_job(
    limit_min: int, ran_s: float, timed_out: bool, tmp_path: Path
) -> None:
    delayed = submitit.helpers.DelayedSubmission(print)
    delayed.set_timeout(limit_min, 3)
    theirs = SignalHandler(None, JobPaths(tmp_path), delayed)  # type: ignore[arg-type]
    theirs._start_time = time.time() - ran_s
    assert Requeue(theirs, signal_delay_s=30).has_timed_out() == timed_out
    if limit_min < 10:
        assert theirs.has_timed_out(), "submitit has mended this; delete Requeue"


# -- real jobs on this machine -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    recipe: Path
    flags: list[str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A recipe of two processes, and the flags of a phase 1 of the tiny model in 8 steps."""
    folder = tmp_path_factory.mktemp("submit")
    data = make_data(folder)
    start = save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(folder, write_model_yaml(folder), data)
    recipe = dataclasses.asdict(load_recipe("v100x2")) | {
        "precision": "fp32",
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Bench(
        path,
        [
            "--config",
            str(config),
            "--phase",
            "1",
            "--phase1_epochs",
            "2",
            "--resume_from",
            str(start),
            "--engine",
            "torch",
        ],
    )


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Path:
    """Output folder of a run through `launch/submit.py --local`."""
    output = bench.recipe.parent / "undisturbed"
    found = ok(
        run(
            command(
                "python",
                REPOSITORY / "launch" / "submit.py",
                "--local",
                "--cluster",
                bench.recipe,
                *bench.flags,
                "--output_dir",
                output,
            ),
            timeout_s=900,
        )
    )
    assert f"{output}: done" in found.stdout
    return output


def final(output: Path) -> Path:
    return run_dir.checkpoint_path(run_dir.phase_dir(output, 1), None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_local_trains_with_one_process_per_gpu_of_the_recipe(undisturbed: Path) -> None:
    state = run_dir.read_json(final(undisturbed) / "state.json")
    assert state["step"] == 8
    logs = sorted((undisturbed / "submitit").glob("*_log.out"))
    assert [path.name.rpartition("_log")[0][-2:] for path in logs] == ["_0", "_1"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_job_saves_is_requeued_and_ends_with_the_undisturbed_weights(
    bench: Bench, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (job,) = training_jobs(["--cluster", str(bench.recipe), *bench.flags, "--output_dir", str(tmp_path / "run")], [])
    started = run_locally(job, tmp_path / "jobs", load_recipe(str(bench.recipe)), minutes=9.5, max_timeouts=0)
    metrics = run_dir.metrics_log_path(run_dir.phase_dir(tmp_path / "run", 1))
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in psutil.Process(int(started.job_id)).children():  # Slurm signals every process of a job's step
        os.kill(process.pid, signal.SIGUSR2)
    assert result_of(started) == str(tmp_path / "run")
    log = started.paths.stdout.read_text()
    assert log.count("Calling checkpoint method.") == 1 and "this job is preempted" in log
    assert "Requeued job" in log and "(0 remaining timeouts)" in log  # with submitit's own reading it would have ended
    assert "resuming from" in log
    before, after = weights_of(final(undisturbed)), weights_of(final(tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_training_is_one_line_that_names_the_log(bench: Bench, tmp_path: Path) -> None:
    job = TrainJob(argv=("--stages", "4", "--engine", "torch", "--output_dir", str(tmp_path)), output_dir=str(tmp_path))
    recipe = dataclasses.replace(load_recipe(str(bench.recipe)), gpus_per_node=1)
    with pytest.raises(TrainingFailedError, match=r"checkpoint-final: no such checkpoint.*_0_log\.err") as caught:
        result_of(run_locally(job, tmp_path / "jobs", recipe, minutes=9.5, max_timeouts=0))
    assert "\n" not in str(caught.value)


def test_a_recipe_for_many_nodes_is_refused_locally(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 nodes"):
        run_locally(TrainJob(argv=(), output_dir="x"), tmp_path, load_recipe("a100x8x2"), 9, 0)

"""A run that was stopped and started again equals one that was not."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_helpers import (
    PHASE2,
    TINY,
    assert_same_weights,
    make_data,
    ok,
    phase_config,
    save_stage3,
    train,
    unfinish,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.schedule import learning_rate_factor

pytestmark = pytest.mark.slow
STEPS, STOP = 5, 3
LAUNCH = {
    "torch": ("python", 1, ("--engine", "torch")),
    "zero2": ("ranks", 2, ("--engine", "deepspeed", "--zero_stage", "2")),
    "zero2 x4": ("ranks", 4, ("--engine", "deepspeed", "--zero_stage", "2", "--batch_size", "2")),
    "zero3": ("ranks", 2, ("--engine", "deepspeed", "--zero_stage", "3")),
    "fsdp": ("ranks", 2, ("--engine", "fsdp")),
}
"""Launcher, processes and flags."""
PAIRS = [("torch", "torch"), ("zero2", "zero2"), ("zero2 x4", "torch"), ("zero2 x4", "fsdp"), ("zero3", "zero3")]
"""What saved, and what resumed."""
CURRICULUM = {
    "stage1": {"max_steps": 3, "complexity": "simple", "epochs": [1, 1]},
    "stage2": {"max_steps": 5, "complexity": "medium", "epochs": [2, 2]},
    "stage3": {"max_steps": 10, "epochs": [3, 3]},
}
"""Phase 2 has epochs 2 and 3, of different lengths; the checkpoint lies in the middle of the second."""
DROPOUT = {"config": {**TINY["vision"]["config"], "hidden_dropout_prob": 0.1}}
"""Drawn anew by every process: comparable on the same number of them alone."""


@dataclass
class Resumed:
    """One run of `STEPS` steps, and a copy of it that was cut back to step `STOP` and started again."""

    saved_by: str
    resumed_by: str
    flags: tuple[str, ...]
    straight: Path
    again: Path
    output: str = ""

    def start(self, output: Path, engine: str) -> subprocess.CompletedProcess[str]:
        launcher, processes, extra = LAUNCH[engine]
        return train(launcher, *self.flags, *extra, "--output_dir", output, processes=processes)

    @property
    def is_same(self) -> bool:
        return self.saved_by == self.resumed_by


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    data = make_data(folder)
    save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    write_run_yaml(
        folder,
        write_model_yaml(folder),
        data,
        log_records=True,
        curriculum=CURRICULUM,
        stage4__phase2__direct_records_ratio=0.0,
    )
    (folder / "dropout").mkdir()
    write_model_yaml(folder / "dropout", vision=DROPOUT)
    return folder


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def resumed(request: pytest.FixtureRequest, bench: Path) -> Resumed:
    saved_by, resumed_by = request.param
    flags = (
        "--config",
        str(bench / "run.yaml"),
        "--stages",
        "4",
        "--phase",
        "2",
        "--resume_from",
        str(bench / "start" / "stage3" / "checkpoint-final"),
        "--max_steps",
        str(STEPS),
        "--save_steps",
        str(STOP),
    )
    if saved_by == resumed_by:
        flags += ("--model", str(bench / "dropout" / "tiny.yaml"))
    run = Resumed(saved_by, resumed_by, flags, bench / saved_by, bench / f"{saved_by}-{resumed_by}")
    if not run.straight.exists():
        ok(run.start(run.straight, saved_by))
    shutil.copytree(run.straight, run.again)
    phase = run_dir.phase_dir(run.again, 2)
    unfinish(phase, keep_step=STOP)
    (run_dir.new_tmp_dir(phase) / "half.bin").write_bytes(b"half")  # a save that was killed
    run.output = ok(run.start(run.again, resumed_by)).stdout
    return run


def final(output: Path) -> Path:
    return run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(resumed: Resumed) -> None:
    straight, again = weights_of(final(resumed.straight)), weights_of(final(resumed.again))
    stopped = weights_of(run_dir.checkpoint_path(run_dir.phase_dir(resumed.straight, 2), STOP))
    assert straight.keys() == again.keys()
    if resumed.is_same:
        assert all(torch.equal(again[key], value) for key, value in straight.items())
    else:
        assert_same_weights(again, straight, rtol=1e-3)
    assert any(not torch.equal(stopped[key], value) for key, value in straight.items())  # there was something to do


def test_a_resumed_run_ends_with_the_optimizer_of_an_uninterrupted_one(resumed: Resumed) -> None:
    straight, again = (
        torch.load(final(output) / "training_state.pt", weights_only=True)["optimizer"]
        for output in (resumed.straight, resumed.again)
    )
    assert straight["updates"] == again["updates"] == STEPS
    for name, moments in straight["moments"].items():
        for key, value in moments.items():
            rtol, atol = (0, 0) if resumed.is_same else (1e-2, 1e-7)
            torch.testing.assert_close(again["moments"][name][key], value, rtol=rtol, atol=atol)


def test_a_resumed_run_says_where_it_goes_on(resumed: Resumed) -> None:
    assert f"checkpoint-{STOP}" in resumed.output and "resuming" in resumed.output


def test_the_log_of_a_resumed_run_has_each_step_once_with_the_same_losses(resumed: Resumed) -> None:
    logs = [
        [json.loads(line) for line in run_dir.metrics_log_path(run_dir.phase_dir(output, 2)).read_text().splitlines()]
        for output in (resumed.straight, resumed.again)
    ]
    for log in logs:
        assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for straight, again in zip(*logs, strict=True):
        assert again["loss"] == pytest.approx(straight["loss"], rel=1e-4)
        assert again["learning_rate"] == pytest.approx(straight["learning_rate"])
        assert again["teacher_forcing"] == straight["teacher_forcing"]
    assert {line["teacher_forcing"] for line in logs[1]} == {1.0, 0.5}


def test_a_resumed_run_has_seen_as_many_samples(resumed: Resumed) -> None:
    straight, again = (run_dir.read_json(final(output) / "state.json") for output in (resumed.straight, resumed.again))
    assert (again["step"], again["samples"]) == (straight["step"], straight["samples"])


def test_a_resumed_run_sees_the_samples_of_an_uninterrupted_one_each_once_an_epoch(resumed: Resumed) -> None:
    logs = [
        [json.loads(line) for line in run_dir.metrics_log_path(run_dir.phase_dir(output, 2)).read_text().splitlines()]
        for output in (resumed.straight, resumed.again)
    ]
    for straight, again in zip(*logs, strict=True):
        assert sorted(again["records"]) == sorted(straight["records"])
    for epoch in (1, 2):
        seen = [name for line in logs[1] if line["epoch"] == epoch for name in line["records"]]
        assert len(seen) == len(set(seen)) > 0
    epochs = [line["epoch"] for line in logs[1]]
    assert epochs[0] == 1 and epochs[STOP - 1 : STOP + 1] == [2, 2]


def test_a_resume_on_fewer_processes_keeps_the_global_batch_and_says_so(resumed: Resumed) -> None:
    assert ("the global batch stays 8" in resumed.output) == ((resumed.saved_by, resumed.resumed_by) == PAIRS[2])


def test_leftovers_of_a_killed_save_are_cleaned_up_by_the_next_start(resumed: Resumed) -> None:
    assert not list(run_dir.phase_dir(resumed.again, 2).glob(".tmp-*"))


def test_a_finished_run_that_is_started_again_says_so_and_changes_nothing(resumed: Resumed) -> None:
    before = {path: path.stat().st_mtime_ns for path in resumed.straight.rglob("*") if path.is_file()}
    result = ok(resumed.start(resumed.straight, resumed.saved_by))
    assert f"already finished: {final(resumed.straight)}" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in resumed.straight.rglob("*") if path.is_file()} == before


def test_a_run_whose_only_checkpoint_is_damaged_warns_and_starts_anew(resumed: Resumed, tmp_path: Path) -> None:
    if not resumed.is_same:
        pytest.skip("the same on every engine")
    output = tmp_path / "cut"
    shutil.copytree(resumed.straight, output)
    unfinish(run_dir.phase_dir(output, 2), keep_step=STOP)
    state = run_dir.checkpoint_path(run_dir.phase_dir(output, 2), STOP) / "training_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    result = ok(resumed.start(output, resumed.saved_by))
    assert f"checkpoint-{STOP}: training_state.pt has 100 bytes" in result.stderr
    again, straight = weights_of(final(output)), weights_of(final(resumed.straight))
    assert all(torch.equal(again[key], value) for key, value in straight.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(("--resume", "never"), "--resume never: "), (("--seed", "5"), "restore --seed, --reasoning_data")],
)
def test_a_resume_that_is_not_wanted_or_would_mix_up_the_samples_is_an_error(
    flags: tuple[str, ...], expected: str, resumed: Resumed, tmp_path: Path
) -> None:
    if (resumed.saved_by, resumed.resumed_by) != PAIRS[0]:
        pytest.skip("the same on every engine")
    output = tmp_path / "cut"
    shutil.copytree(resumed.straight, output)
    unfinish(run_dir.phase_dir(output, 2), keep_step=STOP)
    result = train("python", *resumed.flags, "--engine", "torch", "--output_dir", output, *flags)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1
    assert expected in errors[0] and f"checkpoint-{STOP}" in errors[0]


def test_a_run_in_fp16_does_an_overflowed_step_again_with_its_own_batch_and_rate(bench: Path, tmp_path: Path) -> None:
    """Plain torch on the CPU: what the loop does with an overflow, not how a GPU or DeepSpeed comes by one."""
    ok(
        train(
            "python",
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
            "--max_steps",
            "4",
            "--output_dir",
            tmp_path,
            "--precision",
            "fp16",
            "--set",
            "curriculum=null",
        )
    )
    phase = run_dir.phase_dir(tmp_path, 2)
    log = [json.loads(line) for line in run_dir.metrics_log_path(phase).read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[0]["overflows"] >= 1  # the first scale of 65536 is too high for this model
    assert log[-1]["loss_scale"] == 65536 / 2 ** log[-1]["overflows"]
    seen = [name for line in log for name in line["records"]]
    assert len(seen) == len(set(seen)) == 16
    config = phase_config(PHASE2)
    for step, line in enumerate(log):
        factor = learning_rate_factor(step, 4, config.warmup_steps, config.final_lr_ratio)
        assert line["learning_rate"]["reasoning_module"] == pytest.approx(config.learning_rate * factor)
    state = torch.load(final(tmp_path) / "training_state.pt", weights_only=True)
    assert state["optimizer"]["updates"] == 4
    assert state["optimizer"]["loss_scale"] == {"scale": log[-1]["loss_scale"], "good_steps": 4}

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
    TINY,
    make_data,
    ok,
    save_stage3,
    train,
    unfinish,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data.records import read_records

pytestmark = pytest.mark.slow
STEPS, STOP = 6, 3
LAUNCH = {"torch": ("python", 1, ()), "zero2": ("torchrun", 2, ("--zero_stage", "2"))}


@dataclass
class Resumed:
    """One run of `STEPS` steps, and a copy of it that was cut back to step `STOP` and started again."""

    engine: str
    flags: tuple[str, ...]
    straight: Path
    again: Path
    output: str

    def start(self, output: Path) -> subprocess.CompletedProcess[str]:
        launcher, processes, extra = LAUNCH[self.engine]
        return train(launcher, *self.flags, *extra, "--output_dir", output, processes=processes)


@pytest.fixture(scope="module", params=sorted(LAUNCH))
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    folder = tmp_path_factory.mktemp(request.param)
    data = make_data(folder)
    stage3 = save_stage3(folder / "start" / "stage3", TINY, read_records(data))
    config = write_run_yaml(folder, write_model_yaml(folder), data)
    engine = "torch" if request.param == "torch" else "deepspeed"
    flags = (
        "--config", str(config), "--stages", "4", "--phase", "2", "--resume_from", str(stage3), "--engine", engine,
        "--max_steps", str(STEPS), "--save_steps", str(STOP),
    )  # fmt: skip
    run = Resumed(request.param, flags, folder / "straight", folder / "again", "")
    ok(run.start(run.straight))
    shutil.copytree(run.straight, run.again)
    phase = run_dir.phase_dir(run.again, 2)
    unfinish(phase, keep_step=STOP)
    (run_dir.new_tmp_dir(phase) / "half.bin").write_bytes(b"half")  # a save that was killed
    run.output = ok(run.start(run.again)).stdout
    return run


def final(output: Path) -> Path:
    return run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(resumed: Resumed) -> None:
    straight, again = weights_of(final(resumed.straight)), weights_of(final(resumed.again))
    stopped = weights_of(run_dir.checkpoint_path(run_dir.phase_dir(resumed.straight, 2), STOP))
    assert straight.keys() == again.keys()
    for key, value in straight.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any(not torch.equal(stopped[key], value) for key, value in straight.items())  # there was something to do


def test_a_resumed_run_ends_with_the_optimizer_of_an_uninterrupted_one(resumed: Resumed) -> None:
    straight, again = (
        torch.load(final(output) / "training_state.pt", weights_only=True)["optimizer"]
        for output in (resumed.straight, resumed.again)
    )
    assert straight["updates"] == again["updates"] == STEPS
    for name, moments in straight["moments"].items():
        for key, value in moments.items():
            torch.testing.assert_close(again["moments"][name][key], value, rtol=1e-4, atol=1e-9)


def test_a_resumed_run_says_where_it_goes_on(resumed: Resumed) -> None:
    assert f"checkpoint-{STOP}" in resumed.output and "resuming" in resumed.output


def test_the_log_of_a_resumed_run_has_each_step_once_with_the_same_losses(resumed: Resumed) -> None:
    logs = [
        [json.loads(line) for line in run_dir.metrics_log_path(run_dir.phase_dir(output, 2)).read_text().splitlines()]
        for output in (resumed.straight, resumed.again)
    ]  # fmt: skip
    for log in logs:
        assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for straight, again in zip(*logs, strict=True):
        assert again["loss"] == pytest.approx(straight["loss"], rel=1e-5)
        assert again["learning_rate"] == pytest.approx(straight["learning_rate"])
        assert again["teacher_forcing"] == straight["teacher_forcing"]


def test_a_resumed_run_has_seen_as_many_samples(resumed: Resumed) -> None:
    straight, again = (run_dir.read_json(final(output) / "state.json") for output in (resumed.straight, resumed.again))
    assert (again["step"], again["samples"]) == (straight["step"], straight["samples"])


def test_leftovers_of_a_killed_save_are_cleaned_up_by_the_next_start(resumed: Resumed) -> None:
    assert not list(run_dir.phase_dir(resumed.again, 2).glob(".tmp-*"))


def test_a_finished_run_that_is_started_again_says_so_and_changes_nothing(resumed: Resumed) -> None:
    before = {path: path.stat().st_mtime_ns for path in resumed.straight.rglob("*") if path.is_file()}
    result = ok(resumed.start(resumed.straight))
    assert f"already finished: {final(resumed.straight)}" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in resumed.straight.rglob("*") if path.is_file()} == before


def test_a_truncated_training_state_is_named_in_the_error(resumed: Resumed, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    shutil.copytree(resumed.straight, output)
    unfinish(run_dir.phase_dir(output, 2), keep_step=STOP)
    state = run_dir.checkpoint_path(run_dir.phase_dir(output, 2), STOP) / "training_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    result = resumed.start(output)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "training_state.pt" in errors[0] and f"checkpoint-{STOP}" in errors[0]
    assert 'train.py", line' not in result.stderr  # no traceback of ours; torchrun prints one of its own

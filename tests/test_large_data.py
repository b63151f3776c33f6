"""Training from a prepared store: records without pictures, errors of process 0, another number of processes."""

from __future__ import annotations

import json
import shutil
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
STEPS, STOP = 4, 2
TIMEOUT_S = 400


def write_run(folder: Path, share_without_picture: float) -> Path:
    """A run YAML over scenes, of which the first share has lost its pictures."""
    data = make_data(folder)
    records = json.loads(data.read_text())
    for record in records[: round(share_without_picture * len(records))]:
        del record["image"]
    data.write_text(json.dumps(records))
    return write_run_yaml(folder, write_model_yaml(folder), data)


@pytest.mark.parametrize(("engine", "share_without_picture"), [("torch", 1.0), ("zero2", 0.8), ("zero3", 1.0)], ids=str)
def test_records_without_a_picture_train_in_every_phase_on_two_processes(
    engine: str, share_without_picture: float, tmp_path: Path
) -> None:
    """Whole batches of one process or of both have none; an engine that waits for gradients would hang."""
    flags = ("--engine", "torch") if engine == "torch" else ("--zero_stage", engine[-1])
    config = write_run(tmp_path, share_without_picture)
    ok(train("torchrun", "--config", config, "--stages", "3", "4", "--max_steps", "3", *flags, timeout_s=TIMEOUT_S))
    for phase in (1, 2):
        assert (run_dir.phase_dir(tmp_path / "outputs", phase) / "checkpoint-final" / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("field", "value", "flags", "message"),
    [
        ("answer", "Boat", (), 'answer "Boat" is not one of'),
        ("split", "dev", (), "metadata.split: 'dev' is not one of"),
        ("id", "ok", ("--max_reasoning_length", "20"), "more than the 20 of --max_reasoning_length"),
    ],
)
def test_a_bad_record_ends_both_processes_with_one_message(
    field: str, value: str, flags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    config = write_run(tmp_path, 0.0)
    data = tmp_path / "reasoning_data.json"
    stage3 = save_stage3(tmp_path / "start" / "stage3", TINY, read_records(data))
    records = json.loads(data.read_text())
    records[7][field] = value
    data.write_text(json.dumps(records))
    result = train(
        "torchrun", "--config", config, "--stages", "4", "--resume_from", stage3, "--engine", "torch", *flags,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert result.returncode != 0
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert message in result.stderr and 'train.py", line' not in result.stderr


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_the_same_batches_on_another_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    data = make_data(tmp_path)
    stage3 = save_stage3(tmp_path / "start" / "stage3", TINY, read_records(data))
    config = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data)

    def start(output: Path, processes: int) -> str:
        return ok(train(
            "torchrun", "--config", config, "--stages", "4", "--phase", "2", "--resume_from", stage3, "--engine",
            "torch", "--max_steps", str(STEPS), "--save_steps", str(STOP), "--output_dir", output,
            processes=processes, timeout_s=TIMEOUT_S,
        )).stdout  # fmt: skip

    straight, again = tmp_path / "straight", tmp_path / "again"
    start(straight, before)
    shutil.copytree(straight, again)
    unfinish(run_dir.phase_dir(again, 2), keep_step=STOP)
    assert f"keeps its {4 * before} records per update" in start(again, after)
    finals = [run_dir.phase_dir(output, 2) / "checkpoint-final" for output in (straight, again)]
    wanted, found = map(weights_of, finals)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    states = [run_dir.read_json(final / "state.json") for final in finals]
    assert states[0]["samples"] == states[1]["samples"]

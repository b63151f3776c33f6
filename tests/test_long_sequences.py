"""One limit on the whole sequence, picture, question and text together, and what is told before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embervlm import run_dir
from embervlm.config import load_train_config
from embervlm.training.engine import World
from embervlm.training.phases import Run
from tests.training_helpers import CPU, make_data, write_model_yaml, write_run_yaml


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    data = make_data(tmp_path_factory.mktemp("scenes"), num_samples=18)
    return [{**r, "image": str(data.parent / r["image"])} for r in json.loads(data.read_text())]


def runs(folder: Path, records: list[dict[str, Any]], *stages: str, **changes: Any) -> Path:
    """Trains `records` in this process and gives the output folder."""
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    changes = {"allow_outside": True, "engine": "torch", "report": False, "max_steps": 2} | changes
    config = write_run_yaml(folder, changes.pop("model", None) or write_model_yaml(folder), data, **changes)
    Run(load_train_config(str(config), {}), World(0, 1, CPU)).go(list(stages), None)
    return folder / "outputs"


def test_samples_that_cannot_be_written_end_no_run_and_a_save_comes_before_them(
    records: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def fails(run: Run, model: Any, data: Any, epoch: int) -> None:
        saved.append(run_dir.list_checkpoints(run_dir.phase_dir(run.output, 1 if epoch == 1 else 2))[-1].path.name)
        raise MemoryError("out of memory")

    monkeypatch.setattr(Run, "_write_samples", fails)
    output = runs(tmp_path, records, "3", "4", max_steps=None, stage4__batch_size=32, background_saves=False)
    assert saved == ["checkpoint-final", "checkpoint-1", "checkpoint-final"]
    assert "epoch 3: no samples (MemoryError: out of memory); training goes on" in caplog.text
    assert run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None).is_dir()

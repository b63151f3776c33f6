"""Where a run's numbers go when W&B's server does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from wandb_file import history

from embervlm.training.tracking import Tracker


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # what an earlier test started would keep that one's settings
    tracker = Tracker(tmp_path, active=True, name="phase 2", first_step=0, total_steps=1, project="embervlm")
    tracker.advance(1, {"loss": {"total": 1.5}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1})
    tracker.close()
    (line,) = history(tmp_path)
    assert line["loss/total"] == 1.5
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert str(tracker.wandb_run_id) in said and f"run in {tmp_path}," in said


@pytest.mark.slow
def test_whatever_wandb_raises_costs_the_curves_there_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    tracker = Tracker(tmp_path, active=True, name="phase 2", first_step=0, total_steps=2, project="embervlm")
    wandb.finish()  # a run that has ended takes nothing more: its log() raises
    values = {"loss": {"total": 1.5}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1}
    for step in (1, 2):
        tracker.advance(step, values)
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert "No more is sent there; training goes on" in said

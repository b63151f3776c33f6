"""A phase that stops at a plateau: when it is one, what the learning rate does, and that a resume changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
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
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training import plateau


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([2.0, 1.5, 1.2], False),  # too few to say
        ([2.0, 1.5, 1.2, 1.0], False),
        ([1.0, 1.1, 0.999, 1.2], True),  # 0.1% better is no progress
        ([1.0, 1.1, 1.2, 0.98], False),
        ([1.0, 0.5, 0.6, 0.51, 0.49], False),  # the last one is 2% below the best before
        ([1.0, 0.5, 0.6, 0.51, 0.497], True),
    ],
)
def test_three_measurements_without_progress_are_a_plateau(losses: list[float], found: bool) -> None:
    assert plateau.is_plateau(losses, 0.01) is found


def test_the_rate_stays_at_its_peak_until_the_plateau_and_decays_over_a_quarter_as_many_steps() -> None:
    rates = [plateau.rate_factor(step, 400, 10_000, 100, 0.1) for step in range(501)]
    assert rates[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert rates[100:401] == [1.0] * 301
    assert rates[401:] == sorted(rates[401:], reverse=True) and rates[500] == pytest.approx(0.1)
    assert plateau.total_steps(400, 10_000) == 500


def test_without_a_plateau_the_decay_ends_with_the_last_epoch() -> None:
    rates = [plateau.rate_factor(step, None, 1000, 0, 0.0) for step in range(1001)]
    assert rates[:801] == [1.0] * 801 and rates[900] == pytest.approx(0.5) and rates[1000] == pytest.approx(0.0)
    assert plateau.total_steps(None, 1000) == 1000 == plateau.total_steps(950, 1000)


@pytest.mark.slow
def test_a_phase_ends_early_at_a_plateau_and_a_resume_ends_where_it_would_have(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    without_pictures = [{**record, "image": None} for record in json.loads(data.read_text())]  # nothing to look at
    data.write_text(json.dumps(without_pictures))
    save_stage3(tmp_path / "stage3", TINY, read_records(data, candidates=ROBOTS))
    flat = dict(stop_at_plateau=True, plateau_steps=1, epochs=9, learning_rate=1e-9)
    run = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data, engine="torch", save_steps=1, sample_records=1)
    settings = yaml.safe_load(run.read_text())
    settings["stage4"]["phase2"] |= flat
    run.write_text(yaml.safe_dump(settings))

    def start(output: Path) -> str:
        start = str(tmp_path / "stage3" / "checkpoint-final")
        flags = ["--stages", "4", "--phase", "2", "--resume_from", start, "--output_dir", str(output)]
        return ok(train("python", "--config", run, *flags)).stdout

    straight, again = tmp_path / "straight", tmp_path / "again"
    # 4 measurements without progress, then a quarter as many steps, where 9 epochs have some 60
    assert "the val loss no longer falls" in start(straight)
    steps = [found.step for found in run_dir.list_checkpoints(run_dir.phase_dir(straight, 2)) if not found.is_final]
    assert steps[-1] == 4
    for keep_step in (2, 4):  # before the plateau, and at it
        shutil.copytree(straight, again / str(keep_step))
        phase = run_dir.phase_dir(again / str(keep_step), 2)
        unfinish(phase, keep_step=keep_step)
        start(again / str(keep_step))
        final = run_dir.checkpoint_path(phase, None)
        assert json.loads((final / "state.json").read_text())["step"] == 5
        expected = weights_of(run_dir.checkpoint_path(run_dir.phase_dir(straight, 2), None))
        assert all(torch.equal(value, expected[key]) for key, value in weights_of(final).items())

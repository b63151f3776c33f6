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


@pytest.mark.parametrize(
    ("most", "epoch_steps", "found"),
    [
        (4000, 1000, 100),  # as set
        (120, 6, 10),  # few records: at 100 steps no plateau could be found
        (5, 5, 1),
        (250_000, 125_000, 2500),  # many: at 100 steps there could be one within 0.4% of an epoch
    ],
)
def test_few_records_are_measured_often_enough_and_many_not_too_early(most: int, epoch_steps: int, found: int) -> None:
    assert plateau.measured_every(100, most, epoch_steps) == found


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


def start(folder: Path, output: Path) -> list[str]:
    checkpoint = str(folder / "stage3" / "checkpoint-final")
    config = ["--config", str(folder / "run.yaml"), "--stages", "4", "--phase", "2"]
    return [*config, "--resume_from", checkpoint, "--output_dir", str(output)]


def bench(folder: Path, **phase2: object) -> Path:
    """Records without pictures, where there is nothing to look at, and a run whose loss cannot fall."""
    data = make_data(folder)
    without_pictures = [{**record, "image": None} for record in json.loads(data.read_text())]
    data.write_text(json.dumps(without_pictures))
    save_stage3(folder / "stage3", TINY, read_records(data, candidates=ROBOTS))
    run = write_run_yaml(folder, write_model_yaml(folder), data, engine="torch", save_steps=1, sample_records=1)
    settings = yaml.safe_load(run.read_text())
    settings["stage4"]["phase2"] |= dict(stop_at_plateau=True, plateau_steps=1, learning_rate=1e-9, **phase2)
    run.write_text(yaml.safe_dump(settings))
    return data


@pytest.mark.slow
def test_a_decay_that_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    bench(tmp_path, epochs=1)
    said = ok(train("python", *start(tmp_path, tmp_path / "out"), "--max_steps", 5)).stdout
    assert "no longer falls" not in said  # the measurement at step 4 would be one, but the decay began there


def all_train(records: list[dict]) -> None:
    for record in records:
        record["metadata"]["split"] = "train"


def chains_in_train_alone(records: list[dict]) -> None:
    all_train(records)
    for record in records[:3]:
        record["metadata"]["split"] = "val"
        del record["reasoning"]


@pytest.mark.slow
@pytest.mark.parametrize("change", [all_train, chains_in_train_alone])
def test_a_plateau_without_val_records_is_refused_before_training(tmp_path: Path, change) -> None:
    data = bench(tmp_path)
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    settings["stage4"]["phase3"] = {"epochs": 1}  # so that answers alone are taken
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    records = json.loads(data.read_text())
    change(records)
    data.write_text(json.dumps(records))
    failed = train("python", *start(tmp_path, tmp_path / "out"))
    assert failed.returncode != 0 and "has no records with a chain in the val split" in failed.stderr


@pytest.mark.slow
def test_a_phase_ends_early_at_a_plateau_and_a_resume_ends_where_it_would_have(tmp_path: Path) -> None:
    bench(tmp_path, epochs=9)
    straight, again = tmp_path / "straight", tmp_path / "again"
    # 4 measurements without progress, then a quarter as many steps, where 9 epochs have some 60
    assert "the val loss no longer falls" in ok(train("python", *start(tmp_path, straight))).stdout
    steps = [found.step for found in run_dir.list_checkpoints(run_dir.phase_dir(straight, 2)) if not found.is_final]
    assert steps[-1] == 4
    for keep_step in (2, 4):  # before the plateau, and at it
        shutil.copytree(straight, again / str(keep_step))
        phase = run_dir.phase_dir(again / str(keep_step), 2)
        unfinish(phase, keep_step=keep_step)
        ok(train("python", *start(tmp_path, again / str(keep_step))))
        final = run_dir.checkpoint_path(phase, None)
        assert json.loads((final / "state.json").read_text())["step"] == 5
        expected = weights_of(run_dir.checkpoint_path(run_dir.phase_dir(straight, 2), None))
        assert all(torch.equal(value, expected[key]) for key, value in weights_of(final).items())


@pytest.mark.slow
def test_the_decay_begins_while_it_still_ends_within_the_time(tmp_path: Path) -> None:
    data = bench(tmp_path, epochs=2000, final_lr_ratio=0.5)
    flags = ("--set", "stage4.phase2.plateau_steps=1000000", "log_steps=1", "save_steps=1000", "--max_minutes", 0.1)
    result = ok(train("python", *start(tmp_path, tmp_path / "out"), *flags))
    phase = run_dir.phase_dir(tmp_path / "out", 2)
    state = json.loads((run_dir.checkpoint_path(phase, None) / "state.json").read_text())
    begun = state["decay_from"]
    assert state["step"] == plateau.total_steps(begun, 10**6)
    assert f"80% of the 0.1 minutes are over: the learning rate decays from step {begun} to the end at" in result.stdout
    lines = [json.loads(line) for line in run_dir.metrics_log_path(phase).read_text().splitlines()]
    elapsed = {line["step"]: line["elapsed_s"] for line in lines if "elapsed_s" in line}
    assert elapsed[begun - 1] < 0.8 * 6 <= elapsed[begun]
    rates = {line["step"]: line["learning_rate"]["reasoning_module"] for line in lines if "learning_rate" in line}
    assert rates[begun] == pytest.approx(1e-9) and rates[state["step"]] < 0.6e-9
    assert data.is_file() and "as many as 0.1 minutes allow, at most" in result.stdout

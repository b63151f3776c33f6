"""Batches that worker processes make ahead are those that the training process would make, and a run ends the same."""

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch
from training_helpers import (
    CPU,
    PHASE2,
    TINY,
    Bench,
    assert_same_weights,
    make_data,
    ok,
    phase_config,
    save_stage3,
    train,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.config import ScheduledSamplingConfig
from embervlm.data.records import DataError, read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.feed import Feed
from embervlm.training.job import PhaseJob
from embervlm.world import World

ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def job(scene_data):
    phase = phase_config(PHASE2)
    bench = Bench.make(scene_data / "reasoning_data.json", phase, most_groups=4)
    return PhaseJob(
        name="phase 2",
        folder=Path("nowhere"),
        phase=phase,
        model=bench.model,
        plan=bench.plan,
        collator=bench.collator,
        pictures=bench.collator.pictures,
        batch_size=4,
        accumulation=2,
        scheduled_sampling=ScheduledSamplingConfig(enabled=True),
    )


def feed(job, num_workers, world=ALONE):
    return Feed(job, world, load_pictures=True, num_workers=num_workers, end=12)


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def assert_equal(one, other):
    assert (one.num_samples, one.epoch, one.teacher_forcing) == (other.num_samples, other.epoch, other.teacher_forcing)
    assert len(one.batches) == len(other.batches)
    for mine, theirs in zip(one.batches, other.batches):
        assert (mine.counts, mine.record_ids, mine.muted) == (theirs.counts, theirs.record_ids, theirs.muted)
        for values, others in ((mine.inputs, theirs.inputs), (mine.targets, theirs.targets)):
            assert values.keys() == others.keys()
            for key, value in values.items():
                same = torch.equal(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
                assert same, key


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_make_the_batches_that_the_training_process_would_make(job, rank):
    world = World(rank, 2, CPU)
    with feed(job, 0, world) as here, feed(job, 2, world) as ahead:
        for step in range(3, 9):  # as after a resume
            assert_equal(here.of(step), ahead.of(step))


def test_a_step_can_be_done_again(job):
    with feed(job, 1) as ahead:
        once = ahead.of(5)
        assert ahead.of(5) is once
        assert_equal(feed(job, 0).of(6), ahead.of(6))


def test_the_workers_end_with_the_feed(job):
    before = children()
    with feed(job, 2) as ahead:
        ahead.of(0)
        assert len(children()) == len(before) + 2
    until = time.monotonic() + 10
    while len(children()) > len(before) and time.monotonic() < until:
        time.sleep(0.05)
    assert children() == before


class Refusing:
    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples, *, step, **options):
        if step == 2:
            raise DataError("pictures/7.png: was truncated since the start")
        return self.collator(samples, step=step, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_mistake_in_a_worker_is_told_as_it_is(job, num_workers):
    refusing = dataclasses.replace(job, collator=Refusing(job.collator))
    with feed(refusing, num_workers) as ahead:
        ahead.of(0), ahead.of(1)
        with pytest.raises(DataError, match=r"^pictures/7.png: was truncated since the start$"):
            ahead.of(2)


@pytest.mark.slow
def test_a_run_with_workers_ends_with_the_same_weights(tmp_path):
    data = make_data(tmp_path)
    save_stage3(tmp_path / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data)
    found = []
    for workers in (0, 2):
        output = tmp_path / f"workers-{workers}"
        arguments = ["--config", config, "--stages", "4", "--phase", "2", "--max_steps", "4", "--engine", "torch"]
        arguments += ["--resume_from", run_dir.checkpoint_path(tmp_path / "start" / "stage3", None)]
        ok(train("torchrun", *arguments, "--output_dir", output, "--set", f"data_workers={workers}"))
        found.append(weights_of(run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)))
    assert_same_weights(*found)

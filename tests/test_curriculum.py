"""Short and simple chains first: which records an epoch trains on, and in which step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from training_helpers import TINY, make_data, ok, save_stage3, train, write_model_yaml, write_run_yaml

from embervlm import run_dir
from embervlm.config import ConfigError, CurriculumConfig, TrainConfig
from embervlm.config_file import from_mapping
from embervlm.curate.augment import augment_file
from embervlm.data.curriculum import complexity_of, records_of_epochs
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.facts import reader_of
from embervlm.data.records import DataError, read_records
from embervlm.data.samples import DIRECT, Sample
from embervlm.data.splits import split_records
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.run_data import load_data
from embervlm.run.train import main
from embervlm.training.feed import deal
from embervlm.world import World

GUIDE = """
curriculum:
  stage1: # Epochs 1-3
    max_steps: 3
    complexity: "simple"
  stage2: # Epochs 4-7
    max_steps: 5
    complexity: "medium"
  stage3: # Epochs 8-10
    max_steps: 10
    complexity: "complex"
"""


def curriculum(**stages):
    return from_mapping(CurriculumConfig, stages)


def without_complexity(record):
    return replace(record, metadata={key: v for key, v in record.metadata.items() if key != "complexity"})


# ---- settings


def test_the_guides_yaml_is_read_with_the_epochs_of_its_comments():
    found = from_mapping(TrainConfig, yaml.safe_load(GUIDE)).curriculum
    names = [found.stage_of(epoch)[0] for epoch in range(1, 12)]
    assert names == ["stage1"] * 3 + ["stage2"] * 4 + ["stage3"] * 4
    assert (found.stage2.max_steps, found.stage2.complexity) == (5, "medium")


def test_a_stage_can_name_its_epochs():
    found = curriculum(
        stage1={"max_steps": 2, "epochs": [1, 1]},
        stage2={"max_steps": 4, "epochs": [2, 2]},
        stage3={"max_steps": 9, "epochs": [3, 4]},
    )
    assert [found.stage_of(epoch)[0] for epoch in (1, 2, 3, 4)] == ["stage1", "stage2", "stage3", "stage3"]


@pytest.mark.parametrize(
    ("epochs", "message"), [([2, 3], "start at epoch 1"), ([1, 5], "start at epoch 6"), ([1, 2], "start at epoch 3")]
)
def test_a_gap_or_an_overlap_between_stages_is_refused(epochs, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(stage1={"max_steps": 3, "epochs": epochs})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"max_steps": 3, "complexity": "easy"}, "easy"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": 3, "epochs": [3, 1]}, r"\[3, 1\]"),
        ({"max_steps": 3, "epochs": [1]}, r"\[1\]"),
    ],
)
def test_a_wrong_value_of_a_stage_is_named(stage, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(stage1=stage)


# ---- complexity


def test_the_complexity_computed_for_the_rule_teachers_chains_is_the_one_it_gives(records):
    reader = reader_of(records)
    assert {record.metadata["complexity"] for record in records} == {"simple", "medium", "complex"}
    for record in records:
        assert complexity_of(without_complexity(record), reader) == record.metadata["complexity"]


def test_many_claims_make_a_short_chain_complex(records):
    haul = next(record for record in records if record.num_steps == 9)
    short = without_complexity(replace(haul, steps=(" ".join(haul.steps[:-1]), haul.steps[-1])))
    assert complexity_of(short, reader_of(records)) == "medium"


@pytest.mark.parametrize(("given", "read"), [("high", "complex"), ("low", "simple"), ("Medium", "medium")])
def test_the_guides_other_spelling_of_complexity_is_read(records, given, read):
    record = replace(records[0], metadata={"complexity": given})
    assert complexity_of(record, reader_of(records)) == read


def test_every_unknown_complexity_is_listed(records):
    wrong = [replace(record, metadata={"complexity": "easy"}) for record in records[:2]]
    with pytest.raises(DataError) as caught:
        records_of_epochs([*wrong, records[2]], CurriculumConfig(), 2)
    assert len(caught.value.problems) == 2 and "'easy'" in caught.value.problems[1]


# ---- records of an epoch


def test_an_epoch_has_the_records_within_its_steps_and_its_complexity(records):
    epochs = records_of_epochs(records, CurriculumConfig(), 10)
    kinds = [Counter(records[index].metadata["complexity"] for index in epoch) for epoch in epochs]
    totals = Counter(record.metadata["complexity"] for record in records)
    assert kinds[0] == kinds[2] == {"simple": totals["simple"]}
    assert kinds[3] == kinds[6] == {"simple": totals["simple"], "medium": totals["medium"]}
    assert kinds[7] == kinds[9] == totals


def test_an_epoch_without_a_record_is_an_error_that_says_which(records):
    hard = [record for record in records if record.num_steps > 3]
    with pytest.raises(ConfigError, match=r"curriculum.stage1: .*epoch 1 is empty \(the shortest chain has 5 steps"):
        records_of_epochs(hard, CurriculumConfig(), 10)


def test_epochs_that_are_not_reached_may_be_empty(records):
    easy = [record for record in records if record.num_steps == 3]
    none = curriculum(
        stage1={"max_steps": 3, "epochs": [1, 2]},
        stage2={"max_steps": 1, "epochs": [3, 3]},
        stage3={"max_steps": 9, "epochs": [4, 4]},
    )
    assert len(records_of_epochs(easy, none, 2)) == 2
    with pytest.raises(ConfigError, match="stage2"):
        records_of_epochs(easy, none, 3)


# ---- the plan


def plan(**options):
    main = [Sample(record=i, form=DIRECT, prompt=[1], target=[2] * (1 + i % 5)) for i in range(20)]
    return EpochPlan(
        **{"main": main, "global_batch": 4, "seed": 0, "epochs": [range(5), range(12), range(20)], **options}
    )


def test_epochs_may_differ_in_length():
    assert [plan().num_steps(epochs) for epochs in (1, 2, 3, 4)] == [2, 5, 10, 15]
    assert [plan().locate(step) for step in (0, 1, 2, 4, 5, 9, 10, 15)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 4),
        (3, 0),
        (4, 0),
    ]


def test_an_epoch_trains_once_on_each_of_its_records_and_on_no_other():
    found = plan()
    ends = [found.num_steps(epochs) for epochs in range(5)]
    for (start, end), count in zip(pairwise(ends), (5, 12, 20, 20), strict=True):
        seen = Counter(sample.record for step in range(start, end) for sample in found.batch(step))
        assert seen == Counter(range(count))


def test_a_resumed_plan_brings_the_same_batches():
    whole, resumed = plan(), plan()
    batches = [whole.batch(step) for step in range(15)]
    assert [resumed.batch(step) for step in (12, 4, 2, 9)] == [batches[step] for step in (12, 4, 2, 9)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_trains_on_the_same_records_with_any_number_of_processes(world_size):
    found = plan()
    worlds = [World(rank=rank, size=world_size, device=torch.device("cpu")) for rank in range(world_size)]
    for step in range(found.num_steps(3)):
        batch = found.batch(step)
        shared = [sample.record for world in worlds for _, part in deal(batch, world, 2) for sample in part]
        assert sorted(shared) == sorted(sample.record for sample in batch)


def test_without_a_curriculum_every_epoch_trains_on_all():
    found = plan(epochs=())
    assert [found.num_steps(epochs) for epochs in (1, 2)] == [5, 10]
    assert found.locate(11) == (2, 1)


# ---- a run


CURRICULUM = {
    "stage1": {"max_steps": 3, "complexity": "simple", "epochs": [1, 1]},
    "stage2": {"max_steps": 5, "complexity": "medium", "epochs": [2, 2]},
    "stage3": {"max_steps": 10, "epochs": [3, 3]},
}
"""One epoch of phase 1 and two of phase 2, as `training_helpers` has them."""


@pytest.mark.slow
def test_a_run_on_two_processes_augments_once_and_follows_the_curriculum_over_both_phases(tmp_path):
    data = make_data(tmp_path)
    stage3 = save_stage3(tmp_path / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(
        tmp_path,
        write_model_yaml(tmp_path),
        data,
        curriculum=CURRICULUM,
        stage4__reasoning_augmentation={"target_samples": 60},
    )
    told = ok(train("ranks", "--config", config, "--stages", "4", "--resume_from", stage3)).stdout
    (line,) = [line for line in told.splitlines() if line.startswith("curriculum: records by epoch ")]
    counts = [int(number) for number in line.rpartition("epoch ")[2].split(", ")]
    assert counts[0] < counts[1] < counts[2] == 60
    (cache,) = (tmp_path / "outputs" / "cache").glob("augmented-*.jsonl")
    given = len(split_records(read_records(data, candidates=ROBOTS))["train"])
    assert len(read_records(cache, allow_outside=True, candidates=ROBOTS)) == 60 - given
    for phase, epochs in ((1, counts[:1]), (2, counts[1:])):
        lines = run_dir.metrics_log_path(run_dir.phase_dir(tmp_path / "outputs", phase)).read_text().splitlines()
        of_epoch = Counter(json.loads(line)["epoch"] for line in lines)
        assert [of_epoch[1 + i] for i in range(len(epochs))] == [-(-count // 8) for count in epochs]


def test_an_empty_epoch_ends_the_run_before_stage_3_is_trained(tmp_path):
    data = make_data(tmp_path)
    config = write_run_yaml(
        tmp_path,
        write_model_yaml(tmp_path),
        data,
        engine="torch",
        curriculum={"stage1": {"max_steps": 2, "complexity": "simple"}},
    )
    with pytest.raises(SystemExit, match=r"error: curriculum\.stage1: .* so epoch 1 is empty"):
        main(["--config", str(config), "--stages", "3", "4"])
    assert not list((tmp_path / "outputs").glob("stage*/**/COMPLETE"))


def test_more_chains_are_no_more_questions(tmp_path):
    """A file of `embervlm data augment`: chains train on all of it, direct answers on what was given."""
    data = make_data(tmp_path)
    augment_file(data, tmp_path / "augmented.json", target_samples=90, domain=ROBOTS_DOMAIN)
    config = from_mapping(
        TrainConfig, {"reasoning_data": str(tmp_path / "augmented.json"), "output_dir": str(tmp_path / "outputs")}
    )
    loaded = load_data(config, 36, World(rank=0, size=1, device=torch.device("cpu")))
    given = split_records(read_records(data, candidates=ROBOTS))["train"]
    assert [record.record_id for record in loaded.train] == [record.record_id for record in given]
    assert len(loaded.reasoning) == len(given) + 54 and list(loaded.reasoning)[: len(given)] == list(loaded.train)

"""Splits are stable, and no picture stands in two of them."""

import os
import subprocess
import sys

import pytest

from embervlm.data.records import DataError, ReasoningRecord
from embervlm.data.splits import SPLITS, split_of, split_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

KEYS = [f"scene {i}" for i in range(2000)]


@pytest.fixture
def picture(tmp_path):
    """Writes a picture file with the given content."""

    def picture(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return picture


def record(record_id, image=None, instruction="Which robot?", **metadata):
    return ReasoningRecord(
        record_id=record_id,
        image=image,
        instruction=instruction,
        steps=("Look.",),
        answer=("Drone",),
        metadata=metadata,
        default_candidates=ROBOTS,
    )


def placed(records, **options):
    """Record id -> split."""
    splits = split_records(records, **options)
    assert tuple(splits) == SPLITS
    return {found.record_id: name for name, members in splits.items() for found in members}


def key_in(split):
    return next(key for key in KEYS if split_of(key) == split)


def test_split_is_the_same_in_another_process():
    code = "from embervlm.data.splits import split_of; print(*(split_of(f'scene {i}') for i in range(200)))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [split_of(key) for key in KEYS[:200]]


def test_known_keys_keep_their_split_over_versions():
    assert [split_of(f"scene {i}") for i in range(12)] == [
        "train",
        "train",
        "test",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
    ]


def test_ratios_are_met():
    found = [split_of(key, val_ratio=0.2, test_ratio=0.1) for key in KEYS]
    assert abs(found.count("val") / 2000 - 0.2) < 0.03 and abs(found.count("test") / 2000 - 0.1) < 0.03


def test_ratio_zero_empties_a_split_and_one_fills_it():
    assert {split_of(key, val_ratio=0, test_ratio=0) for key in KEYS} == {"train"}
    assert {split_of(key, val_ratio=0, test_ratio=1) for key in KEYS} == {"test"}


def test_seed_changes_the_splits():
    assert [split_of(key) for key in KEYS] != [split_of(key, seed=1) for key in KEYS]


def test_larger_val_ratio_leaves_the_test_split_alone():
    assert [split_of(key) == "test" for key in KEYS] == [split_of(key, val_ratio=0.5) == "test" for key in KEYS]


@pytest.mark.parametrize("ratios", [(-0.1, 0.1), (0.6, 0.6), (float("nan"), 0.1)])
def test_ratios_that_do_not_fit_are_refused(ratios):
    with pytest.raises(DataError, match=f"val_ratio={ratios[0]}"):
        split_of("x", val_ratio=ratios[0], test_ratio=ratios[1])


def test_split_group_decides_where_a_record_goes():
    assert placed([record(key, instruction=key, split_group=key) for key in KEYS]) == {
        key: split_of(key) for key in KEYS
    }


def test_same_picture_under_two_names_stays_together(picture):
    records = [record(f"{name}{i}", picture(f"{name}{i}.png", b"%d" % i)) for i in range(60) for name in ("a", "b")]
    found = placed(records)
    assert all(found[f"a{i}"] == found[f"b{i}"] for i in range(60)) and set(found.values()) == set(SPLITS)


def test_text_only_records_go_by_instruction_whatever_case_and_punctuation():
    pairs = [
        (record(f"a{key}", instruction=f"Is {key} wet?"), record(f"b{key}", instruction=f"is  {key.upper()}: WET"))
        for key in KEYS[:60]
    ]
    found = placed([member for pair in pairs for member in pair])
    assert all(found[f"a{key}"] == found[f"b{key}"] for key in KEYS[:60]) and len(set(found.values())) == 3


@pytest.mark.parametrize("split", SPLITS)
def test_record_without_group_follows_the_group_of_its_picture(picture, split):
    key = key_in(split)
    for content in range(20):
        image = picture("a.png", b"%d" % content)
        assert placed([record("plain", image), record("grouped", image, split_group=key)]) == {
            "plain": split,
            "grouped": split,
        }


def test_groups_joined_by_a_picture_land_where_the_smallest_key_says(picture):
    first, second = sorted((key_in("val"), key_in("test")))
    shared = picture("shared.png", b"shared")
    records = [
        record("1", picture("own.png", b"own"), split_group=second),
        record("2", shared, split_group=second),
        record("3", shared, split_group=first),
        record("4", None, split_group=first),
    ]
    assert set(placed(records).values()) == {split_of(first)}
    assert placed(records) == placed(records[::-1])


def test_explicit_split_wins_and_the_rest_of_its_picture_follows(picture):
    image = picture("a.png", b"a")
    records = [record("1", image, split_group=key_in("train")), record("2", image, split="test")]
    assert placed(records) == {"1": "test", "2": "test"}


def test_groups_with_different_explicit_splits_never_share_a_picture(picture):
    own = [picture(f"{i}.png", b"%d" % i) for i in range(2)]
    shared = picture("shared.png", b"shared")
    records = [
        record("1", own[0], split_group="g", split="train"),
        record("2", shared, split_group="g"),
        record("3", own[1], split_group="h", split="test"),
        record("4", shared, split_group="h"),
    ]
    found = placed(records)
    assert (found["1"], found["3"]) == ("train", "test") and found["2"] == found["4"]


def test_picture_in_two_explicit_splits_is_refused_with_both_records(picture):
    records = [
        record("r1", picture("a.png", b"same"), split="train"),
        record("r2", picture("b.png", b"same"), split="test"),
    ]
    with pytest.raises(DataError, match=r"b.png: is in train \(record r1\) and in test \(record r2\); give both"):
        split_records(records)


def test_unknown_explicit_split_is_refused():
    with pytest.raises(DataError, match=r"record r1: metadata\.split: 'dev' is not one of train, val, test"):
        split_records([record("r1", split="dev")])


def test_all_missing_pictures_are_named(tmp_path):
    gone = [str(tmp_path / name) for name in ("a.png", "b.png")]
    with pytest.raises(DataError) as caught:
        split_records([record(path, path) for path in gone])
    assert [problem.split(":")[0] for problem in caught.value.problems] == gone


def test_long_chain_of_joined_groups_is_one_group(picture):
    records = [
        record(f"{i}{end}", picture(f"{i + end}.png", b"%d" % (i + end)), split_group=f"g{i}")
        for i in range(1500)
        for end in (0, 1)
    ]
    assert len(set(placed(records).values())) == 1

"""Checkpoint folders are whole or not there, and are found by number."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from embervlm import run_dir
from embervlm.run_dir import (
    COMPLETE,
    DamagedCheckpointError,
    clean_leftovers,
    list_checkpoints,
    new_tmp_dir,
    prune_checkpoints,
    publish_checkpoint,
    read_json,
    reduce_to_weights,
    verify_checkpoint,
    write_json_atomic,
)


def publish(phase: Path, step: int, *, final: bool = False, weights: str = "weights") -> Path:
    tmp = new_tmp_dir(phase)
    (tmp / "model.bin").write_text(weights)
    (tmp / "engine").mkdir()
    (tmp / "engine" / "rank0.pt").write_text("state")
    return publish_checkpoint(tmp, run_dir.checkpoint_path(phase, None if final else step), step)


def names(phase: Path) -> list[str]:
    return [checkpoint.path.name for checkpoint in list_checkpoints(phase)]


def test_names_are_those_of_the_guide():
    phase = run_dir.phase_dir("outputs", 2)
    assert run_dir.checkpoint_path(phase, 500) == Path("outputs/stage4/phase2/checkpoint-500")
    assert run_dir.checkpoint_path(phase, None) == Path("outputs/stage4/phase2/checkpoint-final")
    assert run_dir.metrics_log_path(phase) == Path("outputs/stage4/phase2/metrics.jsonl")
    assert run_dir.stage3_dir("outputs") / "checkpoint-final" == Path("outputs/stage3/checkpoint-final")
    assert run_dir.reasoning_samples_path("outputs", 5) == Path("outputs/stage4/reasoning_samples/epoch_5_samples.json")
    assert run_dir.eval_results_path("outputs") == Path("outputs/results/stage4_eval.json")


def test_checkpoints_are_sorted_by_number_with_the_final_last(tmp_path):
    publish(tmp_path, 1000, final=True)
    for step in (1000, 500, 20000):
        publish(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-500", "checkpoint-1000", "checkpoint-final", "checkpoint-20000"]


def test_folders_without_a_readable_manifest_do_not_count(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.bin").touch()
    (publish(tmp_path, 2) / COMPLETE).write_text("{")
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-x" / COMPLETE).write_text("{}")
    publish(tmp_path, 3).rename(tmp_path / "checkpoint-old")
    assert names(tmp_path) == []


def test_a_missing_folder_has_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_published_checkpoint_verifies_and_may_gain_evaluations(tmp_path):
    path = publish(tmp_path, 5)
    write_json_atomic(run_dir.eval_path(path, "val"), {"metrics": {}})
    verify_checkpoint(path)
    assert set(read_json(path / COMPLETE)["files"]) == {"model.bin", "engine/rank0.pt"}


def test_every_damaged_file_is_named(tmp_path):
    path = publish(tmp_path, 5)
    (path / "model.bin").write_text("weighty!")
    (path / "engine" / "rank0.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="rank0.pt is missing; model.bin has 8 bytes, not 7"):
        verify_checkpoint(path)


def test_a_changed_byte_is_found_by_its_checksum_only(tmp_path):
    path = publish(tmp_path, 5)
    (path / "model.bin").write_text("weighty")
    verify_checkpoint(path, checksums=False)
    with pytest.raises(DamagedCheckpointError, match="model.bin has the wrong checksum"):
        verify_checkpoint(path)


def test_a_folder_without_a_manifest_does_not_verify(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="COMPLETE: no such file"):
        verify_checkpoint(tmp_path)


def test_replacing_a_checkpoint_leaves_only_the_new_one(tmp_path):
    publish(tmp_path, 5, weights="old")
    path = publish(tmp_path, 5, weights="new")
    assert (path / "model.bin").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_a_failed_replacement_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    path = publish(tmp_path, 5, weights="old")
    rename = os.rename

    def refuse(source, target):
        if Path(target) == path and "replaced" not in str(source):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path, 5, weights="new")
    verify_checkpoint(path)
    assert (path / "model.bin").read_text() == "old"


def test_a_run_killed_before_the_rename_leaves_the_previous_checkpoint_the_last(tmp_path, monkeypatch):
    publish(tmp_path, 1)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_leftovers_are_deleted_and_a_checkpoint_set_aside_is_put_back(tmp_path):
    publish(tmp_path, 5, final=True).rename(tmp_path / ".tmp-replaced-checkpoint-final")
    new_tmp_dir(tmp_path)
    (tmp_path / ".tmp-metrics").touch()
    clean_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-final"]


def moved_and_linked_back(checkpoint: Path, scratch: Path) -> Path:
    scratch.mkdir()
    target = checkpoint.rename(scratch / checkpoint.name)
    checkpoint.symlink_to(target)
    return target


def test_a_checkpoint_that_was_moved_and_linked_back_is_read_and_replaced_and_its_files_stay(tmp_path, caplog):
    phase = tmp_path / "phase"
    target = moved_and_linked_back(publish(phase, 1, final=True), tmp_path / "scratch")
    assert names(phase) == ["checkpoint-final"]
    verify_checkpoint(phase / "checkpoint-final")
    new = publish(phase, 2, final=True, weights="new")
    assert not new.is_symlink() and (new / "model.bin").read_text() == "new"
    assert (target / "model.bin").read_text() == "weights" and f"stays in {target}" in caplog.text


def test_a_linked_checkpoint_that_is_damaged_is_set_aside_more_than_once(tmp_path):
    phase = tmp_path / "phase"
    for turn in range(3):
        linked = publish(phase, 3)
        if turn < 2:
            moved_and_linked_back(linked, tmp_path / f"scratch{turn}")
        assert run_dir.set_damaged_aside(linked).is_symlink() == (turn < 2)
    assert (tmp_path / "scratch0" / "checkpoint-3" / COMPLETE).exists()


def test_links_among_the_leftovers_end_no_start(tmp_path, caplog):
    phase = tmp_path / "phase"
    target = moved_and_linked_back(publish(phase, 1), tmp_path / "scratch")
    (phase / "checkpoint-1").rename(phase / ".tmp-killed")
    (phase / ".tmp-replaced-checkpoint-2").symlink_to(target)
    (phase / "checkpoint-3").symlink_to(tmp_path / "purged")
    clean_leftovers(phase)
    assert sorted(path.name for path in phase.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert f"{phase / 'checkpoint-3'} is a link to {tmp_path / 'purged'}, which does not exist" in caplog.text
    assert (target / "model.bin").exists()
    assert not publish(phase, 3).is_symlink()  # over a link to nothing


def test_pruning_leaves_linked_checkpoints_alone(tmp_path):
    phase = tmp_path / "phase"
    target = moved_and_linked_back(publish(phase, 1), tmp_path / "scratch")
    for step in (2, 3, 4):
        publish(phase, step)
    prune_checkpoints(phase, keep_last=1)
    assert names(phase) == ["checkpoint-1", "checkpoint-4"] and (target / "engine" / "rank0.pt").exists()


@pytest.mark.parametrize("name", ["best", "checkpoint-6"])
def test_a_name_that_does_not_fit_is_refused(tmp_path, name):
    tmp = new_tmp_dir(tmp_path)
    (tmp / "model.bin").touch()
    with pytest.raises(ValueError, match=name):
        publish_checkpoint(tmp, tmp_path / name, 5)


def test_an_empty_folder_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        publish_checkpoint(new_tmp_dir(tmp_path), tmp_path / "checkpoint-5", 5)


def test_pruning_keeps_the_last_the_best_and_the_final(tmp_path):
    for step in (1, 2, 3, 10, 11):
        publish(tmp_path, step)
    publish(tmp_path, 4, final=True)
    removed = prune_checkpoints(tmp_path, keep_last=2, keep=[tmp_path / "checkpoint-2"])
    assert [path.name for path in removed] == ["checkpoint-1", "checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-final", "checkpoint-10", "checkpoint-11"]


def test_pruning_reduces_old_checkpoints_to_weights_and_deletes_those_beyond(tmp_path):
    for step in range(1, 7):
        part = new_tmp_dir(tmp_path)
        (part / "pytorch_model.bin").write_text("weights")
        (part / "training_state.pt").write_text("moments")
        publish_checkpoint(part, run_dir.checkpoint_path(tmp_path, step), step)
    removed = prune_checkpoints(tmp_path, keep_last=2, keep=[tmp_path / "checkpoint-1"], keep_weights=2)
    assert removed == [tmp_path / "checkpoint-2"]
    found = list_checkpoints(tmp_path)
    assert [(one.step, one.has_state) for one in found] == [(1, False), (3, False), (4, False), (5, True), (6, True)]
    for one in found:
        verify_checkpoint(one.path)
        assert (one.path / "training_state.pt").exists() == one.has_state


def test_a_kill_while_the_state_is_deleted_leaves_a_sound_checkpoint(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    part = new_tmp_dir(tmp_path)
    (part / "pytorch_model.bin").write_text("weights")
    (part / "training_state.pt").write_text("moments")
    path = publish_checkpoint(part, run_dir.checkpoint_path(tmp_path, 1), 1)
    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reduce_to_weights(path)
    monkeypatch.undo()
    verify_checkpoint(path)
    assert [one.has_state for one in list_checkpoints(tmp_path)] == [False]
    reduce_to_weights(path)  # the next pruning
    assert not (path / "training_state.pt").exists()


@pytest.mark.parametrize("keep_last", [0, -3])
def test_pruning_never_deletes_the_last(tmp_path, keep_last):
    for step in (1, 2):
        publish(tmp_path, step)
    prune_checkpoints(tmp_path, keep_last)
    assert names(tmp_path) == ["checkpoint-2"]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"step": ')
    with pytest.raises(ValueError, match=r"state\.json: damaged"):
        read_json(tmp_path / "state.json")


def test_a_value_that_is_no_json_keeps_the_old_file(tmp_path):
    path = tmp_path / "eval.json"
    write_json_atomic(path, {"value": 1})
    with pytest.raises(ValueError, match="eval.json: not written.*null"):
        write_json_atomic(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1}
    assert os.listdir(tmp_path) == ["eval.json"]

"""The checkpoint manager: what it writes while training goes on, and what it does when it cannot."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_helpers import CPU, MULTIPLIERS, PHASE2, Bench, make_data, phase_config, weights_of

from embervlm import run_dir
from embervlm.engines.base import Engine, Snapshot
from embervlm.engines.build import build_engine
from embervlm.ranking import best_checkpoints
from embervlm.training.checkpoint import (
    CheckpointStore,
    Progress,
    SaveError,
    is_finished,
    load_training_state,
    newest_sound,
)
from embervlm.training.module import TrainingModule
from embervlm.world import World

ALONE = World(0, 1, CPU)
EXTRA = {"data": {"order": "as it was", "global_batch": 2}, "wandb_run_id": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@dataclass
class Training:
    """A tiny model under plain torch, and its store."""

    bench: Bench
    engine: Engine
    folder: Path

    def store(self, **options: object) -> CheckpointStore:
        return CheckpointStore(self.folder, ALONE, **{"keep_last": 9, **options})  # type: ignore[arg-type]

    def step(self, number: int) -> None:
        batches = self.bench.batches(number, 0, 1, 1)
        self.engine.train_step(batches, phase_config(PHASE2).loss_weights, dict.fromkeys(MULTIPLIERS, 1e-3), number)

    def save(self, store: CheckpointStore, step: int, final: bool = False) -> Path:
        return store.save(self.engine, Progress(step=step), {}, EXTRA, final=final)

    def weights(self) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.bench.model.state_dict().items()}


@pytest.fixture
def training(data: Path, tmp_path: Path) -> Training:
    phase = phase_config(PHASE2)
    bench = Bench.make(data, phase, global_batch=2, engine="torch")
    engine = build_engine(TrainingModule(bench.model), bench.config, phase, ALONE, batch_size=2, accumulation=1)
    return Training(bench, engine, tmp_path / "phase2")


@pytest.fixture
def no_file_above() -> Iterator[None]:
    """A disk that takes no file above 100 kB: writing more fails in the middle, as on a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def gate(training: Training, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No file of a checkpoint is written before this is set."""
    opened = threading.Event()
    write = training.bench.model.save_pretrained

    def wait_and_write(*args: object, **options: object) -> None:
        assert opened.wait(60)
        write(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training.bench.model, "save_pretrained", wait_and_write)
    return opened


def test_a_checkpoint_holds_the_state_at_its_step_whatever_training_does_while_it_is_written(
    training: Training, gate: threading.Event
) -> None:
    training.step(0)
    wanted = training.weights()
    with training.store() as store:
        saved = training.save(store, 1)
        training.step(1)
        training.step(2)
        gate.set()
    found = weights_of(saved)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert any(not torch.equal(training.weights()[key], value) for key, value in wanted.items())
    assert load_training_state(saved)["optimizer"]["updates"] == 1


def test_no_update_takes_place_before_the_state_is_copied(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.step(0)
    wanted, opened, copy = training.weights(), threading.Event(), Snapshot._copy

    def wait_and_copy(snapshot: Snapshot) -> torch.Tensor:
        assert opened.wait(60)
        return copy(snapshot)

    monkeypatch.setattr(Snapshot, "_copy", wait_and_copy)
    with training.store() as store:
        saved = training.save(store, 1)
        step = threading.Thread(target=training.step, args=(1,))
        step.start()
        step.join(1)
        assert step.is_alive()
        assert all(torch.equal(training.weights()[key], value) for key, value in wanted.items())
        opened.set()
        step.join()
    assert all(torch.equal(weights_of(saved)[key], value) for key, value in wanted.items())
    assert any(not torch.equal(training.weights()[key], value) for key, value in wanted.items())
    assert training.engine.copy_wait_s > 0.3  # counted as time that training stood still


def test_a_save_returns_before_its_checkpoint_is_written(training: Training, gate: threading.Event) -> None:
    with training.store() as store:
        saved = training.save(store, 1)
        assert not saved.exists()
        gate.set()
    run_dir.verify_checkpoint(saved)


def test_a_synchronous_save_returns_with_its_checkpoint_written(training: Training) -> None:
    with training.store(in_background=False) as store:
        run_dir.verify_checkpoint(training.save(store, 1))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step_and_names_its_path(
    training: Training, no_file_above: None
) -> None:
    with training.store() as store:
        saved = training.save(store, 1)
        store._writer.submit(lambda: None).result()  # until the writer is through
        with pytest.raises(SaveError, match=f"{saved}: not written: .*GB free"):
            store.poll()


def test_what_a_failed_save_left_behind_is_removed_and_the_checkpoint_before_it_stands(
    training: Training, request: pytest.FixtureRequest
) -> None:
    with training.store() as store:
        sound = training.save(store, 1)
        store.wait()
        request.getfixturevalue("no_file_above")
        training.save(store, 2)
        with pytest.raises(SaveError, match=f"the last good checkpoint is {sound}"):
            store.wait()
    assert [path.name for path in training.folder.iterdir()] == [sound.name]
    run_dir.verify_checkpoint(sound)


def test_training_goes_on_after_a_failed_save_where_that_is_configured(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    with training.store(on_error="continue") as store:
        shutil.rmtree(training.folder)
        failed = training.save(store, 1)
        assert not store.wait()
        training.folder.mkdir()
        training.save(store, 2)
        assert store.wait()
    assert str(failed) in caplog.text and "training continues" in caplog.text
    assert newest_sound(training.folder) == run_dir.checkpoint_path(training.folder, 2)


def test_the_final_checkpoint_must_be_written_whatever_is_configured(training: Training) -> None:
    with training.store(on_error="continue") as store:
        shutil.rmtree(training.folder)
        with pytest.raises(SaveError, match="has vanished"):
            training.save(store, 1, final=True)
    assert not training.folder.exists()  # not made anew where a mount is missing


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_disk_that_is_full_read_only_or_gone_is_named_and_training_goes_on_when_it_is_back(
    training: Training, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Real file systems, each failing in its own way, between saves that succeed."""
    training.folder = disk / "phase2"
    with training.store(on_error="continue") as store:
        training.save(store, 1)
        assert store.wait()
        for step, options, reason in ((2, "size=1500k", "No space left"), (4, "ro", "Read-only file system")):
            remount(disk, options)
            failed = training.save(store, step)
            assert not store.wait()
            assert f"{failed}: not written: " in caplog.text and reason in caplog.text
            assert f"the last good checkpoint is {run_dir.checkpoint_path(training.folder, step - 1)}" in caplog.text
            remount(disk, "rw,size=100m")
            training.save(store, step + 1)
            assert store.wait()
        subprocess.run(["umount", "--lazy", disk], check=True)
        training.save(store, 6)
        assert not store.wait()
        assert f"the folder {training.folder} has vanished" in caplog.text
    assert not any(disk.iterdir())


def test_a_folder_that_cannot_be_made_ends_the_run_before_it_trains(training: Training, disk: Path) -> None:
    remount(disk, "ro")
    training.folder = disk / "phase2"
    with pytest.raises(SaveError, match=f"{training.folder}: cannot create .*Read-only file system"):
        training.store()


def test_a_slow_disk_is_named_while_training_waits_for_it(
    training: Training, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("embervlm.training.checkpoint.SLOW_S", 0.1)
    with training.store() as store:
        training.save(store, 1)
        threading.Timer(0.5, gate.set).start()
        store.wait()
    assert f"{training.folder}: a checkpoint is still being written there" in caplog.text


def test_an_error_of_training_waits_for_the_checkpoint_being_written(training: Training) -> None:
    with pytest.raises(KeyError), training.store() as store:
        saved = training.save(store, 1)
        raise KeyError
    run_dir.verify_checkpoint(saved)


@pytest.fixture
def three(training: Training) -> list[Path]:
    """Checkpoints of steps 1, 2 and 3."""
    with training.store() as store:
        return [training.save(store, step) for step in (1, 2, 3)]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_are_skipped_with_a_warning_that_names_the_file(
    three: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    flip_a_byte(three[2] / "training_state.pt")
    (three[1] / "pytorch_model.bin").unlink()
    assert newest_sound(three[0].parent) == three[0]
    assert f"{three[2]}: training_state.pt has the wrong checksum" in caplog.text
    assert f"{three[1]}: pytorch_model.bin is missing" in caplog.text


def test_a_damaged_checkpoint_does_not_crowd_out_the_one_that_is_written_next(
    training: Training, three: list[Path]
) -> None:
    flip_a_byte(three[2] / "training_state.pt")
    assert newest_sound(training.folder) == three[1]
    with training.store(keep_last=1) as store:
        training.save(store, 2)
    assert newest_sound(training.folder) == three[1]
    assert three[2].with_name("damaged-checkpoint-3").is_dir()  # kept for whoever wants to look


def test_a_phase_whose_final_checkpoint_is_damaged_is_not_finished(training: Training) -> None:
    with training.store() as store:
        final = training.save(store, 1, final=True)
    assert is_finished(training.folder, ALONE)
    flip_a_byte(final / "pytorch_model.bin")
    assert not is_finished(training.folder, ALONE)


def test_the_best_evaluated_checkpoint_is_kept_beside_the_last(training: Training, three: list[Path]) -> None:
    for checkpoint, accuracy in zip(three, (0.9, 0.2, 0.1)):
        metrics = {"reasoning_consistency": accuracy, "final_answer_accuracy": accuracy}
        run_dir.write_json_atomic(run_dir.eval_path(checkpoint, "val"), {"metrics": metrics})
    assert best_checkpoints(training.folder, 1) == [three[0]]
    with training.store(keep_last=2, keep_best=1) as store:
        training.save(store, 4)
    assert sorted(path.name for path in training.folder.iterdir()) == [f"checkpoint-{step}" for step in (1, 3, 4)]


def test_it_is_said_once_when_a_checkpoint_is_deleted_that_nothing_has_evaluated(
    training: Training, three: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    evaluated = {"metrics": {"reasoning_consistency": 0.9, "final_answer_accuracy": 0.9}}
    run_dir.write_json_atomic(run_dir.eval_path(three[0], "val"), evaluated)
    for are_ranked, told in ((False, 0), (True, 1)):
        with training.store(keep_last=1, keep_weights=1, are_ranked=are_ranked) as store:
            for step in range(4, 8):
                training.save(store, step + 4 * are_ranked)
        assert caplog.text.count("nothing has evaluated it, so `select_best` cannot choose it") == told
    assert three[0].exists() is False and f"{three[0]} is deleted, and" not in caplog.text


@pytest.mark.parametrize("damage", ["", "[]", '{"metrics": ', '{"metrics": {}}'])
def test_a_damaged_evaluation_ends_no_training_and_nothing_is_deleted_on_its_word(
    training: Training, three: list[Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = run_dir.eval_path(three[0], "val")
    file.parent.mkdir()
    file.write_text(damage)
    with training.store(keep_last=1, keep_best=1) as store:
        final = training.save(store, 4, final=True)
    run_dir.verify_checkpoint(final)
    assert all(path.exists() for path in three)
    assert f"{training.folder}: no old checkpoint was deleted: " in caplog.text


def test_the_optimizer_of_a_checkpoint_that_trained_other_parts_is_refused(training: Training, data: Path) -> None:
    with training.store() as store:
        saved = training.save(store, 1)
    phase = phase_config({**PHASE2, "learning_rate_multipliers": {**MULTIPLIERS, "vision_encoder": 0.0}})
    bench = Bench.make(data, phase, engine="torch")
    engine = build_engine(TrainingModule(bench.model), bench.config, phase, ALONE, batch_size=2, accumulation=1)
    with pytest.raises(ValueError, match="other parameters than those that are trained now .*vision_encoder"):
        engine.load_optimizer_state(load_training_state(saved)["optimizer"])

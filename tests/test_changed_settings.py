"""The same command with other settings, in a folder that holds a finished or an interrupted run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training_helpers import TINY, make_data, save_stage3, unfinish, write_model_yaml, write_run_yaml

from embervlm import run_dir
from embervlm.config import TrainConfig
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.train import main
from embervlm.select_best import main as select_best
from embervlm.signals import STOP_SIGNALS
from embervlm.training.settings import changes, of_stage4, trained_with

Start = Callable[..., str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, run.yaml, a Stage 3 checkpoint, and `finished`: both phases, 3 steps each, a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("changed")
    data = make_data(folder, 18)
    write_run_yaml(
        folder,
        write_model_yaml(folder),
        data,
        engine="torch",
        sample_records=1,
        save_steps=1,
        max_steps=3,
        eval_samples=2,
    )
    save_stage3(folder / "stage3", TINY, read_records(data, candidates=ROBOTS))
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    main(flags(folder, folder / "finished"))
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def flags(bench: Path, output: Path, *more: object) -> list[str]:
    given = [
        "--config",
        bench / "run.yaml",
        "--stages",
        "4",
        "--output_dir",
        output,
        "--resume_from",
        bench / "stage3" / "checkpoint-final",
        *more,
    ]
    return [str(item) for item in given]


@pytest.fixture
def output(bench: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run. The handlers that training takes for good are given back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    shutil.copytree(bench / "finished", tmp_path / "out")
    yield tmp_path / "out"
    for number, handler in before.items():
        signal.signal(number, handler)


def refusal(bench: Path, output: Path, *more: object) -> str:
    """What the command says that trains nothing; nothing in the folder has changed."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main(flags(bench, output, *more))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    return str(ended.value.code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "phase", "expected"),
    [
        (("--phase1_epochs", "7"), 1, "epochs 1, now 7"),
        (("--phase2_learning_rate", "3e-5"), 2, "learning_rate 0.0005, now 3e-05"),
        (
            ("--set", "stage4.phase2.learning_rate_multipliers.vision_encoder=0.05"),
            2,
            "learning_rate_multipliers.vision_encoder 0.1, now 0.05",
        ),
        (("--set", "stage4.phase2.consistency_loss_weight=0.5"), 2, "consistency_loss_weight 0.2, now 0.5"),
        (("--set", "max_steps=null"), 1, "max_steps 3, now not given"),
        (("--seed", "9"), 1, "seed 0, now 9"),
        (("--batch_size", "2"), 1, "records per update 4, now 2"),
        (("--max_reasoning_length", "390"), 1, "max_reasoning_length 400, now 390"),
        (("--model", "quickstart"), 1, "tiny.yaml, now quickstart"),
        (("--domain", "none"), 1, "domain robots, now none"),
        (("--set", "max_closed_answers=3"), 1, "max_closed_answers 64, now 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_finished_phase_refuses_settings_it_was_not_trained_with_and_names_them(
    more: tuple[str, ...], phase: int, expected: str, bench: Path, output: Path
) -> None:
    found = refusal(bench, output, *more)
    folder = run_dir.phase_dir(output, phase)
    assert found.startswith(f"error: {folder} is finished") and expected in found
    assert "--output_dir" in found and f"deleting {folder}" in found


@pytest.mark.slow
def test_a_finished_run_takes_other_settings_that_no_weight_depends_on(
    bench: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(bench, bench.parent / f"{bench.name}-moved", ignore=shutil.ignore_patterns("finished"))
    main(
        flags(
            bench,
            output,
            "--log_steps",
            "2",
            "--save_steps",
            "9",
            "--eval_steps",
            "5",
            "--precision",
            "bf16",
            "--engine",
            "fsdp",
            "--reasoning_data",
            moved / "reasoning_data.json",
        )
    )
    assert capsys.readouterr().out.count("already finished") == 2


@pytest.mark.slow
def test_other_data_under_a_finished_run_is_refused(bench: Path, output: Path, tmp_path: Path) -> None:
    records = json.loads((bench / "reasoning_data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[:9]))
    found = refusal(bench, output, "--reasoning_data", tmp_path / "other.json")
    assert f"reasoning_data {bench / 'reasoning_data.json'}, now {tmp_path / 'other.json'}" in found


@pytest.mark.slow
def test_other_pictures_under_a_finished_run_are_refused_and_moved_ones_are_not(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    first, moved, other = (tmp_path / name for name in ("first", "moved", "other"))
    for folder in (first, moved, other):
        shutil.copytree(bench / "images", folder / "images")
    picture = next((other / "images").iterdir())
    picture.write_bytes(picture.read_bytes() + b"another")
    main(flags(bench, tmp_path / "out", "--max_steps", "1", "--set", f"image_root={first}"))
    main(flags(bench, tmp_path / "out", "--max_steps", "1", "--set", f"image_root={moved}"))
    assert capsys.readouterr().out.count("already finished") == 2
    found = refusal(bench, tmp_path / "out", "--max_steps", "1", "--set", f"image_root={other}")
    assert f"image_root {first}, now {other}" in found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_an_answer_that_was_corrected_in_the_data_is_noticed(bench: Path, output: Path, tmp_path: Path) -> None:
    text = (bench / "reasoning_data.json").read_text()
    shutil.copytree(bench / "images", tmp_path / "images")
    (tmp_path / "reasoning_data.json").write_text(text.replace("is suited", "is SUITED", 1))
    found = refusal(bench, output, "--reasoning_data", tmp_path / "reasoning_data.json")
    assert f"now {tmp_path / 'reasoning_data.json'}" in found


@pytest.mark.slow
def test_phase_2_of_another_phase_1_is_refused_before_phase_1_trains(bench: Path, output: Path) -> None:
    shutil.rmtree(run_dir.phase_dir(output, 1))
    found = refusal(bench, output, "--phase1_epochs", "2")
    assert f"{run_dir.phase_dir(output, 2)} is finished" in found
    assert "weights of another phase 1, which is now trained again" in found


@pytest.mark.slow
def test_phase_2_of_another_phase_1_is_refused_alone_too(bench: Path, output: Path) -> None:
    shutil.rmtree(run_dir.phase_dir(output, 1))
    main(flags(bench, output, "--phase", "1", "--phase1_learning_rate", "3e-3"))
    found = refusal(bench, output, "--phase", "2", "--resume_from", run_dir.phase_dir(output, 1) / "checkpoint-final")
    assert "starting weights" in found and f"now {run_dir.phase_dir(output, 1) / 'checkpoint-final'}" in found


@pytest.mark.slow
def test_a_baseline_that_was_matched_to_another_phase_is_refused_before_that_trains(bench: Path, output: Path) -> None:
    shutil.copytree(run_dir.phase_dir(output, 2), output / "baseline" / "same_samples")
    shutil.rmtree(run_dir.phase_dir(output, 2))
    with pytest.raises(SystemExit) as ended:
        main(flags(bench, output, "--stages", "4", "baseline"))
    assert f"{output / 'baseline' / 'same_samples'} is finished" in str(ended.value.code)
    assert "weights of another phase 2, which is now trained again" in str(ended.value.code)
    assert not run_dir.list_checkpoints(run_dir.phase_dir(output, 2))


@pytest.mark.slow
def test_a_phase_that_goes_on_with_other_settings_says_which(
    bench: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(run_dir.phase_dir(output, 2), keep_step=1)
    main(
        flags(
            bench,
            output,
            "--phase2_learning_rate",
            "3e-5",
            "--phase2_epochs",
            "3",
            "--set",
            "stage4.phase2.answer_loss_weight=0.4",
        )
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "other settings" in line]
    assert line == (
        "phase 2: continues with other settings than before: epochs 2, now 3; learning_rate 0.0005, now 3e-05; "
        "answer_loss_weight 0.3, now 0.4"
    )
    state = run_dir.read_json(run_dir.phase_dir(output, 2) / "checkpoint-final" / "state.json")
    assert state["settings"]["trained_with"]["epochs"] == 3


@pytest.mark.slow
def test_a_phase_that_goes_on_with_the_same_settings_says_nothing_of_them(
    bench: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(run_dir.phase_dir(output, 2), keep_step=2)
    main(flags(bench, output))
    said = capsys.readouterr().out
    assert "phase 2: resuming from" in said and "other settings" not in said


@pytest.mark.slow
def test_the_guides_checkpoints_outlast_a_phase_and_select_best_ranks_them_all(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those before the newest by their weights alone; a resume goes on from a whole one."""
    output = tmp_path / "out"
    main(flags(bench, output, "--phase", "2", "--max_steps", "5", "--keep_last", "2", "--keep_weights", "2"))
    phase = run_dir.phase_dir(output, 2)
    kept = [(found.step, found.has_state) for found in run_dir.list_checkpoints(phase) if not found.is_final]
    assert kept == [(1, False), (2, False), (3, True), (4, True)]
    assert select_best(["--checkpoints_dir", str(phase), "--json"]) == 0
    told = capsys.readouterr()
    assert sorted(ranked["step"] for ranked in json.loads(told.out[told.out.index("[\n") :])) == [1, 2, 3, 4, 5]
    assert "5 of 5 checkpoints have no evaluation on val yet" in told.err and "s; the others: about" in told.err
    again = run_dir.read_eval(run_dir.eval_path(phase / "checkpoint-1", "val"))
    assert again["num_samples"] <= 2  # the run's eval_samples
    unfinish(phase, keep_step=3)
    main(flags(bench, output, "--phase", "2", "--max_steps", "5"))
    assert f"resuming from {phase / 'checkpoint-3'}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_phase_with_weights_alone_starts_anew_and_says_so(
    bench: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phase = run_dir.phase_dir(output, 2)
    unfinish(phase, keep_step=2)
    for found in run_dir.list_checkpoints(phase):
        run_dir.reduce_to_weights(found.path)
    main(flags(bench, output))
    assert f"{phase / 'checkpoint-2'} has only weights" in caplog.text and "--resume_from" in caplog.text
    assert run_dir.read_json(phase / "checkpoint-final" / "state.json")["step"] == 3


def test_a_batch_of_other_size_on_other_processes_is_no_changed_setting() -> None:
    config = TrainConfig(model="quickstart")
    four, two, halved = (
        trained_with(config.stage4.phase1, config, None, global_batch=batch, processes=size, **of_stage4(config))
        for batch, size in ((64, 4), (32, 2), (32, 4))
    )
    assert not changes(four, two)
    assert changes(four, halved) == ["records per update 64, now 32"]


def test_a_checkpoint_of_an_older_version_is_compared_in_what_it_has() -> None:
    assert changes({"epochs": 5}, {"epochs": 5, "learning_rate": 1.0}) == []
    assert changes({}, {"epochs": 5}) == []

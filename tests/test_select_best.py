"""Which checkpoint is chosen, and what the command prints."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from embervlm.ranking import rank_checkpoints
from embervlm.run_dir import checkpoint_path, eval_path, new_tmp_dir, publish_checkpoint, write_json_atomic
from embervlm.select_best import main, select_best_checkpoint

METRIC = "reasoning_consistency"


def evaluation(consistency, accuracy=0.8) -> dict:
    return {"split": "val", "num_samples": 10, "metrics": {METRIC: consistency, "final_answer_accuracy": accuracy}}


def add(phase: Path, step: int, *scores, final: bool = False) -> Path:
    """A complete checkpoint; with `scores` it carries an evaluation."""
    tmp = new_tmp_dir(phase)
    (tmp / "model.bin").write_text("weights")
    path = publish_checkpoint(tmp, checkpoint_path(phase, None if final else step), step)
    if scores:
        write_json_atomic(eval_path(path, "val"), evaluation(*scores))
    return path


def chosen(phase: Path, **options) -> str:
    return select_best_checkpoint(phase, **options).name


def test_the_highest_metric_wins(tmp_path):
    for step, consistency in ((500, 0.8), (1500, 0.9), (2000, 0.85)):
        add(tmp_path, step, consistency)
    assert chosen(tmp_path) == "checkpoint-1500"
    assert chosen(tmp_path, higher_is_better=False) == "checkpoint-500"


def test_a_consistent_checkpoint_with_worse_answers_is_not_eligible(tmp_path):
    add(tmp_path, 500, 0.99, 0.70)
    add(tmp_path, 1000, 0.90, 0.80)
    ranking = rank_checkpoints(tmp_path)
    assert [ranked.eligible for ranked in ranking] == [True, False]
    assert ranking[1].reason == "final_answer_accuracy 0.7000 is more than 0.01 below the best, 0.8000"


def test_a_checkpoint_exactly_one_point_below_is_eligible(tmp_path):
    add(tmp_path, 500, 0.99, 0.79)
    add(tmp_path, 1000, 0.90, 0.80)
    assert chosen(tmp_path) == "checkpoint-500"


def test_a_tie_goes_to_accuracy_and_then_to_the_later_step(tmp_path):
    add(tmp_path, 500, 0.9, 0.805)
    add(tmp_path, 1000, 0.9, 0.80)
    assert chosen(tmp_path) == "checkpoint-500"
    add(tmp_path, 2000, 0.9, 0.805)
    assert chosen(tmp_path) == "checkpoint-2000"


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("value", ["NaN", "null", "Infinity", '"0.9"'])
def test_a_metric_that_is_no_number_is_not_eligible(tmp_path, value, higher_is_better):
    add(tmp_path, 500, 0.5)
    path = add(tmp_path, 1000, 0.9)
    eval_path(path, "val").write_text(json.dumps(evaluation(0.9)).replace("0.9", value))
    ranking = rank_checkpoints(tmp_path, higher_is_better=higher_is_better)
    assert [ranked.step for ranked in ranking] == [500, 1000]
    assert ranking[1].reason == "reasoning_consistency is missing or not a number"


def test_an_unknown_metric_is_refused_with_those_that_exist(tmp_path):
    add(tmp_path, 500, 0.5)
    with pytest.raises(
        ValueError, match="'fluency' .*the known metrics are .*final_answer_accuracy, .*reasoning_consistency"
    ):
        select_best_checkpoint(tmp_path, metric="fluency")


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    add(tmp_path, 500, 0.5)
    write_json_atomic(eval_path(tmp_path / "checkpoint-1000", "val"), evaluation(0.9))
    assert chosen(tmp_path) == "checkpoint-500"


def test_only_checkpoints_without_an_evaluation_are_evaluated(tmp_path):
    add(tmp_path, 500, 0.5)
    add(tmp_path, 1000)
    calls = []

    def evaluate(path, split):
        calls.append((path.name, split))
        return evaluation(0.9)

    assert chosen(tmp_path, evaluate=evaluate) == "checkpoint-1000"
    assert calls == [("checkpoint-1000", "val")]


def test_the_final_stands_for_the_numbered_checkpoint_of_its_step(tmp_path):
    add(tmp_path, 500, 0.5)
    add(tmp_path, 1000, 0.9)
    add(tmp_path, 1000, final=True)
    assert [Path(ranked.checkpoint).name for ranked in rank_checkpoints(tmp_path)] == [
        "checkpoint-final",
        "checkpoint-500",
    ]


def test_the_command_prints_one_line(tmp_path, capsys):
    path = add(tmp_path, 500, 0.5)
    assert main(["--checkpoints_dir", str(tmp_path), "--metric", METRIC]) == 0
    assert capsys.readouterr().out == f"Best checkpoint: {path}\n"


def test_the_command_prints_a_ranking_as_json(tmp_path, capsys):
    add(tmp_path, 500, 0.5)
    best = add(tmp_path, 1000, 0.9)
    assert main(["--checkpoints_dir", str(tmp_path), "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)
    assert ranking[0] == {
        "checkpoint": str(best),
        "step": 1000,
        "metrics": evaluation(0.9)["metrics"],
        "eligible": True,
        "reason": None,
    }
    assert main(["--checkpoints_dir", str(tmp_path), "--json", "--lower_is_better"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == 500


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
    return str(ended.value)


def test_a_folder_without_checkpoints_is_an_error_that_says_what_was_looked_for(tmp_path):
    error = error_of("--checkpoints_dir", str(tmp_path))
    assert f"{tmp_path}: no complete checkpoint" in error and "COMPLETE" in error


def test_a_damaged_evaluation_is_named(tmp_path):
    file = eval_path(add(tmp_path, 500, 0.5), "val")
    file.write_text('{"metrics": ')
    assert str(file) in error_of("--checkpoints_dir", str(tmp_path))


def test_no_eligible_checkpoint_is_an_error_with_the_reasons(tmp_path):
    add(tmp_path, 500, None)
    assert "checkpoint-500: reasoning_consistency is missing" in error_of("--checkpoints_dir", str(tmp_path))


def test_the_command_starts_within_a_second_and_without_torch(tmp_path):
    add(tmp_path, 500, 0.5)
    code = (
        "import sys; from embervlm.select_best import main; rc = main(); "
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules); sys.exit(str(heavy) if heavy else rc)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "--checkpoints_dir", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # processor time: on a busy machine the clock says little
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_module_runs_as_a_command(tmp_path):
    path = add(tmp_path, 500, 0.5)
    done = subprocess.run(
        [sys.executable, "-m", "embervlm.select_best", "--checkpoints_dir", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Best checkpoint: {path}\n", "")


def test_an_unknown_metric_is_refused_before_anything_is_evaluated(tmp_path):
    add(tmp_path, 500)
    with pytest.raises(ValueError, match="metric 'foo' is in no evaluation.*final_answer_accuracy.*step_completeness"):
        select_best_checkpoint(tmp_path, metric="foo", evaluate=lambda *_: pytest.fail("evaluated"))


def test_an_unknown_split_is_refused_before_anything_is_evaluated(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoints_dir", str(tmp_path), "--split", "tst"])
    assert ended.value.code == 2
    assert "argument --split: 'tst' is not one of train, val, test; did you mean test?" in capsys.readouterr().err


def test_the_command_without_flags_looks_into_the_guides_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    add(Path("outputs/stage4/phase2"), 500, 0.9)
    assert main([]) == 0
    assert capsys.readouterr().out == "Best checkpoint: outputs/stage4/phase2/checkpoint-500\n"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("outputs/quickstart/stage4/phase2", "There are checkpoints in outputs/quickstart/stage4/phase2; choose one"),
        ("outputs/stage4/phase1", "There are checkpoints in outputs/stage4/phase1; choose one with --checkp"),
        (None, "Train first (`python launch/train.py --stages 3 4`)"),
    ],
)
def test_where_there_is_nothing_to_choose_the_command_says_what_there_is(made, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if made:
        add(Path(made), 500, 0.9)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert "outputs/stage4/phase2: no complete checkpoint" in str(ended.value.code)
    assert expected in str(ended.value.code)

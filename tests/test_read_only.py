"""An output that cannot be written is one line, and costs nothing that can be had without it."""

import json
import subprocess
from pathlib import Path

import pytest
from training_helpers import train

from embervlm import run_dir
from embervlm.cli import main
from embervlm.model.embervlm import EmberVLM
from embervlm.select_best import select_best_checkpoint

SHORT = ["--num_samples", "2", "--faithfulness_samples", "0", "--max_new_tokens", "8"]


@pytest.fixture
def make_read_only():
    """`make_read_only(folder)`: really, also for root."""
    mounted = []

    def make(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
            pytest.skip("mounting a file system takes root")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def checkpoint(tiny_model, scene_data, tmp_path):
    """The final checkpoint of a run in `outputs`."""
    folder = run_dir.phase_dir(tmp_path / "outputs", 2)
    part = run_dir.new_tmp_dir(folder)
    tiny_model.save_pretrained(part)
    settings = {"phase": "phase 2", "config": {"reasoning_data": str(scene_data / "reasoning_data.json")}}
    run_dir.write_json_atomic(part / "state.json", {"step": 3, "settings": settings})
    return run_dir.publish_checkpoint(part, run_dir.checkpoint_path(folder, None), 3)


def test_a_read_only_checkpoint_is_evaluated_and_chosen_all_the_same(checkpoint, tmp_path, make_read_only, capsys):
    make_read_only(checkpoint)
    output = tmp_path / "results" / "eval.json"
    main(["evaluate", "--checkpoint", str(checkpoint), "--output_file", str(output), *SHORT])
    assert run_dir.read_eval(output)["num_samples"] == 2
    assert f"warning: nothing was saved in the checkpoint: {checkpoint}/evals/" in capsys.readouterr().err
    assert select_best_checkpoint(checkpoint.parent) == checkpoint


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--checkpoint", "CHECKPOINT", "--output_file", "OUT/x/eval.json", *SHORT],
        ["analyze", "--checkpoint", "CHECKPOINT", "--test_set", "DATA", "--output_dir", "OUT/x", *SHORT],
        ["data", "validate", "--data_file", "DATA", "--output_report", "OUT/report.txt"],
        ["data", "generate", "--output_file", "OUT/x/data.json", "--num_samples", "1"],
        ["data", "augment", "--input", "DATA", "--output_file", "OUT/x/data.json", "--target_samples", "49"],
        ["quickstart", "--output_dir", "OUT/x"],
        ["export", "CHECKPOINT", "OUT/x"],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_a_command_whose_output_is_read_only_ends_in_one_line_that_names_it(
    checkpoint, scene_data, tmp_path, make_read_only, argv
):
    out = make_read_only(tmp_path / "out")
    names = {"CHECKPOINT": str(checkpoint), "DATA": str(scene_data / "reasoning_data.json"), "OUT": str(out)}
    for name, value in names.items():
        argv = [word.replace(name, value) for word in argv]
    with pytest.raises(SystemExit, match=f"error: {out}/.* not written .Read-only file system"):
        main(argv)


@pytest.mark.slow
def test_training_into_a_read_only_folder_ends_in_one_line_on_all_processes(scene_data, tmp_path, make_read_only):
    out = make_read_only(tmp_path / "out")
    done = train("torchrun", "--output_dir", out / "x", "--reasoning_data", scene_data / "reasoning_data.json")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith(f"error: {out}/x/owner.json: not ")]) == 1


def test_the_report_finds_the_evaluation_that_was_written_elsewhere(checkpoint, tmp_path, capsys):
    run, results = tmp_path / "outputs", tmp_path / "results" / "stage4_eval.json"
    evaluation = ["evaluate", "--checkpoint", str(checkpoint), "--split", "test", "--output_file", str(results), *SHORT]
    main([*evaluation, "--save_reasoning_samples"])
    capsys.readouterr()
    main(["report", str(run)])
    said = capsys.readouterr().out
    assert f"Evaluation: {run_dir.eval_path(checkpoint, 'test')}" in said
    page = (run_dir.visualizations_dir(run) / "index.html").read_text()
    sample = json.loads((results.parent / "stage4_eval_samples.json").read_text())[0]
    assert sample["id"] in page and "reasoning_consistency" in page
    main(evaluation)  # without samples: the old ones are not those of this evaluation
    assert not (checkpoint / "evals" / "test_samples.json").exists()


def test_a_report_without_an_evaluation_says_where_it_looked(checkpoint, tmp_path, capsys):
    run = tmp_path / "outputs"
    run_dir.write_text_atomic(run_dir.metrics_log_path(run_dir.phase_dir(run, 2)), '{"step": 1, "loss": {}}\n')
    main(["report", str(run)])
    said = capsys.readouterr().out
    assert f"looked for {run_dir.eval_results_path(run)}, {run_dir.eval_path(checkpoint, 'test')}. " in said


def test_a_checkpoint_of_a_read_only_folder_loads(checkpoint: Path, make_read_only) -> None:
    EmberVLM.from_pretrained(make_read_only(checkpoint))

"""`launch/train.py` and `scripts/train_all.py` as users start them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_helpers import (
    PHASE1,
    PHASE2,
    REPOSITORY,
    TINY,
    command,
    environment,
    make_data,
    ok,
    phase_config,
    run,
    run_ranks,
    save_stage3,
    train,
    unfinish,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.config_file import model_preset
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.train import main
from embervlm.signals import STOP_SIGNALS
from embervlm.training.schedule import learning_rate_factor

STEPS = 2
GIB = 1 << 30


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, tiny.yaml, run.yaml and an untrained Stage 3 checkpoint in start/stage3."""
    folder = tmp_path_factory.mktemp("cli")
    data = make_data(folder)
    write_run_yaml(folder, write_model_yaml(folder), data)
    save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    return folder


@pytest.fixture(scope="module")
def trained(bench: Path) -> Path:
    """Output folder of Stage 3 and both phases, two steps each, under the deepspeed launcher."""
    output = bench / "trained"
    done = ok(
        train(
            "deepspeed",
            "--config",
            bench / "run.yaml",
            "--stages",
            "3",
            "4",
            "--model",
            bench / "tiny.yaml",
            "--output_dir",
            output,
            "--max_steps",
            str(STEPS),
        )
    )
    (bench / "stdout").write_text(done.stdout)
    (bench / "stderr").write_text(done.stderr)
    return output


def metrics(output: Path, phase: int) -> list[dict]:
    lines = run_dir.metrics_log_path(run_dir.phase_dir(output, phase)).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "reasoning_module.bin", "config.json", "tokenizer.json", "COMPLETE", "state.json"]
)
def test_each_phase_leaves_the_guides_files(phase: int, name: str, trained: Path) -> None:
    assert (trained / "stage4" / f"phase{phase}" / "checkpoint-final" / name).stat().st_size > 0


@pytest.mark.slow
def test_stage_3_leaves_a_checkpoint_without_a_reasoning_module(trained: Path) -> None:
    final = trained / "stage3" / "checkpoint-final"
    assert (final / "COMPLETE").exists() and not (final / "reasoning_module.bin").exists()
    assert not any(key.startswith("reasoning_module.") for key in weights_of(final))


@pytest.mark.slow
def test_reasoning_module_bin_holds_the_module_of_the_whole_model(trained: Path) -> None:
    final = trained / "stage4" / "phase2" / "checkpoint-final"
    whole, own = weights_of(final), torch.load(final / "reasoning_module.bin", weights_only=True)
    assert {key for key in whole if key.startswith("reasoning_module.")} == {f"reasoning_module.{key}" for key in own}
    assert all(torch.equal(whole[f"reasoning_module.{key}"], value) for key, value in own.items())


@pytest.mark.slow
def test_reasoning_samples_are_numbered_by_the_epoch_over_both_phases(trained: Path) -> None:
    names = sorted(path.name for path in (trained / "stage4" / "reasoning_samples").iterdir())
    assert names == ["epoch_1_samples.json", f"epoch_{PHASE1['epochs'] + 1}_samples.json"]


@pytest.mark.slow
def test_reasoning_samples_hold_question_chain_and_answer(trained: Path) -> None:
    (sample,) = json.loads(run_dir.reasoning_samples_path(trained, 1).read_text())
    assert {"image", "instruction", "reasoning_steps", "answer", "gold_answer", "gold_steps"} <= sample.keys()


@pytest.mark.slow
def test_a_phase_that_ends_by_the_clock_warms_up_all_the_same(bench: Path, tmp_path: Path) -> None:
    start = bench / "start" / "stage3" / "checkpoint-final"
    flags = ("--config", bench / "run.yaml", "--phase", "1", "--resume_from", start, "--output_dir", tmp_path / "out")
    ok(train("python", *flags, "--set", "stage4.phase1.max_minutes=0.05", "--set", "stage4.phase1.warmup_steps=9"))
    lines = metrics(tmp_path / "out", 1)
    assert lines[0]["learning_rate"]["reasoning_module"] == pytest.approx(PHASE1["learning_rate"] / 10)
    assert max(line["learning_rate"]["reasoning_module"] for line in lines) > PHASE1["learning_rate"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "values"), [(1, PHASE1), (2, PHASE2)])
def test_the_log_holds_the_closed_form_rate_of_every_group_at_every_step(
    phase: int, values: dict, trained: Path
) -> None:
    config = phase_config(values)
    found = metrics(trained, phase)
    assert [line["step"] for line in found] == [1, 2]
    for step, line in enumerate(found):
        factor = learning_rate_factor(step, STEPS, config.warmup_steps, config.final_lr_ratio)
        wanted = {name: scale * config.learning_rate * factor for name, scale in config.multipliers.items() if scale}
        assert line["learning_rate"] == pytest.approx(wanted)


@pytest.mark.slow
def test_the_output_says_what_is_trained_how_it_goes_and_what_to_do_next(trained: Path, bench: Path) -> None:
    said, bars = (bench / "stdout").read_text(), (bench / "stderr").read_text()
    assert re.search(r"(?m)^phase 1: train_reasoning_heads\n  model +\S+tiny.yaml, [\d,]+ parameters\n  trains ", said)
    assert re.search(r"(?m)^  trains +([\d,]+) \(\d[\d.]*%\): reasoning_module \1$", said)
    assert re.search(r"(?m)^  steps +2, of \d+ records each: 2 processes x \d+", said)
    final = run_dir.checkpoint_path(run_dir.phase_dir(trained, 2), None)
    assert said.count("saved ") == 3 and f"saved {final}\n" in said
    assert f'Ask it: embervlm ask PICTURE "QUESTION" --checkpoint {final}\n' in said
    assert "\r" not in bars and re.search(r"(?m)^phase 2: 2/2 \[.* epoch 1/\d, loss [\d.]+ \(reasoning ", bars)
    for number in (1, 2):
        weights = phase_config((PHASE1, PHASE2)[number - 1]).loss_weights
        for line in metrics(trained, number):
            assert line["total_loss"] == pytest.approx(sum(weights[term] * loss for term, loss in line["loss"].items()))


@pytest.mark.slow
def test_the_log_holds_every_loss_term_of_the_phase(trained: Path) -> None:
    assert {"reasoning", "consistency", "answer"} <= metrics(trained, 1)[0]["loss"].keys()
    assert metrics(trained, 2)[0]["loss"].keys() == {"reasoning", "consistency", "answer", "multimodal", "direct"}
    assert all(math.isfinite(value) for line in metrics(trained, 2) for value in line["loss"].values())


@pytest.mark.slow
def test_phase_1_leaves_the_backbone_of_stage_3_bit_for_bit_as_it_was(trained: Path) -> None:
    before = weights_of(trained / "stage3" / "checkpoint-final")
    after = weights_of(trained / "stage4" / "phase1" / "checkpoint-final")
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.slow
def test_phase_2_moves_every_component(trained: Path) -> None:
    before, after = (weights_of(trained / "stage4" / f"phase{phase}" / "checkpoint-final") for phase in (1, 2))
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"vision_encoder", "projection", "language_model", "reasoning_module"}


@pytest.mark.slow
def test_the_resolved_config_is_saved_with_the_checkpoint(trained: Path) -> None:
    state = run_dir.read_json(trained / "stage4" / "phase2" / "checkpoint-final" / "state.json")
    config = state["settings"]["config"]
    assert state["step"] == STEPS and config["max_steps"] == STEPS and config["output_dir"] == str(trained)


@pytest.mark.slow
def test_the_guides_commands_train_phase_1_then_phase_2_and_keep_the_wandb_run_over_a_resume(bench: Path) -> None:
    """`torchrun scripts/train_all.py`, with a YAML of a tiny model beside the guide's flags."""
    output = bench / "guide"

    def start(phase: int, source: Path, *, launcher: str = "ranks") -> str:
        script = REPOSITORY / "scripts" / "train_all.py"
        flags: tuple[str | Path, ...] = (
            *("--stages", "4", "--phase", str(phase), "--resume_from", source, "--output_dir", output),
            *("--reasoning_data", bench / "reasoning_data.json", "--config", bench / "run.yaml"),
            *("--wandb_project", "embervlm", "--wandb_run_name", f"stage4_phase{phase}"),
            *("--max_steps", "2", "--save_steps", "1"),
        )
        wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        if launcher == "torchrun":
            return ok(run(command("torchrun", script, *flags), **wandb)).stdout
        return ok(run_ranks(script, *flags, processes=2, **wandb)).stdout

    phase1 = run_dir.phase_dir(output, 1)
    start(1, bench / "start" / "stage3" / "checkpoint-final", launcher="torchrun")
    run_id = (phase1 / "wandb_run_id").read_text()
    unfinish(phase1, keep_step=1)
    (phase1 / "wandb_run_id").unlink()  # the checkpoint knows
    assert "resuming from" in start(1, bench / "start" / "stage3" / "checkpoint-final")
    assert (phase1 / "wandb_run_id").read_text() == run_id
    runs = sorted(path.name for path in (phase1 / "wandb").glob("offline-run-*"))
    assert runs and {name.split("-")[3] for name in runs} == {run_id}
    start(2, phase1 / "checkpoint-final")
    assert (run_dir.phase_dir(output, 2) / "checkpoint-final" / "COMPLETE").exists()
    assert (run_dir.phase_dir(output, 2) / "wandb_run_id").read_text() != run_id


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run_with_one_line_and_no_checkpoint(bench: Path, tmp_path: Path) -> None:
    start = tmp_path / "nan" / "checkpoint-final"
    shutil.copytree(bench / "start" / "stage3" / "checkpoint-final", start, ignore=lambda *_: ["COMPLETE"])
    weights = weights_of(start)
    weights["projection.norm.weight"].fill_(float("nan"))
    torch.save(weights, start / "pytorch_model.bin")
    result = train(
        "deepspeed",
        "--config",
        bench / "run.yaml",
        "--stages",
        "4",
        "--phase",
        "1",
        "--resume_from",
        start,
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        "2",
    )
    assert result.returncode != 0
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "step 0: loss term" in errors[0] and "Records of rank" in errors[0]
    assert not run_dir.list_checkpoints(run_dir.phase_dir(tmp_path / "out", 1))


def wait_until(holds: Callable[[], bool], training: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert training.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def fill(disk: Path) -> bool:
    """Until nothing more goes onto it; what is deleted there later makes room again."""
    with contextlib.suppress(OSError), open(disk / "filler", "ab", buffering=0) as filler:
        while filler.write(bytes(1 << 16)):
            pass
    return True


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_run_on_a_disk_that_fills_up_stops_with_one_line_or_goes_on_as_configured(
    on_error: str, bench: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        log = tmp_path / "log"
        argv = command(
            "torchrun",
            REPOSITORY / "launch" / "train.py",
            "--config",
            bench / "run.yaml",
            "--stages",
            "4",
            "--phase",
            "2",
            "--resume_from",
            bench / "start" / "stage3" / "checkpoint-final",
            "--engine",
            "torch",
            "--output_dir",
            disk / "out",
            "--save_steps",
            "2",
            "--phase2_epochs",
            "50",
            "--set",
            f"on_save_error={on_error}",
        )
        phase = run_dir.phase_dir(disk / "out", 2)
        with log.open("wb") as out:
            training = subprocess.Popen(argv, stdout=out, stderr=out, env=environment(), start_new_session=True)
        try:
            wait_until(lambda: bool(run_dir.list_checkpoints(phase)), training)
            if on_error == "continue":
                goes_on = "training continues (on_save_error: continue)"
                wait_until(lambda: fill(disk) and goes_on in log.read_text(), training)
                (disk / "filler").unlink()
                newest = run_dir.list_checkpoints(phase)[-1].step
                wait_until(lambda: run_dir.list_checkpoints(phase)[-1].step > newest, training)
            else:
                until = time.monotonic() + 120
                while training.poll() is None:
                    fill(disk)
                    assert time.monotonic() < until
                    time.sleep(0.05)
                assert training.returncode != 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(training.pid, signal.SIGKILL)
            training.wait()
        told = log.read_text()
        assert "No space left on device" in told and f"{phase}/checkpoint-" in told
        if on_error == "stop":
            errors = [line for line in told.splitlines() if line.startswith("error: ")]
            assert (
                len(errors) == 1 and f"the last good checkpoint is {run_dir.list_checkpoints(phase)[-1].path}" in told
            )
            assert "embervlm/run" not in told  # a line of a traceback
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_missing_stage_3_checkpoint_is_one_line_that_says_what_to_run(bench: Path, tmp_path: Path) -> None:
    result = train(
        "python",
        "--config",
        bench / "run.yaml",
        "--stages",
        "4",
        "--output_dir",
        tmp_path / "nothing",
        "--engine",
        "torch",
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "nothing" / "stage3" / "checkpoint-final") in line and "--stages 3" in line


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["embervlm-39m", "embervlm-48m"])
def test_a_full_size_preset_does_three_real_steps_in_each_phase(preset: str, bench: Path, tmp_path: Path) -> None:
    """Six records, one per process and step; in under 8 GiB for both processes.

    With one val record there is no other picture to ask about, which would take longer than the steps.
    """
    settings = model_preset(preset)
    records = json.loads((bench / "reasoning_data.json").read_text())[:7]
    for number, record in enumerate(records):
        record["metadata"]["split"] = "val" if number == 6 else "train"
    data = tmp_path / "reasoning_data.json"
    data.write_text(json.dumps(records))
    shutil.copytree(bench / "images", tmp_path / "images")
    start = save_stage3(tmp_path / "start" / "stage3", settings, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(tmp_path, preset, data, stage4__batch_size=1, stage4__max_reasoning_length=350)
    output = tmp_path / "outputs"
    ok(
        train(
            "deepspeed", "--config", config, "--stages", "4", "--resume_from", start, "--max_steps", "3", timeout_s=600
        )
    )
    for phase in (1, 2):
        found = metrics(output, phase)
        assert [line["step"] for line in found] == [1, 2, 3]
        assert all(math.isfinite(value) for line in found for value in line["loss"].values())
        assert run_dir.read_json(run_dir.phase_dir(output, phase) / "checkpoint-final" / "state.json")["step"] == 3
    of_one_process = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert 2 * of_one_process < 8 * GIB
    shutil.rmtree(output)


# -- what is wrong with a command, found before any process is joined ---------------------------------------------


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """`main` takes the stop signals for the rest of its process's life, which here is pytest's."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def message(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What `launch/train.py` says when it refuses `argv`."""
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in argv])
    assert ended.value.code not in (0, None)
    return str(ended.value.code) if isinstance(ended.value.code, str) else capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--engine", "horovod"], "engine: 'horovod' is not one of deepspeed, fsdp, torch"),
        (["--precision", "int8"], "precision: 'int8' is not one of"),
        (["--zero_stage", "4"], "zero_stage: 4 is not 0, 1, 2 or 3"),
        (["--batch_size", "0"], "batch_size: 0 is less than 1"),
        (["--batch_size", "many"], "--batch_size"),
        (["--max_steps", "0"], "max_steps: 0 is less than 1"),
        (["--phase", "4"], "--phase"),
        (["--phase1_epochs", "0"], "epochs: 0 is less than 1"),
        (["--phase2_learning_rate", "-1"], "learning_rate: -1.0 is not positive"),
        (["--stages", "5"], "--stages: 5: this program trains 3, 4 and baseline"),
        (["--stages", "3,4,all"], "--stages: all"),
        (["--phase", "1", "--run_both_phases"], "--phase and --run_both_phases contradict"),
        (["--stages", "3", "--phase", "2"], "--phase 2 is a phase of Stage 4, which --stages 3 leaves out"),
        (["--stages", "3", "4", "--resume_from", "there"], "so --resume_from there would not be used"),
        (["--stages", "3", "--set", "resume_from=there"], "so --resume_from there would not be used"),
        (["--stages", "3", "--model", "embervlm-7b"], "no preset 'embervlm-7b'"),
        (["--set", "stage4.phase1.learnin_rate=1"], "did you mean learning_rate"),
        (["--set", "log_steps"], "write KEY=VALUE"),
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = message(capsys, *flags, "--output_dir", tmp_path)
    assert expected in found and "Traceback" not in found


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--precision", "fp8"], "error: --precision fp8: precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
        (["--phase1_epochs", "0"], "error: --phase1_epochs 0: stage4.phase1: "),
        (["--set", "stage4.phase1.learnin_rate=1"], "error: --set stage4.phase1.learnin_rate 1: stage4.phase1.learnin"),
        (["--set", "save_steps.a=1"], "error: --set save_steps.a 1: save_steps.a: save_steps is 500 in the YAML"),
        (["--deepspeed_config", "none.json"], "error: --deepspeed_config none.json: no such file"),
        (["--engine", "jax", "--zero_stage", "7"], "error: --engine jax: engine: "),
    ],
)
def test_a_wrong_flag_is_blamed_and_not_the_yaml(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = message(capsys, *flags)
    assert found.startswith(expected) and "training_stages.yaml" not in found


def test_a_mistake_in_the_yaml_is_not_blamed_on_a_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("precision: fp8")
    found = message(capsys, "--config", tmp_path / "run.yaml", "--engine", "torch")
    assert found.startswith(f"error: {tmp_path / 'run.yaml'}: precision: 'fp8'")


def test_a_mistake_in_a_node_recipe_names_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = (REPOSITORY / "configs" / "cluster" / "v100x1.yaml").read_text().replace("fp16", "fp8")
    (tmp_path / "own.yaml").write_text(recipe)
    found = message(capsys, "--cluster", tmp_path / "own.yaml")
    assert found.startswith(f"error: --cluster {tmp_path / 'own.yaml'}: precision fp8: precision: 'fp8' is not one of")


def test_stage_3_asks_for_data_that_is_missing(capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path) -> None:
    found = message(
        capsys,
        "--config",
        bench / "run.yaml",
        "--stages",
        "3",
        "--output_dir",
        tmp_path,
        "--reasoning_data",
        tmp_path / "none.json",
    )
    assert f"--reasoning_data {tmp_path / 'none.json'}: no such file" in found and "data generate" in found


def test_a_checkpoint_of_another_size_than_the_model_is_a_clear_error(
    capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path
) -> None:
    other = write_model_yaml(tmp_path, projection_hidden_size=40)
    found = message(
        capsys,
        "--config",
        bench / "run.yaml",
        "--stages",
        "4",
        "--output_dir",
        tmp_path,
        "--model",
        other,
        "--resume_from",
        bench / "start" / "stage3" / "checkpoint-final",
    )
    assert "belongs to another model" in found and "--model" in found and "projection" in found


def test_a_checkpoint_with_a_flipped_byte_is_a_clear_error(
    capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path
) -> None:
    start = tmp_path / "stage3" / "checkpoint-final"
    shutil.copytree(bench / "start" / "stage3" / "checkpoint-final", start)
    content = bytearray((start / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (start / "pytorch_model.bin").write_bytes(content)
    found = message(capsys, "--config", bench / "run.yaml", "--stages", "4", "--output_dir", tmp_path)
    assert "pytorch_model.bin has the wrong checksum" in found


def test_phase_2_alone_without_phase_1_says_what_to_do(
    capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path
) -> None:
    found = message(capsys, "--config", bench / "run.yaml", "--stages", "4", "--phase", "2", "--output_dir", tmp_path)
    assert "phase1/checkpoint-final: no such checkpoint; train it first" in found


def test_a_baseline_before_stage_4_says_what_to_do(
    capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path
) -> None:
    found = message(capsys, "--config", bench / "run.yaml", "--stages", "baseline", "--output_dir", tmp_path)
    assert "train Stage 4 first" in found


def test_the_local_rank_that_the_deepspeed_launcher_appends_is_accepted(
    capsys: pytest.CaptureFixture[str], bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    found = message(capsys, "--local_rank=0", "--config", bench / "run.yaml", "--stages", "4", "--output_dir", tmp_path)
    assert "no such checkpoint" in found

"""Phase 3 from the command line: records without chains, a run that is killed, and policies that cannot learn."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    REPOSITORY,
    TINY,
    assert_same_weights,
    make_data,
    make_tokenizer,
    ok,
    run,
    save_stage3,
    train,
    unfinish,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data.records import ReasoningRecord, read_records
from embervlm.model.embervlm import build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

pytestmark = pytest.mark.slow
PHASE3: dict[str, Any] = {
    "prompts_per_rollout": 4,
    "num_generations": 4,
    "num_iterations": 2,
    "rollout_batch_size": 2,
    "max_completion_length": 24,
    "learning_rate": 2e-3,
    "warmup_steps": 1,
    "supervised_records_ratio": 0.5,
    "log_group_steps": 2,
    "kl_coef": 0.05,
    "reward": {"answer": 1.0, "form": 0.2, "soundness": 0.2, "length": 0.1},
}
LAUNCH = {
    "torch": ("python", 1, ("--engine", "torch")),
    "torch x2": ("ranks", 2, ("--engine", "torch")),
    "zero2": ("ranks", 2, ("--engine", "deepspeed", "--zero_stage", "2")),
    "zero3": ("ranks", 2, ("--engine", "deepspeed", "--zero_stage", "3")),
    "fsdp": ("ranks", 2, ("--engine", "fsdp")),
}


def save_stage4(folder: Path, records: list[ReasoningRecord]) -> Path:
    """A model that has learned nothing, but writes chains of all kinds."""
    torch.manual_seed(1)
    model = build_model({**TINY, "stage": 4, "candidates": ROBOTS}, load_pretrained=False)
    head = model.reasoning_module.reasoning_head
    torch.nn.init.normal_(head.output.weight, std=0.02)
    torch.nn.init.normal_(head.token_embedding.weight, std=0.15)  # structure tokens are drawn often
    model.attach_tokenizer(make_tokenizer(records, model.language_model.vocab_size))
    part = run_dir.new_tmp_dir(folder)
    model.save_pretrained(part)
    return run_dir.publish_checkpoint(part, run_dir.checkpoint_path(folder, None), step=0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third record has a chain."""
    folder = tmp_path_factory.mktemp("phase3")
    data = make_data(folder)
    records = read_records(data, candidates=ROBOTS)
    save_stage4(folder / "start", records)
    save_stage3(folder / "stage3", TINY, records)
    values = json.loads(data.read_text())
    for number, value in enumerate(values):
        if number % 3:
            del value["reasoning"]
            value["metadata"] = {"split_group": value["metadata"]["split_group"]}
    data.write_text(json.dumps(values))
    write_run_yaml(folder, write_model_yaml(folder), data, stage4__phase3=PHASE3)
    return folder


def start(bench: Path, output: Path, engine: str, *more: str) -> subprocess.CompletedProcess[str]:
    launcher, processes, extra = LAUNCH[engine]
    origin = () if "--resume_from" in more else ("--resume_from", str(bench / "start" / "checkpoint-final"))
    flags = ("--config", bench / "run.yaml", "--stages", "4", "--phase", "3", "--output_dir", output, *origin)
    return train(launcher, *map(str, flags), *extra, *more, processes=processes)


def final(output: Path) -> Path:
    return run_dir.checkpoint_path(run_dir.phase_dir(output, 3), None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(bench: Path) -> Path:
    """Two epochs of 7 rollouts with 2 updates each, saved where a rollout has ended after step 5."""
    output = bench / "straight"
    ok(start(bench, output, "torch", "--max_steps", "10", "--save_steps", "5"))
    return output


@pytest.mark.parametrize("engine", ["torch", "torch x2", "zero2", "zero3", "fsdp"])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(bench: Path, straight: Path, engine: str) -> None:
    again = bench / f"again {engine}"
    shutil.copytree(straight, again)
    unfinish(run_dir.phase_dir(again, 3), keep_step=6)
    told = ok(start(bench, again, engine, "--max_steps", "10", "--save_steps", "5")).stdout
    assert "phase 3: resuming from" in told and "checkpoint-6" in told
    found, wanted = weights_of(final(again)), weights_of(final(straight))
    if engine == "torch":
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    else:
        assert_same_weights(found, wanted, rtol=2e-2)
    stopped = weights_of(run_dir.checkpoint_path(run_dir.phase_dir(straight, 3), 6))
    assert any(not torch.equal(stopped[key], value) for key, value in wanted.items())
    logs = [lines_of(run_dir.metrics_log_path(run_dir.phase_dir(output, 3))) for output in (straight, again)]
    assert [line["step"] for line in logs[1]] == [line["step"] for line in logs[0]] == list(range(1, 11))
    assert [line["policy"]["tokens_drawn"] for line in logs[1]] == [line["policy"]["tokens_drawn"] for line in logs[0]]
    groups = [lines_of(run_dir.phase_dir(output, 3) / "groups.jsonl") for output in (straight, again)]
    assert [group["id"] for group in groups[1]] == [group["id"] for group in groups[0]]


def test_the_log_says_what_was_drawn_and_what_it_was_rewarded_for(straight: Path) -> None:
    lines = lines_of(run_dir.metrics_log_path(run_dir.phase_dir(straight, 3)))
    assert {"policy", "kl", "reasoning", "consistency", "answer"} <= lines[1]["loss"].keys()
    assert {"reward_answer", "reward_form", "reward_soundness", "reward_length", "group_spread"} <= lines[0][
        "policy"
    ].keys()
    assert lines[0]["policy"]["drift"] < 1e-4 < lines[1]["policy"]["drift"]  # the second update is off policy
    assert lines[0]["policy"]["clipped"] == 0
    group = lines_of(run_dir.phase_dir(straight, 3) / "groups.jsonl")[0]
    assert len(group["chains"]) == 4 and sum(chain["advantage"] for chain in group["chains"]) == pytest.approx(0)


def test_an_evaluation_reads_records_without_chains(straight: Path) -> None:
    written = straight / "eval.json"
    argv = ["scripts/evaluate.py", "--checkpoint", str(final(straight)), "--split", "train", "--num_samples", "4"]
    ok(run([str(REPOSITORY / ".venv/bin/python"), *argv, "--output_file", str(written)]))
    assert json.loads(written.read_text())["num_samples"] == 4


def test_an_epoch_that_teaches_nothing_stops_behind_a_checkpoint_or_goes_on(bench: Path) -> None:
    """A model that has learned nothing never names the right answer."""
    answer_alone = ("--set", "stage4.phase3.reward={answer: 1.0, form: 0.0, soundness: 0.0}")
    output = bench / "no signal"
    stopped = start(bench, output, "torch", *answer_alone)
    assert stopped.returncode == 1 and "nothing can be learned from them" in stopped.stderr
    assert "epoch 1" in stopped.stderr and "on_no_signal" in stopped.stderr
    assert [found.step for found in run_dir.list_checkpoints(run_dir.phase_dir(output, 3))] == [12]
    told = ok(start(bench, output, "torch", *answer_alone, "stage4.phase3.on_no_signal=continue"))
    assert "(on_no_signal: continue)" in told.stdout + told.stderr and final(output).is_dir()


def test_a_collapsed_policy_stops_or_its_chains_are_skipped(bench: Path) -> None:
    collapsed = ("--max_steps", "2", "--set", "stage4.phase3.collapse_ratio=0.0")
    stopped = start(bench, bench / "collapse", "torch", *collapsed)
    assert stopped.returncode == 1 and "the policy has collapsed" in stopped.stderr and "tokens it" in stopped.stderr
    told = ok(start(bench, bench / "collapse", "torch", *collapsed, "stage4.phase3.on_collapse=skip"))
    assert "these chains are skipped" in told.stdout + told.stderr


def test_phase_3_wants_a_model_that_writes_chains(bench: Path) -> None:
    told = start(bench, bench / "x", "torch", "--resume_from", str(bench / "stage3" / "checkpoint-final")).stderr
    assert "is a Stage 3 checkpoint" in told and "Traceback" not in told


def test_records_without_answers_are_named_or_left_out(bench: Path) -> None:
    values = json.loads((bench / "reasoning_data.json").read_text())
    del values[1]["answer"], values[2]["answer"]
    data = bench / "unanswered.json"
    data.write_text(json.dumps(values))
    flags = ("--reasoning_data", str(data), "--max_steps", "2")
    told = start(bench, bench / "unanswered", "torch", *flags).stderr
    assert "record 2: answer: is missing" in told and "record 3: answer: is missing" in told
    skipping = ("--set", "stage4.phase3.unanswered_records=skip")
    told = ok(start(bench, bench / "unanswered", "torch", *flags, *skipping)).stdout
    assert "records are left out, because they have no answer" in told and values[1]["id"] in told


def test_phases_1_and_2_train_on_the_records_with_chains_alone(bench: Path) -> None:
    flags = ("--config", bench / "run.yaml", "--stages", "4", "--engine", "torch", "--max_steps", "2")
    origin = ("--resume_from", bench / "stage3" / "checkpoint-final", "--output_dir", bench / "all")
    told = ok(train("python", *map(str, (*flags, *origin)))).stdout
    assert "phase 3: finished" in told and "phase 1: train_reasoning_heads" in told
    assert f"records    {len([1 for _ in range(27)]) // 3}" in told.replace(",", "")

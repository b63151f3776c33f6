"""Every engine goes the whole way: Stage 3, both phases with all that runs beside the steps, and the evaluation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_helpers import assert_same_weights, make_data, ok, train, weights_of, write_model_yaml, write_run_yaml

from embervlm import cli, run_dir

pytestmark = pytest.mark.slow
GLOBAL_BATCH, SAVE, EVAL = 12, 2, 4
ENGINES: dict[str, tuple[str, ...]] = {
    **{f"zero{stage}": ("--engine", "deepspeed", "--zero_stage", str(stage)) for stage in range(4)},
    "fsdp": ("--engine", "fsdp"),
    "torch": ("--engine", "torch"),
}
RUNS = [(name, size) for size in (2, 1, 3) for name in ENGINES if (name, size) != ("torch", 1)]
"""Engine and processes: two, alone, and three, where shards and shares are not alike."""


@dataclass
class Run:
    """A finished run."""

    output: Path
    said: str

    @property
    def checkpoints(self) -> list[run_dir.Checkpoint]:
        return [found for phase in (1, 2) for found in run_dir.list_checkpoints(run_dir.phase_dir(self.output, phase))]

    @property
    def val_losses(self) -> list[float]:
        """Those that phase 2 measured, at each of its steps the newest one."""
        lines = run_dir.metrics_log_path(run_dir.phase_dir(self.output, 2)).read_text().splitlines()
        return [entry["val_loss"] for entry in map(json.loads, lines) if "val_loss" in entry]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    # phase 2 trains on behind the samples of its first epoch
    write_run_yaml(
        folder,
        write_model_yaml(folder),
        make_data(folder),
        save_steps=SAVE,
        eval_steps=EVAL,
        eval_samples=2,
        report=True,
        sample_records=2,
        stage4__phase2__stop_at_plateau=True,  # the val loss is measured beside the steps
        stage4__phase2__plateau_steps=1,
    )
    return folder


def start(bench: Path, name: str, processes: int) -> Run:
    output, batch = bench / f"{name}-{processes}", str(GLOBAL_BATCH // processes)
    launcher = "python" if processes == 1 else "ranks"
    found = ok(
        train(
            launcher,
            "--config",
            bench / "run.yaml",
            "--stages",
            "3",
            "4",
            *ENGINES[name],
            "--output_dir",
            output,
            "--batch_size",
            batch,
            "--set",
            f"stage3_batch_size={batch}",
            processes=processes,
            timeout_s=400,
        )
    )
    return Run(output, found.stdout + found.stderr)


@pytest.fixture(scope="module")
def alone(bench: Path) -> Run:
    """Plain torch in one process, over the same global batches."""
    return start(bench, "torch", 1)


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_an_engine_goes_the_whole_way_to_the_weights_of_plain_torch(
    name: str, processes: int, bench: Path, alone: Run
) -> None:
    run = start(bench, name, processes)
    for failure in ("not evaluated", "no report", "different backends", "not known whether"):
        assert failure not in run.said
    for stage in ("stage 3", "phase 1", "phase 2"):
        assert f"{stage}: with the right picture" in run.said
        assert re.search(rf"{stage}: of \d+ questions \d+% are answered right with the right picture", run.said)
    assert len(alone.val_losses) > 2 and run.val_losses == pytest.approx(alone.val_losses, rel=1e-3)
    assert [found.step for found in run.checkpoints] == [found.step for found in alone.checkpoints]
    for found in run.checkpoints:
        written = run_dir.eval_path(found.path, "val").exists()
        assert written == (found.is_final or found.step % EVAL == 0), found.path
    for epoch in (1, 2, 3):
        samples = json.loads(run_dir.reasoning_samples_path(run.output, epoch).read_text())
        assert len(samples) == 2 and all(
            {"reasoning_steps", "answer", "gold_answer"} <= sample.keys() for sample in samples
        )
    assert f"Report: {run.output}" in run.said
    for folder in (run_dir.stage3_dir(run.output), *(run_dir.phase_dir(run.output, phase) for phase in (1, 2))):
        wanted = run_dir.checkpoint_path(alone.output / folder.relative_to(run.output), None)
        assert_same_weights(weights_of(run_dir.checkpoint_path(folder, None)), weights_of(wanted), rtol=1e-3)
    result = run.output / "results" / "eval.json"
    cli.main(
        [
            "evaluate",
            "--checkpoint",
            str(run_dir.checkpoint_path(run_dir.phase_dir(run.output, 2), None)),
            "--output_file",
            str(result),
            "--num_samples",
            "4",
            "--no_wandb",
        ]
    )
    assert json.loads(result.read_text())["metrics"].keys() >= {"final_answer_accuracy", "reasoning_consistency"}

"""What only a GPU shows: DeepSpeed's own fp16, copies beside kernels that still run, a GPU machine's defaults.

One process and one GPU, so nothing is shared out between GPUs here; `test_engine.py` shows that over gloo.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import run_case
from smoke import TARGETS, quickstart
from test_engine import ALONE, CURVE, CURVE_STEPS, PHASE2, SHARDED, STEPS, curves, drive, losses
from training_helpers import Bench, changed_components, make_data, ok, phase_config, save_stage3, train, write_run_yaml

from embervlm import run_dir
from embervlm.config_file import model_preset
from embervlm.data.records import read_records
from embervlm.engines.build import build_engine
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.module import TrainingModule
from embervlm.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ON_GPU = {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 2e-2}
"""Relative, of a loss."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_loss_curve_of_every_engine_is_that_of_the_cpu(precision: str, data: Path, tmp_path: Path) -> None:
    """Of plain torch there, in bf16 for bf16."""
    case = {**CURVE, "engine": "torch", "precision": "bf16" if precision == "bf16" else "fp32"}
    wanted = losses(run_case(case, data, ALONE))
    assert wanted[-1] < 0.95 * wanted[0]  # it is a curve
    found = curves(data, tmp_path, SHARDED, 1, precision=precision, accumulation=1, env=ON_GPU)
    off = {name: max(abs(a / b - 1) for a, b in zip(curve, wanted)) for name, curve in found.items()}
    print(f"{precision}: furthest from the CPU's curve", off)
    assert all(len(curve) == CURVE_STEPS for curve in found.values())
    assert {name: value for name, value in off.items() if not value <= TOLERANCE[precision]} == {}


@pytest.fixture(scope="module")
def overflowed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    case = {"phase": PHASE2, "steps": STEPS, "precision": "fp16", "overflow_on_rank": 0, "good_steps": 7}
    cases = [{**case, "name": name, **engine} for name, engine in SHARDED.items()]
    return drive(data, cases, tmp_path_factory.mktemp("overflow"), processes=1, env=ON_GPU)


@pytest.mark.parametrize("name", SHARDED)
def test_an_fp16_overflow_is_skipped_and_the_step_done_again_at_half_the_scale(
    name: str, overflowed: dict[str, list[Any]]
) -> None:
    """DeepSpeed's check of the device, its scaler and its kernels are its own here."""
    (found,) = overflowed[name]
    before, after = found["at_overflow"], found["after_overflow"]
    assert found["overflows"] == 1 and changed_components(before["weights"], after["weights"]) == set()
    assert after["optimizer"]["loss_scale"]["scale"] == before["optimizer"]["loss_scale"]["scale"] / 2
    assert found["optimizer"]["updates"] == STEPS


def test_a_snapshot_is_the_state_between_two_steps_though_training_goes_on(data: Path) -> None:
    phase = phase_config(PHASE2)
    bench = Bench.make(data, phase, global_batch=2, engine="torch", precision="bf16")
    world = World(0, 1, torch.device("cuda"))
    engine = build_engine(TrainingModule(bench.model), bench.config, phase, world, batch_size=2, accumulation=1)
    batches, rates = bench.batches(0, 0, 1, 1), dict.fromkeys(phase.multipliers, 1e-2)
    for step in range(4):
        engine.train_step(batches, phase.loss_weights, rates, step)
        wanted = {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}
        snapshot, found = engine.snapshot(), []
        thread = threading.Thread(target=lambda snapshot=snapshot, found=found: found.append(snapshot.collect()))
        thread.start()
        engine.train_step(batches, phase.loss_weights, rates, step)
        thread.join()
        assert changed_components(found[0].weights, wanted) == set()
        now = {key: value.cpu() for key, value in engine.module.state_dict().items()}
        assert changed_components(now, wanted), "the step in between changed nothing"


def test_the_gpu_writes_the_chains_of_the_cpu(lively_model: Any, records: Any) -> None:
    images, texts = [record.image for record in records[:6]], [record.instruction for record in records[:6]]
    options = {"image": images, "instruction": texts, "max_new_tokens": 60}
    on_cpu = lively_model.generate_with_reasoning(**options)
    on_gpu = lively_model.cuda().generate_with_reasoning(**options)
    assert len({result["text"] or str(result["reasoning_steps"]) for result in on_cpu}) > 1
    for ours, wanted in zip(on_gpu, on_cpu, strict=True):
        assert ours["reasoning_steps"] == wanted["reasoning_steps"] and ours["answer"] == wanted["answer"]
        assert ours["confidence"] == pytest.approx(wanted["confidence"], rel=1e-2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_full_size_preset_trains_in_both_phases(precision: str, data: Path, tmp_path: Path) -> None:
    """fp16 with a V100's config: the scale must settle, and the loss be finite in every step that counts."""
    steps = 12
    start = save_stage3(
        tmp_path / "start" / "stage3", model_preset("embervlm-39m"), read_records(data, candidates=ROBOTS)
    )
    config = write_run_yaml(
        tmp_path, "embervlm-39m", data, precision=precision, stage4__batch_size=2, stage4__max_reasoning_length=350
    )
    output = tmp_path / "outputs"
    ok(
        train(
            "deepspeed",
            "--config",
            config,
            "--stages",
            "4",
            "--resume_from",
            start,
            "--max_steps",
            str(steps),
            processes=1,
            timeout_s=300,
            **ON_GPU,
        )
    )
    for phase in (1, 2):
        folder = run_dir.phase_dir(output, phase)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(math.isfinite(value) for line in lines for value in line["loss"].values())
        assert run_dir.read_json(folder / "checkpoint-final" / "state.json")["step"] == steps


def test_the_quickstart_runs_on_the_gpu_in_its_smoke_form(tmp_path: Path) -> None:
    result = ok(quickstart(tmp_path / "smoke", **ON_GPU))
    assert all(any(line.startswith(name) for line in result.stdout.splitlines()) for name in TARGETS)
    assert result.stdout.strip().splitlines()[-1].startswith("Best checkpoint: ")

"""Started by test_engine.py under torchrun: run every case of a JSON file, write what each rank saw.

engine_driver.py DATA CASES.json OUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from training_helpers import Bench, phase_config

from embervlm.data.collate import Batch
from embervlm.training.engine import Engine, EngineState, NonFiniteLossError, World, build_engine
from embervlm.training.module import TrainingModule
from embervlm.training.schedule import learning_rate_factor


def micro_batches(bench: Bench, case: dict[str, Any], world: World, step: int) -> list[Batch]:
    accumulation, forcing = case.get("accumulation", 1), case.get("forcing", 1.0)
    if case.get("forms_apart"):  # rank 0 reads chains, rank 1 direct answers only
        parts = [bench.chains[4 * step : 4 * step + 4], bench.direct[4 * step : 4 * step + 4]]
        mine = [parts[world.rank]] if world.size == 2 else parts
        return [bench.collator(part, step=step, teacher_forcing=forcing) for part in mine]
    return bench.batches(step, world.rank, world.size, accumulation, forcing)


def take_pictures_away(batch: Batch) -> None:
    """As in a batch of text-only records."""
    batch.inputs["image_mask"] = torch.zeros_like(batch.inputs["image_mask"])
    batch.inputs["pictures"] = torch.zeros_like(batch.inputs["pictures"])


def whole_state(engine: Engine) -> EngineState:
    """The state to save, on every rank."""
    return engine.world.broadcast(engine.snapshot().collect())


def run_case(case: dict[str, Any], data: Path, world: World) -> dict[str, Any]:
    """Weights before and after, per step rates and terms, what learns, and the error where there is one."""
    phase = phase_config(case["phase"])
    accumulation, global_batch = case.get("accumulation", 1), case.get("global_batch", 8)
    bench = Bench.make(
        data, phase, global_batch=global_batch, draws=case.get("draws", True), vision=case.get("vision"),
        seed=world.rank if case.get("seed_by_rank") else 0,
        engine=case.get("engine", "deepspeed"), zero_stage=case.get("zero_stage", 2),
        precision=case.get("precision", "fp32"), deepspeed_config=case.get("deepspeed_config"),
    )  # fmt: skip
    module = TrainingModule(bench.model)
    if where := case.get("nan_in"):
        with torch.no_grad():
            dict(module.named_parameters())[where].fill_(float("nan"))
    bench.model.freeze_backbone(phase.freeze_backbone)
    if case.get("activation_checkpointing"):
        bench.model.enable_gradient_checkpointing()
    bench.model.train()
    before = {key: value.detach().clone() for key, value in module.state_dict().items()}
    engine = build_engine(
        module, bench.config, phase, world, batch_size=global_batch // (world.size * accumulation) or 1,
        accumulation=accumulation,
    )  # fmt: skip
    out: dict[str, Any] = {
        "before": before,
        "wrapped": whole_state(engine).weights,
        "own": {key: value.clone() for key, value in module.state_dict().items()} if case.get("seed_by_rank") else {},
        "learning": sorted(name for name, p in engine.module.named_parameters() if p.requires_grad),
        "rates": [], "terms": [], "counts": [], "error": None, "records": [],
    }  # fmt: skip
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    for step in range(case.get("steps", 3)):
        factor = learning_rate_factor(step, case.get("steps", 3), phase.warmup_steps, phase.final_lr_ratio)
        rates = {name: phase.learning_rate * scale * factor for name, scale in phase.multipliers.items()}
        batches = micro_batches(bench, case, world, step)
        if case.get("last_share_without_pictures") and world.rank == world.size - 1:
            take_pictures_away(batches[-1])
        if case.get("nan_on_rank") == world.rank:
            batches[0].targets["answers_real"] *= float("nan")
        out["records"] += [name for batch in batches for name in batch.record_ids]
        try:
            terms, counts = engine.train_step(batches, phase.loss_weights, rates, step)
        except NonFiniteLossError as error:
            out["error"] = str(error)
            break
        out["terms"].append(terms)
        out["counts"].append(counts)
        out["rates"].append({group["name"]: group["lr"] for group in optimizer.param_groups})
    state = whole_state(engine)
    out["after"], out["optimizer"] = state.weights, state.optimizer
    return out


def main() -> None:
    data, cases, folder = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    world = World.join()
    for case in json.loads(cases.read_text()):
        torch.save(run_case(case, data, world), folder / f"{case['name']}-rank{world.rank}.pt")
        world.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

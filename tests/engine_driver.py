"""Started by test_engine.py under torchrun: run every case of a JSON file, write what each rank saw.

engine_driver.py DATA CASES.json OUT_DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from training_helpers import Bench, phase_config

from embervlm.data.collate import Batch
from embervlm.engines import plain
from embervlm.engines.base import Engine, EngineState, NonFiniteLossError
from embervlm.engines.build import build_engine
from embervlm.engines.deepspeed import DeepSpeedEngine
from embervlm.model.lora import add_adapters
from embervlm.training.module import TrainingModule
from embervlm.training.schedule import learning_rate_factor
from embervlm.world import World

FP16_SCALE = 4096.0


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


def let_deepspeed_compute_in_fp16() -> None:
    """On the CPU, past its accelerator's check and ours, which both refuse what torch can do."""
    from deepspeed.accelerator import get_accelerator

    from embervlm.engines import build

    get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]
    build.resolve_precision = lambda precision, *_: precision


def overflow_once(engine: Engine, rank: int, value: float = float("inf")) -> None:
    """The next update meets a gradient of `value` in what process `rank` holds or adds, and in nothing else."""
    update = engine._update
    if isinstance(engine, DeepSpeedEngine) or getattr(engine, "_sums", None):  # take gradients as they come
        if engine.world.rank == rank:
            (bias,) = (p for name, p in engine.module.named_parameters() if name.endswith("answer_head.bias"))
            hook = bias.register_hook(lambda gradient: (hook.remove(), gradient + value)[1])
        return

    def update_with_overflow(rates: Mapping[str, float]) -> bool:
        engine._update = update  # type: ignore[method-assign]
        if engine.world.rank == rank:
            gradients: list[Any] = [p.grad for p in engine.module.parameters() if p.grad is not None]
            held = (g.to_local() if hasattr(g, "to_local") else g for g in gradients)
            local = next(gradient for gradient in held if gradient.numel())
            local.view(-1)[0] = value
        return update(rates)

    engine._update = update_with_overflow  # type: ignore[method-assign]


def whole_state(engine: Engine) -> EngineState:
    """The state to save, on every rank."""
    return engine.world.broadcast(engine.snapshot().collect())


plain.BUCKET = 3000  # several messages, of a model as small as this one


def run_case(case: dict[str, Any], data: Path, world: World) -> dict[str, Any]:
    """Weights before and after, per step rates and terms, what learns, and the error where there is one."""
    phase = phase_config(case["phase"])
    accumulation, global_batch = case.get("accumulation", 1), case.get("global_batch", 8)
    bench = Bench.make(
        data,
        phase,
        global_batch=global_batch,
        draws=case.get("draws", True),
        vision=case.get("vision"),
        seed=world.rank if case.get("seed_by_rank") else 0,
        text_only=case.get("text_only", False),
        boxes=case.get("boxes", True),
        engine=case.get("engine", "deepspeed"),
        zero_stage=case.get("zero_stage", 2),
        precision=case.get("precision", "fp32"),
        deepspeed_config=case.get("deepspeed_config"),
    )
    if bench.config.precision == "fp16" and bench.config.engine == "deepspeed" and world.device.type == "cpu":
        let_deepspeed_compute_in_fp16()
    add_adapters(bench.model, phase.lora)
    module = TrainingModule(bench.model)
    if where := case.get("nan_in"):
        with torch.no_grad():
            dict(module.named_parameters())[where].fill_(float("nan"))
    bench.model.freeze(phase.frozen_parts)
    if case.get("activation_checkpointing"):
        bench.model.enable_gradient_checkpointing()
    bench.model.train()
    before = {key: value.detach().clone() for key, value in module.state_dict().items()}
    engine = build_engine(
        module,
        bench.config,
        phase,
        world,
        batch_size=global_batch // (world.size * accumulation) or 1,
        accumulation=accumulation,
    )
    out: dict[str, Any] = {
        "before": before,
        "wrapped": whole_state(engine).weights,
        "own": {key: value.clone() for key, value in module.state_dict().items()} if case.get("seed_by_rank") else {},
        "learning": sorted(name for name, p in engine.module.named_parameters() if p.requires_grad),
        "rates": [],
        "terms": [],
        "counts": [],
        "error": None,
        "records": [],
        "overflows": 0,
    }
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    if engine.loss_scale is not None and "overflow_on_rank" in case:  # at a scale where nothing overflows by itself
        engine._set_loss_scale({"scale": FP16_SCALE, "good_steps": case.get("good_steps", 0)})
    for step in range(case.get("first_steps", case.get("steps", 3))):
        factor = learning_rate_factor(step, case.get("steps", 3), phase.warmup_steps, phase.final_lr_ratio)
        rates = {name: phase.learning_rate * scale * factor for name, scale in phase.multipliers.items()}
        batches = micro_batches(bench, case, world, step)
        if case.get("last_share_without_pictures") and world.rank == world.size - 1:
            take_pictures_away(batches[-1])
        if case.get("nan_on_rank") == world.rank:
            batches[0].targets["answers_real"] *= float("nan")
        out["records"] += [name for batch in batches for name in batch.record_ids]
        if step == 1 and "overflow_on_rank" in case:
            out["at_overflow"] = vars(whole_state(engine))
            overflow_once(engine, case["overflow_on_rank"], float(case.get("gradient", "inf")))
        try:
            terms, counts = engine.train_step(batches, phase.loss_weights, rates, step)
            while engine.overflowed:
                out["overflows"] += 1
                out["after_overflow"] = vars(whole_state(engine))
                terms, counts = engine.train_step(batches, phase.loss_weights, rates, step)
        except NonFiniteLossError as error:
            out["error"] = str(error)
            break
        out["terms"].append(terms)
        out["counts"].append(counts)
        out["rates"].append({group["name"]: group["lr"] for group in optimizer.param_groups})
    state = whole_state(engine)
    out["after"], out["optimizer"] = state.weights, state.optimizer
    out["statistics"] = {n: value.clone() for n, value in engine.module.named_buffers() if ".running_" in n}
    return out


def main() -> None:
    data, cases, folder = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # what is compared here is not how many bits a GPU convolves with
    world = World.join()
    for case in json.loads(cases.read_text()):
        torch.save(run_case(case, data, world), folder / f"{case['name']}-rank{world.rank}.pt")
        world.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

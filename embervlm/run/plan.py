"""An estimate of what a run needs: memory per GPU, optimizer steps, communication, time.

Floating-point operations and activation memory are counted, not guessed: PyTorch runs one micro-batch of the real
model, losses and backward pass on fake tensors, which have shapes and no contents. For a plain transformer the counts
agree with what the literature derives by hand, and the tests hold them to it: 6 N D operations for N parameters and D
tokens (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022, appendix F), and 34 s b h bytes per layer kept for the
backward pass where attention is fused (Korthikanti et al. 2022, equation 2 without its attention term).
Parameters, gradients, optimizer state and communication follow Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from embervlm.cluster import ClusterRecipe, load_recipe
from embervlm.config import REPOSITORY, AugmentationConfig, ConfigError, Phase3Config, PhaseConfig, TrainConfig
from embervlm.config_checks import require
from embervlm.config_file import load_train_config, model_preset
from embervlm.model.embervlm import EmberVLM
from embervlm.progress import progress_bar
from embervlm.run.plan_counts import MicroBatch, count_micro_batch, count_parameters, empty_model
from embervlm.training.visual_cache import MAX_BYTES

ZERO_STAGES = (0, 1, 2, 3)
GB = 1e9
NETWORK_BYTES_PER_S = 25e9
"""Between nodes, per node and direction: one port of 200 Gbit/s."""
UTILISATION = 0.15
"""Assumed share of the GPU's rated speed. Large models reach 0.4 to 0.5; our matrices are only 384 wide."""
OPERATOR_S = 7e-6
"""Assumed time of the host for one operator of eager PyTorch; a small micro-batch waits for it."""
TRAIN_RATIO = 0.8
"""Share of the records that `embervlm.data.splits` gives to training."""
QUESTION_TOKENS = 128
"""Tokens of a question, if the run does not say."""
GUIDE_MINUTES = {"v100x1": (180, 360), "v100x2": (90, 210), "a100x4": (45, 90), "a100x8": (25, 45)}
"""Recipe -> (phase 1, phase 2): the guide's table of expected training times."""
GUIDE_MEMORY_GB = (14.0, 20.0)
"""The guide's table of memory: phase 1 and phase 2 at batch size 32."""
GUIDE_BATCH, GUIDE_HALF_PRECISION = 32, 0.6
"""The guide says that FP16 takes about 40% less."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A type of GPU, from its data sheet; the smaller memory if it is sold with two sizes."""

    memory_gb: float
    flops: dict[str, float]
    """Precision -> rated operations per second, dense."""
    link_bytes_per_s: float
    """To the other GPUs of the node, per direction."""


GPUS = {
    "v100": Gpu(memory_gb=16, flops={"fp32": 15.7e12, "fp16": 125e12}, link_bytes_per_s=150e9),
    "a100": Gpu(memory_gb=40, flops={"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12}, link_bytes_per_s=300e9),
}


# -- formulas --------------------------------------------------------------------------------------------------------


def state_bytes(
    total: int, learning: int, *, zero_stage: int, num_gpus: int, precision: str
) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer state on each GPU.

    Rajbhandari et al. 2020, section 3.1: an element of a parameter and of a gradient has 2 bytes in half precision,
    and mixed-precision Adam keeps 12 more (a float32 copy and two moments). Section 5: ZeRO 1, 2 and 3 divide the
    optimizer state, then the gradients, then the parameters. Frozen parameters have neither gradient nor state.

    Args:
        total, learning: Parameters of the model, and those that are trained.
    """
    element = 4 if precision == "fp32" else 2
    shares = [num_gpus if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return element * total / shares[0], element * learning / shares[1], 12 * learning / shares[2]


def bytes_sent(
    total: int, learning: int, *, zero_stage: int, num_gpus: int, precision: str, accumulation: int = 1
) -> float:
    """Bytes that each GPU sends in one optimizer step.

    Rajbhandari et al. 2020, section 7: reducing the gradients and gathering what was updated sends each parameter
    once; ZeRO 3 gathers all parameters for the forward and again for the backward pass instead. A ring of N GPUs leaves
    out one of N shares. ZeRO 2 and 3 reduce in every micro-batch, since no GPU keeps whole gradients.
    """
    element = 4 if precision == "fp32" else 2
    reduced = learning * (accumulation if zero_stage >= 2 else 1)
    gathered = 2 * total * accumulation if zero_stage == 3 else learning
    return element * (reduced + gathered) * (num_gpus - 1) / num_gpus


def optimizer_steps(records: int, phase: PhaseConfig, global_batch: int) -> int:
    """Optimizer steps of a phase over data of `records`, as `EpochPlan` counts them."""
    return -(-round(records * TRAIN_RATIO) // global_batch) * phase.epochs


# -- the plan --------------------------------------------------------------------------------------------------------


def make_plan(
    cluster: str,
    *,
    config: TrainConfig,
    records: int,
    question_tokens: int,
    chain_tokens: int,
    utilisation: float = UTILISATION,
) -> dict[str, Any]:
    """The plan of the phases on the nodes of recipe `cluster`, as printed with `--json`. `config`: the run's."""
    recipe, settings = load_recipe(cluster), model_preset(config.model)
    gpu = _gpu_of(recipe, cluster)
    require(0 < utilisation <= 1, f"--utilisation: {utilisation} is not in (0, 1]")
    model = empty_model(settings)
    parts, visual_tokens = model.parameter_counts(), model.num_visual_tokens
    tokens = question_tokens + chain_tokens + visual_tokens
    if (limit := model.language_model.max_positions) is not None and tokens > limit:
        advice = "give fewer --chain_tokens or --question_tokens"
        raise ConfigError(f"{tokens:,} tokens with the picture's: {config.model} reads {limit:,} positions; {advice}")
    phases = []
    numbered = [(1, config.stage4.phase1), (2, config.stage4.phase2), (3, config.stage4.phase3)]
    for number, phase in progress_bar(numbered, desc="counting", unit="phase"):
        if phase is None:
            continue
        counted = count_micro_batch(
            settings,
            config.stage4,
            phase,
            precision=recipe.precision,
            question_tokens=question_tokens,
            chain_tokens=chain_tokens,
            cached_pictures=_caches_pictures(model, phase, records),
        )
        sizes = count_parameters(settings, phase)
        about: dict[str, Any] = {"records": records, "utilisation": utilisation}
        if isinstance(phase, Phase3Config):
            planned = _plan_phase3(phase, counted, sizes, recipe, gpu, chain_tokens=chain_tokens, **about)
        else:
            planned = _plan_phase(phase, counted, sizes, recipe, gpu, **about)
        phases.append({"phase": number, **planned, "flops_6nd": 6 * sum(parts.values()) * recipe.global_batch * tokens})
    return {
        "cluster": cluster,
        "model": config.model,
        "parameters": parts,
        "total_parameters": sum(parts.values()),
        "num_gpus": recipe.num_gpus,
        "gpu": recipe.gpu_type,
        "gpu_memory_gb": gpu.memory_gb,
        "global_batch": recipe.global_batch,
        **{name: getattr(recipe, name) for name in ("precision", "zero_stage", "batch_size")},
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "records": records,
        "question_tokens": question_tokens,
        "chain_tokens": chain_tokens,
        "visual_tokens": visual_tokens,
        "phases": phases,
        "assumptions": _assumptions(recipe, gpu, utilisation),
        "guide": _compare(cluster, recipe, phases, utilisation),
    }


def _caches_pictures(model: EmberVLM, phase: PhaseConfig, records: int) -> bool:
    """Whether training computes the visual tokens once and keeps them."""
    frozen = phase.multipliers["vision_encoder"] == phase.multipliers["projection"] == 0
    return frozen and 4 * records * model.num_visual_tokens * model.language_model.hidden_size <= MAX_BYTES


def _gpu_of(recipe: ClusterRecipe, cluster: str) -> Gpu:
    if recipe.gpu_type not in GPUS:
        raise ConfigError(f"{cluster}: gpu_type {recipe.gpu_type!r} is unknown here; known are {', '.join(GPUS)}")
    gpu = GPUS[recipe.gpu_type]
    if recipe.precision not in gpu.flops:
        raise ConfigError(
            f"{cluster}: a {recipe.gpu_type} does not support {recipe.precision}; write {' or '.join(gpu.flops)}"
        )
    return gpu


def _plan_phase(
    phase: PhaseConfig,
    counted: MicroBatch,
    sizes: tuple[int, int],
    recipe: ClusterRecipe,
    gpu: Gpu,
    *,
    records: int,
    utilisation: float,
) -> dict[str, Any]:
    """Memory per ZeRO stage, work and time of one phase. `sizes`: of `count_parameters`."""
    (total, learning), accumulation = sizes, recipe.gradient_accumulation_steps
    on: dict[str, Any] = {"num_gpus": recipe.num_gpus, "precision": recipe.precision}
    memory = {}
    for zero_stage in ZERO_STAGES:
        state = state_bytes(total, learning, zero_stage=zero_stage, **on)
        values = dict(zip(("parameters", "gradients", "optimizer"), state))
        values["activations"] = float(counted.activation_bytes)
        memory[str(zero_stage)] = values | {"total": sum(values.values())}
    sent = bytes_sent(total, learning, zero_stage=recipe.zero_stage, accumulation=accumulation, **on)
    compute_s = accumulation * counted.flops / (gpu.flops[recipe.precision] * utilisation)
    host_s = accumulation * counted.operators * OPERATOR_S
    communication_s = sent / (gpu.link_bytes_per_s if recipe.nodes == 1 else NETWORK_BYTES_PER_S)
    steps = optimizer_steps(records, phase, recipe.global_batch)
    step_s = max(compute_s, host_s) + communication_s
    return {
        "learning_parameters": learning,
        "memory_bytes": memory,
        "steps": steps,
        "flops_per_step": counted.flops * accumulation * recipe.num_gpus,
        "bytes_sent_per_step": sent,
        "compute_s": compute_s,
        "host_s": host_s,
        "communication_s": communication_s,
        "step_s": step_s,
        "minutes": steps * step_s / 60,
    }


def _plan_phase3(
    phase: Phase3Config,
    counted: MicroBatch,
    sizes: tuple[int, int],
    recipe: ClusterRecipe,
    gpu: Gpu,
    *,
    chain_tokens: int,
    records: int,
    utilisation: float,
) -> dict[str, Any]:
    """The same of phase 3: as many micro-batches as its chains need, and the time to draw them.

    A token is drawn by about a third of the operators of a micro-batch, its forward pass, and waits for the host.
    """
    samples = phase.prompts_per_rollout * (phase.num_generations + phase.supervised_records_ratio)
    accumulation = math.ceil(samples / (recipe.batch_size * recipe.num_gpus))
    its = dataclasses.replace(recipe, gradient_accumulation_steps=accumulation)
    planned = _plan_phase(phase, counted, sizes, its, gpu, records=records, utilisation=utilisation)
    bundles = math.ceil(phase.prompts_per_rollout / phase.rollout_batch_size)
    rollout_s = math.ceil(bundles / recipe.num_gpus) * chain_tokens * counted.operators / 3 * OPERATOR_S
    steps = optimizer_steps(records, phase, phase.prompts_per_rollout) * phase.num_iterations
    step_s = planned["step_s"] + rollout_s / phase.num_iterations
    return {**planned, "steps": steps, "rollout_s": rollout_s, "step_s": step_s, "minutes": steps * step_s / 60}


def _assumptions(recipe: ClusterRecipe, gpu: Gpu, utilisation: float) -> list[str]:
    link = "the network, {:g} GB/s per node" if recipe.nodes > 1 else "NVLink, {:g} GB/s per GPU and direction"
    rate = NETWORK_BYTES_PER_S if recipe.nodes > 1 else gpu.link_bytes_per_s
    return [
        "every record has the length given above and the whole vocabulary is used, so memory and time are upper "
        "bounds at the other assumptions; for shorter chains give --chain_tokens",
        f"{utilisation:.0%} of {gpu.flops[recipe.precision] / 1e12:g} TFLOP/s ({recipe.precision}) are reached "
        "(--utilisation)",
        f"the host needs {OPERATOR_S * 1e6:g} us for each PyTorch operator; a step takes as long as the "
        f"slower of host and GPU",
        f"gradients go over {link.format(rate / GB)}, and nothing is computed during this time",
        "not included in the memory: CUDA context, NCCL, DeepSpeed's buckets and fragmentation, about 2 GB",
        "not included in the time: start, reading data, saves, samples after each epoch, evaluation",
    ]


def _compare(cluster: str, recipe: ClusterRecipe, phases: list[dict[str, Any]], utilisation: float) -> list[str]:
    """A comparison of the plan with the guide's tables, in words."""
    out = []
    for phase, guide_gb in zip(phases, GUIDE_MEMORY_GB):
        name, half = f"phase {phase['phase']}", recipe.precision != "fp32"
        wanted = guide_gb * (GUIDE_HALF_PRECISION if half else 1)
        memory = phase["memory_bytes"][str(recipe.zero_stage)]
        state = memory["total"] - memory["activations"]
        found = (state + memory["activations"] * GUIDE_BATCH / recipe.batch_size) / GB
        out.append(
            f"{name}, memory at batch size {GUIDE_BATCH}: the guide says ~{guide_gb:g} GB"
            + (f", ~{wanted:.1f} GB with its 40% less in half precision" if half else "")
            + f"; the plan says {found:.1f} GB, {_in_words(found / wanted)}"
        )
    if cluster not in GUIDE_MINUTES:
        return [*out, f"time: the guide's table has no {cluster}"]
    for phase, minutes in zip(phases, GUIDE_MINUTES[cluster]):
        ratio = phase["minutes"] / minutes
        line = (
            f"phase {phase['phase']}, time: the guide says ~{minutes} minutes; the plan says "
            f"{phase['minutes']:.0f}, {_in_words(ratio)}"
        )
        if phase["compute_s"] > phase["host_s"]:
            line += f". The guide's time would mean {utilisation * ratio:.1%} utilisation for what is counted here"
        out.append(line)
    return out


def _in_words(ratio: float) -> str:
    if 0.8 <= ratio <= 1.25:
        return "which agrees"
    return f"{ratio:.1f} times as much" if ratio > 1 else f"{1 / ratio:.1f} times less"


def print_plan(plan: dict[str, Any]) -> None:
    print(
        f"{plan['cluster']}: {plan['num_gpus']} x {plan['gpu']}, {plan['precision']}, ZeRO-{plan['zero_stage']}; "
        f"{plan['batch_size']} records x {plan['gradient_accumulation_steps']} micro-batches x {plan['num_gpus']} GPUs "
        f"= global batch {plan['global_batch']}"
    )
    print(
        f"{plan['model']}: {plan['total_parameters']:,} parameters; {plan['records']:,} records, each "
        f"{plan['visual_tokens']} visual + {plan['question_tokens']} question + {plan['chain_tokens']} chain tokens"
    )
    for phase in plan["phases"]:
        print(f"\nphase {phase['phase']}: {phase['learning_parameters']:,} parameters are trained")
        columns = ("parameters", "gradients", "optimizer", "activations", "total")
        print("  GB per GPU " + "".join(f"{name:>13}" for name in columns))
        for zero_stage, memory in phase["memory_bytes"].items():
            mark = "  <- this recipe" if int(zero_stage) == plan["zero_stage"] else ""
            print(f"  ZeRO-{zero_stage:<5}" + "".join(f"{memory[name] / GB:>13.2f}" for name in columns) + mark)
        needed = phase["memory_bytes"][str(plan["zero_stage"])]["total"] / GB
        fits = "fits" if needed + 2 <= plan["gpu_memory_gb"] else "does NOT fit: lower batch_size in the recipe"
        print(f"  {needed:.1f}GB plus about 2 GB more, of {plan['gpu_memory_gb']:g} GB: {fits}")
        print(
            f"  {phase['steps']:,} steps; per step {phase['flops_per_step'] / 1e12:.1f} TFLOP in total "
            f"(6 N D: {phase['flops_6nd'] / 1e12:.1f}), {phase['bytes_sent_per_step'] / 1e6:.1f} MB sent by each GPU"
        )
        print(
            f"  step {phase['step_s']:.3f} s (compute {phase['compute_s']:.3f}, host {phase['host_s']:.3f}, "
            f"communication {phase['communication_s']:.4f}{_drawing(phase)}); in total {_duration(phase['minutes'])}"
        )
    together = "both" if len(plan["phases"]) == 2 else "all"
    print(f"\n{together} phases: {_duration(sum(phase['minutes'] for phase in plan['phases']))}")
    for title, lines in (("assumed", plan["assumptions"]), ("compared with the guide's tables", plan["guide"])):
        print(f"\n{title}:")
        for line in lines:
            print(f"- {line}")


def _drawing(phase: dict[str, Any]) -> str:
    return f", drawing {phase['rollout_s']:.1f} for each rollout" if "rollout_s" in phase else ""


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type="path", required=True, help="recipe in configs/cluster/, or a YAML")
    parser.add_argument("--model", type="path", help="preset in configs/model/, or a YAML; default: the run's")
    parser.add_argument("--config", type="path", help="the run's YAML; default: configs/training_stages.yaml")
    parser.add_argument(
        "--records", type=int, help="records of all splits together; default: target_samples, or 50,000"
    )
    parser.add_argument("--question_tokens", type=int, help="tokens of a question; default: 128")
    parser.add_argument("--chain_tokens", type=int, help="tokens of chain and answer; default: max_reasoning_length")
    parser.add_argument(
        "--utilisation", type=float, help="share of the GPU's rated speed that is reached; see the plan's assumptions"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")


def plan(
    *,
    cluster: str,
    model: str | None,
    config: str | None,
    records: int | None,
    question_tokens: int | None,
    chain_tokens: int | None,
    utilisation: float | None,
    as_json: bool,
) -> None:
    """`embervlm plan`. What is None comes from the run's YAML: its model, `target_samples`, the longest chain.

    A YAML that augments nothing does not say how many records there are; then the guide's 50,000 are planned for.
    """
    overrides = load_recipe(cluster).train_settings | ({"model": model} if model else {})
    path = config or str(REPOSITORY / "configs" / "training_stages.yaml")
    settings = load_train_config(path, overrides)
    if records is None:
        records = (settings.stage4.reasoning_augmentation or AugmentationConfig()).target_samples
    found = {
        "records": records,
        "question_tokens": QUESTION_TOKENS if question_tokens is None else question_tokens,
        "chain_tokens": settings.stage4.max_reasoning_length if chain_tokens is None else chain_tokens,
    }
    for name, value in found.items():
        if value < 1:
            raise ConfigError(f"--{name}: {value} is less than 1")
    made = make_plan(cluster, config=settings, utilisation=utilisation or UTILISATION, **found)
    print(json.dumps(made, indent=2)) if as_json else print_plan(made)

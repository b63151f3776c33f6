"""The plan's formulas against the papers' own figures, and its counts against PyTorch on real tensors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from embervlm import cli
from embervlm.cluster import check_recipes, load_recipe, recipe_names
from embervlm.config import ConfigError, PhaseConfig, StageConfig, TrainConfig
from embervlm.config_lora import LoraConfig
from embervlm.run.plan import GPUS, GUIDE_MINUTES, bytes_sent, make_plan, optimizer_steps, print_plan, state_bytes

PHASE2 = PhaseConfig(reasoning_loss_weight=0.3, consistency_loss_weight=0.2, answer_loss_weight=0.3, epochs=2)


# -- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_of_7_5_billion_parameters_on_64_gpus_are_those_of_the_zero_papers_figure_1(
    zero_stage: int, gigabytes: float
) -> None:
    found = state_bytes(7_500_000_000, 7_500_000_000, zero_stage=zero_stage, num_gpus=64, precision="fp16")
    assert sum(found) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_frozen_parameters_have_neither_gradient_nor_optimizer_state() -> None:
    assert state_bytes(100, 10, zero_stage=0, num_gpus=1, precision="bf16") == (200, 20, 120)
    assert state_bytes(100, 10, zero_stage=3, num_gpus=2, precision="fp32") == (200, 20, 60)


def test_zero_3_sends_half_as_much_again_as_zero_2_and_one_gpu_sends_nothing() -> None:
    """Section 7 of the ZeRO paper: twice the parameters, and three times with ZeRO 3."""
    on = {"num_gpus": 1_000_000_000, "precision": "fp16"}
    assert bytes_sent(1000, 1000, zero_stage=2, **on) == pytest.approx(2 * 1000 * 2)  # type: ignore[arg-type]
    assert bytes_sent(1000, 1000, zero_stage=3, **on) == pytest.approx(3 * 1000 * 2)  # type: ignore[arg-type]
    assert bytes_sent(1000, 1000, zero_stage=2, num_gpus=1, precision="fp16") == 0


def test_accumulation_reduces_once_under_zero_1_and_every_time_under_zero_2() -> None:
    one = bytes_sent(1000, 1000, zero_stage=1, num_gpus=2, precision="fp16", accumulation=4)
    two = bytes_sent(1000, 1000, zero_stage=2, num_gpus=2, precision="fp16", accumulation=4)
    assert (one, two) == (2 * 2000 / 2, 2 * 5000 / 2)


def test_steps_are_those_of_the_epoch_plan() -> None:
    from embervlm.data.epoch_plan import EpochPlan
    from embervlm.data.samples import DIRECT, Sample

    train = [Sample(record=i, form=DIRECT, prompt=[0], target=[0]) for i in range(80)]
    plan = EpochPlan(main=train, global_batch=32, seed=0)
    assert optimizer_steps(100, PHASE2, 32) == plan.num_steps(1) * PHASE2.epochs == 6


# -- counts ----------------------------------------------------------------------------------------------------------


def layer(**changes: Any) -> Any:
    """One GPT-2 layer as Korthikanti et al. count it: dropout, and a feed-forward part with a single activation."""
    import torch
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(n_embd=64, n_head=4, activation_function="gelu", attn_implementation="sdpa", **changes)
    with torch.device("meta"):
        return GPT2Block(config, layer_idx=0).to(torch.bfloat16).train()


def test_a_layer_keeps_34_s_b_h_bytes_for_its_backward_pass() -> None:
    """Equation 2 of Korthikanti et al. without `5 a s / h`, which a fused kernel does not keep."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from embervlm.run.plan_counts import trace

    batch, length, hidden = 4, 32, 64
    block = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cpu")
        kept: list[Any] = []

        def forward() -> None:
            states = torch.zeros(batch, length, hidden, dtype=torch.bfloat16, requires_grad=True)
            kept.append(block(states))  # alive, so what is freed by now was not kept for the backward pass

        counted = trace(forward)
    sum_exp = 4 * batch * 4 * length  # what the fused kernel keeps of the softmax: one float32 per head and row
    transient = 2 * 2 * batch * length * hidden  # at the peak, of an output that is not kept
    bound = 34 * batch * length * hidden
    assert bound <= counted.activation_bytes <= 1.15 * bound + sum_exp + transient


def test_a_transformers_step_takes_6_operations_per_parameter_and_token() -> None:
    """Kaplan et al. 2020, section 2.1: for short texts, where attention itself costs little."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from embervlm.run.plan_counts import trace

    block = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cpu")
        matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        states = torch.zeros(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        counted = trace(lambda: block(states).sum().backward())
    assert counted.flops == pytest.approx(6 * matrices * 2 * 8, rel=0.05)


@pytest.mark.parametrize("phase", [PhaseConfig(freeze_backbone=True), PHASE2], ids=["phase1", "phase2"])
def test_fake_tensors_count_what_real_ones_cost(phase: PhaseConfig, tiny_settings: dict[str, Any]) -> None:
    from embervlm.model.embervlm import build_model
    from embervlm.run.plan_counts import count_micro_batch, micro_batch, prepare, step_on

    stage = StageConfig(batch_size=3)
    lengths: dict[str, Any] = {"question_tokens": 8, "chain_tokens": 24, "cached_pictures": phase.freeze_backbone}
    model = build_model(tiny_settings)
    real = step_on(prepare(model, stage, phase), micro_batch(model, stage, phase, **lengths))
    fake = count_micro_batch(tiny_settings, stage, phase, precision="fp32", **lengths)
    assert fake.flops == real.flops > 0
    assert fake.activation_bytes == pytest.approx(real.activation_bytes, rel=0.03)


@pytest.fixture(scope="module")
def config(tiny_model_yaml: Any) -> TrainConfig:
    stage = StageConfig(batch_size=16, phase1=PhaseConfig(freeze_backbone=True), phase2=PHASE2)
    return TrainConfig(model=str(tiny_model_yaml), stage4=stage)


@pytest.fixture(scope="module")
def plan(config: TrainConfig) -> dict[str, Any]:
    return make_plan("a100x8", config=config, records=1000, question_tokens=16, chain_tokens=64)


@pytest.mark.slow
def test_parameters_are_counted_from_the_built_model(plan: dict[str, Any], tiny_settings: dict[str, Any]) -> None:
    from embervlm.model.embervlm import build_model

    parts = build_model(tiny_settings).parameter_counts()
    assert plan["parameters"] == parts
    phase1, phase2 = plan["phases"]
    assert phase1["learning_parameters"] == sum(
        parts[name] for name in ("reasoning_head", "step_validator", "answer_head")
    )
    assert phase2["learning_parameters"] == plan["total_parameters"] == sum(parts.values())


def test_adapters_are_counted_by_hand_and_frozen_weights_have_no_state(config: TrainConfig) -> None:
    """Rank 4 on q_proj of two layers, 32 x 32: 2 * 4 * (32 + 32), beside what is not the language model."""
    lora = {"language_model": LoraConfig(rank=4, targets=("q_proj",))}
    phase2 = dataclasses.replace(PHASE2, lora=lora)
    stage = dataclasses.replace(config.stage4, phase2=phase2)
    made = make_plan(
        "a100x8", config=dataclasses.replace(config, stage4=stage), records=1000, question_tokens=8, chain_tokens=16
    )
    parts, found = made["parameters"], made["phases"][1]
    assert found["learning_parameters"] == made["total_parameters"] - parts["language_model"] + 2 * 4 * (32 + 32)
    memory = found["memory_bytes"]["0"]
    assert memory["optimizer"] == 12 * found["learning_parameters"]
    assert memory["parameters"] == 2 * (made["total_parameters"] + 2 * 4 * (32 + 32))


def test_describe_counts_what_a_run_trains(
    tiny_model_yaml: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    path = tmp_path / "run.yaml"
    lora = {"language_model": {"rank": 4, "targets": ["q_proj"]}}
    path.write_text(yaml.safe_dump({"model": str(tiny_model_yaml), "stage4": {"phase2": {"lora": lora}}}))
    cli.main(["describe", "--config", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == 2 * 4 * (32 + 32)
    rest = found["total"] - found["components"]["language_model"]
    assert found["trainable"]["phase2"] == rest + found["adapters"]
    cli.main(["describe", "--model", str(tiny_model_yaml)])
    assert f"in phase 2: {found['total']:,} (100.0%)" in capsys.readouterr().out


def test_a_frozen_backbone_needs_less_memory_and_time_than_one_that_learns(plan: dict[str, Any]) -> None:
    phase1, phase2 = plan["phases"]
    assert phase1["memory_bytes"]["2"]["total"] < phase2["memory_bytes"]["2"]["total"]
    assert phase1["flops_per_step"] < phase2["flops_per_step"]


def test_longer_chains_need_more_memory_and_more_operations(plan: dict[str, Any], config: TrainConfig) -> None:
    longer = make_plan("a100x8", config=config, records=1000, question_tokens=16, chain_tokens=128)
    for before, after in zip(plan["phases"], longer["phases"]):
        assert after["memory_bytes"]["2"]["activations"] > before["memory_bytes"]["2"]["activations"]
        assert after["flops_per_step"] > before["flops_per_step"]


def test_recomputed_activations_need_less_memory(plan: dict[str, Any], config: TrainConfig) -> None:
    stage = dataclasses.replace(config.stage4, gradient_checkpointing=True)
    saving = make_plan(
        "a100x8", config=dataclasses.replace(config, stage4=stage), records=1000, question_tokens=16, chain_tokens=64
    )
    for before, after in zip(plan["phases"][1:], saving["phases"][1:]):
        assert after["memory_bytes"]["2"]["activations"] < before["memory_bytes"]["2"]["activations"]
        assert after["flops_per_step"] > before["flops_per_step"]


def test_the_plan_says_in_words_where_it_disagrees_with_the_guide(
    plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    memory, time = plan["guide"][0], plan["guide"][3]
    assert "the guide says ~14 GB, ~8.4 GB with its 40% less in half precision" in memory and "times less" in memory
    assert f"the guide says ~{GUIDE_MINUTES['a100x8'][1]} minutes" in time and "times less" in time
    print_plan(plan)
    shown = capsys.readouterr().out
    assert all(line in shown for line in (*plan["assumptions"], *plan["guide"])) and "<- this recipe" in shown
    assert json.loads(json.dumps(plan)) == plan


def test_the_plan_covers_every_shipped_recipe() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.precision in GPUS[recipe.gpu_type].flops


def test_the_check_prints_one_global_batch_for_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cluster"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == recipe_names() and len({row.split()[-1] for row in rows}) == 1
    assert "\n".join(rows) in check_recipes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--cluster", "h100x4"], "no recipe 'h100x4'"),
        (["--cluster", "a100x4", "--model", "embervlm-7b"], "no preset 'embervlm-7b'"),
        (["--cluster", "a100x4", "--records", "0"], "--records: 0 is less than 1"),
        (["--cluster", "a100x4", "--utilisation", "2"], "--utilisation: 2.0 is not in (0, 1]"),
        (["--cluster", "a100x4", "--chain_tokens", "100000"], "reads 1,024 positions; give fewer --chain_tokens"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *flags])
    assert expected in str(ended.value.code)


def test_a_precision_that_the_gpu_lacks_is_an_error(config: TrainConfig, tmp_path: Any) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(load_recipe("v100x1")) | {"precision": "bf16"}))
    with pytest.raises(ConfigError, match="a v100 does not support bf16; write fp32 or fp16"):
        make_plan(str(path), config=config, records=10, question_tokens=1, chain_tokens=1)

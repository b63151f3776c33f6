"""Adapters: what they compute, what learns, what a checkpoint holds, and how a phase resumes with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import (
    CPU,
    MULTIPLIERS,
    PHASE2,
    TINY,
    Bench,
    assert_same_weights,
    changed_components,
    make_data,
    ok,
    phase_config,
    save_stage3,
    train,
    unfinish,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)
from transformers import DynamicCache

from embervlm import run_dir
from embervlm.config import ConfigError, Phase1Config, Phase2Config, TrainConfig
from embervlm.config_file import from_mapping
from embervlm.config_lora import LoraConfig
from embervlm.data.records import read_records
from embervlm.engines.build import build_engine
from embervlm.model.decode import language_step
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.lora import add_adapters, check_targets, is_adapter
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.module import TrainingModule
from embervlm.training.settings import changes, shown_lora
from embervlm.world import World

BOTH = {"language_model": LoraConfig(rank=4), "vision_encoder": LoraConfig(rank=2, targets=("q_proj", "v_proj"))}
LORA = {"language_model": {"rank": 4}, "vision_encoder": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
GPT2 = {"config": {"model_type": "gpt2", "vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 2}}


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request, tiny_settings, tokenizer) -> EmberVLM:
    """A model whose adapters add something."""
    torch.manual_seed(0)
    settings = tiny_settings | ({"language": GPT2} if request.param == "gpt2" else {})
    model = build_model(settings)
    model.attach_tokenizer(tokenizer)
    torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=0.1)
    add_adapters(model, BOTH)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model: EmberVLM) -> torch.Tensor:
    """Of a text behind a picture."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (2, 36, 36, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, 500, (2, 12), generator=generator)
    seen = torch.ones(2, dtype=torch.bool)
    visual = model.see_pictures(picture)
    hidden, _ = model.refine(model.read(visual, seen, ids, ids >= 0), ids, visual, seen)
    return model.token_logits(hidden)


def test_new_adapters_add_nothing(tiny_model):
    before = logits_of(tiny_model)
    add_adapters(tiny_model, BOTH)
    assert torch.equal(logits_of(tiny_model), before)


def test_a_checkpoint_holds_merged_weights_that_compute_the_same(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    merged = EmberVLM.from_pretrained(tmp_path)
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=0, atol=1e-5)
    asked = dict(instruction="Which robot flies?", image=None, max_new_tokens=8)
    assert merged.generate_with_reasoning(**asked)["answer"] == adapted.generate_with_reasoning(**asked)["answer"]


@torch.no_grad()
def test_a_step_of_generation_reads_the_adapters(adapted):
    """The steps of our own for one more token read weights past their modules."""
    language = adapted.language_model
    embeds, place = torch.randn(2, 1, language.hidden_size), torch.zeros(2, 1, dtype=torch.int64)
    seen = torch.ones(2, 1, dtype=torch.bool)
    found = language_step(language, 8)(embeds[:, 0], seen, None, place, DynamicCache())
    torch.testing.assert_close(found, language(embeds, seen.long(), place)[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("component", BOTH)
def test_peft_adds_the_saved_adapters_to_the_part_that_they_were_trained_on(component, adapted, tmp_path):
    from peft import PeftModel

    adapted.save_pretrained(tmp_path)
    wanted = weights_of(tmp_path)
    part = getattr(adapted, component).backbone
    plain = type(part)(part.config)
    if component == "vision_encoder":
        plain.pooler = None
    own = {name.replace(".base_layer.", "."): v for name, v in part.state_dict().items() if not is_adapter(name)}
    plain.load_state_dict(own)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapters" / component).merge_and_unload()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, wanted[f"{component}.backbone.{name}"], rtol=0, atol=1e-6)
    assert any(not torch.equal(value, own[name]) for name, value in again.state_dict().items())


def test_targets_that_name_no_layer_are_an_error_that_lists_the_layers(tiny_model):
    with pytest.raises(
        ConfigError,
        match="lora: language_model: targets c_attn, lm_head: no linear layer is called so; there are "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ):
        check_targets(tiny_model, {"language_model": LoraConfig(targets=("q_proj", "c_attn", "lm_head"))})


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"projection": {}}, "'projection' has no adapters; vision_encoder and language_model can have"),
        ({"language_model": {"rank": 0}}, r"language_model: rank: 0 is less than 1"),
        ({"language_model": {"alpha": 0}}, "alpha: 0.0 is not positive"),
        ({"language_model": {"dropout": 1}}, r"dropout: 1.0 is not in \[0, 1\)"),
        ({"language_model": {"r": 8}}, "lora.language_model.r: unknown key"),
    ],
)
def test_a_bad_setting_is_named(lora: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        from_mapping(TrainConfig, {"stage4": {"phase2": {"lora": lora}}})


def test_adapters_of_a_frozen_component_or_of_phase_1_are_an_error() -> None:
    with pytest.raises(ConfigError, match="language_model: its learning rate multiplier is 0"):
        Phase2Config(lora=BOTH, learning_rate_multipliers={"language_model": 0})
    with pytest.raises(ConfigError, match="lora: language_model, vision_encoder does nothing in this phase"):
        Phase1Config(lora=BOTH)
    with pytest.raises(ConfigError, match="stage4.lora: unknown key; it belongs to stage4.phase2"):
        from_mapping(TrainConfig, {"stage4": {"lora": {"language_model": {}}}})


def test_a_step_moves_adapters_projection_and_reasoning_module_alone(data: Path) -> None:
    phase = phase_config({**PHASE2, "lora": LORA})
    bench = Bench.make(data, phase, global_batch=4, engine="torch")
    add_adapters(bench.model, phase.lora)
    before = {key: value.clone() for key, value in bench.model.state_dict().items()}
    engine = build_engine(
        TrainingModule(bench.model), bench.config, phase, World(0, 1, CPU), batch_size=4, accumulation=1
    )
    engine.train_step(bench.batches(0, 0, 1, 1), phase.loss_weights, dict.fromkeys(MULTIPLIERS, 1e-3), 0)
    after = bench.model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {key.partition(".")[0] for key in moved} == set(MULTIPLIERS)
    assert all(is_adapter(key) for key in moved if ".backbone." in key)
    state = engine.snapshot().collect()
    assert state is not None
    moments = state.optimizer["moments"]
    assert all(is_adapter(key) for key in moments if ".backbone." in key) and any(map(is_adapter, moments))


def test_running_statistics_under_adapters_stay(tiny_model):
    tiny_model.vision_encoder.norm = torch.nn.BatchNorm2d(3)
    add_adapters(tiny_model, BOTH)
    tiny_model.train()
    assert not tiny_model.vision_encoder.norm.training and tiny_model.vision_encoder.backbone.training


def test_adapters_are_a_setting_that_a_finished_phase_is_held_to() -> None:
    before, now = (shown_lora({"language_model": LoraConfig(rank=rank)}) for rank in (4, 8))
    assert changes({"lora": before}, {"lora": now}) == [
        "lora language_model rank 4 alpha 32 dropout 0 on all, now language_model rank 8 alpha 32 dropout 0 on all"
    ]
    assert changes({"lora": before}, {"lora": shown_lora({})})[0].endswith(", now none")


# -- whole phases ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bench(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a start for Stage 4 and the YAML of a run whose phase 2 trains adapters."""
    folder = tmp_path_factory.mktemp("lora")
    save_stage3(folder / "start", TINY, read_records(data, candidates=ROBOTS))
    model = write_model_yaml(folder)
    write_run_yaml(folder, model, data, stage4__phase2__lora=LORA, stage4__gradient_checkpointing=True)
    return folder


def start(bench: Path, output: Path, *flags: str, processes: int = 1, check: bool = True) -> Any:
    flags = ("--phase", "2", "--max_steps", "4", "--save_steps", "2", *flags)
    start_from = ("--resume_from", str(bench / "start" / "checkpoint-final"))
    launcher = "python" if processes == 1 else "ranks"
    whole = ("--config", str(bench / "run.yaml"), *start_from, *flags, "--output_dir", str(output))
    found = train(launcher, *whole, processes=processes)
    return ok(found) if check else found


@pytest.fixture(scope="module")
def straight(bench: Path) -> Path:
    """Phase 2 of a run on plain torch that was not stopped."""
    start(bench, bench / "straight", "--engine", "torch")
    return run_dir.phase_dir(bench / "straight", 2)


def copy_at_step_2(straight: Path, output: Path) -> Path:
    folder = run_dir.phase_dir(output, 2)
    shutil.copytree(straight, folder)
    unfinish(folder, keep_step=2)
    return folder


@pytest.mark.slow
def test_a_resumed_phase_equals_the_one_that_was_not_stopped_bit_for_bit(bench: Path, straight: Path) -> None:
    folder = copy_at_step_2(straight, bench / "again")
    start(bench, bench / "again", "--engine", "torch")
    found, wanted = (weights_of(run_dir.checkpoint_path(place, None)) for place in (folder, straight))
    assert changed_components(wanted, found) == set()
    before = weights_of(bench / "start" / "checkpoint-final")
    assert all(not torch.equal(before[name], wanted[name]) for name in before if name.endswith("q_proj.weight"))
    assert all(torch.equal(before[name], wanted[name]) for name in before if "norm" in name and ".backbone." in name)
    for component in LORA:
        name = f"adapters/{component}/adapter_model.safetensors"
        saved, again = (load_file(run_dir.checkpoint_path(place, None) / name) for place in (straight, folder))
        assert saved and all(torch.equal(value, again[key]) for key, value in saved.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_another_engine_on_two_processes_resumes_what_plain_torch_saved(
    engine: str, bench: Path, straight: Path
) -> None:
    folder = copy_at_step_2(straight, bench / engine)
    flags = ("--engine", "deepspeed", "--zero_stage", "3") if engine == "zero3" else ("--engine", engine)
    start(bench, bench / engine, *flags, "--batch_size", "2", processes=2)
    found, wanted = (weights_of(run_dir.checkpoint_path(place, None)) for place in (folder, straight))
    assert_same_weights(found, wanted, rtol=1e-3)


@pytest.mark.slow
def test_a_numbered_checkpoint_loads_as_the_final_one_does(straight: Path) -> None:
    for step in (2, None):
        EmberVLM.from_pretrained(run_dir.checkpoint_path(straight, step))


@pytest.mark.slow
def test_a_resume_with_other_adapters_is_refused(bench: Path, straight: Path) -> None:
    copy_at_step_2(straight, bench / "other")
    flags = ("--engine", "torch", "--set", "stage4.phase2.lora.language_model.rank=8")
    said = start(bench, bench / "other", *flags, check=False).stderr
    assert (
        "was trained with other adapters (lora: language_model rank 4" in said and "now: language_model rank 8" in said
    )

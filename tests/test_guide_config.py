"""The guide's blocks of settings, pasted as they stand: what they mean, and that they train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_helpers import REPOSITORY, TINY, make_data, ok, save_stage3, train, write_model_yaml

from embervlm import run_dir
from embervlm.config import COMPONENTS, ConfigError, TrainConfig
from embervlm.config_data import AUGMENTATION_STRATEGIES
from embervlm.config_file import from_mapping, load_train_config
from embervlm.config_lora import LoraConfig
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

BLOCKS = Path(__file__).resolve().parent / "guide_blocks.txt"
GUIDE = REPOSITORY.parent / "shared" / "spec" / "stage4_guide.md"
TEXTS = dict(re.findall(r"```(?:yaml|python)\n((\w+).*?)```", BLOCKS.read_text(encoding="utf-8"), re.DOTALL))
BLOCK = {name: text for text, name in TEXTS.items()}
YAML_BLOCKS = ("phase1", "phase2", "stage4", "curriculum")


def pasted(folder: Path, *names: str, **more: object) -> Path:
    """A file with the guide's blocks of these names one after the other, and `more` keys behind them."""
    path = folder / "pasted.yaml"
    path.write_text("\n".join([*(BLOCK[name] for name in names), yaml.safe_dump(more) if more else ""]))
    return path


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide does not lie beside this checkout")
@pytest.mark.parametrize("name", BLOCK)
def test_a_block_stands_in_the_guide_word_for_word(name: str) -> None:
    assert BLOCK[name] in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [("stage4",), ("phase1", "phase2"), ("phase1",), ("phase2",), ("curriculum",), ()])
def test_the_guides_blocks_give_the_guides_phases(names: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, warmup and factors stand elsewhere in the guide than its blocks, which must not mean 0."""
    stage = load_train_config(pasted(tmp_path, *names, seed=0)).stage4
    one, two = stage.phase1, stage.phase2
    assert (one.epochs, one.learning_rate, one.warmup_steps, one.gradient_clipping) == (5, 1e-4, 500, 1.0)
    assert (two.epochs, two.learning_rate, two.warmup_steps, two.gradient_clipping) == (5, 5e-5, 200, 1.0)
    guide = {"reasoning": 0.4, "consistency": 0.3, "answer": 0.3, "multimodal": 0.0, "direct": 0.0, "dense": 0.0}
    assert one.loss_weights == guide
    assert two.loss_weights == guide | {"reasoning": 0.3, "consistency": 0.2, "multimodal": 0.2}
    assert one.multipliers == dict.fromkeys(COMPONENTS, 0.0) | {"reasoning_module": 1.0}
    assert two.multipliers == {"vision_encoder": 0.1, "projection": 0.5, "language_model": 0.5, "reasoning_module": 1.0}


def test_one_changed_weight_leaves_the_phases_others(tmp_path: Path) -> None:
    """The guide's troubleshooting: `reasoning_loss_weight: 0.5 (from 0.4)`, `vision_encoder: 0.05 (from 0.1)`."""
    values = {
        "phase1": {"reasoning_loss_weight": 0.5},
        "phase2": {"learning_rate_multipliers": {"vision_encoder": 0.05}},
    }
    stage = load_train_config(pasted(tmp_path, **values)).stage4
    assert (stage.phase1.reasoning_loss_weight, stage.phase1.consistency_loss_weight) == (0.5, 0.3)
    assert stage.phase1.multipliers["language_model"] == 0
    assert stage.phase2.multipliers == {
        "vision_encoder": 0.05,
        "projection": 0.5,
        "language_model": 0.5,
        "reasoning_module": 1.0,
    }


def test_flags_stand_over_a_phases_block_at_the_top(tmp_path: Path) -> None:
    overrides = {"stage4.phase1.epochs": 7, "phase2.learning_rate": 3e-5}
    stage = load_train_config(pasted(tmp_path, "phase1", "phase2"), overrides).stage4
    assert (stage.phase1.epochs, stage.phase2.learning_rate, stage.phase2.epochs) == (7, 3e-5, 5)


def test_a_phase_at_the_top_and_in_stage4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phase1: appears at the top and in stage4; keep one"):
        load_train_config(pasted(tmp_path, "phase1", "stage4"))


@pytest.mark.parametrize(
    ("alias", "component"), [("projection_layer", "projection"), ("language_model_backbone", "language_model")]
)
def test_the_guides_other_names_of_components_are_taken_for_multipliers(
    alias: str, component: str, tmp_path: Path
) -> None:
    path = pasted(tmp_path, phase2={"learning_rate_multipliers": {alias: 0.25}})
    assert load_train_config(path).stage4.phase2.multipliers[component] == 0.25
    flag = {f"stage4.phase2.learning_rate_multipliers.{component}": 0.75}
    assert load_train_config(path, flag).stage4.phase2.multipliers[component] == 0.75
    flag = {f"stage4.phase2.learning_rate_multipliers.{alias}": 0.75}
    assert load_train_config(path, flag).stage4.phase2.multipliers[component] == 0.75


def test_adapters_are_asked_for_by_either_name_and_a_flag_changes_what_the_file_says(tmp_path: Path) -> None:
    path = pasted(tmp_path, phase2={"lora": {"language_model_backbone": {"rank": 4, "alpha": 16}}})
    for name in ("language_model", "language_model_backbone"):
        lora = load_train_config(path, {f"stage4.phase2.lora.{name}.rank": 8}).stage4.phase2.lora
        assert lora == {"language_model": LoraConfig(rank=8, alpha=16)}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("learning_rate_multipliers", {"projection": 0.5, "projection_layer": 0.25}),
        ("lora", {"language_model": {"rank": 8}, "language_model_backbone": {"rank": 4}}),
    ],
)
def test_one_component_under_two_names_is_refused(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .* name one component twice"):
        from_mapping(TrainConfig, {"stage4": {"phase2": {key: values}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reasoning_loss_weight": 0.5}, "reasoning_loss_weight: unknown key; it belongs to stage4.phase1 or"),
        ({"stage4": {"reasoning_loss_weight": 0.5}}, "it belongs to stage4.phase1 or stage4.phase2"),
        ({"vision_encoder": 0.05}, "it belongs under stage4.phase2.learning_rate_multipliers: vision_encoder"),
        ({"stage4": {"projection_layer": 0.05}}, "it belongs under stage4.phase2.learning_rate_multipliers: pro"),
        ({"batch_size": 8}, "it belongs to stage4 or baseline"),
        ({"target_samples": 8}, "it belongs to stage4.reasoning_augmentation"),
        ({"stage4": {"seed": 8}}, "it belongs to the top of the file"),
        ({"curriculum": {"stage1": {"complexity": "simple"}}}, "curriculum.stage1: max_steps is missing"),
    ],
)
def test_a_setting_in_the_wrong_section_is_told_where_it_belongs(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_mapping(TrainConfig, values)


NOTHING = {f"{term}_loss_weight": 0 for term in ("reasoning", "consistency", "answer", "multimodal")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage4": {"phase1": NOTHING}}, "phase 'train_reasoning_heads': reasoning_loss_weight, .* are all 0"),
        ({"stage4": {"phase2": NOTHING}}, "phase 'joint_finetuning': reasoning_loss_weight, .* are all 0"),
        ({"stage3": {"direct_loss_weight": 0, "dense_loss_weight": 0}}, "direct_loss_weight and dense_.* are both 0"),
        ({"stage4": {"phase2": NOTHING | {"direct_loss_weight": 0.1}}}, "reasoning_loss_weight, .* are all 0"),
        ({"stage4": {"phase2": {"dense_loss_weight": 1}}}, "dense_loss_weight: 1.0 does nothing in this phase"),
        ({"stage3": {"reasoning_loss_weight": 0.4}}, "reasoning_loss_weight: 0.4 does nothing in this phase"),
    ],
)
def test_a_phase_that_would_learn_nothing_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, values)


def test_the_guides_augmentation_strategies_are_settings(tmp_path: Path) -> None:
    strategies = BLOCK["augmentation_strategies"].replace("=", ":", 1)
    (tmp_path / "pasted.yaml").write_text(strategies)
    found = load_train_config(tmp_path / "pasted.yaml").stage4.reasoning_augmentation
    assert found is not None and found.augmentation_strategies == AUGMENTATION_STRATEGIES
    (tmp_path / "pasted.yaml").write_text("augmentation_strategies: {paraphrase: 1, shuffle: 1}")
    with pytest.raises(ConfigError, match="augmentation_strategies: 'shuffle' is not one of paraphrase, reorder"):
        load_train_config(tmp_path / "pasted.yaml")


# ---- trained with


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    write_model_yaml(folder)
    save_stage3(folder / "stage3", TINY, read_records(make_data(folder), candidates=ROBOTS))
    return folder


def moved_by_gradient(final: Path) -> set[str]:
    """Components with first moments other than 0: what weight decay alone moves has none."""
    moments = torch.load(final / "training_state.pt", weights_only=True)["optimizer"]["moments"]
    return {
        part
        for name, tensors in moments.items()
        if any(bool(value.any()) for value in tensors.values())
        for part in COMPONENTS
        if part in name.split(".")
    }


@pytest.mark.slow
@pytest.mark.parametrize("names", [("stage4",), ("phase1", "phase2", "curriculum")], ids="+".join)
def test_the_guides_blocks_as_they_stand_train_what_each_phase_names(
    names: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    fewer = "stage4.reasoning_augmentation.target_samples=60"  # 50,000 take minutes
    result = ok(
        train(
            "python",
            "--config",
            pasted(tmp_path, *names),
            "--stages",
            "4",
            "--engine",
            "torch",
            "--model",
            start / "tiny.yaml",
            "--reasoning_data",
            start / "reasoning_data.json",
            "--resume_from",
            start / "stage3" / "checkpoint-final",
            "--output_dir",
            tmp_path / "out",
            "--max_steps",
            "3",
            "--set",
            "sample_records=1",
            *([fewer] if "stage4" in names else []),
        )
    )
    finals = [run_dir.phase_dir(tmp_path / "out", phase) / "checkpoint-final" for phase in (1, 2)]
    assert [moved_by_gradient(final) for final in finals] == [{"reasoning_module"}, set(COMPONENTS)]
    assert (names == ("stage4",)) == ("lost 9 to 35 points" in result.stdout) == ("ignore its chain" in result.stdout)
    for phase, warmup in ((1, 500), (2, 200)):
        assert f"phase {phase}: warmup_steps {warmup} is more than 25% of its 3 steps" in result.stdout

"""What learns in each phase, and how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import PHASE1, PHASE2, TINY, phase_config

from embervlm.config import COMPONENTS, REPOSITORY, ConfigError
from embervlm.config_file import load_train_config
from embervlm.engines.param_groups import AUXILIARY, build_param_groups
from embervlm.model.embervlm import build_model
from embervlm.training.module import TrainingModule


@pytest.fixture
def module() -> TrainingModule:
    return TrainingModule(build_model({**TINY, "candidates": ("Drone",)}, load_pretrained=False))


def paths_of(module: nn.Module, group: dict[str, Any]) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {path for path, parameter in module.named_parameters() if id(parameter) in wanted}


def test_phase_1_has_one_group_with_all_of_the_reasoning_module_and_nothing_else(module: TrainingModule) -> None:
    (group,) = build_param_groups(module, phase_config(PHASE1))
    own = {path for path, _ in module.named_parameters() if path.startswith("model.reasoning_module.")}
    assert group["name"] == "reasoning_module" and paths_of(module, group) == own


def test_phase_1_freezes_every_parameter_of_the_backbone(module: TrainingModule) -> None:
    build_param_groups(module, phase_config(PHASE1))
    learning = {path.split(".")[1] for path, parameter in module.named_parameters() if parameter.requires_grad}
    assert learning == {"reasoning_module"}


def test_phase_2_has_the_rates_that_the_guide_prints() -> None:
    phase = load_train_config(REPOSITORY / "configs" / "training_stages.yaml").stage4.phase2
    model = build_model({**TINY, "candidates": ("Drone",)}, load_pretrained=False)
    rates = {group["name"]: group["lr"] for group in build_param_groups(model, phase)}
    assert rates == pytest.approx(
        {"vision_encoder": 5.0e-6, "projection": 2.5e-5, "language_model": 2.5e-5, "reasoning_module": 5.0e-5}
    )


def test_phase_1_has_the_rate_that_the_guide_prints() -> None:
    phase = load_train_config(REPOSITORY / "configs" / "training_stages.yaml").stage4.phase1
    model = build_model({**TINY, "candidates": ("Drone",)}, load_pretrained=False)
    assert {group["name"]: group["lr"] for group in build_param_groups(model, phase)} == {"reasoning_module": 1.0e-4}


def test_phase_2_gives_every_parameter_to_exactly_one_group(module: TrainingModule) -> None:
    groups = build_param_groups(module, phase_config(PHASE2))
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in module.parameters())
    assert len(found) == len(set(found))


def test_the_groups_hold_the_components_they_are_named_after(module: TrainingModule) -> None:
    for group in build_param_groups(module, phase_config(PHASE2)):
        assert {path.split(".")[1] for path in paths_of(module, group)} == {group["name"]}


def test_phase_2_after_phase_1_thaws_the_backbone(module: TrainingModule) -> None:
    build_param_groups(module, phase_config(PHASE1))
    build_param_groups(module, phase_config(PHASE2))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_multiplier_of_zero_freezes_a_component_and_leaves_its_group_out(
    component: str, module: TrainingModule
) -> None:
    multipliers = dict.fromkeys(COMPONENTS, 1.0) | {component: 0.0}
    groups = build_param_groups(module, phase_config({**PHASE2, "learning_rate_multipliers": multipliers}))
    assert component not in {group["name"] for group in groups}
    frozen = {path.split(".")[1] for path, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {component}


def test_the_dense_head_of_stage_3_learns_at_the_peak_rate() -> None:
    module = TrainingModule(build_model({**TINY, "candidates": ("Drone",)}, load_pretrained=False), [3, 4])
    groups = {group["name"]: group for group in build_param_groups(module, phase_config(PHASE2))}
    assert groups[AUXILIARY]["lr"] == PHASE2["learning_rate"]
    assert paths_of(module, groups[AUXILIARY]) == {"auxiliary.weight", "auxiliary.bias"}


def test_nothing_to_train_is_an_error_that_names_the_phase(module: TrainingModule) -> None:
    phase = phase_config({"name": "idle", "learning_rate_multipliers": dict.fromkeys(COMPONENTS, 0.0)})
    with pytest.raises(ConfigError, match="idle.*nothing would be trained"):
        build_param_groups(module, phase)


def test_a_parameter_of_no_component_is_an_error_that_names_it() -> None:
    stray = nn.Module()
    stray.adapter = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"adapter\.weight"):
        build_param_groups(stray, phase_config(PHASE2))


def test_a_component_is_known_by_its_place_in_the_path_not_by_a_part_of_its_name() -> None:
    odd = nn.Module()
    odd.model = nn.Module()
    odd.model.vision_encoder = nn.Module()
    odd.model.vision_encoder.language_model = nn.Linear(2, 2)  # some backbones call an inner part so
    groups = build_param_groups(odd, phase_config(PHASE2))
    assert [group["name"] for group in groups] == ["vision_encoder"]


def test_grouping_changes_no_weight(module: TrainingModule) -> None:
    before = {path: parameter.detach().clone() for path, parameter in module.named_parameters()}
    build_param_groups(module, phase_config(PHASE2))
    assert all(torch.equal(before[path], parameter) for path, parameter in module.named_parameters())

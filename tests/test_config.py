"""Settings: what ships loads, and whatever is wrong is named with its path before a run starts."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from embervlm import config
from embervlm.config import (
    COMPONENTS,
    REPOSITORY,
    ConfigError,
    PhaseConfig,
    PolicySettings,
    ScheduledSamplingConfig,
    StageConfig,
    TrainConfig,
)
from embervlm.config_file import from_mapping, load_train_config, model_preset, override, read_yaml
from embervlm.run.train_flags import known_to_harm, load_config, parser, rates_that_harm

RUNS = sorted((REPOSITORY / "configs").glob("*.yaml"))
PRESETS = sorted((REPOSITORY / "configs" / "model").glob("*.yaml"))


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- what ships


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_shipped_run_loads(path):
    assert isinstance(load_train_config(path), TrainConfig)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_shipped_run_names_a_preset_that_is_there(path):
    assert model_preset(load_train_config(path).model)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_shipped_preset_names_both_backbones(path):
    settings = model_preset(path.stem)
    assert settings["vision"]["config"]["model_type"] and settings["language"]["config"]["model_type"]


def test_a_preset_may_be_a_path(tiny_model_yaml):
    assert model_preset(str(tiny_model_yaml))["image_size"] == 36


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'embervlm-39'.*embervlm-39m.*quickstart"):
        model_preset("embervlm-39")


def test_the_guides_values_are_the_shipped_ones():
    """Both phases of the Stage 4 guide: epochs, rates, warmup and loss weights."""
    stage = load_train_config(REPOSITORY / "configs" / "training_stages.yaml").stage4
    one, two = stage.phase1, stage.phase2
    assert (one.epochs, one.learning_rate, one.warmup_steps) == (5, 1e-4, 500)
    assert (two.epochs, two.learning_rate, two.warmup_steps) == (5, 5e-5, 200)
    weights = [one.loss_weights[term] for term in ("reasoning", "consistency", "answer")]
    assert weights == [0.4, 0.3, 0.3]
    weights = [two.loss_weights[term] for term in ("reasoning", "consistency", "answer", "multimodal")]
    assert weights == [0.3, 0.2, 0.3, 0.2]
    assert (stage.batch_size, stage.max_reasoning_length) == (32, 512)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_no_shipped_run_turns_on_what_the_results_say_harms(path):
    stage = load_train_config(path).stage4
    assert not known_to_harm(stage)
    assert stage.reasoning_augmentation is None and not stage.scheduled_sampling.enabled
    assert not known_to_harm(StageConfig())


def test_the_guides_run_states_the_price_where_its_keys_would_stand():
    text = (REPOSITORY / "configs" / "training_stages.yaml").read_text(encoding="utf-8")
    assert "target_samples: 50000" in text and "docs/results.md" in text and "enabled: false" in text


def test_scheduled_sampling_is_on_for_whoever_writes_its_section():
    values = {"stage4": {"scheduled_sampling": {"final_teacher_forcing": 0.3}}}
    stage = from_mapping(TrainConfig, values).stage4
    assert stage.scheduled_sampling.enabled and "ignore its chain" in known_to_harm(stage)[0]


# ---- reading


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_rate_may_be_written_with_or_without_a_dot(tmp_path, number):
    path = written(tmp_path, f"stage4: {{phase1: {{learning_rate: {number}, freeze_backbone: true}}}}")
    assert load_train_config(path).stage4.phase1.learning_rate == 1e-4


def test_a_whole_number_is_read_as_a_rate():
    assert from_mapping(PhaseConfig, {"learning_rate": 1}).learning_rate == 1.0


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_name(tmp_path):
    path = written(tmp_path, "stage4: {phase2: {learning_rat: 1.0e-4}}")
    with pytest.raises(ConfigError, match=r"run\.yaml: stage4\.phase2\.learning_rat: unknown key.*learning_rate\?"):
        load_train_config(path)


def test_an_unknown_key_like_no_other_is_named_without_a_guess():
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, {"qqqqq": 1})
    assert str(caught.value) == "qqqqq: unknown key"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "zero"}, "seed: expected a whole number, found 'zero'"),
        ({"seed": True}, "seed: expected a whole number, found True"),
        ({"seed": 1.5}, "seed: expected a whole number, found 1.5"),
        ({"model": 3}, "model: expected text, found 3"),
        ({"allow_outside": "no"}, "allow_outside: expected true or false, found 'no'"),
        ({"stage4": {"phase1": {"learning_rate": "fast"}}}, "stage4.phase1.learning_rate: expected a number, found"),
        ({"stage4": {"phase1": {"learning_rate": True}}}, "stage4.phase1.learning_rate: expected a number, found"),
        ({"stage4": {"phase1": {"learning_rate": float("inf")}}}, "learning_rate: expected a number, found inf"),
        ({"stage4": {"phase1": {"learning_rate": "nan"}}}, "learning_rate: expected a number, found 'nan'"),
        ({"stage4": {"phase1": {"learning_rate": 10**400}}}, "learning_rate: expected a number, found 1000"),
        ({"stage3": {"learning_rate_multipliers": {"projection": float("nan")}}}, "projection: expected a number, fou"),
        ({"stage4": 3}, "stage4: expected a mapping, found 3"),
        ({"stage3": {"learning_rate_multipliers": {"projection": "x"}}}, "learning_rate_multipliers.projection: exp"),
        ({"stage3": {"frozen_components": [1]}}, "stage3.frozen_components[0]: expected text, found 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_path(values, message):
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, values)
    assert message in str(caught.value)


def test_all_unknown_keys_and_wrong_types_are_listed_together(tmp_path):
    path = written(tmp_path, "sed: 1\nkeep_last: many\nstage4: {batchsize: 2, phase1: {epochs: 1.5}}")
    with pytest.raises(ConfigError) as caught:
        load_train_config(path)
    for found in ("sed: unknown", "keep_last: expected", "stage4.batchsize: unknown", "stage4.phase1.epochs: expected"):
        assert found in str(caught.value)


def test_impossible_values_are_listed_beside_unknown_keys():
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, {"sed": 1, "stage3": {"epochs": 0}, "stage4": {"batch_size": 0}})
    for found in ("sed: unknown", "epochs: 0", "batch_size: 0"):
        assert found in str(caught.value)


def test_a_key_that_appears_twice_is_named_with_its_line(tmp_path):
    path = written(tmp_path, "seed: 1\nstage4:\n  batch_size: 8\nstage3: {epochs: 2}\nstage4:\n  phase1: {epochs: 3}")
    with pytest.raises(ConfigError, match=rf"^{path}: line 5: stage4 appears twice in one section; keep one of the tw"):
        load_train_config(path)
    path = written(tmp_path, "stage4:\n  phase1:\n    epochs: 2\n    epochs: 3")
    with pytest.raises(ConfigError, match="line 4: epochs appears twice"):
        load_train_config(path)
    merged = written(tmp_path, "stage4:\n  phase1: &one {epochs: 2}\n  phase2:\n    <<: *one\n    warmup_steps: 3")
    assert load_train_config(merged).stage4.phase2.epochs == 2


def test_overrides_stand_over_the_file(tmp_path):
    path = written(tmp_path, "seed: 1\nstage4: {batch_size: 8}")
    config = load_train_config(path, {"seed": 2, "stage4.phase1.epochs": 3, "stage4.max_reasoning_length": 99})
    assert (config.seed, config.stage4.batch_size, config.stage4.phase1.epochs) == (2, 8, 3)


def test_an_override_makes_the_sections_it_needs():
    values = {}
    override(values, "a.b.c", 1)
    assert values == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("section", ["", "3"])
def test_an_override_into_an_empty_section_is_no_crash(tmp_path, section):
    path = written(tmp_path, f"stage4: {section}")
    try:
        load_train_config(path, {"stage4.batch_size": 4})
    except ConfigError as error:
        assert "stage4" in str(error)


@pytest.mark.parametrize("text", ["[1, 2]", "seed: [1", "just text", ""])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(written(tmp_path, text))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML"):
        read_yaml(tmp_path / "run.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    path = written(tmp_path, f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ConfigError):
        load_train_config(path)
    assert not Path(tmp_path / "made").exists()


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = load_train_config(REPOSITORY / "configs" / "training_stages.yaml")
    assert from_mapping(TrainConfig, dataclasses.asdict(config)) == config


# ---- what belongs together


def test_phase1_trains_the_reasoning_module_alone():
    multipliers = PhaseConfig(freeze_backbone=True).multipliers
    assert {name for name, factor in multipliers.items() if factor} == {"reasoning_module"}


def test_a_component_without_a_multiplier_trains_at_the_full_rate():
    assert PhaseConfig(learning_rate_multipliers={"projection": 0.5}).multipliers == {
        "vision_encoder": 1.0,
        "projection": 0.5,
        "language_model": 1.0,
        "reasoning_module": 1.0,
    }


def test_a_multiplier_for_no_component_is_refused():
    with pytest.raises(ConfigError, match="langauge_model"):
        PhaseConfig(learning_rate_multipliers={"langauge_model": 0.5})


@pytest.mark.parametrize("name", ["vision_encoder", "language_model_backbone", "projection_layer"])
def test_frozen_components_that_would_train_are_refused(name):
    with pytest.raises(ConfigError, match=f"frozen_components: lists {name}, but its learning rate multiplier is 1"):
        PhaseConfig(frozen_components=(name,))


@pytest.mark.parametrize("name", ["projection", "all"])
def test_trainable_components_that_would_not_train_are_refused(name):
    with pytest.raises(ConfigError, match="trainable_components"):
        PhaseConfig(freeze_backbone=True, trainable_components=(name,))


def test_a_listed_component_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no component is called 'eyes'"):
        PhaseConfig(frozen_components=("eyes",))


@pytest.mark.parametrize("component", [name for name in COMPONENTS if name != "reasoning_module"])
def test_a_frozen_backbone_with_a_rate_of_its_own_is_refused(component):
    with pytest.raises(ConfigError, match=component):
        PhaseConfig(freeze_backbone=True, learning_rate_multipliers={component: 0.1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PhaseConfig(epochs=0), "epochs: 0"),
        (lambda: PhaseConfig(learning_rate=0.0), "learning_rate: 0"),
        (lambda: PhaseConfig(learning_rate=float("nan")), "learning_rate: nan"),
        (lambda: PhaseConfig(warmup_steps=-1), "warmup_steps: -1"),
        (lambda: PhaseConfig(reasoning_loss_weight=-0.1), "reasoning_loss_weight: -0.1"),
        (lambda: PhaseConfig(gradient_clipping=0.0), "gradient_clipping: 0"),
        (lambda: PhaseConfig(name="p1", epochs=0), "phase 'p1': epochs"),
        (lambda: PhaseConfig(learning_rate_multipliers={"projection": -1.0}), "projection.*negative"),
        (lambda: StageConfig(batch_size=0), "batch_size: 0"),
        (lambda: StageConfig(max_reasoning_length=0), "max_reasoning_length: 0"),
        (lambda: ScheduledSamplingConfig(final_teacher_forcing=1.5), "final_teacher_forcing: 1.5"),
        (lambda: TrainConfig(engine="jax"), "engine: 'jax' is not one of deepspeed, fsdp, torch"),
        (lambda: TrainConfig(precision="fp8"), "precision: 'fp8'"),
        (lambda: TrainConfig(zero_stage=4), "zero_stage: 4"),
        (lambda: TrainConfig(save_steps=0), "save_steps: 0"),
        (lambda: TrainConfig(eval_steps=0), "eval_steps: 0"),
        (lambda: TrainConfig(max_steps=-3), "max_steps: -3"),
    ],
)
def test_an_impossible_value_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


SECTIONS = [
    kind
    for kind in vars(config).values()
    if dataclasses.is_dataclass(kind) and kind is not PolicySettings  # checked with the phase that has it
]
NUMBERS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}-{field.name}")
    for kind in SECTIONS
    for field in dataclasses.fields(kind)
    if str(field.type).startswith(("int", "float"))
]


@pytest.mark.parametrize(("kind", "field"), NUMBERS)
def test_no_number_of_a_run_may_be_negative(kind, field):
    with pytest.raises(ConfigError, match=field):
        kind(**{field: -1})


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3


def test_every_field_of_a_run_can_be_written_as_yaml():
    assert from_mapping(TrainConfig, yaml.safe_load(yaml.safe_dump(plain(TrainConfig())))) == TrainConfig()


def plain(config):
    """The config in what YAML can hold."""
    import json

    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    ("recipe", "flags", "rate"),
    [
        ("training_stages", (), 1e-5),
        ("own_data", (), 4e-4),
        ("own_data", ("--set", "stage4.phase3.num_iterations=2"), 4e-4),
        ("own_data", ("--phase2_learning_rate", "1e-3"), 2e-4),
        ("own_data", ("--phase3_learning_rate", "3e-5"), 3e-5),
    ],
)
def test_phase_3_without_a_rate_of_its_own_learns_at_a_fifth_of_phase_2s(
    recipe: str, flags: tuple[str, ...], rate: float
) -> None:
    """At 1e-5 the recipe of a model of 2M parameters, whose phase 2 learns at 2e-3, learned nothing."""
    argv = ["--config", f"configs/{recipe}.yaml", "--phase", "3", *flags]
    phase3 = load_config(parser().parse_args(argv)).stage4.phase3
    assert phase3 is not None and phase3.learning_rate == pytest.approx(rate)


def test_phase_3_takes_adapters_and_frozen_parts_from_phase_2(tmp_path: Path) -> None:
    """A language model of 135M that phase 2 had trained by adapters was trained whole."""
    lora = {"language_model_backbone": {"rank": 4}, "vision_encoder": {"rank": 2}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stage4": {"phase2": {"lora": lora}, "phase3": {}}}))
    phase3 = load_train_config(path).stage4.phase3
    assert phase3 is not None and set(phase3.lora) == {"language_model"} and phase3.lora["language_model"].rank == 4
    path.write_text(
        yaml.safe_dump({"stage4": {"phase2": {"learning_rate_multipliers": {"language_model": 0}}, "phase3": {}}})
    )
    frozen = load_train_config(path).stage4.phase3
    assert frozen is not None and not frozen.multipliers["language_model"] and frozen.multipliers["reasoning_module"]
    own = load_train_config(path, {"stage4.phase3.learning_rate_multipliers": {"language_model": 0.3}}).stage4.phase3
    assert own is not None and own.multipliers["language_model"] == 0.3


def test_a_pretrained_part_that_would_learn_too_fast_is_told(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(yaml.safe_dump({"vision": {"name_or_path": "dino", "pretrained": True}, "language": {}}))
    argv = ["--config", "configs/own_data.yaml", "--model", str(preset)]

    def told(*flags: str, phases: tuple[int, ...] = (2, 3)) -> list[str]:
        return rates_that_harm(load_config(parser().parse_args([*argv, *flags])), phases)

    (line,) = told()
    assert line.startswith("phase 2: vision_encoder is pretrained and learns at a rate of 0.001.")
    assert told("--set", line.rpartition("--set ")[2]) == told(phases=(1,)) == []
    imported = tmp_path / "imported"
    imported.mkdir()
    (imported / "config.json").write_text('{"model_type": "embervlm", "imported_from": "smolvlm"}')
    argv[-2:] = ["--resume_from", str(imported), "--phase", "3"]
    assert [line.partition(" is ")[0] for line in told()] == [
        *(f"phase 2: {name}" for name in ("vision_encoder", "language_model"))
    ]

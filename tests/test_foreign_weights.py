"""Weights as other programs write them, and the options of `from_pretrained`."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from training_helpers import TINY, ok, save_stage3, train, write_model_yaml, write_run_yaml

from embervlm.config import ConfigError
from embervlm.data.records import read_records
from embervlm.model.embervlm import EmberVLM
from embervlm.model.storage import CheckpointError, read_weights
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS


@pytest.fixture
def checkpoint(lively_model, tmp_path):
    lively_model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same(loaded, model):
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


def prefixed(prefix):
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def inside(*names):
    def wrap(weights):
        for name in names:
            weights = {name: weights, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
        return weights

    return wrap


@pytest.mark.parametrize(
    "wrap",
    [
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module.model."),
        *[inside(name) for name in ("model", "state_dict", "model_state_dict", "module")],
        inside("module", "state_dict"),
        lambda weights: inside("model")(prefixed("module.")(weights)),
    ],
)
def test_weights_are_taken_from_under_what_trainers_put_around_them(lively_model, checkpoint, wrap):
    torch.save(wrap(dict(lively_model.state_dict())), checkpoint / "pytorch_model.bin")
    assert_same(EmberVLM.from_pretrained(checkpoint), lively_model)


def test_weights_of_a_compiled_model_and_of_compiled_parts_are_taken(lively_model, checkpoint):
    wanted = {key: value.clone() for key, value in lively_model.state_dict().items()}
    lively_model.language_model = torch.compile(lively_model.language_model)
    torch.save({"model": torch.compile(lively_model).state_dict()}, checkpoint / "pytorch_model.bin")
    loaded = EmberVLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in wanted.items())


def whole(model, folder):
    save_model(model, str(folder / "model.safetensors"))  # leaves all but one of tied weights out


def in_parts(model, folder, *, safe):
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    suffix, base = (".safetensors", "model") if safe else (".bin", "pytorch_model")
    names = {key: f"{base}-{number % 3 + 1:05d}-of-00003{suffix}" for number, key in enumerate(weights)}
    for name in set(names.values()):
        part = {key: value for key, value in weights.items() if names[key] == name}
        save_file(part, folder / name) if safe else torch.save(part, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{base}{suffix}.index.json").write_text(json.dumps(index))


FORMS = {
    "safetensors": whole,
    "parts": lambda model, folder: in_parts(model, folder, safe=True),
    "bin parts": lambda model, folder: in_parts(model, folder, safe=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_other_files_are_taken(lively_model, checkpoint, form):
    for path in checkpoint.glob("*.bin"):
        path.unlink()
    FORMS[form](lively_model, checkpoint)
    assert_same(EmberVLM.from_pretrained(checkpoint), lively_model)


def test_a_damaged_or_missing_part_is_named(lively_model, checkpoint):
    (checkpoint / "pytorch_model.bin").unlink()
    in_parts(lively_model, checkpoint, safe=True)
    part = checkpoint / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{part}: cut short"):
        EmberVLM.from_pretrained(checkpoint)
    part.unlink()
    with pytest.raises(CheckpointError, match=f"{part}: missing, 1 of the 3 files of model.safetensors.index.json"):
        EmberVLM.from_pretrained(checkpoint)
    (checkpoint / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-.*, .*00002-of-.*: missing, 2 of the 3 files"):
        EmberVLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: damaged: it lacks weight_map"):
        EmberVLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["one file", *FORMS])
def test_half_precision_is_read_into_float32(lively_model, checkpoint, form, dtype):
    for path in checkpoint.glob("*.bin"):
        path.unlink()
    lively_model.to(dtype)
    if form == "one file":
        torch.save(dict(lively_model.state_dict()), checkpoint / "pytorch_model.bin")
    else:
        FORMS[form](lively_model, checkpoint)
    found = read_weights(checkpoint)[1]
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float32}
    assert_same(EmberVLM.from_pretrained(checkpoint), lively_model.float())


class NotWeights:
    """Of a class that only the program knows which wrote the file."""


@pytest.mark.parametrize("write", [torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))])
def test_a_pickle_of_more_than_weights_is_not_read_and_the_line_says_why(checkpoint, write):
    path = checkpoint / "pytorch_model.bin"
    write({"weights": torch.zeros(2), "trainer": NotWeights()}, path)
    with pytest.raises(CheckpointError, match=f"{path}: contains more than weights.*save only the weights") as told:
        EmberVLM.from_pretrained(checkpoint)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_training_starts_from_weights_of_a_ddp_trainer_in_safetensors(scene_data, tmp_path):
    data = scene_data / "reasoning_data.json"
    stage3 = save_stage3(tmp_path / "start", TINY, read_records(data, candidates=ROBOTS))
    weights = torch.load(stage3 / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "COMPLETE"):
        (stage3 / name).unlink()
    save_file({f"module.{key}": value.clone() for key, value in weights.items()}, stage3 / "model.safetensors")
    config = write_run_yaml(tmp_path, write_model_yaml(tmp_path), data)
    flags = ["--config", config, "--resume_from", stage3, "--engine", "torch", "--max_steps", "1"]
    ok(train("python", *flags, "--stages", "4", "--phase", "1"))
    trained = torch.load(tmp_path / "outputs" / "stage4" / "phase1" / "checkpoint-final" / "pytorch_model.bin")
    assert all(torch.equal(trained[key], value) for key, value in weights.items())  # phase 1 leaves them alone


# ---- options


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float64", torch.float16, "auto", None])
def test_the_type_of_the_weights_is_the_one_asked_for(checkpoint, dtype):
    wanted = {"bfloat16": torch.bfloat16, "torch.float64": torch.float64, torch.float16: torch.float16}
    for name in ("dtype", "torch_dtype"):
        model = EmberVLM.from_pretrained(checkpoint, **{name: dtype})
        assert {p.dtype for p in model.parameters()} == {wanted.get(dtype, torch.float32)}


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), None])
def test_the_model_goes_to_the_device_asked_for(checkpoint, place):
    wanted = "cuda" if place == "auto" and torch.cuda.is_available() else "cpu"
    assert EmberVLM.from_pretrained(checkpoint, device_map=place).device.type == wanted


def test_any_device_that_torch_knows_is_one(checkpoint):
    assert EmberVLM.from_pretrained(checkpoint, device_map="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("anything", 1),
        ("load_in_8bit", True),
        ("dtype", "int8"),
        ("dtype", "half precision"),
        ("device_map", "balanced"),
        ("device_map", {"vision_encoder": 0, "language_model": 1}),
        ("revision", "v2"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused_by_name(checkpoint, option, value):
    with pytest.raises((ConfigError, CheckpointError), match=option):
        EmberVLM.from_pretrained(checkpoint, **{option: value})


@pytest.mark.parametrize("option", [{"push_to_hub": True}, {"max_shard_size": "1GB"}, {"safe_serialization": True}])
def test_a_save_refuses_what_it_would_not_do(checkpoint, tmp_path, option):
    with pytest.raises(ConfigError, match=f"save_pretrained: {next(iter(option))}: not known"):
        EmberVLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "copy", **option)
    assert not (tmp_path / "copy").exists()


def test_a_revision_of_a_hub_id_is_the_one_that_is_taken(checkpoint, tmp_path):
    """From the cache, as the hub client lays it out: a branch that points to a commit."""
    cache = tmp_path / "hub" / "models--someone--ember"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "v2").write_text("c" * 40)
    checkpoint.rename(cache / "snapshots" / ("c" * 40))
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    EmberVLM.from_pretrained("someone/ember", revision="v2", **options)
    with pytest.raises(CheckpointError, match="someone/ember"):
        EmberVLM.from_pretrained("someone/ember", revision="v3", **options)

"""Parts from folders of others: what a checkpoint takes from them, and what is said where they are not there."""

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import ok, train, write_run_yaml
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, ViTConfig

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.config_file import brings_its_shape
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.judge.backends import make_backends
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.storage import CheckpointError
from embervlm.run.train_flags import load_config, parser


@pytest.fixture
def parts(tiny_settings, tokenizer, tmp_path):
    """A folder with a vision model, and one with a language model and its tokenizer, as transformers saves them."""
    settings = {name: dict(tiny_settings[name]["config"]) for name in ("vision", "language")}
    for config in settings.values():
        config.pop("model_type")
    torch.manual_seed(3)
    AutoModel.from_config(ViTConfig(**settings["vision"])).save_pretrained(tmp_path / "parts" / "vision")
    language = LlamaConfig(**settings["language"], of_their_own="a key that the class does not know")
    AutoModelForCausalLM.from_config(language).save_pretrained(tmp_path / "parts" / "language")
    tokenizer.hugging_face.save_pretrained(tmp_path / "parts" / "language")
    return tmp_path / "parts"


def test_a_checkpoint_loads_without_the_folders_it_was_made_from(tiny_settings, parts, tmp_path):
    names = {name: {"name_or_path": str(parts / name), "pretrained": True} for name in ("vision", "language")}
    model = build_model({**tiny_settings, **names}).eval()
    model.attach_tokenizer(ReasoningTokenizer.from_folder(parts / "language"))
    model.save_pretrained(tmp_path / "checkpoint")
    os.rename(parts, tmp_path / "moved")
    again = EmberVLM.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    asked = dict(instruction="Which robot flies?", image=None, max_new_tokens=8)
    assert again.generate_with_reasoning(**asked) == model.generate_with_reasoning(**asked)
    again.save_pretrained(tmp_path / "copy")  # and what was loaded is as complete
    EmberVLM.from_pretrained(tmp_path / "copy")


def put_together(parts, *flags):
    out = parts.parent / "out"
    main(["new-checkpoint", str(parts / "vision"), str(parts / "language"), str(out), *flags])
    return out


def test_two_folders_become_a_checkpoint_without_training(parts, capsys):
    out = put_together(parts, "--connector", "pixel_shuffle", "--factor", "3")
    told = capsys.readouterr().out
    model = EmberVLM.from_pretrained(out)
    for name, auto in (("vision", AutoModel), ("language", AutoModelForCausalLM)):
        theirs = auto.from_pretrained(parts / name).state_dict()
        part = model.vision_encoder if name == "vision" else model.language_model
        ours = part.backbone.state_dict()
        assert ours and all(torch.equal(theirs[key], value) for key, value in ours.items())
    assert (model.config.image_size, model.num_visual_tokens, model.config.stage) == (36, 1, 3)
    lines = [line.strip() for line in told.splitlines()]
    assert f"vision_encoder: {parts}/vision (vit), {model.parameter_counts()['vision_encoder']:,} parameters" in lines
    assert "a picture: 1 visual tokens (1 x 1), connector pixel_shuffle" in lines
    assert any(line.startswith("pictures: no preprocessor_config.json in ") for line in lines)
    assert lines[-1].endswith(f"or Stage 4 only: `--stages 4 --resume_from {out}`")
    assert brings_its_shape(out)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--connector", "pixel_shuffle"], "connector: pixel_shuffle needs factor"),
        (["--connector", "mlp", "--factor", "2"], "connector: mlp has no factor"),
        (["--image_size", "0"], "--image_size 0: give the pixels of a side, at least 1"),
        (["--image_size", "48"], "vit does not read pictures of image_size 48"),
    ],
)
def test_parts_that_do_not_fit_are_told_and_nothing_is_written(flags, told, parts):
    with pytest.raises(SystemExit, match=told) as ended:
        put_together(parts, *flags)
    assert "\n" not in str(ended.value)
    assert not (parts.parent / "out").exists()


def test_a_folder_whose_weights_are_not_all_there_is_refused(parts):
    file = parts / "vision" / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "layernorm" not in key}, file, {"format": "pt"})
    with pytest.raises(SystemExit, match=r"vision: .*has not all weights of a vit: \d+ are missing \("):
        put_together(parts)


def without_a_shard(folder):
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def as_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model": folder}))


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def of_pictures(folder):
    shutil.copytree(folder.with_name("vision"), folder, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("damage", "part", "told"),
    [
        (without_a_shard, "vision", r"model-00002-of-0000\d.safetensors: missing, 1 of the \d files"),
        (as_a_pickle, "vision", "vision: .* contains more than weights, and reading the rest could run code"),
        (cut_short, "language", "language: cannot read .*; save or download it again"),
        (of_pictures, "language", "language: vit is not a causal language model"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told_in_one_line(damage, part, told, parts):
    damage(parts / part)
    with pytest.raises(SystemExit, match=told) as ended:
        put_together(parts)
    assert "\n" not in str(ended.value) and "hf download" not in str(ended.value)


def run_config(*flags):
    return load_config(parser().parse_args([*flags, "--stages", "3"]))


def test_stage3_trains_the_projection_alone_where_both_parts_are_pretrained(parts):
    out = put_together(parts)
    wanted = {"vision_encoder": 0.0, "projection": 1.0, "language_model": 0.0, "reasoning_module": 1.0}
    assert run_config("--model", str(out)).stage3.multipliers == wanted
    some = run_config("--model", str(out), "--set", "stage3.learning_rate_multipliers.language_model=0.1")
    assert some.stage3.multipliers == {**wanted, "language_model": 0.1}
    every = run_config("--model", str(out), "--set", "stage3.trainable_components=[all]")
    assert every.stage3.frozen_parts == ()
    assert run_config("--model", "quickstart").stage3.frozen_parts == ()


def test_a_part_that_does_not_learn_is_in_eval_mode(parts):
    model = EmberVLM.from_pretrained(put_together(parts)).train()
    model.freeze(["vision_encoder"])
    assert (model.vision_encoder.training, model.language_model.training) == (False, True)
    model.eval().train()
    assert not model.vision_encoder.training


@pytest.mark.slow
def test_stage3_moves_the_projection_alone_and_says_so(parts, scene_data, tmp_path):
    out = put_together(parts)
    config = write_run_yaml(tmp_path, str(out), scene_data / "reasoning_data.json", stage4__max_reasoning_length=900)
    flags = ["--config", config, "--engine", "torch", "--max_steps", "1", "--stages", "3"]
    told = ok(train("python", *flags))
    assert (
        "stage 3: trains projection; vision_encoder and language_model stay as they are "
        "(stage3.learning_rate_multipliers)" in told.stdout
    )
    before = EmberVLM.from_pretrained(out).state_dict()
    after = EmberVLM.from_pretrained(tmp_path / "outputs" / "stage3" / "checkpoint-final").state_dict()
    moved = {
        name.split(".")[0] for name, value in after.items() if name in before and not torch.equal(value, before[name])
    }
    assert moved - {"reasoning_module"} == {"projection"}


@pytest.mark.parametrize("name", ["outputs/quickstrt", "outptus/x", "~/outputs", "a/b/c", "../outputs", "/no"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name, tiny_settings, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outptus").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        EmberVLM.from_pretrained(name)
    with pytest.raises(ConfigError, match="vision: cannot get .*no such folder"):
        build_model({**tiny_settings, "vision": {"name_or_path": name, "pretrained": True}})
    with pytest.raises(ConfigError, match="no such tokenizer folder"):
        ReasoningTokenizer.from_folder(name)
    for kind in ("similarity", "entailment"):
        with pytest.raises(ConfigError, match=f"{kind} backend {name}: no such folder"):
            make_backends(**{kind: name})


def test_the_closest_name_is_offered(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "quickstart" / "checkpoint-final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, meant in (
        ("outputs/quickstrt", "outputs/quickstart"),
        ("outputs/quickstrt/checkpoint-final", "checkpoint-final"),
        ("output/quickstart", "outputs/quickstart"),
        (str(tmp_path / "outputs" / "quikstart"), "quickstart"),
    ):
        with pytest.raises(SystemExit, match=rf"did you mean [^ ]*{meant}\?"):
            main(["evaluate", "--checkpoint", name, "--output_file", "x.json"])
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--checkpoint", "outputs/nothing-like-it", "--output_file", "x.json"])
    assert "did you mean" not in str(ended.value)

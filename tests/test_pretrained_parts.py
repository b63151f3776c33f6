"""Parts from folders of others: what a checkpoint takes from them, and what is said where they are not there."""

import os

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, ViTConfig

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.judge.backends import make_backends
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.storage import CheckpointError


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

"""What a vision encoder's own folder says of its pictures, and what a preset may say otherwise."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, ViTConfig

from embervlm.cli import main
from embervlm.config import ConfigError
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.preprocessor import preprocessor_notes, preprocessor_of

CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 48},
    "do_center_crop": True,
    "crop_size": {"height": 36, "width": 36},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.1, 0.2, 0.3],
}


@pytest.fixture
def tower(tiny_settings, tmp_path):
    """`tower(values)`: a preset without picture settings, whose vision encoder lies in a folder with these values."""
    config = {key: value for key, value in tiny_settings["vision"]["config"].items() if key != "model_type"}
    AutoModel.from_config(ViTConfig(**config)).save_pretrained(tmp_path / "tower")

    def made(values=None, **settings):
        if values is not None:
            (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(values))
        rest = {key: value for key, value in tiny_settings.items() if not key.startswith("image_")}
        vision = {"name_or_path": str(tmp_path / "tower"), "pretrained": True}
        return {**rest, "vision": vision, **settings}

    return made


def test_a_preset_without_picture_settings_takes_those_of_the_folder(tower, tmp_path):
    settings = tower(CLIP)
    config = build_model(settings).config
    assert (config.image_size, config.image_mean, config.image_std) == (36, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    (note,) = preprocessor_notes(settings)
    assert note == (
        f"{tmp_path}/tower/preprocessor_config.json cuts the middle out of a picture (56% of a square one); that is "
        "not followed: pictures are read whole"
    )


def test_a_preset_that_contradicts_the_folder_wins_and_both_are_told(tower, tmp_path, capsys):
    settings = tower(CLIP, image_size=36, image_mean=[0.5, 0.5, 0.5])
    assert build_model(settings).config.image_mean == [0.5, 0.5, 0.5]
    file = f"{tmp_path}/tower/preprocessor_config.json"
    told = preprocessor_notes(settings)
    assert told[0] == (
        f"image_mean: the preset says [0.5, 0.5, 0.5], {file} says [0.4, 0.5, 0.6]; the preset's is used"
    )
    assert len(told) == 2
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    main(["describe", "--model", str(tmp_path / "mine.yaml")])
    assert told[0] in capsys.readouterr().out


def test_without_a_preprocessor_the_size_is_the_encoders_and_it_is_told(tower):
    settings = tower()
    config = build_model(settings).config
    assert (config.image_size, config.image_mean) == (36, (0.5, 0.5, 0.5))
    (note,) = preprocessor_notes(settings)
    assert note.startswith("no preprocessor_config.json in ") and "image_mean and image_std" in note
    assert preprocessor_notes({**settings, "image_mean": [0, 0, 0]}) == []


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, 0.25, 0.25),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2),
        (
            {"image_processor_type": "MobileViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            0.0,
            1.0,
        ),
        (
            {"image_processor_type": "EfficientNetImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            0.5,
            0.25,
        ),
        ({"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False}, 0.5, 0.5),
    ],
)
def test_means_are_those_of_values_from_0_to_1(values, mean, std, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    settings = preprocessor_of(tmp_path).settings
    assert settings["image_mean"] == pytest.approx((mean,) * 3)
    assert settings["image_std"] == pytest.approx((std,) * 3)


def test_a_file_that_says_nothing_of_means_is_told_and_not_taken_for_unscaled_values(tower, tmp_path):
    """A CLIP whose file leaves out the defaults of its class saw pictures at a quarter of their contrast."""
    settings = tower({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}})
    (note,) = preprocessor_notes(settings)
    assert "does not say image_mean and image_std, so values of pictures are scaled to [-1, 1]" in note
    assert build_model(settings).config.image_mean == (0.5, 0.5, 0.5)


def test_a_processor_without_an_image_processor_says_nothing_of_pictures(tmp_path):
    legacy = {"processor_class": "LlavaProcessor", "patch_size": 14}
    (tmp_path / "processor_config.json").write_text(json.dumps(legacy))
    assert preprocessor_of(tmp_path) is None


def test_the_image_processor_within_a_processor_counts_before_a_file_of_its_own(tmp_path):
    """As transformers reads them: a folder that is saved into again keeps the older file."""
    newer = {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert preprocessor_of(tmp_path).settings["image_mean"] == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": {"height": 3.5, "width": 4}}, r"size \[3.5, 4\] is not height and width in pixels"),
        ({"image_mean": [0.5], "image_std": [1, 1, 1]}, r"image_mean is \[0.5\], not three numbers"),
    ],
)
def test_values_that_cannot_be_read_are_told(values, told, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {told}"):
        preprocessor_of(tmp_path)


def test_resize_is_kept_with_the_checkpoint_and_padding_is_the_mean_colour(tower, tokenizer, tmp_path):
    model = build_model(tower(CLIP, resize="pad")).eval()
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "out")
    again = EmberVLM.from_pretrained(tmp_path / "out")
    assert (again.config.resize, again.config.fill) == ("pad", (102, 128, 153))
    grey = model.normalise(torch.tensor(np.full((1, 2, 2, 3), again.config.fill, np.uint8)))
    assert grey.abs().max() < 0.02
    assert build_model(tower(CLIP)).config.fill is None
    with pytest.raises(ConfigError, match="resize: 'crop' is not squash or pad"):
        build_model(tower(CLIP, resize="crop"))

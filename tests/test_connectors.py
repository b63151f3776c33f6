"""What stands between vision encoder and language model: by name, with the numbers of a case worked by hand."""

import pytest
import torch

from embervlm.config import ConfigError
from embervlm.data.samples import Grid
from embervlm.model.config import EmberVLMConfig
from embervlm.model.connectors import CONNECTORS, build_connector
from embervlm.model.embervlm import build_model


def connector(**settings):
    return build_connector(EmberVLMConfig(connector=settings, projection_hidden_size=5), 2, 3, Grid(4, 4))


def test_each_kind_gives_the_width_of_the_language_model():
    features = torch.randn(2, 16, 2)
    options = {"pixel_shuffle": {"factor": 2}, "norm_adapter": {"width": 4, "bottleneck": 2}}
    for kind in CONNECTORS:
        built = connector(kind=kind, **options.get(kind, {}))
        assert built(features).shape == (2, 16 // built.factor**2, 3)
    assert connector().layers[0].out_features == 5  # without a kind it is that of the presets


def test_pixel_shuffle_puts_squares_side_by_side_row_by_row():
    built = build_connector(EmberVLMConfig(connector={"kind": "pixel_shuffle", "factor": 2}), 1, 4, Grid(4, 4))
    torch.nn.init.eye_(built.linear.weight)
    found = built(torch.arange(16.0).view(1, 16, 1))
    assert found.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    built = build_connector(EmberVLMConfig(connector={"kind": "pixel_shuffle", "factor": 2}), 1, 4, Grid(2, 8))
    torch.nn.init.eye_(built.linear.weight)
    found = built(torch.arange(16.0).view(1, 16, 1))
    assert found.tolist() == [[[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "resampler"}, "kind 'resampler' is not known; known are norm_mlp, mlp, linear, norm_adapter"),
        ({"kind": "pixel_shuffle"}, "pixel_shuffle needs factor"),
        ({"kind": "pixel_shuffle", "factor": 3}, "factor 3 does not divide the 4 x 4 features"),
        ({"kind": "pixel_shuffle", "factor": 0}, "factor 0 is not a whole number above 0"),
        ({"kind": "linear", "width": 3}, "linear has no width; it has bias"),
        ({"kind": "mlp", "activation": "glue"}, "activation 'glue' is not known"),
    ],
)
def test_settings_that_make_no_connector_are_told_in_a_line(settings, told):
    with pytest.raises(ConfigError, match=f"connector: {told}"):
        connector(**settings)


def test_the_network_counts_the_tokens_behind_its_connector(tiny_settings):
    model = build_model({**tiny_settings, "connector": {"kind": "pixel_shuffle", "factor": 3}})
    assert (model.vision_encoder.grid, model.grid, model.num_visual_tokens) == ((3, 3), (1, 1), 1)
    pixels = torch.zeros(2, 3, 36, 36)
    assert model.see(pixels).shape == (2, 1, model.language_model.hidden_size)


def test_a_place_of_its_own_tells_equal_features_apart():
    plain, placed = connector(kind="norm_mlp"), connector(kind="norm_mlp", positions=True)
    out = placed(torch.ones(1, 16, 2))
    assert out.shape == (1, 16, 3) and len({tuple(row) for row in out[0].tolist()}) == 16
    assert set(placed.state_dict()) - set(plain.state_dict()) == {"places"}

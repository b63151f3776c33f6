"""Pictures that are shifted and scaled at each step: how far, and that neither order nor processes matter."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from embervlm.config import ConfigError, Phase1Config, Phase2Config, Phase3Config, Stage3Config
from embervlm.data.collate import Collator
from embervlm.data.images import PictureCache
from embervlm.data.moved import moved

RAMP = np.stack(np.broadcast_arrays(*np.ogrid[:100, :100], 7), axis=-1).astype(np.uint8)
"""Each pixel says its row and column."""


def test_a_picture_moves_by_at_most_the_share_and_continues_its_edges() -> None:
    found = [moved(RAMP, 0.1, random.Random(seed)) for seed in range(200)]
    middles = np.array([one[50, 50, :2] for one in found], int)
    assert (abs(middles - 50) <= 11).all() and middles.min() < 43 and middles.max() > 57
    widths = np.array([one[50, 70, 1].astype(int) - one[50, 30, 1] for one in found])
    assert (abs(widths - 40) <= 40 * 0.1 / 0.9 + 1).all() and widths.min() < 38 and widths.max() > 42
    for one in found:
        assert one.shape == RAMP.shape and one.dtype == np.uint8 and (one[..., 2] == 7).all()
        assert (np.diff(one[:, 0, 0].astype(int)) >= 0).all() and (np.diff(one[0, :, 1].astype(int)) >= 0).all()


def test_none_is_none() -> None:
    assert (moved(RAMP, 0.0, random.Random(0)) == RAMP).all()


@pytest.fixture
def collator(records, tokenizer) -> Collator:
    bare = [dataclasses.replace(record, metadata={}) for record in records]
    pictures = PictureCache([record.image for record in records if record.image], 36)
    return Collator(bare, tokenizer, pictures, seed=0, image_size=36, picture_shift=0.2)


def test_a_picture_of_a_step_is_the_same_in_any_order_and_another_in_the_next(collator: Collator) -> None:
    first, _ = collator.pictures_at([0, 1, 2], 5)
    again, places = collator.pictures_at([2, 0, -1, 2], 5)
    assert (again[places[0]] == first[2]).all() and (again[places[1]] == first[0]).all() and len(again) == 2
    after, _ = collator.pictures_at([0, 1, 2], 6)
    assert (after != first).any()
    plain, _ = collator.pictures_at([0, 1, 2])
    assert (plain.numpy() == collator.pictures.array[:3]).all() and (first != plain).any()


def test_where_records_have_boxes_nothing_moves(records, tokenizer) -> None:
    pictures = PictureCache([record.image for record in records if record.image], 36)
    collator = Collator(records, tokenizer, pictures, seed=0, image_size=36, picture_shift=0.2)
    assert (collator.pictures_at([0, 1], 5)[0].numpy() == pictures.array[:2]).all()


@pytest.mark.parametrize("config", [Phase1Config, Phase3Config])
def test_a_phase_that_does_not_train_on_pictures_refuses_it(config: type) -> None:
    with pytest.raises(ConfigError, match=r"picture_shift: 0\.1 does nothing"):
        config(picture_shift=0.1)


@pytest.mark.parametrize("config", [Stage3Config, Phase2Config])
def test_a_share_is_a_share(config: type) -> None:
    with pytest.raises(ConfigError, match="picture_shift"):
        config(picture_shift=0.7)
    assert config(picture_shift=0.1).picture_shift == 0.1

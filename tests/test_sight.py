"""Whether a model looks at the picture is measured and said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from embervlm.evaluation.sight import Sight, other_pictures, sight


@pytest.mark.parametrize(
    ("num", "share", "looks"), [(64, 0.5, False), (64, 0.61, False), (64, 0.63, True), (4, 0.75, False), (9, 1.0, True)]
)
def test_a_share_that_chance_explains_is_no_sight(num: int, share: float, looks: bool) -> None:
    found = Sight(num, share, 0.1)
    assert found.looks is looks
    assert ("does not look at the picture" in str(found)) is not looks


def test_another_picture_is_of_another_chain_and_of_the_same_question_where_there_is_one(records) -> None:
    some = records[:24]
    for record, place in zip(some, other_pictures(some), strict=True):
        assert place is not None and some[place].image != record.image and some[place].steps != record.steps
        if any(
            o.instruction == record.instruction and o.image != record.image for o in some if o.steps != record.steps
        ):
            assert some[place].instruction == record.instruction
    alike = [dataclasses.replace(record, steps=some[0].steps) for record in some]
    assert other_pictures(alike) == [None] * len(alike)


def test_a_model_whose_words_do_not_depend_on_the_picture_gains_nothing(tiny_model, pictures, records) -> None:
    with torch.no_grad():
        tiny_model.projection.norm.weight.zero_()
        tiny_model.projection.norm.bias.zero_()
    tiny_model.train()
    found = sight(tiny_model, pictures, records[:12])
    assert found is not None and found.num_texts == 12 and abs(found.gain) < 1e-4 and not found.looks
    assert tiny_model.training
    text_only = sight(tiny_model, pictures, [dataclasses.replace(record, image=None) for record in records[:4]])
    assert text_only is not None and text_only.num_texts == 0 and text_only.looks and text_only.loss > 0
    assert sight(tiny_model, pictures, []) is None

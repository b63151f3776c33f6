"""Whether a model looks at the picture is measured and said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from embervlm.evaluation.batches import answer
from embervlm.evaluation.sight import AnsweredTwice, Sight, answer_twice, other_pictures, sight
from embervlm.judge.metrics import is_right
from embervlm.model.decoding import Decoding


@pytest.mark.parametrize(
    ("num", "share", "looks"), [(64, 0.5, False), (64, 0.61, False), (64, 0.63, True), (5, 0.8, False), (9, 1.0, True)]
)
def test_a_share_that_chance_explains_is_no_sight(num: int, share: float, looks: bool) -> None:
    found = Sight(num, share, 0.1)
    assert found.looks is looks
    assert ("does not look at the picture" in str(found)) is not looks


def test_fewer_texts_than_can_tell_say_so_and_hold_no_plateau_up() -> None:
    """All of four texts are still within two standard errors of a half."""
    found = Sight(4, 1.0, 3.0)
    assert found.looks and str(found).endswith("too few to tell whether the model looks at the picture")


def test_a_record_without_a_picture_has_no_other_one(records) -> None:
    mixed = [dataclasses.replace(record, image=None) if place % 2 else record for place, record in enumerate(records)]
    assert [place is None for place in other_pictures(mixed)] == [record.image is None for record in mixed]


def test_another_picture_is_of_another_chain_and_of_the_same_question_where_there_is_one(records) -> None:
    some = records[:24]
    for record, place in zip(some, other_pictures(some), strict=True):
        assert place is not None and some[place].image != record.image and some[place].steps != record.steps
        if any(
            o.instruction == record.instruction and o.image != record.image for o in some if o.steps != record.steps
        ):
            assert some[place].instruction == record.instruction
    alike = [dataclasses.replace(record, steps=some[0].steps, answer=some[0].answer) for record in some]
    assert other_pictures(alike) == [None] * len(alike)


def test_records_with_answers_alone_have_another_picture_where_the_answer_is_another(records) -> None:
    bare = [dataclasses.replace(record, steps=()) for record in records[:12]]
    for record, place in zip(bare, other_pictures(bare), strict=True):
        assert place is not None and bare[place].answer != record.answer


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


def test_texts_that_no_record_has_are_not_measured(tiny_model, pictures, records) -> None:
    assert sight(tiny_model, pictures, [dataclasses.replace(record, steps=()) for record in records[:4]]) is None


@pytest.mark.parametrize(
    ("only_own", "only_other", "said"),
    [
        (10, 0, "with another"),
        (30, 12, "with another"),
        (4, 0, "which may be chance"),
        (24, 16, "which may be chance"),
        (5, 5, "the answers do not depend on the picture yet"),
        (0, 0, "the answers do not depend on the picture yet"),
    ],
)
def test_answers_depend_on_the_picture_where_more_change_for_the_worse_than_chance_explains(
    only_own: int, only_other: int, said: str
) -> None:
    found = AnsweredTwice(48, 0.8, 0.5, only_own, only_other)
    assert str(found).endswith(said) and found.looks is (said == "with another")


def test_a_model_that_cannot_see_answers_alike_with_another_picture(tiny_model, pictures, records) -> None:
    with torch.no_grad():
        tiny_model.projection.norm.weight.zero_()
        tiny_model.projection.norm.bias.zero_()
    tiny_model.train()
    found = answer_twice(tiny_model, pictures, records, Decoding(form="direct", max_new_tokens=8), 48)
    assert found is not None and found.num_questions == len(records) <= 48
    assert found.own_accuracy == found.other_accuracy and not found.num_only_own and not found.looks
    assert tiny_model.training
    text_only = [dataclasses.replace(record, image=None) for record in records[:4]]
    assert answer_twice(tiny_model, pictures, text_only, Decoding(), 48) is None


def test_each_question_is_compared_with_itself(lively_model, pictures, records) -> None:
    """Gold is what the model answers with the right picture, so only the other picture can make it wrong."""
    decoding = Decoding(form="direct", max_new_tokens=8)
    bare = [dataclasses.replace(record, default_candidates=(), metadata={}) for record in records[:12]]
    gold = [found["answer_set"] for found in answer(lively_model, pictures, bare, decoding)]
    asked = [dataclasses.replace(record, answer=tuple(text)) for record, text in zip(bare, gold, strict=True)]
    asked = [record for record in asked if is_right(record.answer, record)]  # noise may be punctuation alone
    swapped = [
        dataclasses.replace(record, image=asked[place].image)
        for record, place in zip(asked, other_pictures(asked), strict=True)
        if place is not None
    ]
    found = answer_twice(lively_model, pictures, asked, decoding, 48)
    others = answer(lively_model, pictures, swapped, decoding)
    changed = sum(not is_right(one["answer_set"], record) for one, record in zip(others, swapped, strict=True))
    assert found is not None and found.num_questions == len(swapped) > 3 and changed
    assert (found.own_accuracy, found.num_only_own, found.num_only_other) == (1, changed, 0)
    assert found.other_accuracy == pytest.approx(1 - changed / len(swapped))

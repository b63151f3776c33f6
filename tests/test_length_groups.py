"""Texts of like length are read together: the same losses and gradients with less padding, and each picture once."""

import dataclasses
import random

import pytest
import torch
from training_helpers import PHASE1, PHASE2, STAGE3, Bench, phase_config

from embervlm.data.collate import DenseLabels
from embervlm.data.dataset import encode_captions, encode_glossary
from embervlm.data.length_groups import length_groups
from embervlm.training.module import TrainingModule

NO_BOXES = {"boxes": False}
CASES = {
    "phase 1": (PHASE1, {}, 1.0),
    "phase 2": (PHASE2, {}, 1.0),
    "sampled inputs": (PHASE2, {}, 0.5),
    "no boxes": (PHASE2, NO_BOXES, 1.0),
    "no boxes, sampled inputs": (PHASE2, NO_BOXES, 0.5),
    "no pictures": (PHASE2, {"text_only": True}, 1.0),
}


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.choice((9, 20, 26, 60, 130, 150)) + rng.randrange(9) for _ in range(rng.randint(1, 32))]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_group_and_fits(seed):
    lengths = random_lengths(seed)
    sees = [random.Random(seed + row).random() < 0.7 for row in range(len(lengths))]
    groups = length_groups(lengths, sees, most=4)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(lengths)))
    assert len(groups) <= 4
    for group in groups:
        assert group.length == max(lengths[row] for row in group.rows)
        assert group.sees == any(sees[row] for row in group.rows)


@pytest.mark.parametrize("seed", range(20))
def test_more_groups_never_compute_more_tokens_than_one(seed):
    lengths = random_lengths(seed)
    tokens = [sum(len(g.rows) * g.length for g in length_groups(lengths, most=most)) for most in (1, 2, 4)]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == len(lengths) * max(lengths)


def test_two_kinds_of_text_make_two_groups():
    groups = length_groups([100, 9, 98, 8, 9, 99], most=2)
    assert sorted(group.rows for group in groups) == [[0, 2, 5], [1, 3, 4]]


def test_texts_of_one_length_stay_together():
    assert len(length_groups([50] * 8, most=4)) == 1


def losses_and_gradients(bench, batch, weights, dense_sizes=None):
    torch.manual_seed(0)
    module = TrainingModule(bench.model.train(), dense_sizes)
    module.zero_grad()
    sums = module(batch)
    sum(value * (1 + weights.get(term, 0)) for term, value in sums.items()).backward()
    found = {
        name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    return {term: value.item() for term, value in sums.items()}, found


def assert_same(one, other):
    (losses, gradients), (grouped_losses, grouped_gradients) = one, other
    assert losses == pytest.approx(grouped_losses, rel=1e-5, abs=1e-5) and any(losses.values())
    assert gradients.keys() == grouped_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            grouped_gradients[name], gradient, rtol=1e-4, atol=2e-4 * max(1, gradient.abs().max())
        )


@pytest.mark.parametrize("case", CASES)
def test_groups_change_neither_losses_nor_gradients(scene_data, case):
    values, options, forcing = CASES[case]
    phase, found = phase_config({**values, "direct_records_ratio": 0.5}), []
    for most in (1, 4):
        bench = Bench.make(scene_data / "reasoning_data.json", phase, most_groups=most, **options)
        (batch,) = bench.batches(0, 0, 1, 1, forcing)
        found.append(losses_and_gradients(bench, batch, phase.loss_weights))
    assert len(batch.inputs["groups"]) > 1
    assert_same(*found)


def test_groups_change_nothing_of_stage_3(scene_data):
    phase, found = phase_config(STAGE3), []
    for most in (1, 4):
        bench = Bench.make(scene_data / "reasoning_data.json", phase, most_groups=most, draws=False)
        bench.collator.use_reasoning = False
        bench.collator.dense_labels = labels = DenseLabels(bench.collator.records, bench.model.grid)
        captions = encode_captions(bench.collator.records, bench.collator.tokenizer)
        words = encode_glossary(["a drone flies.", "wheels need firm ground."], bench.collator.tokenizer)
        batch = bench.collator([*bench.direct[:6], *captions[:4], *words[:3]], step=0)
        found.append(losses_and_gradients(bench, batch, phase.loss_weights, labels.sizes))
    assert [group.sees for group in batch.inputs["groups"]].count(False) == 1, "texts without a picture are apart"
    assert_same(*found)


def test_little_of_a_mixed_batch_is_padding(scene_data):
    bench = Bench.make(scene_data / "reasoning_data.json", phase_config(PHASE2), most_groups=4)
    samples = bench.plan.batch(0)
    batch = bench.collator(samples, step=0)
    computed = sum(len(group.rows) * group.length for group in batch.inputs["groups"])
    real = sum(map(len, samples))
    assert batch.inputs["text_mask"].numel() > 1.3 * real, "all at once a third is padding"
    assert computed < 1.06 * real


def test_a_picture_of_several_records_is_encoded_once(scene_data):
    bench = Bench.make(scene_data / "reasoning_data.json", phase_config(PHASE2))
    samples = [*bench.chains[:4], *bench.direct[:4]]
    batch = bench.collator(samples, step=0)
    different = len({row for row in batch.picture_index.tolist() if row >= 0})
    assert different < len(samples) and len(batch.inputs["pictures"]) == different
    apart = dataclasses.replace(
        batch,
        inputs={
            **batch.inputs,
            "pictures": batch.inputs["pictures"][batch.inputs["picture_rows"]],
            "picture_rows": None,
        },
    )
    weights = phase_config(PHASE2).loss_weights
    assert_same(losses_and_gradients(bench, apart, weights), losses_and_gradients(bench, batch, weights))

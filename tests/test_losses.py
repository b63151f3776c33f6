"""Every loss term against a case worked out by hand or torch itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from training_helpers import CPU, PHASE2, Bench, make_data, phase_config

from embervlm.config import LOSS_TERMS
from embervlm.engines.build import build_engine
from embervlm.model.network import EmberVLMOutput
from embervlm.training.losses import contrastive_loss_sum, dense_loss_sum, grounding_loss_sum, loss_sums, token_losses
from embervlm.training.module import TrainingModule
from embervlm.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_token_losses_are_the_negative_log_probabilities_of_the_labels() -> None:
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3, 1])
    by_hand = torch.tensor([-math.log(row.exp()[label] / row.exp().sum()) for row, label in zip(logits, labels)])
    torch.testing.assert_close(token_losses(logits, labels), by_hand)


def test_even_logits_cost_the_log_of_the_vocabulary() -> None:
    assert token_losses(torch.zeros(1, 8), torch.tensor([5])).item() == pytest.approx(math.log(8))


def test_token_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    found = token_losses(logits, torch.tensor([0]))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)


def test_direct_and_chain_tokens_are_summed_apart() -> None:
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    sums = loss_sums(
        EmberVLMOutput(token_logits=logits), {"labels": labels, "direct": torch.tensor([True, False, False])}
    )
    assert sums["direct"].item() == pytest.approx(math.log(4))
    assert sums["reasoning"].item() == pytest.approx(2 * math.log(4))


def test_padded_candidates_add_nothing_to_the_answer_term() -> None:
    logits = torch.tensor([[0.0, 2.0, 50.0]])
    targets = {"answers": torch.tensor([[1.0, 0.0, 0.0]]), "answers_real": torch.tensor([[1.0, 1.0, 0.0]])}
    found = loss_sums(EmberVLMOutput(answer_logits=logits), targets)["answer"]
    assert found.item() == pytest.approx(math.log(2) + math.log1p(math.exp(2)))


def test_the_consistency_term_is_binary_cross_entropy_over_the_pairs() -> None:
    logits, valid = torch.tensor([1.5, -0.5, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    targets = {"valid": valid, "valid_weight": torch.ones(3)}
    found = loss_sums(EmberVLMOutput(validator_logits=logits), targets)["consistency"]
    assert found.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, valid).item() * 3)


def test_a_stand_in_pair_costs_nothing() -> None:
    targets = {"valid": torch.ones(1), "valid_weight": torch.zeros(1)}
    assert loss_sums(EmberVLMOutput(validator_logits=torch.tensor([-9.0])), targets)["consistency"].item() == 0


def test_terms_whose_inputs_are_missing_are_left_out() -> None:
    assert loss_sums(EmberVLMOutput(), {}) == {}


# -- grounding -------------------------------------------------------------------------------------------------------


def test_attention_that_rests_on_the_right_patches_costs_nothing() -> None:
    attention = torch.tensor([[0.25, 0.75, 0.0]])
    assert grounding_loss_sum(attention, torch.tensor([[True, True, False]])).item() == pytest.approx(0, abs=1e-6)


def test_half_the_attention_on_the_right_patches_costs_the_log_of_two() -> None:
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.4, 0.5]])
    target = torch.tensor([[True, False, False], [True, True, False]])
    assert grounding_loss_sum(attention, target).item() == pytest.approx(2 * math.log(2))


def test_attention_that_sums_to_less_than_one_pays_for_the_rest() -> None:
    """What goes to "nothing seen" is not in the attention."""
    assert grounding_loss_sum(torch.tensor([[0.2, 0.1]]), torch.tensor([[True, True]])).item() == pytest.approx(
        -math.log(0.3), rel=1e-5
    )


def test_no_attention_on_the_right_patches_costs_much_but_not_infinity() -> None:
    found = grounding_loss_sum(torch.tensor([[0.0, 1.0]]), torch.tensor([[True, False]]))
    assert found.item() == pytest.approx(-math.log(1e-6))


def test_the_grounding_gradient_moves_attention_towards_the_target() -> None:
    scores = torch.zeros(1, 4, requires_grad=True)
    grounding_loss_sum(scores.softmax(-1), torch.tensor([[False, True, False, False]])).backward()
    assert scores.grad is not None and scores.grad[0, 1] < 0 and (scores.grad[0, [0, 2, 3]] > 0).all()


# -- contrast --------------------------------------------------------------------------------------------------------


def test_a_chain_that_is_as_likely_behind_another_picture_costs_the_log_of_two() -> None:
    own = torch.tensor([0.5, 3.0, 1.0])
    found = contrastive_loss_sum(own, own[[1, 0, 2]], torch.tensor([2, 1]))
    assert found.item() == pytest.approx(2 * math.log(2))


def test_contrast_is_the_chance_of_the_own_picture_by_the_likelihood_of_the_whole_chain() -> None:
    own, other = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.5, 2.0, 1.0])  # chains of two tokens and of one
    by_hand = math.log1p(math.exp(-2)) + math.log1p(math.exp(1))
    assert contrastive_loss_sum(own, other, torch.tensor([2, 1])).item() == pytest.approx(by_hand)


def test_contrast_without_a_chain_costs_nothing() -> None:
    assert contrastive_loss_sum(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)).item() == 0


@pytest.mark.slow
def test_contrast_by_itself_teaches_to_look_at_the_picture(data) -> None:
    phase = phase_config(PHASE2)
    bench = Bench.make(data, phase, draws=False, boxes=False)
    batch = bench.collator(bench.chains[:6], step=0)
    assert batch.counts["multimodal"] > 1
    module, found = TrainingModule(bench.model), []
    pictures = batch.inputs["image_mask"].clone()
    batch.inputs["image_mask"].zero_()  # whoever sees nothing is as sure of the one picture as of the other
    blind = module(batch)["multimodal"] / batch.counts["multimodal"]
    assert blind.item() == pytest.approx(math.log(2), abs=1e-5)
    batch.inputs["image_mask"].copy_(pictures)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(40):
        loss = module(batch)["multimodal"] / batch.counts["multimodal"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[0] == pytest.approx(math.log(2), abs=0.1) and found[-1] < math.log(2) / 4


# -- dense -----------------------------------------------------------------------------------------------------------


def test_the_dense_term_sums_each_kind_over_its_own_classes() -> None:
    logits = torch.zeros(1, 2, 5)  # kinds of 2 and 3 classes
    labels = torch.tensor([[[0, 2], [1, 0]]])
    assert dense_loss_sum(logits, labels, [2, 3]).item() == pytest.approx(2 * math.log(2) + 2 * math.log(3))


def test_unlabelled_patches_are_not_scored_in_the_dense_term() -> None:
    logits = torch.zeros(1, 2, 5)
    labels = torch.tensor([[[0, -1], [-1, -1]]])
    assert dense_loss_sum(logits, labels, [2, 3]).item() == pytest.approx(math.log(2))


def test_the_dense_term_without_any_label_is_zero() -> None:
    assert dense_loss_sum(torch.randn(1, 2, 5), torch.full((1, 2, 2), -1), [2, 3]).item() == 0


def test_the_dense_term_reads_the_classes_of_a_kind_from_its_own_slice() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 9.0]]])
    right, wrong = (dense_loss_sum(logits, torch.tensor([[[0, label]]]), [2, 3]) for label in (2, 0))
    assert (wrong - right).item() == pytest.approx(9.0)


# -- what the engine divides by --------------------------------------------------------------------------------------


def test_every_term_is_divided_by_what_is_scored_of_it(data) -> None:
    phase = phase_config(PHASE2)
    bench = Bench.make(data, phase, global_batch=4, engine="torch")
    module = TrainingModule(bench.model)
    engine = build_engine(module, bench.config, phase, World(0, 1, CPU), batch_size=4, accumulation=1)
    (batch,) = bench.batches(0, 0, 1, 1)
    sums = module(batch)
    terms, counts = engine.train_step([batch], phase.loss_weights, dict.fromkeys(phase.multipliers, 0.0), 0)
    assert set(terms) == set(LOSS_TERMS)
    for term, value in terms.items():
        assert value == pytest.approx(sums[term].item() / counts[term], rel=1e-5)


def test_the_reasoning_and_direct_counts_are_the_scored_tokens(data) -> None:
    bench = Bench.make(data, phase_config(PHASE2), global_batch=4)
    (batch,) = bench.batches(0, 0, 1, 1)
    assert batch.counts["reasoning"] + batch.counts["direct"] == len(batch.inputs["score_index"])
    assert batch.counts["direct"] == batch.targets["direct"].sum().item() > 0
    chains = [sample for sample in bench.plan.batch(0) if sample.form == "reasoning"]
    assert batch.counts["reasoning"] == sum(len(sample.target) for sample in chains)


@pytest.mark.parametrize("boxes", [True, False])
def test_the_gradient_does_not_depend_on_how_the_batch_is_split(boxes: bool, data) -> None:
    phase, found = phase_config(PHASE2), []
    for accumulation in (1, 3):
        bench = Bench.make(data, phase, global_batch=4, draws=False, boxes=boxes, engine="torch")
        module = TrainingModule(bench.model)
        engine = build_engine(module, bench.config, phase, World(0, 1, CPU), batch_size=4, accumulation=accumulation)
        gradients = {}

        def keep(rates, module=module, into=gradients) -> bool:
            into |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            return True

        engine._update = keep  # type: ignore[method-assign]
        engine.train_step(bench.batches(0, 0, 1, accumulation), phase.loss_weights, {}, 0)
        found.append(gradients)
    whole, split = found
    assert whole.keys() == split.keys() and len(whole) > 20
    for path, gradient in whole.items():
        torch.testing.assert_close(split[path], gradient, rtol=1e-4, atol=1e-6, msg=lambda t, path=path: f"{path}: {t}")


def test_a_term_with_weight_zero_moves_nothing(data) -> None:
    phase = phase_config({**PHASE2, **{f"{term}_loss_weight": 0.0 for term in LOSS_TERMS if term != "consistency"}})
    bench = Bench.make(data, phase, global_batch=2, engine="torch")
    module = TrainingModule(bench.model)
    engine = build_engine(module, bench.config, phase, World(0, 1, CPU), batch_size=2, accumulation=1)
    head = {path: p.detach().clone() for path, p in bench.model.reasoning_module.answer_head.named_parameters()}
    rates = dict.fromkeys(phase.multipliers, 1e-2)
    engine.train_step(bench.batches(0, 0, 1, 1), phase.loss_weights, rates, 0)
    for path, parameter in bench.model.reasoning_module.answer_head.named_parameters():
        torch.testing.assert_close(parameter, head[path] * (1 - 1e-2 * phase.weight_decay))  # its decay alone

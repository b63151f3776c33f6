"""Phase 3's parts: chains as they are drawn, the policy loss, and how groups are compared."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_helpers import CPU, PHASE2, Bench, make_data, phase_config

from embervlm.config import ConfigError, Phase3Config
from embervlm.config_policy import RewardConfig
from embervlm.data.dataset import encode_questions
from embervlm.data.drawn import DrawnChain
from embervlm.data.samples import Sample
from embervlm.engines.build import build_engine
from embervlm.model.decoding import Decoding
from embervlm.training.feed import deal
from embervlm.training.losses import PolicyLoss
from embervlm.training.module import TrainingModule
from embervlm.training.policy import Group, PolicyJob, Roller, collapsed_into
from embervlm.training.policy_steps import what_changed
from embervlm.training.rollouts import Drawn, draw, log_probs_under
from embervlm.world import World

VOCABULARY = 7


def chain_targets(old: list[float], advantage: list[float], **more: Tensor) -> dict[str, Tensor]:
    number = len(old)
    return {
        "policy_closed": torch.zeros(number, 2, dtype=torch.bool),
        "policy_old": torch.tensor(old, dtype=torch.float64),
        "policy_advantage": torch.tensor(advantage, dtype=torch.float64),
        "policy_weight": torch.ones(number, dtype=torch.float64),
        **more,
    }


def a_loss(**changes: float) -> PolicyLoss:
    settings = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.28, **changes}
    return PolicyLoss(**settings, closed_ids=(5, 6))  # type: ignore[arg-type]


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_policy_loss_is_the_clipped_surrogate_written_out_by_hand() -> None:
    scores = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    labels, old, advantage = torch.tensor([1, 0, 3, 2]), [-1.0, -3.0, -2.5, -0.4], [1.0, 1.0, -0.5, -0.5]
    expected = 0.0
    for row, label, before, worth in zip(scores.tolist(), labels.tolist(), old, advantage):
        total = sum(math.exp(score / 0.7) for score in row)
        ratio = math.exp(row[label] / 0.7) / total / math.exp(before)
        expected -= min(ratio * worth, max(0.8, min(1.28, ratio)) * worth)
    found = a_loss().sums(scores, labels, chain_targets(old, advantage))
    assert found["policy"].item() == pytest.approx(expected, rel=1e-5)


def test_on_policy_the_gradient_is_that_of_reinforce_and_of_finite_differences() -> None:
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, advantage = torch.tensor([2, 4, 0]), torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64)

    def own(given: Tensor) -> Tensor:
        return (given / 0.7).log_softmax(-1)[torch.arange(3), labels]

    targets = chain_targets(own(scores).tolist(), advantage.tolist())
    given = scores.clone().requires_grad_()
    a_loss().sums(given, labels, targets)["policy"].backward()
    reinforce = scores.clone().requires_grad_()
    (-(advantage * own(reinforce)).sum()).backward()
    torch.testing.assert_close(given.grad, reinforce.grad, rtol=1e-4, atol=1e-6)
    step = 1e-3
    for place in ((0, 2), (1, 0), (2, 6)):
        moved = torch.zeros_like(scores)
        moved[place] = step
        up, down = (-(advantage * (own(scores + sign * moved) - own(scores)).exp()).sum() for sign in (1, -1))
        assert given.grad[place].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [
        (1.3, 1.0, False),
        (1.27, 1.0, True),
        (0.7, 1.0, True),
        (0.75, -1.0, False),
        (0.85, -1.0, True),
        (1.5, -1.0, True),
    ],
)
def test_a_token_that_went_far_enough_has_no_gradient(ratio: float, advantage: float, learns: bool) -> None:
    scores = torch.zeros(1, VOCABULARY, requires_grad=True)
    old = math.log(1 / VOCABULARY / ratio)
    found = a_loss().sums(scores, torch.tensor([0]), chain_targets([old], [advantage]))
    found["policy"].backward()
    assert bool(scores.grad.abs().sum() > 0) == learns
    assert found["clipped"].item() == float(not learns)


def test_tokens_that_could_not_be_drawn_have_no_probability() -> None:
    scores = torch.zeros(1, VOCABULARY, requires_grad=True)
    targets = chain_targets([0.0], [1.0], policy_closed=torch.tensor([[True, False]]))
    found = a_loss().sums(scores, torch.tensor([0]), targets)
    assert found["drift"].item() == pytest.approx(math.log(6))
    assert found["entropy"].item() == pytest.approx(math.log(6))
    found["policy"].backward()
    assert scores.grad[0, 5] == 0 and torch.isfinite(scores.grad).all()


def test_the_divergence_is_zero_where_nothing_changed_and_its_gradient_leads_back() -> None:
    scores = torch.zeros(1, VOCABULARY)
    scores[0, 0] = 1.0
    scores.requires_grad_()
    own = (scores / 0.7).log_softmax(-1)[0, 0].item()
    loss = a_loss(has_reference=True)
    same = loss.sums(scores, torch.tensor([0]), chain_targets([own], [0.0], policy_reference=torch.tensor([own])))
    assert same["kl"].item() == pytest.approx(0, abs=1e-6)
    lower = torch.tensor([own - 0.5])
    found = loss.sums(scores, torch.tensor([0]), chain_targets([own], [0.0], policy_reference=lower))["kl"]
    assert found.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1, rel=1e-5)
    found.backward()
    assert scores.grad[0, 0] > 0  # descent makes the token less likely, as it was


# -- chains as they are drawn ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench.make(make_data(tmp_path_factory.mktemp("data")), phase_config(PHASE2))


def drawn_by(bench: Bench, places: list[int], **decoding: float) -> tuple[list[Sample], list[list[Drawn]], Tensor]:
    model, records = bench.model.eval(), bench.collator.records
    settings = Decoding(**{"num_chains": 3, "temperature": 1.3, "max_new_tokens": 60, **decoding}).for_model(
        model.config
    )
    asked = list(encode_questions(records, model.tokenizer)[place] for place in places)
    pictures, which = bench.collator.pictures_at(bench.collator.picture_rows(asked))
    visual = model.see_pictures(pictures)[which].detach()
    found = draw(
        model,
        visual,
        torch.ones(len(asked), dtype=torch.bool),
        [sample.prompt for sample in asked],
        [records[sample.record].candidates for sample in asked],
        settings,
        [f"0 5 {records[sample.record].record_id}" for sample in asked],
    )
    return asked, found, visual


def test_log_probabilities_of_drawing_are_those_of_the_forward_pass(bench: Bench) -> None:
    """Padded prompts, chains of any length, and tokens that the decoder closes."""
    with torch.no_grad():  # steps and conclusions often, so that they are closed as well
        bench.model.reasoning_module.reasoning_head.token_embedding.weight.mul_(20)
    asked, groups, visual = drawn_by(bench, [0, 4, 9], max_reasoning_steps=3)
    closed = 0
    for place, (sample, chains) in enumerate(zip(asked, groups)):
        one = slice(place, place + 1)
        found = log_probs_under(bench.model, visual[one], torch.ones(1, dtype=torch.bool), sample.prompt, chains, 1.3)
        for chain, log_probs in zip(chains, found):
            torch.testing.assert_close(torch.tensor(chain.log_probs), torch.tensor(log_probs), rtol=0, atol=1e-4)
            closed += sum(map(sum, chain.closed))
    assert closed
    with torch.no_grad():
        bench.model.reasoning_module.reasoning_head.token_embedding.weight.div_(20)


def test_a_chain_depends_on_its_key_and_not_on_what_is_drawn_beside_it(bench: Bench) -> None:
    _, together, _ = drawn_by(bench, [0, 4, 9])
    _, alone, _ = drawn_by(bench, [4])
    assert [chain.ids for chain in alone[0]] == [chain.ids for chain in together[1]]
    assert len({chain.ids for group in together for chain in group}) == 9


def as_samples(bench: Bench, advantages: list[float]) -> list[Sample]:
    asked, groups, _ = drawn_by(bench, [0, 4, 9])
    start = bench.model.tokenizer.ids["<|reasoning_start|>"]
    out: list[Sample] = []
    for sample, chains in zip(asked, groups):
        for chain, advantage in zip(chains, advantages):
            out.append(
                DrawnChain(
                    record=sample.record,
                    form="drawn",
                    prompt=sample.prompt,
                    target=[start, *chain.ids],
                    num_given=1,
                    log_probs=chain.log_probs,
                    closed=chain.closed,
                    advantage=advantage,
                )
            )
    return [*out, *bench.chains[:3]]


def test_the_update_does_not_depend_on_how_chains_are_dealt_to_micro_batches(bench: Bench) -> None:
    phase = Phase3Config(learning_rate=1e-3, gradient_clipping=1e9)
    samples, weights = as_samples(bench, [0.5, -0.25, -0.25]), []
    before = {key: value.clone() for key, value in bench.model.state_dict().items()}
    bench.collator.policy = True
    for accumulation in (1, 3):
        bench.model.load_state_dict(before)
        policy = PolicyLoss(temperature=1.3, clip_low=0.2, clip_high=0.28, closed_ids=closed_ids(bench))
        bench.model.freeze(phase.frozen_parts)
        bench.model.eval()
        world = World(0, 1, CPU)
        config = dataclasses.replace(bench.config, engine="torch")
        module = TrainingModule(bench.model, policy=policy)
        engine = build_engine(module, config, phase, world, batch_size=12, accumulation=accumulation)
        batches = [bench.collator(mine, step=0, places=places) for places, mine in deal(samples, world, accumulation)]
        terms, counts = engine.train_step(batches, phase.loss_weights, engine.peak_rates, 0)
        weights.append((terms, counts, {key: value.clone() for key, value in bench.model.state_dict().items()}))
    bench.collator.policy = False
    bench.model.load_state_dict(before)
    (terms, counts, one), (other_terms, other_counts, other) = weights
    assert counts == other_counts and terms["drift"] < 1e-4
    assert counts["reasoning"] == sum(len(sample.target) for sample in bench.chains[:3])
    assert terms == pytest.approx(other_terms, rel=1e-3, abs=1e-5)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=2e-5, msg=key)


def closed_ids(bench: Bench) -> tuple[int, int]:
    ids = bench.model.tokenizer.ids
    return ids["<|step|>"], ids["<|conclusion|>"]


# -- groups ----------------------------------------------------------------------------------------------------------


def a_group(rewards: list[float], ids: tuple[int, ...] = (1, 2)) -> Group:
    chain = Drawn(ids=ids, log_probs=(-1.0,) * len(ids), closed=((False, False),) * len(ids), result={"cut_off": None})
    sample = Sample(record=0, form="asked", prompt=[1], target=[])
    return Group(sample=sample, chains=[chain] * len(rewards), rewards=rewards, parts={"answer": rewards})


def test_a_chain_is_worth_what_it_is_above_its_group_by_default_not_divided_by_the_deviation() -> None:
    group = a_group([1.0, 0.0, 0.0, 0.0])
    assert group.advantages(scale=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    deviation = math.sqrt(3 / 16)
    assert group.advantages(scale=True)[0] == pytest.approx(0.75 / deviation, rel=1e-3)


def test_groups_of_equal_rewards_are_left_out_and_the_rest_counts_as_configured(bench: Bench) -> None:
    groups = [a_group([1.0, 1.0]), a_group([1.0, 0.0], (1, 2, 3))]
    for name, weight, count in (("tokens", 1.0, 1.0), ("chain", 1 / 3, 1 / 3), ("constant", 1.0, 60 / 3)):
        config = Phase3Config(loss_normalisation=name, max_completion_length=60)
        roller = Roller.__new__(Roller)
        roller.job = PolicyJob(config=config, records=(), domains={}, seed=0)
        roller.model, roller.decoding = bench.model, roller.job.decoding(bench.model)
        found = roller.samples(groups)
        assert [len(sample.target) for sample in found] == [4, 4]
        assert [(s.token_weight, s.token_count) for s in found] == [pytest.approx((weight, count))] * 2
        roller.job = dataclasses.replace(roller.job, config=dataclasses.replace(config, drop_equal_groups=False))
        assert len(roller.samples(groups)) == 4


def test_a_policy_that_writes_one_token_has_collapsed() -> None:
    assert collapsed_into([a_group([0.0, 0.0], (4, 4, 4, 1))], 0.6) == (4, 0.75)
    assert collapsed_into([a_group([0.0, 0.0], (4, 3, 2, 1))], 0.6) is None


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_generations": 1}, "num_generations: 1"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"clip_low": 1.0}, "clip_low: 1.0"),
        ({"loss_normalisation": "mean"}, "loss_normalisation: 'mean'"),
        ({"on_collapse": "hope"}, "on_collapse: 'hope'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Phase3Config(**settings)


def test_an_own_reward_without_a_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="module:function"):
        RewardConfig(own={"no_function": 1.0})


# -- what is said at the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("soundness", "gamed"), [((0.9, 0.6), True), ((0.9, 0.89), False), ((0.6, 0.9), False)])
def test_more_right_answers_by_worse_reasons_are_told(
    tmp_path: Path, soundness: tuple[float, float], gamed: bool
) -> None:
    lines = []
    for step in range(10):
        share = step / 9
        sound = soundness[0] + share * (soundness[1] - soundness[0])
        drawn = {"questions": 200, "reward_answer": 0.2 + 0.5 * share, "reward_soundness": sound}
        lines.append({"step": step + 1, "policy": drawn})
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = what_changed(log)
    assert "answer rose from 0.23 to 0.67" in told and ("by worse reasons" in told) == gamed


def test_what_moves_by_less_than_is_shown_stayed_and_a_reward_of_the_users_own_is_told(tmp_path: Path) -> None:
    lines = [
        {"step": step, "policy": {"reward_form": 1.0, "reward_soundness": 1 - step / 1e5, "reward_own:near": step / 10}}
        for step in range(10)
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert what_changed(log) == "of the drawn chains soundness stayed at 1.00 and own:near rose from 0.05 to 0.85"


@pytest.mark.parametrize(
    ("questions", "told"), [(16, "went from 0.60 to 0.80, which may be chance"), (400, "rose from")]
)
def test_a_change_of_few_questions_is_called_chance(tmp_path: Path, questions: int, told: str) -> None:
    """160 rollouts of 16 questions that taught nothing were said to have raised right answers from 0.69 to 0.94."""
    lines = [
        {"policy": {"questions": questions, "reward_answer": share, "equal_groups": equal}}
        for share, equal in ((0.6, 0.9), (0.7, 0.2), (0.9, 0.2), (0.7, 0.2), (0.8, 0.9))
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = what_changed(log)
    assert f"answer {told}" in said and "The chains of 90% of the last questions had equal rewards" in said


def test_a_short_phase_that_drew_no_right_answer_says_so(tmp_path: Path) -> None:
    """300 records are 15 rollouts: two lines of log."""
    log = tmp_path / "metrics.jsonl"
    line = {"questions": 160, "reward_answer": 0.0, "reward_soundness": 0.9, "equal_groups": 0.1}
    log.write_text("".join(json.dumps({"policy": line}) + "\n" for _ in range(2)))
    assert "None had the right answer, so only the other parts of the reward were learned from" in what_changed(log)

"""Each damage lowers the score it is aimed at; the benchmark of the same name, with fewer pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from embervlm.judge.metrics import ChainScorer
from embervlm.robots.rules import claim_domains

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from perturbations import DAMAGES, INDEPENDENT, SCORES, everyday_chains, mean_scores, measure, scene_chains, told

pytestmark = pytest.mark.slow
PAIRS = 40
ALL = [*DAMAGES, "harmless paraphrase"]


@pytest.fixture(scope="module")
def scenes():
    train = [chain.steps for chain in scene_chains(held_out=False, number=300, seed=1)]
    return scene_chains(held_out=True, number=60), ChainScorer.fit(train, claim_domains())


@pytest.fixture(scope="module")
def everyday():
    """Chains about anything; nothing is fitted, so the scorer can know no word of theirs."""
    return everyday_chains(), ChainScorer.fit()


@pytest.fixture(scope="module")
def independent():
    """The same, by somebody who did not know the metrics."""
    return everyday_chains(INDEPENDENT), ChainScorer.fit()


def check(chains, scorer, name, share, pairs=PAIRS):
    (row,) = measure(chains, scorer, pairs=pairs, only=[name])
    assert row.num_pairs == pairs
    if row.aimed_at:
        assert row.lowered >= share, [(miss["steps"], miss["after"]["reasons"]) for miss in row.misses]
    else:
        assert min(row.mean_change.values()) >= -0.05, row.mean_change


@pytest.mark.parametrize("name", ALL)
def test_a_damaged_scene_chain_scores_less(scenes, name):
    check(*scenes, name, 0.95)


@pytest.mark.parametrize("name", ALL)
def test_a_damaged_chain_about_anything_scores_less(everyday, name):
    check(*everyday, name, 0.9)  # 0.95 over the benchmark's 500 pairs


@pytest.mark.parametrize("name", ALL)
def test_a_damaged_chain_of_another_author_scores_less(independent, name):
    in_other_words = {"paraphrased repeat": 0.45, "planted wrong fact": 0.6}  # of these the words alone tell too little
    check(*independent, name, in_other_words.get(name, 0.9), pairs=80)  # each chain once


@pytest.mark.parametrize("name", ["repeat it renumbered", "paraphrased repeat", "shuffle", "filler", "empty"])
def test_without_facts_and_gold_chain_damage_to_the_form_is_still_seen(everyday, name):
    chains, scorer = everyday
    check(told(chains, facts=False, reference=False), scorer, name, 0.9)


def test_untouched_chains_score_high(scenes, everyday):
    assert min(mean_scores(*scenes).values()) > 0.99
    assert min(mean_scores(*everyday)[score] for score in SCORES) > 0.8

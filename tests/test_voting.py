"""Several chains are drawn for a question, and their answers vote."""

import pytest
import torch

from embervlm.config import ConfigError
from embervlm.model.decoding import VOTING_TEMPERATURE, Decoding
from embervlm.model.voting import elected

QUESTION = "Which robots are suited?"


def chain(*answer, confidence=0.5, head=None, tokens=10):
    found = {"answer": ", ".join(answer), "answer_set": list(answer), "confidence": confidence, "num_tokens": tokens}
    return found | ({"head_probabilities": head} if head else {})


def test_the_answer_with_the_most_votes_is_elected_as_a_set():
    chains = [chain("Drone", confidence=0.9), chain("Drone", "Humanoid"), chain("Humanoid", "Drone", confidence=0.6)]
    found = elected(chains, [1, 1, 1])
    assert found["answer_set"] == ["Humanoid", "Drone"]  # the surer of the two chains that say it
    assert found["votes"] == {"Drone, Humanoid": 2, "Drone": 1}
    assert found["confidence"] == pytest.approx(2 / 3) and found["num_tokens"] == 30 and found["num_chains"] == 3


def test_weights_can_turn_the_vote():
    chains = [chain("Drone"), chain("Humanoid"), chain("Humanoid")]
    assert elected(chains, [0.9, 0.3, 0.3])["votes"] == {"Drone": 0.9, "Humanoid": 0.6}


def test_confidence_is_the_heads_mean_over_all_chains():
    chains = [chain("A", head={"A": 0.9, "B": 0.5}), chain("A", head={"A": 0.5, "B": 0.5})]
    assert elected(chains, [1, 1])["confidence"] == pytest.approx((0.9 * 0.5 + 0.5 * 0.5) / 2)


def test_chains_without_an_answer_have_no_vote():
    assert elected([chain(), chain(), chain("Drone")], [1, 1, 1])["votes"] == {"Drone": 1}
    nothing = elected([chain(), chain()], [1, 1])
    assert nothing["votes"] == {} and nothing["confidence"] == 0 and nothing["answer"] == ""


def test_chains_that_vote_are_drawn():
    assert Decoding(num_chains=2).temperature == VOTING_TEMPERATURE and Decoding().temperature == 0
    assert Decoding(num_chains=2, temperature=1.2).temperature == 1.2
    with pytest.raises(ConfigError, match="num_chains: 0"):
        Decoding(num_chains=0)


def test_picture_and_prompt_are_read_once_for_all_chains(lively_model, records, monkeypatch):
    read = []
    see, original = lively_model.see_pictures, lively_model.read
    monkeypatch.setattr(lively_model, "see_pictures", lambda pictures: (read.append(len(pictures)), see(pictures))[1])
    monkeypatch.setattr(lively_model, "read", lambda *given: (read.append(len(given[0])), original(*given))[1])
    one = lively_model.generate_with_reasoning(records[0].image, QUESTION, num_chains=6, max_new_tokens=20)
    assert read == [1, 1] and one["num_chains"] == 6


def test_each_chain_of_a_batch_is_one_that_is_drawn_alone(lively_model, records):
    """With so low a temperature that drawing takes the likeliest token, whatever the row."""
    images, texts = [records[0].image, None], [QUESTION, "What flies, and where?"]
    settings = {"max_new_tokens": 24, "form": "direct"}
    greedy = lively_model.generate_with_reasoning(images, texts, **settings)
    voted = lively_model.generate_with_reasoning(images, texts, num_chains=3, temperature=1e-4, **settings)
    assert [found["text"] for found in voted] == [found["text"] for found in greedy]
    assert [found["num_tokens"] for found in voted] == [3 * found["num_tokens"] for found in greedy]


@pytest.mark.parametrize("weigh", [False, True])
def test_a_question_can_be_reasoned_about_with_votes(lively_model, records, weigh):
    torch.manual_seed(0)
    found = lively_model.generate_reasoning(
        records[0].image, QUESTION, num_chains=4, weigh_votes=weigh, temperature=1.5, max_new_tokens=40
    )
    assert found.num_chains == 4 and sum(found.votes.values()) <= 4

"""Self-consistency (Wang et al. 2023): several chains are drawn for a question, and their answers vote."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from embervlm.model.confidence import set_confidence
from embervlm.model.judging import step_probabilities
from embervlm.model.network import EmberVLMNetwork


def vote(
    model: EmberVLMNetwork,
    visual: Tensor,
    image_mask: Tensor,
    instructions: Sequence[str],
    results: Sequence[dict[str, Any]],
    *,
    weigh: bool,
) -> list[dict[str, Any]]:
    """One result for each of `instructions`, of which `results` has as many chains each, one question after another.

    Args:
        visual, image_mask: One row for each of `instructions`.
        weigh: Count a vote as much as the step validator believes its chain.
    """
    num_chains = len(results) // len(instructions)
    out = []
    for place, instruction in enumerate(instructions):
        chains, row = results[place * num_chains : (place + 1) * num_chains], slice(place, place + 1)
        weights = [1.0] * num_chains
        if weigh:
            weights = _beliefs(model, visual[row], image_mask[row], instruction, [c["reasoning_steps"] for c in chains])
        out.append(elected(chains, weights, model.confidence_temperature))
    return out


def _beliefs(
    model: EmberVLMNetwork, visual: Tensor, seen: Tensor, instruction: str, chains: Sequence[Sequence[str]]
) -> list[float]:
    """The mean probability of each chain's steps; 0 for a chain without any."""
    found = [step_probabilities(model, visual, seen, instruction, steps) for steps in chains]
    return [sum(steps) / len(steps) if steps else 0.0 for steps in found]


def elected(chains: Sequence[dict[str, Any]], weights: Sequence[float], temperature: float = 1.0) -> dict[str, Any]:
    """The surest of the chains whose answer, a set of names, has the most votes.

    It gets `votes`, answer -> number or weight of the votes, the winner first, and `num_chains`; `num_tokens` is the
    sum of all chains. Its `confidence` is the mean of what the answer head gives this answer behind each of the chains
    (which takes the chains as a sample of all there could be); for an open answer its share of the votes. Chains
    without an answer have no vote.
    """
    votes: dict[frozenset[str], float] = {}
    for chain, weight in zip(chains, weights):
        if chain["answer_set"]:
            answer = frozenset(chain["answer_set"])
            votes[answer] = votes.get(answer, 0.0) + weight
    ranked = sorted(votes, key=lambda answer: (-votes[answer], -_belief(chains, answer, temperature)))
    its = [chain for chain in chains if frozenset(chain["answer_set"]) == (ranked[0] if ranked else frozenset())]
    best = max(its, key=lambda chain: chain["confidence"])
    spelled = {frozenset(chain["answer_set"]): chain["answer"] for chain in reversed(chains)}
    return {
        **best,
        "confidence": _belief(chains, ranked[0], temperature) if ranked else 0.0,
        "num_tokens": sum(chain["num_tokens"] for chain in chains),
        "num_chains": len(chains),
        "votes": {spelled[answer]: round(votes[answer], 3) for answer in ranked},
    }


def _belief(chains: Sequence[Mapping[str, Any]], answer: Collection[str], temperature: float) -> float:
    if all("head_probabilities" in chain for chain in chains):
        each = [set_confidence(chain["head_probabilities"], answer, temperature) for chain in chains]
    else:
        each = [float(set(chain["answer_set"]) == set(answer)) for chain in chains]
    return sum(each) / len(each)

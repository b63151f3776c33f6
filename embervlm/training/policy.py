"""The batches of phase 3: chains drawn by the model as it is, rewarded, and compared within their group (GRPO)."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embervlm.config import Phase3Config
from embervlm.data.collate import Collator
from embervlm.data.drawn import DrawnChain
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import ASKED, DRAWN, Sample
from embervlm.errors import UserError
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.training.losses import PolicyLoss
from embervlm.training.rewards import Rewards, RewardWorker
from embervlm.training.rollouts import Drawn, draw, log_probs_under
from embervlm.training.visual_cache import VisualCache
from embervlm.world import World

EQUAL = 1e-6
"""Rewards of a group that differ by no more than this are equal."""


class PolicyError(UserError):
    """A policy that cannot learn any more. The checkpoints before are intact."""


@dataclass(kw_only=True)
class Group:
    """The chains of one question, with what each is worth."""

    sample: Sample
    """The question."""
    chains: list[Drawn]
    parts: Rewards = field(default_factory=dict)
    """Of each part a number for each chain."""
    rewards: list[float] = field(default_factory=list)
    references: list[tuple[float, ...]] | None = None

    @property
    def is_equal(self) -> bool:
        return max(self.rewards) - min(self.rewards) <= EQUAL

    def advantages(self, scale: bool) -> list[float]:
        """How much better each chain is than the mean of its group; with `scale` in deviations of the group."""
        mean = statistics.fmean(self.rewards)
        deviation = statistics.pstdev(self.rewards) if scale else 1.0
        return [(reward - mean) / (deviation + 1e-4 if scale else 1.0) for reward in self.rewards]


@dataclass(kw_only=True)
class PolicyJob:
    """What phase 3 needs besides a `PhaseJob`."""

    config: Phase3Config
    records: Sequence[ReasoningRecord]
    domains: Mapping[str, Collection[str]]
    seed: int
    reference: Callable[[], EmberVLM] | None = None
    """Builds the model that the phase started with; None without a divergence."""

    def loss(self, model: EmberVLM) -> PolicyLoss:
        ids = model.tokenizer.ids
        return PolicyLoss(
            temperature=self.config.temperature,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            has_reference=self.reference is not None,
            closed_ids=(ids["<|step|>"], ids["<|conclusion|>"]),
        )

    def decoding(self, model: EmberVLM) -> Decoding:
        config = self.config
        return Decoding(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_completion_length,
            num_chains=config.num_generations,
        ).for_model(model.config)


class Roller:
    """Draws the chains of a rollout on all processes and turns them into samples, the same on each of them."""

    def __init__(
        self, job: PolicyJob, model: EmberVLM, collator: Collator, cache: VisualCache | None, world: World
    ) -> None:
        self.job, self.model, self.collator, self.cache, self.world = job, model, collator, cache, world
        self.decoding = job.decoding(model)
        self.reference = None if job.reference is None else job.reference().to(world.device).eval()
        self.worker = RewardWorker(job.config.reward, job.domains, self.decoding.max_new_tokens or 1)
        self.worker.check(job.records)

    def roll(self, asked: Sequence[Sample], step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of the questions among `asked`, in their order, and seconds spent. Every process calls it, with
        all parameters at hand.

        Questions are dealt to processes in bundles that do not depend on how many there are, so that a chain is drawn
        beside the same others.
        """
        began, waited = time.monotonic(), 0.0
        size = self.job.config.rollout_batch_size
        bundles = [asked[begin : begin + size] for begin in range(0, len(asked), size)]
        mine = range(self.world.rank, len(bundles), self.world.size)
        found: dict[int, list[Group]] = {}
        judged: int | None = None
        error: UserError | None = None
        try:
            for number in mine:
                found[number] = self._draw(bundles[number], step)
                if judged is not None:
                    waited += self._take(found[judged])
                self._give(found[number])
                judged = number
            if judged is not None:
                waited += self._take(found[judged])
        except UserError as reason:
            error = reason
        shares = self.world.gather((found, error))  # an error of one process ends all
        if first := next((reason for _, reason in shares if reason is not None), None):
            raise first
        together = {number: groups for share, _ in shares for number, groups in share.items()}
        spent = time.monotonic() - began
        groups = [group for number in sorted(together) for group in together[number]]
        return groups, {"rollout_s": spent, "reward_wait_s": waited}

    def _draw(self, asked: Sequence[Sample], step: int) -> list[Group]:
        visual, seen = self.look(asked)
        records = [self.job.records[sample.record] for sample in asked]
        drawn = draw(
            self.model,
            visual,
            seen,
            [sample.prompt for sample in asked],
            [record.candidates for record in records],
            self.decoding,
            [f"{self.job.seed} {step} {record.record_id}" for record in records],
        )
        groups = [Group(sample=sample, chains=chains) for sample, chains in zip(asked, drawn, strict=True)]
        if self.reference is not None:
            visual, seen = self.look(asked, self.reference)
            for place, group in enumerate(groups):
                one, temperature = slice(place, place + 1), self.decoding.temperature
                group.references = log_probs_under(
                    self.reference, visual[one], seen[one], group.sample.prompt, group.chains, temperature
                )
        return groups

    @torch.inference_mode()
    def look(self, samples: Sequence[Sample], model: EmberVLM | None = None) -> tuple[Tensor, Tensor]:
        """Visual tokens of the samples' pictures, and `[samples]` bool: which have one."""
        rows = self.collator.picture_rows(samples)
        device = self.world.device
        seen = torch.tensor([row >= 0 for row in rows], device=device)
        if self.cache is not None:  # the parts that see are frozen, so it holds for the reference as well
            return self.cache.tokens(torch.tensor(rows)).to(device), seen
        pictures, which = self.collator.pictures_at(rows)
        return (model or self.model).see_pictures(pictures)[which.to(device)], seen

    def _give(self, groups: Sequence[Group]) -> None:
        records = [self.job.records[group.sample.record] for group in groups for _ in group.chains]
        self.worker.begin(records, [chain.result for group in groups for chain in group.chains])

    def _take(self, groups: Sequence[Group]) -> float:
        """Write the rewards into the groups that were given last; seconds waited for them."""
        began = time.monotonic()
        rewards = self.worker.result()
        waited = time.monotonic() - began
        totals, begin = self.worker.total(rewards), 0
        for group in groups:
            part = slice(begin, begin + len(group.chains))
            group.parts = {name: values[part] for name, values in rewards.items()}
            group.rewards = totals[part]
            begin = part.stop
        return waited

    def samples(self, groups: Sequence[Group]) -> list[Sample]:
        """The drawn chains to train on, those of like length together."""
        config = self.job.config
        kept = [group for group in groups if not (config.drop_equal_groups and group.is_equal)]
        out = [sample for group in kept or groups[:1] for sample in self._samples_of(group)]
        return sorted(out, key=len)

    def _samples_of(self, group: Group) -> list[Sample]:
        config, prompt = self.job.config, group.sample.prompt
        start, conclusion = (self.model.tokenizer.ids[name] for name in ("<|reasoning_start|>", "<|conclusion|>"))
        out: list[Sample] = []
        for number, (chain, advantage) in enumerate(zip(group.chains, group.advantages(config.scale_rewards))):
            length = max(1, len(chain.ids))
            weight, count = {
                "tokens": (1.0, 1.0),
                "chain": (1 / length, 1 / length),
                "constant": (1.0, (self.decoding.max_new_tokens or 1) / length),
            }[config.loss_normalisation]
            is_right = group.parts.get("answer", [0.0] * (number + 1))[number] > 0
            concludes = conclusion in chain.ids
            out.append(
                DrawnChain(
                    record=group.sample.record,
                    form=DRAWN,
                    prompt=prompt,
                    target=[start, *chain.ids],
                    num_given=1,
                    # the answer head learns behind chains that lead to the right answer alone
                    answer_position=len(prompt) + 1 + chain.ids.index(conclusion) if is_right and concludes else None,
                    log_probs=chain.log_probs,
                    closed=chain.closed,
                    advantage=advantage,
                    token_weight=weight,
                    token_count=count,
                    reference=None if group.references is None else group.references[number],
                )
            )
        return out


def questions(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.form == ASKED]


def others(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.form != ASKED]


def described(groups: Sequence[Group]) -> dict[str, float]:
    """The reward parts' means, and how the groups of a rollout are spread."""
    chains = [chain for group in groups for chain in group.chains]
    lengths = [len(chain.ids) for chain in chains]
    parts = {f"reward_{name}": _mean_of(groups, name) for name in groups[0].parts}
    tokens = Counter(token for chain in chains for token in chain.ids)
    return {
        **parts,
        "reward": statistics.fmean(value for group in groups for value in group.rewards),
        "group_spread": statistics.fmean(statistics.pstdev(group.rewards) for group in groups),
        "equal_groups": statistics.fmean(group.is_equal for group in groups),
        "length": statistics.fmean(lengths),
        "cut_off": statistics.fmean(bool(chain.result["cut_off"]) for chain in chains),
        "distinct_chains": statistics.fmean(len({c.ids for c in group.chains}) / len(group.chains) for group in groups),
        "top_token_share": max(tokens.values()) / sum(lengths),
    }


def _mean_of(groups: Sequence[Group], part: str) -> float:
    return statistics.fmean(value for group in groups for value in group.parts[part])


def collapsed_into(groups: Sequence[Group], ratio: float) -> tuple[int, float] | None:
    """The token that makes up at least `ratio` of all that was drawn, and its share; None where there is none."""
    tokens = Counter(token for group in groups for chain in group.chains for token in chain.ids)
    token, number = tokens.most_common(1)[0]
    share = number / sum(tokens.values())
    return (token, share) if share >= ratio else None


def group_line(group: Group, record: ReasoningRecord, step: int, scale: bool) -> dict[str, Any]:
    """One group as `groups.jsonl` has it."""
    return {
        "step": step,
        "id": record.record_id,
        "image": record.image,
        "instruction": record.instruction,
        "gold_answer": list(record.answer),
        "chains": [
            {
                "reasoning_steps": chain.result["reasoning_steps"],
                "answer": chain.result["answer"],
                "num_tokens": len(chain.ids),
                "cut_off": chain.result["cut_off"],
                "rewards": {name: values[number] for name, values in group.parts.items()},
                "reward": group.rewards[number],
                "advantage": advantage,
            }
            for number, (chain, advantage) in enumerate(zip(group.chains, group.advantages(scale)))
        ],
    }

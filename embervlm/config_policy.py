"""The settings of phase 3: what is drawn, how it is rewarded, and how the policy follows (GRPO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from embervlm.config_checks import ConfigError, bounded, one_of, require


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the parts of a chain's reward; a part of weight 0 is not computed."""

    answer: float = 1.0
    """1 for the right answer, compared as in an evaluation; 0 where the chain games it, see docs/reinforcement.md."""
    form: float = 0.2
    """1 for a chain of steps with an answer behind it that ends by itself."""
    soundness: float = 0.2
    """Share of the steps that repeat and contradict nothing by the judge's rules, and make up nothing where the record
    knows its facts."""
    length: float = 0.0
    """From 0 down to -1 over the last quarter of `max_completion_length`, as DAPO's soft punishment."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Your own parts: `module:function` -> weight. The function gets records and chains, and returns a number for
    each chain."""
    timeout_s: float = 60.0
    """Seconds that the rewards of `rollout_batch_size` questions may take; more is an error."""

    def __post_init__(self) -> None:
        bounded(self, "answer", "form", "soundness", "length", least=0)
        require(self.timeout_s > 0, f"timeout_s: {self.timeout_s} is not positive")
        for name, weight in self.own.items():
            module, colon, function = name.partition(":")
            if not (module and colon and function):
                raise ConfigError(f"own: {name!r} is not module:function, such as my_rewards:no_guessing")
            require(weight != 0, f"own: {name}: its weight is 0; leave it out")
        require(any(self.weights.values()), "answer, form, soundness, length and own are all 0: nothing is rewarded")

    @property
    def weights(self) -> dict[str, float]:
        """Part -> weight, of those that count."""
        named = {name: getattr(self, name) for name in ("answer", "form", "soundness", "length")}
        return {name: weight for name, weight in {**named, **self.own}.items() if weight}


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Group-relative policy optimisation (GRPO, Shao et al. 2024), with what was learned since as defaults."""

    prompts_per_rollout: int = 16
    """Questions whose chains are drawn together, over all processes."""
    num_generations: int = 8
    """Chains that are drawn for each question: its group."""
    num_iterations: int = 1
    """Updates on the same chains before new ones are drawn."""
    rollout_batch_size: int = 8
    """Questions that one process writes about at a time. What a chain becomes does not depend on it."""
    temperature: float = 1.0
    """Of the draws, and of the probabilities that the policy is updated by."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that together have this probability."""
    max_completion_length: int | None = None
    """Most tokens of a chain with its answer; None is the longest of the training data, with a margin."""
    clip_low: float = 0.2
    """A token's probability may fall to 1 - clip_low of what it was when it was drawn."""
    clip_high: float = 0.28
    """It may rise to 1 + clip_high of that: more room upwards keeps rare tokens alive (DAPO, Yu et al. 2025)."""
    kl_coef: float = 0.0
    """Weight of the divergence from the model that the phase started with; above 0 that model stays in memory."""
    scale_rewards: bool = False
    """Divide by the deviation of a group's rewards. GRPO did; it favours questions that are too easy or too hard (Liu
    et al. 2025)."""
    loss_normalisation: str = "tokens"
    """What the loss is divided by: tokens (all of the global batch), chain (each chain's own, then chains: favours
    long wrong chains), or constant (chains times the most tokens; Liu et al. 2025)."""
    drop_equal_groups: bool = True
    """Leave out groups whose rewards are all equal, which teach nothing (DAPO)."""
    reward: RewardConfig = RewardConfig()
    supervised_records_ratio: float = 0.25
    """Records with chains, trained on as in phase 2, for each question, so that chains stay readable; nothing where no
    record has a chain."""
    unanswered_records: str = "stop"
    """Records without an answer: stop names them all, skip leaves them out and says how many."""
    on_no_signal: str = "stop"
    """When all groups of an epoch have equal rewards: stop, or continue with the next epoch."""
    on_collapse: str = "stop"
    """When the chains have collapsed into one token: stop, or skip these chains and continue."""
    collapse_ratio: float = 0.6
    """Share of one token among all that were drawn from which on the policy counts as collapsed."""
    log_group_steps: int = 20
    """Optimizer steps between groups that are written to `groups.jsonl` with their rewards."""

    def check_policy(self) -> None:
        bounded(self, "prompts_per_rollout", "num_iterations", "rollout_batch_size", "log_group_steps", least=1)
        require(self.num_generations >= 2, f"num_generations: {self.num_generations}: a group is at least 2 chains")
        bounded(self, "max_completion_length", least=8)
        require(self.temperature > 0, f"temperature: {self.temperature} is not positive: all chains would be the same")
        require(0 < self.top_p <= 1, f"top_p: {self.top_p} is not in (0, 1]")
        require(0 < self.clip_low < 1, f"clip_low: {self.clip_low} is not between 0 and 1")
        require(self.clip_high > 0, f"clip_high: {self.clip_high} is not positive")
        bounded(self, "kl_coef", "supervised_records_ratio", least=0)
        one_of("loss_normalisation", self.loss_normalisation, ("tokens", "chain", "constant"))
        one_of("unanswered_records", self.unanswered_records, ("stop", "skip"))
        one_of("on_no_signal", self.on_no_signal, ("stop", "continue"))
        one_of("on_collapse", self.on_collapse, ("stop", "skip"))
        bounded(self, "collapse_ratio", least=0, most=1)

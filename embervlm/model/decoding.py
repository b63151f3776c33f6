"""How text is chosen: the settings of `generate_with_reasoning`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from embervlm.config import ConfigError
from embervlm.data.record_fields import MAX_STEPS
from embervlm.model.config import EmberVLMConfig


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is chosen."""

    max_reasoning_steps: int | None = None
    """Maximum number of steps, including the conclusion; None is the maximum of the training data, plus a margin."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; None as for the steps."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that together have this probability (nucleus sampling, Holtzman et al. 2020)."""
    seed: int = 0
    """Of the draws."""
    form: str = "reasoning"
    """`reasoning`: chain and answer; `direct`: only the answer; `text`: continue the instruction unchanged."""
    candidates: tuple[str, ...] = ()
    """Answers to choose among; empty means those of the model's config."""
    num_chains: int = 1
    """Chains that are drawn for each question, whose answers vote (self-consistency, Wang et al. 2023). Above 1, a
    temperature of 0 is one of 0.7."""
    weigh_votes: bool = False
    """Whether a vote counts as much as the step validator believes its chain: the mean probability of its steps."""
    min_known: float = 0.5
    """Least `known` of a question, in [0, 1], that gets an answer; 0 answers all. An evaluation never refuses."""

    def __post_init__(self) -> None:
        for name in ("max_reasoning_steps", "max_new_tokens", "num_chains"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name}: {limit} is less than 1")
        if not 0 <= self.min_known <= 1:
            raise ConfigError(f"min_known: {self.min_known} is not in [0, 1]")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must be at least 0 and top_p in (0, 1]")
        if self.form not in ("reasoning", "direct", "text"):
            raise ConfigError(f"form: {self.form!r} is not reasoning, direct or text")
        if self.num_chains > 1 and self.temperature == 0:  # all of them would be the same
            object.__setattr__(self, "temperature", VOTING_TEMPERATURE)

    @property
    def reasoning(self) -> bool:
        return self.form == "reasoning"

    def for_model(self, config: EmberVLMConfig) -> Decoding:
        """The same with every limit set: a given one stays, the others are those of the model."""
        longest = config.longest_answer_tokens if self.form == "direct" else config.longest_chain_tokens
        return replace(
            self,
            max_reasoning_steps=self.max_reasoning_steps or _with_margin(config.longest_chain_steps, 2, UNKNOWN_STEPS),
            max_new_tokens=self.max_new_tokens or _with_margin(longest, 16, UNKNOWN_TOKENS),
        )


VOTING_TEMPERATURE = 0.7
"""The temperature at which chains are drawn to vote, where none is given (Wang et al. 2023, section 3.1)."""
OnToken = Callable[[int, int], None]
"""Called with each token as it is written: its text's place in the batch, and the token's id."""
UNKNOWN_STEPS, UNKNOWN_TOKENS = MAX_STEPS + 1, 512
"""Limits where a checkpoint does not say what its training data needed."""


def _with_margin(longest: int | None, least: int, unknown: int) -> int:
    return unknown if longest is None else longest + max(least, longest // 4)

"""Which samples each step of phase 3 trains on, and what its log says of the chains that were drawn for it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.samples import Sample
from embervlm.engines.base import Engine
from embervlm.progress import note
from embervlm.training.checkpoint import Progress
from embervlm.training.policy import (
    Group,
    PolicyError,
    Roller,
    collapsed_into,
    described,
    group_line,
    others,
    questions,
)
from embervlm.training.tracking import Tracker

FEWEST_LINES = 2
MOSTLY_EQUAL = 0.8
"""Share of groups of equal rewards from which on the end of the phase says how little was learned from."""
SOUNDNESS_MARGIN = 0.02
"""By how much soundness may fall before it is said to be the price of the answers."""
REPORTED = ("entropy", "clipped", "drift")
"""Terms of a step that are no losses."""


class PolicySteps:
    """Draws chains where a step needs new ones. Every process calls all methods at the same step."""

    def __init__(self, roller: Roller, plan: EpochPlan, progress: Progress, tracker: Tracker, name: str) -> None:
        self._roller, self._plan, self._progress, self._tracker, self._name = roller, plan, progress, tracker, name
        self._number: int | None = None
        self._samples: list[Sample] = []
        self._drawn: list[dict[str, float]] = []
        """What is said of each rollout since the last log line; of the last rollout where there was none since."""
        self._logged = False

    def samples(self, engine: Engine, step: int) -> list[Sample]:
        """The drawn chains of this step's rollout, and the records that are mixed in.

        Raises:
            PolicyError: the policy has collapsed, or an epoch taught nothing, and the settings say to stop.
            RewardError: a reward cannot be used.
        """
        number = step // self._plan.repeats
        if number == self._number:
            return self._samples
        asked = self._plan.batch(step)
        self._roller.model.eval()
        with engine.whole():
            groups, spent = self._roller.roll(questions(asked), number)
        if self._logged:
            self._drawn, self._logged = [], False
        self._drawn.append({"questions": len(groups), **described(groups), **spent})
        self._look_for_collapse(groups, step)
        self._count(groups, step)
        self._log_group(groups, step)
        self._samples, self._number = [*self._roller.samples(groups), *others(asked)], number
        return self._samples

    def values(self, terms: Mapping[str, float]) -> dict[str, Any]:
        """What a log line says besides the losses: of the chains, means over the rollouts since the line before."""
        self._logged = True
        policy = {name: statistics.fmean(drawn[name] for drawn in self._drawn) for name in self._drawn[0]}
        policy["questions"] = sum(drawn["questions"] for drawn in self._drawn)
        policy |= {name: terms[name] for name in REPORTED if name in terms}
        return {"policy": {**policy, "tokens_drawn": self._progress.tokens_drawn}}

    def _look_for_collapse(self, groups: list[Group], step: int) -> None:
        config, tokenizer = self._roller.job.config, self._roller.model.tokenizer
        if (found := collapsed_into(groups, config.collapse_ratio)) is None:
            return
        token, share = found
        text = next((name for name, own in tokenizer.ids.items() if own == token), None) or tokenizer.decode([token])
        told = (
            f"{self._name}: step {step}: the policy has collapsed: {share:.0%} of the tokens it writes are {text!r} "
            f"(collapse_ratio {config.collapse_ratio:g})"
        )
        if config.on_collapse == "stop":
            raise PolicyError(
                f"{told}; nothing was updated. Start again from an earlier checkpoint with a smaller learning rate, a "
                "larger supervised_records_ratio, or a kl_coef"
            )
        for group in groups:
            group.rewards = [0.0] * len(group.chains)
        if self._roller.world.rank == 0:
            note(f"{told}; these chains are skipped (on_collapse: skip)")

    def _count(self, groups: list[Group], step: int) -> None:
        progress, plan = self._progress, self._plan
        progress.tokens_drawn += sum(len(chain.ids) for group in groups for chain in group.chains)
        progress.groups_drawn += len(groups)
        progress.groups_unequal += sum(not group.is_equal for group in groups)
        if plan.locate((step // plan.repeats + 1) * plan.repeats)[1]:
            return
        drawn, unequal = progress.groups_drawn, progress.groups_unequal
        progress.groups_drawn = progress.groups_unequal = 0
        if unequal:
            return
        rewards = [reward for group in groups for reward in group.rewards]
        told = (
            f"{self._name}: epoch {plan.locate(step)[0] + 1}: the chains of each of its {drawn} questions have equal "
            f"rewards (the last ones {min(rewards):.2f} to {max(rewards):.2f}), so nothing can be learned from them"
        )
        if self._roller.job.config.on_no_signal == "stop":
            raise PolicyError(
                f"{told}. If all are right, ask harder questions; if all are wrong, train on chains first, raise "
                "num_generations or temperature, or reward a part of the answer (on_no_signal: continue goes on)"
            )
        if self._roller.world.rank == 0:
            note(f"{told} (on_no_signal: continue)")

    def _log_group(self, groups: list[Group], step: int) -> None:
        job = self._roller.job
        every = -(-job.config.log_group_steps // self._plan.repeats)
        if (step // self._plan.repeats) % every == 0:
            shown = max(groups, key=lambda group: (max(group.rewards) - min(group.rewards), -group.sample.record))
            line = group_line(shown, job.records[shown.sample.record], step + 1, job.config.scale_rewards)
            self._tracker.log_group(line)

    def __enter__(self) -> PolicySteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._roller.worker.__exit__(kind, error, trace)


def what_changed(log: Path) -> str:
    """A sentence about the drawn chains at the beginning and at the end of a phase, from its log; "" of a short one."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    drawn = [line["policy"] for line in lines if "policy" in line]
    size = max(1, len(drawn) // 5)
    wanted = ("reward_answer", "reward_soundness")
    names = [
        name for name in (drawn[0] if drawn else ()) if name in wanted or (name.startswith("reward_") and ":" in name)
    ]
    if len(drawn) < FEWEST_LINES or not names:
        return ""
    first, last = drawn[:size], drawn[-size:]
    found = {name: (_mean(first, name), _mean(last, name)) for name in names}
    counts = [sum(line.get("questions", 1) for line in some) for some in (first, last)]
    told = " and ".join(
        f"{name.removeprefix('reward_')} {_moved(*means, counts if name in wanted else None)}"
        for name, means in found.items()
    )
    gamed = set(wanted) <= set(found) and found["reward_answer"][1] > found["reward_answer"][0]
    gamed = gamed and found["reward_soundness"][1] < found["reward_soundness"][0] - SOUNDNESS_MARGIN
    told = f"of the drawn chains {told}" + (": more right answers by worse reasons; read groups.jsonl" if gamed else "")
    if "reward_answer" in found and not any(line["reward_answer"] for line in drawn):
        told += ". None had the right answer, so only the other parts of the reward were learned from"
    if "equal_groups" in drawn[-1] and (equal := _mean(last, "equal_groups")) >= MOSTLY_EQUAL:
        told += (
            f". The chains of {equal:.0%} of the last questions had equal rewards, and taught nothing: ask harder "
            "questions, or raise temperature or num_generations"
        )
    return told


def _mean(lines: Sequence[Mapping[str, float]], name: str) -> float:
    """Over the questions of `lines`."""
    weights = [line.get("questions", 1) for line in lines]
    return sum(weight * line[name] for weight, line in zip(weights, lines)) / sum(weights)


def _moved(first: float, last: float, counts: Sequence[float] | None) -> str:
    """In words. With `counts`, the questions behind each mean of values in [0, 1], a change within two standard errors
    is called chance; chains about one question are taken for alike, so the errors are at their greatest."""
    if f"{first:.2f}" == f"{last:.2f}":
        return f"stayed at {last:.2f}"
    if counts is not None:
        both = (counts[0] * first + counts[1] * last) / sum(counts)
        error = math.sqrt(both * (1 - both) * sum(1 / count for count in counts))
        if abs(last - first) < 2 * error:
            return f"went from {first:.2f} to {last:.2f}, which may be chance,"
    return f"{'rose' if last > first else 'fell'} from {first:.2f} to {last:.2f}"


def without_reported(terms: Mapping[str, float]) -> dict[str, float]:
    """The losses among the terms of a step."""
    return {name: value for name, value in terms.items() if name not in REPORTED}

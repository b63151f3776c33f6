"""Rewards of drawn chains, computed in a process of their own while the next chains are drawn."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from multiprocessing import Pipe
from types import TracebackType
from typing import Any

from embervlm.config_policy import RewardConfig
from embervlm.data.records import ReasoningRecord
from embervlm.errors import UserError

START_S = 60.0
"""Time for the worker to start, besides the time limit of its work."""
CHECKED_RECORDS = 4
Rewards = dict[str, list[float]]
"""Part -> a number for each chain."""


class RewardError(UserError):
    """A reward that cannot be used. The message names the part and what it did."""


class RewardWorker:
    """Computes rewards; use as a context. One job is under way at a time."""

    def __init__(self, config: RewardConfig, domains: Mapping[str, Collection[str]], most_tokens: int) -> None:
        """
        Args:
            domains: Fact name -> values, for the judge.
            most_tokens: A chain can have.
        """
        self.config = config
        self.has_begun = False
        self._waiting_for = 0
        self._connection, inner = Pipe()
        command = [sys.executable, "-m", "embervlm.training.reward_worker", str(inner.fileno())]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, pass_fds=[inner.fileno()], stdin=subprocess.DEVNULL, env=env)
        inner.close()
        parts = tuple(name for name in config.weights if name not in config.own)
        settings = {"parts": parts, "own": tuple(config.own), "domains": domains, "most_tokens": most_tokens}
        self._connection.send(settings)

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def begin(self, records: Sequence[ReasoningRecord], chains: Sequence[Mapping[str, Any]]) -> None:
        """Start on `chains`, each with its record; `result` gives what comes out."""
        assert not self._waiting_for
        self._waiting_for = len(chains)
        try:
            self._connection.send((list(records), [dict(chain) for chain in chains]))
        except OSError as error:
            raise RewardError(f"reward: the process that computes rewards has ended ({error})") from error

    def result(self) -> Rewards:
        """The rewards of the chains that were begun.

        Raises:
            RewardError: a part raised, took too long, or gave no finite number for each chain.
        """
        number, self._waiting_for = self._waiting_for, 0
        limit = self.config.timeout_s + (0 if self.has_begun else START_S)
        try:
            if not self._connection.poll(limit):
                self._process.kill()
                own = ", ".join(self.config.own) or "our own parts"
                raise RewardError(
                    f"reward: {own}: no result for {number} chains after {limit:g} s; make it faster, or raise "
                    "reward.timeout_s"
                )
            status, *found = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise RewardError(f"reward: {', '.join(self.config.own)}: its process ended with status {code}") from error
        self.has_begun = True
        if status == "error":
            raise RewardError(f"reward: {found[0] or 'our own parts'}: {found[1]}")
        rewards: Rewards = found[0]
        for part, values in rewards.items():
            if len(values) != number:
                raise RewardError(f"reward: {part}: returned {len(values)} numbers for {number} chains")
            if wrong := [value for value in values if not math.isfinite(value)]:
                raise RewardError(f"reward: {part}: returned {wrong[0]}, which is no finite number")
        return rewards

    def check(self, records: Sequence[ReasoningRecord]) -> None:
        """Compute the rewards of made-up chains, so that a part that does not work is found before training."""
        some = [records[place] for place in range(min(CHECKED_RECORDS, len(records)))]
        asked = [record for record in some for _ in range(2)]
        chains = [
            {
                "reasoning_steps": list(record.steps) or ["A step."],
                "answer": ", ".join(answer),
                "answer_set": list(answer),
                "text": ", ".join(answer),
                "num_tokens": 8,
                "cut_off": None if answer else "tokens",
            }
            for record in some
            for answer in (record.answer, ())
        ]
        self.begin(asked, chains)
        self.result()

    def total(self, rewards: Rewards) -> list[float]:
        """The weighted sum of the parts for each chain."""
        weights = self.config.weights
        return [sum(weights[part] * value for part, value in zip(rewards, row)) for row in zip(*rewards.values())]

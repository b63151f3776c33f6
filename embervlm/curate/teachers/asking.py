"""Many questions to an endpoint at once, within a budget, without losing paid answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from embervlm.config import ConfigError
from embervlm.curate.teachers.answers import Rejected, read_reply, scene_text
from embervlm.curate.teachers.collection import Answer, Collection, Question
from embervlm.curate.teachers.endpoint import Endpoint, EndpointConfig, Unanswered
from embervlm.data.records import DataError
from embervlm.progress import progress_bar

MIN_FAILURES = 8
"""Minimum number of consecutive failed requests before the endpoint counts as down."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    unanswered: dict[str, str]
    """Id of a question that got no answer -> why."""
    stopped: str
    """Why it ended before all questions were done; empty if all are done."""


def ask_endpoint(
    config: EndpointConfig, questions: Sequence[Question], collection: Collection, *, num_samples: int
) -> Outcome:
    """Ask `questions` until `num_samples` answers are accepted in all; every answer is in `collection` at once.

    Raises:
        ConfigError: the endpoint refuses everything, or a question has a picture of which it can be told nothing.
        DataError: the answers cannot be written.
    """
    check_pictures(config, questions)
    run = _Run(config, questions, collection, num_samples)
    asyncio.run(run.main())
    if run.error is not None:
        raise run.error
    return Outcome(run.unanswered, run.stopped)


def check_pictures(config: EndpointConfig, questions: Sequence[Question]) -> None:
    """DataError where a teacher that sees no pictures would have to guess."""
    if not config.sees_pictures:
        blind = [q.record for q in questions if q.record.image is not None and scene_text(q.record) is None]
        if blind:
            raise DataError.of(
                [
                    f"record {record.record_id}: has a picture, and metadata has neither scene nor facts to tell a "
                    "teacher that does not see it; use --teacher_sees_pictures, or add metadata.scene"
                    for record in blind
                ]
            )


class _Run:
    """One run's state. Everything happens on one event loop, so plain attributes are safe."""

    def __init__(
        self, config: EndpointConfig, questions: Sequence[Question], collection: Collection, num_samples: int
    ) -> None:
        self.config, self.collection, self.num_samples = config, collection, num_samples
        self.unanswered: dict[str, str] = {}
        self.stopped = ""
        self.error: ConfigError | DataError | None = None
        self._jobs = self._open_jobs(questions)
        self._num_jobs = len(questions) * config.samples_per_record
        self._num_given_up = 0
        self._in_flight = 0
        self._failures_in_a_row = 0
        self._workers: list[asyncio.Task[None]] = []
        self._pending: list[Answer] = []
        self._writing = asyncio.Lock()

    def _open_jobs(self, questions: Sequence[Question]) -> Iterator[tuple[Question, int]]:
        """What is left to ask: every question once before any twice."""
        for sample in range(self.config.samples_per_record):
            for question in questions:
                key = f"{question.key}:{sample}"
                if key in self.collection.accepted:
                    continue
                if self.collection.num_rejected[key] >= self.config.attempts:
                    self._num_given_up += 1
                    continue
                yield question, sample

    async def main(self) -> None:
        config = self.config
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread
                loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        self._bar = progress_bar(
            total=min(self.num_samples, self._num_jobs),
            initial=len(self.collection.accepted),
            desc="answers",
            unit="record",
            miniters=0,
        )
        self._endpoint = Endpoint(config, self._bar.write)
        self._show()
        try:
            async with self._endpoint.client:
                if self._budgets and not self.collection.largest:  # nobody knows yet what an answer costs
                    await self._work(once=True)
                # The connections limit the requests in flight; the workers beyond them stand in for those that wait
                # for the disk or pause before they ask again.
                num_workers = config.concurrency + config.concurrency // 4
                self._workers = [asyncio.create_task(self._work()) for _ in range(num_workers)]
                for result in await asyncio.gather(*self._workers, return_exceptions=True):
                    if isinstance(result, Exception):  # a fault of ours: everything that came in is on disk
                        raise result
        finally:
            self._bar.close()

    def _on_signal(self, name: str) -> None:
        """The first lets the requests in flight come in, since they are paid for; the second does not."""
        if self.stopped.startswith("SIG"):
            for worker in self._workers:
                worker.cancel()
        self.stopped = f"{name}; a second one ends without waiting for the open requests"

    # ---- one worker

    async def _work(self, *, once: bool = False) -> None:
        while (job := self._next_job()) is not None:
            self._in_flight += 1
            try:
                await self._answer(*job)
                self._failures_in_a_row = 0
            except Unanswered as error:
                self.unanswered[job[0].record.record_id] = str(error)
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= max(MIN_FAILURES, self.config.concurrency):
                    self._fail(
                        ConfigError(
                            f"--teacher_model {self.config.teacher_model}: the endpoint failed "
                            f"{self._failures_in_a_row} times in a row, last: {error}; what was "
                            "answered is kept, and the same command continues"
                        )
                    )
            except (ConfigError, DataError) as error:
                self._fail(error)
            except Exception:
                self.stopped = self.stopped or "error"
                raise
            finally:
                self._in_flight -= 1
                self._show()
            if once:
                return

    def _fail(self, error: ConfigError | DataError) -> None:
        """Stop asking; the answers in flight still come in."""
        self.error = self.error or error
        self.stopped = self.stopped or "error"

    def _next_job(self) -> tuple[Question, int] | None:
        if self.stopped or len(self.collection.accepted) + self._in_flight >= self.num_samples:
            return None
        if self._over_budget(self._in_flight + 1):
            return None
        return next(self._jobs, None)

    @property
    def _budgets(self) -> bool:
        return self.config.max_tokens_total is not None or self.config.max_usd_total is not None

    def _over_budget(self, in_flight: int) -> bool:
        """Whether `in_flight` more answers, each as expensive as the most expensive so far, exceed the budget."""
        for spent, largest, limit, name in zip(
            self._cost(self.collection.usage),
            self._cost(self.collection.largest),
            (self.config.max_tokens_total, self.config.max_usd_total),
            ("max_tokens_total", "max_usd_total"),
        ):
            if limit is not None and (spent >= limit or spent + in_flight * largest > limit):
                if in_flight == 1:  # else the answers in flight may turn out cheaper
                    self.stopped = self.stopped or f"--{name} {limit:,}: {spent:,.6g} have been spent"
                return True
        return False

    def _cost(self, usage: Mapping[str, int]) -> tuple[int, float]:
        """Tokens and dollars."""
        return sum(usage.values()), self.config.usd(usage)

    async def _answer(self, question: Question, sample: int) -> None:
        """Ask until an answer is accepted or the attempts are used up, each answer on disk before the next request."""
        key = f"{question.key}:{sample}"
        while self.collection.num_rejected[key] < self.config.attempts:
            reply, usage = await self._endpoint.ask(question)
            details: dict[str, Any] = {
                "id": question.record.record_id,
                "usage": usage,
                "text": reply.content,
                "thinking": reply.thinking,
            }
            try:
                record = read_reply(reply, question, sample, teacher_model=self.config.teacher_model)
                if not self.collection.is_new_chain(key, record.steps):
                    raise Rejected("repeated: the question has this chain already")
            except Rejected as error:
                details |= {"instruction": question.record.instruction, "gold_answer": list(question.record.answer)}
                await self._keep(Answer(key=key, reason=str(error), details=details))
            else:
                return await self._keep(Answer(key=key, record=record, details=details))
            if self.stopped or self._over_budget(self._in_flight):
                return
        self._num_given_up += 1

    async def _keep(self, answer: Answer) -> None:
        """Return once `answer` is on disk. Answers that come in while the disk is busy are written together."""
        self._pending.append(answer)
        async with self._writing:
            if self._pending:  # else another worker has written it
                batch, self._pending = self._pending, []
                self.collection.count(await asyncio.to_thread(self.collection.put_on_disk, batch))

    def _show(self) -> None:
        collection = self.collection
        tokens, usd = self._cost(self.collection.usage)
        accepted = len(collection.accepted)
        self._bar.total = max(accepted, min(self.num_samples, self._num_jobs - self._num_given_up))
        shown = {"rejected": collection.total_rejected, "tokens": f"{tokens:,}", "cost": f"${usd:.4f}"}
        self._bar.set_postfix({**shown, "unanswered": len(self.unanswered)}, refresh=False)
        self._bar.update(accepted - self._bar.n)

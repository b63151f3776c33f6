"""The one thread that runs the model, and the jobs that wait for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from embervlm.data.images import Area
from embervlm.errors import UserError
from embervlm.evaluation.explain import explain_chains, without_padding
from embervlm.model.continuous import Asked, Together, begin
from embervlm.model.decoding import Decoding
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.streaming import CONCLUSION, STEP, Piece, Pieces
from embervlm.serve.metrics import Metrics
from embervlm.serve.pictures import Loaded

MAX_JOINING = 8
"""Most requests whose prompts are read between two tokens of the others, who wait meanwhile."""
JOIN_S = 0.06
"""Least seconds between two times that texts join where many are written: joining copies what all of them hold."""
MANY_ROWS = 8
IDLE_S = 1.0
NEWS_S = 0.05
"""Least seconds between two parts of a stream: sending each token by itself would take as long as writing it."""
log = logging.getLogger("embervlm.serve")


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The worker takes and answers no more."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One request. The worker writes its fields, and then wakes up who waits on `news`."""

    question: str
    last: str | None
    """Of a follow-up, its own words, with which `question` ends."""
    picture: Loaded | None
    previous: Sequence[str]
    decoding: Decoding
    elect: bool
    """Whether its chains vote; else each is a choice of its own."""
    stream: bool
    """Whether somebody reads `pieces`."""
    attention: bool
    """Whether the results say where each step looked."""
    loop: asyncio.AbstractEventLoop
    begun_s: float = field(default_factory=time.monotonic)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: deque[Piece] = field(default_factory=deque)
    first_token_s: float | None = None
    told_s: float = 0.0
    """When it was last woken."""
    asked: Asked | None = None
    results: list[dict[str, Any]] | None = None
    error: BaseException | None = None
    given_up: bool = False
    """Set by whoever asked, when nobody waits for the answer any more."""

    @property
    def num_rows(self) -> int:
        return self.decoding.num_chains

    @property
    def over(self) -> bool:
        return self.results is not None or self.error is not None

    def hear(self, piece: Piece) -> None:
        if piece.section in (STEP, CONCLUSION):
            self.pieces.append(piece)


class Worker:
    """Runs `model`, which nobody else may use meanwhile."""

    def __init__(self, model: EmberVLMNetwork, metrics: Metrics, *, max_rows: int, max_waiting: int) -> None:
        self.model, self.metrics = model.eval(), metrics
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._together = Together()
        self._joined_s = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Raises `Busy` where too many chains wait, and `Stopped` after `stop`."""
        with self._changed:
            if self._stopping or not self.alive:
                raise Stopped("the server is stopping")
            waiting = sum(other.num_rows for other in self._waiting)
            if waiting + job.num_rows > self.max_waiting:
                raise Busy(f"{waiting} chains wait already; try again later")
            self._waiting.append(job)
            self.metrics.waiting.set(waiting + job.num_rows)
            self._changed.notify()

    def stop(self, timeout_s: float) -> None:
        """End; what has not been answered by now gets `Stopped`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        device = self.model.device.type
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            while not self._stopping:
                try:
                    self._admit()
                    self._advance()
                except Exception as error:  # a fault of ours: those who are in it get status 500, the others go on
                    log.exception("a batch failed")
                    self._end(self._running, error)
                    self._running, self._together = [], Together()
        self._end([*self._running, *self._waiting], Stopped("the server was stopped before the answer was there"))

    def _admit(self) -> None:
        """Begin with those whose turn it is; wait where there is nothing to do."""
        chosen: list[Job] = []
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait(IDLE_S)
            rows = sum(job.num_rows for job in self._running)
            if rows >= MANY_ROWS and time.monotonic() - self._joined_s < JOIN_S:
                return
            while self._waiting and len(chosen) < MAX_JOINING:
                if self._waiting[0].given_up:
                    self._waiting.popleft()
                    continue
                if rows and rows + self._waiting[0].num_rows > self.max_rows:
                    break
                chosen.append(self._waiting.popleft())
                rows += chosen[-1].num_rows
            self.metrics.waiting.set(sum(job.num_rows for job in self._waiting))
        joining = []
        for job in chosen:
            try:
                pieces = Pieces(self.model.tokenizer, job.hear) if job.stream and not job.elect else None
                pixels = None if job.picture is None else job.picture.pixels
                job.asked = begin(self.model, pixels, job.question, job.decoding, job.previous, pieces, job.last)
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("a request failed")
                self._end([job], error)
                continue
            if pieces is not None:
                for place in range(job.num_rows):
                    pieces.all(place, job.asked.begun)
            self.metrics.prompt_tokens.inc(job.asked.num_prompt_tokens)
            joining.append(job)
        if joining:
            self._joined_s = time.monotonic()
        self._running += joining
        self._together.add([job.asked for job in joining if job.asked is not None])

    def _advance(self) -> None:
        if not self._running:
            return
        self._together.advance()
        now, told = time.monotonic(), []
        for job in self._running:
            assert job.asked is not None
            if job.first_token_s is None:
                job.first_token_s = now - job.begun_s
                self.metrics.first_token_s.observe(job.first_token_s)
            if job.given_up:
                job.asked.give_up()
                self._count(job)
            elif job.asked.done:
                self._finish(job, job.asked)
                told.append(job)
            elif job.pieces and now - job.told_s >= NEWS_S:
                job.told_s = now
                told.append(job)
        self._running = [job for job in self._running if not (job.over or job.given_up)]
        self.metrics.rows.set(self._together.num_rows)
        self._wake(told)

    def _finish(self, job: Job, asked: Asked) -> None:
        results = asked.results(job.elect)
        try:
            if job.attention and job.picture is not None:
                add_attention(self.model, asked, results, job.picture.area)
            job.results = results
        except Exception as error:  # of this job alone
            log.exception("the attention of a chain failed")
            job.error = error
        self._count(job)

    def _count(self, job: Job) -> None:
        assert job.asked is not None
        self.metrics.tokens.inc(sum(len(row.ids) for row in job.asked.writer.everyone))

    def _end(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.error = error
        self._wake(jobs)

    def _wake(self, jobs: Sequence[Job]) -> None:
        """One call into each event loop, however many wait there."""
        for loop in {job.loop for job in jobs}:
            mine = [job for job in jobs if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_set, mine)
            except RuntimeError:  # the loop has ended
                continue


def add_attention(model: EmberVLMNetwork, asked: Asked, results: Sequence[dict[str, Any]], area: Area | None) -> None:
    """Give each result with a chain its `attention`: over the picture in `area` where it was padded."""
    read = [result for result in results if result["reasoning_steps"]]
    if not read:
        return
    count = len(read)
    visual, seen = asked.visual.expand(count, -1, -1), asked.seen.expand(count)
    chains = [result["reasoning_steps"] for result in read]
    found = explain_chains(model, visual, seen, [asked.question] * count, chains, judged=False)
    for result, about in zip(read, found):
        attention = about["attention"]
        result["attention"] = without_padding(attention, area) if attention and area else attention


def _set(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.news.set()

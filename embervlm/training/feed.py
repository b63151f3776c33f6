"""The micro-batches of a phase, step after step, made in the training process or beside it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from embervlm.data.collate import Batch
from embervlm.data.samples import Sample
from embervlm.errors import UserError
from embervlm.training.job import PhaseJob
from embervlm.training.schedule import teacher_forcing_ratio
from embervlm.world import World


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What this process trains on in one step."""

    batches: list[Batch]
    num_samples: int
    """Samples of the global batch, over all processes."""
    epoch: int
    """Counted from 0."""
    teacher_forcing: float

    def pin_memory(self) -> Fed:
        """The same in memory from which a GPU reads beside its work; `DataLoader` calls it."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class Feed:
    """`of(step)` is what this process trains on in that step; to be closed.

    With `num_workers` processes beside this one the steps behind the first one asked for are made ahead. What a step
    consists of depends on its number alone, so that it is the same either way, and after a resume.
    """

    def __init__(self, job: PhaseJob, world: World, *, load_pictures: bool, num_workers: int, end: int) -> None:
        """
        Args:
            load_pictures: False where visual tokens take the pictures' place.
            end: the step behind the last one.
        """
        self._steps = _Steps(job, world, load_pictures)
        self._num_workers, self._end = num_workers, end
        self._pinned = world.device.type == "cuda"
        self._ahead: Iterator[Fed | UserError] | None = None
        self._step = -1
        self._fed: Fed | UserError | None = None
        self.waited_s = 0.0
        """Seconds that training has stood still for data so far."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ahead = None  # its workers end with it

    def of(self, step: int) -> Fed:
        """Step `step`: the one that follows the last, or that one again."""
        if step != self._step:
            began = time.monotonic()
            self._fed, self._step = self._next(step), step
            self.waited_s += time.monotonic() - began
        if isinstance(self._fed, UserError):
            raise self._fed
        assert self._fed is not None
        return self._fed

    def made_of(self, samples: Sequence[Sample], step: int) -> Fed:
        """Step `step` of other samples than the plan's, which were drawn for it."""
        began = time.monotonic()
        fed = self._steps.made_of(samples, step)
        self.waited_s += time.monotonic() - began
        return fed

    def _next(self, step: int) -> Fed | UserError:
        if self._num_workers == 0:
            return self._steps[step]
        if self._ahead is None:
            self._ahead = iter(
                DataLoader(
                    self._steps,
                    batch_size=None,
                    sampler=_Following(step, self._end),
                    num_workers=self._num_workers,
                    pin_memory=self._pinned,
                )
            )
        return next(self._ahead)


def data_workers(wanted: int | None, world: World) -> int:
    """`wanted`, or by itself none on a CPU, whose cores are busy, and beside a GPU up to 4 of the cores left."""
    if wanted is not None:
        return wanted
    if world.device.type == "cpu":
        return 0
    return max(1, min(4, len(os.sched_getaffinity(0)) // torch.cuda.device_count() - 1))


class _Following:
    """The numbers of the steps from `start` on."""

    def __init__(self, start: int, end: int) -> None:
        self._steps = range(start, end)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


class _Steps(Dataset[Any]):
    """Step number -> `Fed`, or the user's mistake that kept it from that, which a worker cannot raise as it is."""

    def __init__(self, job: PhaseJob, world: World, load_pictures: bool) -> None:
        self._job, self._world, self._load_pictures = job, world, load_pictures

    def __getitem__(self, step: int) -> Fed | UserError:
        try:
            return self._make(step)
        except UserError as error:
            return error

    def _make(self, step: int) -> Fed:
        return self.made_of(self._job.plan.batch(step), step)

    def made_of(self, samples: Sequence[Sample], step: int) -> Fed:
        """The step of these samples."""
        job = self._job
        epoch, _ = job.plan.locate(step)
        forcing = teacher_forcing_ratio(epoch, job.phase.epochs, job.scheduled_sampling)
        batches = []
        for places, mine in deal(samples, self._world, job.accumulation):
            batch = job.collator(
                mine or samples[:1],
                step=step,
                places=places or [0],
                teacher_forcing=forcing,
                load_pictures=self._load_pictures,
            )
            if not mine:  # every process must take part in the step; this share counts nothing
                batch.mute()
            batches.append(batch)
        return Fed(batches=batches, num_samples=len(job.plan.batch(step)), epoch=epoch, teacher_forcing=forcing)


def micro_batches(samples: float, batch_size: int, world: World) -> int:
    """Micro-batches of one process for an update on so many samples."""
    return math.ceil(samples / (batch_size * world.size))


def deal(samples: Sequence[Sample], world: World, accumulation: int) -> list[tuple[list[int], list[Sample]]]:
    """This process's micro-batches of a global batch, each with its samples' places in it.

    Every `world.size * accumulation`-th sample goes to the same micro-batch, so lengths stay alike. A share may be
    empty in the last batch of an epoch.
    """
    parts = world.size * accumulation
    shares = []
    for micro in range(accumulation):
        places = list(range(world.rank * accumulation + micro, len(samples), parts))
        shares.append((places, [samples[place] for place in places]))
    return shares

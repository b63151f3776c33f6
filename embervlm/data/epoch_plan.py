"""The order in which training sees the samples: seeded, and seekable to any step."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from embervlm.data.lazy import Lazy
from embervlm.data.samples import Sample, Samples


@dataclass(frozen=True, kw_only=True)
class GlobalBatch(Lazy[Sample]):
    """The samples of one optimizer step; each is encoded only where it is asked for, on the rank that trains on it."""

    sources: tuple[Sequence[Sample], ...] = field(repr=False, compare=False)
    picks: tuple[tuple[int, int], ...]
    """(which source, which of its samples)."""

    def __len__(self) -> int:
        return len(self.picks)

    def item(self, place: int) -> Sample:
        source, i = self.picks[place]
        return self.sources[source][i]


@dataclass(frozen=True)
class _Epoch:
    """Indices of an epoch's samples."""

    order: np.ndarray
    """Main ones, a batch behind the other."""
    batches: np.ndarray
    """The order in which these batches are trained on."""
    mixed: list[np.ndarray]
    """Those of each mixed-in list, in the order of training."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which samples make up each global batch of an epoch: the same for every number of ranks.

    The main samples (of `epochs`, where given) all come once; of each mixed-in list as many as `mix` asks for, another
    part of it every epoch.
    Batches are of like length, so that little is padding (sorted within `window` batches), and in random order.
    """

    main: Sequence[Sample]
    mixed: Sequence[tuple[Sequence[Sample], float]] = ()
    """(samples, how many for each sample that is in the batch already: main ones, and those of the lists before)."""
    epochs: Sequence[Sequence[int] | np.ndarray] = ()
    """For each epoch the places in `main` that it trains on, the last for all that follow; () trains on all."""
    global_batch: int
    """Main samples per optimizer step over all ranks and micro-batches."""
    seed: int
    window: int = 16
    repeats: int = 1
    """Optimizer steps in a row that train on the same batch."""
    _epochs: dict[int, _Epoch] = field(default_factory=dict)

    def with_global_batch(self, global_batch: int) -> EpochPlan:
        return replace(self, global_batch=global_batch, _epochs={})

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self._places(epoch)) // self.global_batch)

    def _places(self, epoch: int) -> Sequence[int] | np.ndarray:
        return self.epochs[min(epoch, len(self.epochs) - 1)] if self.epochs else range(len(self.main))

    def num_steps(self, num_epochs: int) -> int:
        """Steps of the first `num_epochs`."""
        return sum(map(self._steps_in, range(num_epochs))) * self.repeats

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of optimizer step `step`, and the step within it, all counted from 0."""
        step, repeat = divmod(step, self.repeats)
        epoch = 0
        while epoch < len(self.epochs) - 1 and step >= self._steps_in(epoch):
            step -= self._steps_in(epoch)
            epoch += 1
        more, index = divmod(step, self._steps_in(epoch))
        return epoch + more, index * self.repeats + repeat

    def digest(self) -> str:
        """Changes with whatever the order of the samples depends on, apart from the global batch."""
        digest = hashlib.blake2b(repr((self.seed, self.window)).encode(), digest_size=16)
        for places in self.epochs:
            digest.update(repr(len(places)).encode())
            digest.update(np.asarray(places, np.int32).tobytes())
        for samples, ratio in ((self.main, 1.0), *self.mixed):
            form = samples.form if isinstance(samples, Samples) else [sample.form for sample in samples]
            rows = samples.rows if isinstance(samples, Samples) else [sample.record for sample in samples]
            digest.update(repr((ratio, len(samples), form)).encode())
            digest.update(np.asarray(rows, np.int32).tobytes())
        digest.update(self._lengths.tobytes())
        if self.repeats > 1:
            digest.update(repr(self.repeats).encode())
        return digest.hexdigest()

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each main sample."""
        if isinstance(self.main, Samples):
            return self.main.sizes.sum(1, dtype=np.int32)
        return np.array([len(sample) for sample in self.main], np.int32)

    def batch(self, step: int) -> GlobalBatch:
        """Samples of optimizer step `step`, counted from 0 over all epochs. It seeks: no step before it is replayed."""
        epoch, index = self.locate(step)
        index //= self.repeats
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self._plan(epoch)
        plan = self._epochs[epoch]
        last = len(plan.batches) - 1
        start = int(plan.batches[index]) * self.global_batch
        picks = [(0, int(i)) for i in plan.order[start : start + self.global_batch]]
        last_came = bool((plan.batches[:index] == last).any())  # the one batch that may be shorter
        in_full, in_last, here = map(
            self._num_mixed, (self.global_batch, len(plan.order) - last * self.global_batch, len(picks))
        )
        for number, indices in enumerate(plan.mixed):
            first = in_full[number] * (index - last_came) + in_last[number] * last_came
            picks += [(number + 1, int(i)) for i in indices[first : first + here[number]]]
        return GlobalBatch(sources=(self.main, *(samples for samples, _ in self.mixed)), picks=tuple(picks))

    def _plan(self, epoch: int) -> _Epoch:
        rng = random.Random(f"epoch:{self.seed}:{epoch}")
        order = _shuffled(self._places(epoch), rng)
        span = self.window * self.global_batch
        for start in range(0, len(order), span):
            part = order[start : start + span]
            part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = _shuffled(range(self._steps_in(epoch)), rng)
        last = len(batches) - 1
        counts = zip(*map(self._num_mixed, (self.global_batch, len(order) - last * self.global_batch)))
        mixed = []
        for number, ((samples, _), (in_full, in_last)) in enumerate(zip(self.mixed, counts)):
            count = in_full * last + in_last
            drawn = random.Random(f"mix:{self.seed}:{epoch}:{number}")
            rounds = [_shuffled(range(len(samples)), drawn)[::-1] for _ in range(-(-count // max(1, len(samples))))]
            mixed.append(np.concatenate([*rounds, np.empty(0, np.int32)])[:count])
        return _Epoch(order, batches, mixed)

    def _num_mixed(self, size: int) -> list[int]:
        """How many of each mixed-in list go beside `size` main samples."""
        counts = []
        for samples, ratio in self.mixed:
            counts.append(round(size * ratio) if len(samples) else 0)
            size += counts[-1]
        return counts


def _shuffled(values: Sequence[int] | np.ndarray, rng: random.Random) -> np.ndarray:
    order = array("i")
    order.frombytes(np.asarray(values, np.int32).tobytes())
    rng.shuffle(order)
    return np.frombuffer(order, np.int32)

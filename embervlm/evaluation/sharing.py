"""Work of an evaluation in tasks of a fixed size: dealt over the processes, and kept on disk as they come.

What a task computes does not depend on who does it, so a result is the same from one process and from many, and from
a run that was killed and started again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.errors import UserError
from embervlm.journal import Journal
from embervlm.model.embervlm import EmberVLM
from embervlm.run_dir import naming_unwritten
from embervlm.world import World

Key = tuple[str, int]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A batch of records for one model."""

    name: str
    number: int
    checkpoint: Path
    num_records: int
    run: Callable[[EmberVLM], Any]
    """Gives what JSON can hold."""

    @property
    def key(self) -> Key:
        return self.name, self.number


class TaskJournal:
    """Results of finished tasks, in one file for each process of each run: `<folder>/<digest>-<rank>.jsonl`."""

    def __init__(self, folder: Path | None, digest: str, world: World) -> None:
        """`folder` None keeps nothing. `digest`: of all that the results depend on; those of others are left alone."""
        self._folder, self._digest, self._world = folder, digest, world
        self._file: Journal | None = None
        self.done: dict[Key, Any] = {}
        if folder is not None:
            found: Any = None
            if world.rank == 0:
                try:
                    with naming_unwritten(folder):
                        found = self._read()
                except UserError as error:
                    found = error
            found = world.broadcast(found)  # one reader: the processes must agree on what is left
            if isinstance(found, UserError):
                raise found
            self.done = found
            if self.done and world.rank == 0:
                print(f"continuing with {len(self.done)} finished batches of a killed evaluation in {folder}")

    def _read(self) -> dict[Key, Any]:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        done: dict[Key, Any] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            if not path.name.startswith(f"{self._digest}-"):
                path.unlink()  # of another checkpoint, data or decoding: the output file will be replaced as well
                continue
            try:
                with Journal(path) as journal:
                    done |= {(name, number): value for name, number, value in journal.take()}
            except ValueError:
                path.unlink()  # damaged: its tasks are done again
        return done

    def add(self, key: Key, value: Any) -> None:
        self.done[key] = value
        if self._folder is None:
            return
        path = self._folder / f"{self._digest}-{self._world.rank}.jsonl"
        with naming_unwritten(path):
            if self._file is None:
                self._file = Journal(path)
            self._file.append([[*key, value]])


def share_out(
    tasks: Sequence[Task], load: Callable[[Path], EmberVLM], world: World, journal: TaskJournal, bar: Any
) -> dict[Key, Any]:
    """Every task's result, on every process. An error of one process is raised on all, so that none waits for it."""
    left = [task for task in tasks if task.key not in journal.done]
    known = {task.key: journal.done[task.key] for task in tasks if task.key in journal.done}
    bar.total = (bar.total or 0) + sum(task.num_records for task in tasks)
    bar.update(sum(task.num_records for task in tasks if task.key in known))
    mine: dict[Key, Any] = {}
    with failing_together(world):
        for turn, place in enumerate(range(0, len(left), world.size)):
            # Tasks of a kind grow longer one by one: dealt there and back, so that the last process gets no more
            own = place + (world.size - 1 - world.rank if turn % 2 else world.rank)
            if own < len(left):
                task = left[own]
                bar.set_postfix_str(task.name, refresh=False)
                mine[task.key] = json.loads(json.dumps(task.run(load(task.checkpoint))))  # alike, read from disk or not
                journal.add(task.key, mine[task.key])
            bar.update(sum(task.num_records for task in left[place : place + world.size]))
    for share in world.gather(mine):
        known |= share
    return known


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Raises an error of one process on all, so that none waits for it. Enter it on every process."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    said = None if failed is None else (isinstance(failed, UserError), f"{type(failed).__name__}: {failed}")
    found = world.gather(said)
    if failed is not None:
        raise failed
    for rank, other in enumerate(found):
        if other is not None:
            of_the_user, text = other
            raise (UserError if of_the_user else RuntimeError)(f"process {rank}: {text}")

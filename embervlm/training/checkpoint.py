"""Saving a phase while it trains, and resuming it on any engine and any number of processes.

A checkpoint's `training_state.pt`, read with `weights_only=True`, holds:

    optimizer     moments by parameter name, updates done, loss scale (`EngineState.optimizer`)
    auxiliary     weights that only training needs: of Stage 3's dense head, of adapters and of what they are added to
    progress      step, samples, seconds
    data          `order` (`EpochPlan.digest`, seed included) and `global_batch`
    wandb_run_id  or None

The step is the cursor of everything else: rates, teacher forcing and the samples of a batch are functions of it, and
the random numbers of a step depend on seed, step and rank alone. So there is no further state to lose.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from embervlm import run_dir
from embervlm.engines.base import Engine, EngineState, Snapshot
from embervlm.errors import UserError
from embervlm.model.lora import is_adapted
from embervlm.model.storage import CheckpointError, read_tensors
from embervlm.ranking import best_checkpoints
from embervlm.run_dir import TRAINING_STATE
from embervlm.slurm_commands import EVALUATED_SPLIT, awaiting_evaluation
from embervlm.training.module import TrainingModule
from embervlm.world import World

MODEL_PREFIX = "model."
SLOW_S = 60.0
"""Waiting this long for a checkpoint gives a warning."""
_log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint that could not be written. The message names its path; earlier checkpoints are intact."""


@dataclass
class Progress:
    """The progress of a phase."""

    step: int = 0
    """Optimizer steps done."""
    elapsed_s: float = 0.0
    """Training time, over all resumes."""
    samples: int = 0
    """Records seen."""
    overflows: int = 0
    """Updates that were repeated because an fp16 gradient was not finite."""
    val_losses: tuple[float, ...] = ()
    """Measured so far where the phase stops at a plateau."""
    decay_from: int | None = None
    """Step at which such a plateau was found."""
    tokens_drawn: int = 0
    """That phase 3 has written so far, over all resumes."""
    groups_drawn: int = 0
    """Of the epoch under way, in phase 3."""
    groups_unequal: int = 0
    """Of these, with rewards that differ."""


class CheckpointStore:
    """The checkpoints of one phase folder, written by a background thread.

    Use as a context: leaving it waits for the checkpoint being written. Every process calls all methods but `failed`
    at the same step.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_last: int,
        keep_best: int = 0,
        keep_weights: int = 0,
        on_error: str = "stop",
        in_background: bool = True,
        on_saved: Callable[[Path], None] | None = None,
        are_ranked: bool = False,
    ) -> None:
        """
        Args:
            on_error: `stop` raises SaveError at the step after; `continue` warns.
            in_background: False waits in `save` until the checkpoint is on disk.
            on_saved: Called with the path of each checkpoint that is on disk, in the thread that wrote it.
            are_ranked: Whether somebody will want the best of these checkpoints, so that it is said when one is deleted
                that nothing has evaluated.
        """
        self.folder, self._world = folder, world
        self._keep_last, self._keep_best, self._keep_weights = keep_last, keep_best, keep_weights
        self._on_error = on_error
        self._in_background, self._on_saved = in_background, on_saved
        self._tells_unranked = are_ranked
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.stalled_s = 0.0
        """Seconds that training has waited for checkpoints so far."""
        error = None
        if world.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                error = f"{folder}: cannot create this folder for checkpoints ({reason.strerror})"
        if (error := world.broadcast(error)) is not None:
            raise SaveError(error)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(wait=True)
        if kind is not None and self.failed:  # the error under way goes first, but this one is not lost
            assert self._writing is not None
            _log.error("%s", self._writing.exception())

    @property
    def failed(self) -> bool:
        """Whether this process could not do its part of the last checkpoint."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def poll(self) -> None:
        """Raise, or warn about, the error of a checkpoint on every process once one has it. Call at every step."""
        if self._world.any(self.failed):
            self.wait()

    def wait(self, required: bool = False) -> bool:
        """Wait until the last checkpoint is on disk; False if it could not be written.

        Raises:
            SaveError: it could not be written, and `required` or `on_error` says to stop.
        """
        error = self._outcome()
        self._writing = None
        if not self._world.any(error is not None):  # also a barrier: no process continues before all are done
            return True
        first = next(text for text in self._world.gather(None if error is None else str(error)) if text is not None)
        if required or self._on_error == "stop":
            raise SaveError(first)
        if self._world.rank == 0:
            _log.warning("%s; training continues (on_save_error: continue)", first)
        return False

    def _outcome(self) -> BaseException | None:
        """The error of the checkpoint being written, once writing has ended."""
        began = time.monotonic()
        while self._writing is not None:
            try:
                return self._writing.exception(SLOW_S)
            except StillRunning:
                _log.warning(
                    "%s: a checkpoint is still being written there; training has waited %.0f s for it; check the disk",
                    self.folder,
                    time.monotonic() - began,
                )
        return None

    def save(
        self,
        engine: Engine,
        progress: Progress,
        settings: dict[str, Any],
        extra: dict[str, Any],
        *,
        final: bool = False,
    ) -> Path:
        """Copy the state and return; the path that is written now. The final checkpoint is on disk on return.

        Args:
            settings: Goes into `state.json`.
            extra: Goes into the training state beside the engine's.
        """
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > 1 and self._world.rank == 0:
            _log.warning(
                "%s: training waited %.1f s for the previous checkpoint; raise save_steps or use a faster disk",
                self.folder,
                waited,
            )
        assert isinstance(engine.module, TrainingModule)
        target = run_dir.checkpoint_path(self.folder, None if final else progress.step)
        content = {**extra, "progress": asdict(progress)}
        about = {**asdict(progress), "final": final, "settings": settings}
        self._writing = self._writer.submit(self._write, engine.module, engine.snapshot(), target, content, about)
        if final or not self._in_background:
            self.wait(required=final)
        self.stalled_s += time.monotonic() - began
        return target

    def _write(
        self, module: TrainingModule, snapshot: Snapshot, target: Path, content: dict[str, Any], about: dict[str, Any]
    ) -> None:
        """In the background thread of every process; rank 0 writes."""
        state = snapshot.collect()
        if state is None:
            return
        part = None
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"the folder {self.folder} has vanished")
            part = run_dir.new_tmp_dir(self.folder)
            self._write_files(part, module, state, content)
            run_dir.write_json_atomic(part / "state.json", about)
            run_dir.publish_checkpoint(part, target, about["step"])
        except (OSError, RuntimeError, run_dir.WriteError) as error:
            reason = f"{_one_line(_reason_of(error, part))}{self._what_stands()}"
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
            raise SaveError(f"{target}: not written: {reason}") from error
        if self._on_saved is not None:
            self._on_saved(target)
        try:
            kept = [*best_checkpoints(self.folder, self._keep_best), *awaiting_evaluation(self.folder)]
            unranked = [found.path for found in run_dir.list_checkpoints(self.folder) if not _is_evaluated(found.path)]
            deleted = run_dir.prune_checkpoints(self.folder, self._keep_last, kept, self._keep_weights)
            self._say_unranked([path for path in deleted if path in unranked])
        except (UserError, OSError) as error:  # the checkpoint stands, and what is not known to be old is kept
            _log.warning("%s: no old checkpoint was deleted: %s", self.folder, error)

    def _say_unranked(self, deleted: Sequence[Path]) -> None:
        """Once, because more will follow."""
        if deleted and self._tells_unranked:
            self._tells_unranked = False
            _log.warning(
                "%s is deleted, and nothing has evaluated it, so `select_best` cannot choose it; nor will it choose "
                "from those that follow. To keep more, raise keep_weights (%d); to evaluate while training, set "
                "eval_steps",
                deleted[0],
                self._keep_weights,
            )

    @staticmethod
    def _write_files(part: Path, module: TrainingModule, state: EngineState, content: dict[str, Any]) -> None:
        model = {k.removeprefix(MODEL_PREFIX): v for k, v in state.weights.items() if k.startswith(MODEL_PREFIX)}
        module.model.save_pretrained(part, state_dict=model)
        # merging rounds, so a resume takes adapters and what they were added to from here
        rest = {k: v for k, v in state.weights.items() if not k.startswith(MODEL_PREFIX) or is_adapted(k)}
        torch.save({**content, "optimizer": state.optimizer, "auxiliary": rest}, part / TRAINING_STATE)

    def _what_stands(self) -> str:
        try:
            free = shutil.disk_usage(self.folder).free
            sound = run_dir.list_checkpoints(self.folder)
        except OSError as error:
            return f"; the folder cannot be read either ({_one_line(error)})"
        last = f"the last good checkpoint is {sound[-1].path}" if sound else "there is no earlier checkpoint"
        return f" ({free / 1e9:.1f} GB free); {last}"


def _reason_of(error: BaseException, part: Path | None) -> BaseException:
    """The system's error: if a disk is full, torch.save raises a RuntimeError without the reason."""
    if part is not None and isinstance(error, RuntimeError):
        try:
            (part / "probe").write_bytes(bytes(1 << 20))
        except OSError as reason:
            return reason
    return error


def _is_evaluated(checkpoint: Path) -> bool:
    return run_dir.eval_path(checkpoint, EVALUATED_SPLIT).exists()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def is_finished(folder: Path, world: World) -> bool:
    """Whether `folder` has an intact `checkpoint-final`; cleans up after killed runs. Collective."""
    finished = False
    if world.rank == 0:
        run_dir.clean_leftovers(folder)
        path = run_dir.checkpoint_path(folder, None)
        finished = any(found.path == path for found in run_dir.list_checkpoints(folder)) and _is_sound(path)
    return bool(world.broadcast(finished))


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint of `folder` that a phase can resume and whose files match its manifest.

    Damaged ones are renamed, with a warning that names the file. A phase cannot resume one whose training state was
    deleted; a warning names it if there is no other.
    """
    weights_alone = []
    for found in reversed(run_dir.list_checkpoints(folder)):
        if not found.has_state:
            weights_alone.append(found.path)
        elif _is_sound(found.path):
            return found.path
    if weights_alone:
        _log.warning(
            "%s has only weights, no optimizer state: a phase cannot resume from it, so this one starts again. "
            "--resume_from %s in another --output_dir starts from its weights",
            weights_alone[0],
            weights_alone[0],
        )
    return None


def _is_sound(checkpoint: Path) -> bool:
    try:
        run_dir.verify_checkpoint(checkpoint)
    except run_dir.DamagedCheckpointError as error:
        _log.warning("skipped: %s; it is now %s", error, run_dir.set_damaged_aside(checkpoint))
        return False
    return True


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint."""
    if not (checkpoint / TRAINING_STATE).exists():
        raise CheckpointError(f"{checkpoint}: has only weights, no {TRAINING_STATE}; a phase cannot resume from it")
    state = read_tensors(checkpoint / TRAINING_STATE)
    if not isinstance(state, dict) or not {"optimizer", "auxiliary", "progress", "data"} <= set(state):
        raise CheckpointError(f"{checkpoint / TRAINING_STATE}: is not the training state of a phase of this version")
    return state

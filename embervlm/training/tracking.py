"""Where a run's numbers go: progress bar, `metrics.jsonl`, and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from embervlm.progress import progress_bar
from embervlm.run_dir import GROUPS, eval_path, list_checkpoints, read_eval, write_text_atomic

_log = logging.getLogger(__name__)
RUN_ID_FILE = "wandb_run_id"
"""In the folder of a phase."""
SERVICE_WAIT_S = 300
"""Time limit for the start of W&B's process; its default of 30 s is short on a node that just booted."""


class Tracker:
    """Rank 0's log of one phase; on other ranks every method does nothing.

    W&B's own rules say whether its run is online, see `wandb_mode`. A resumed phase continues under the same run id.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        name: str,
        first_step: int,
        total_steps: int | None,
        epochs: int | None = None,
        project: str | None = None,
        run_name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        wandb_run_id: str | None = None,
    ) -> None:
        """`wandb_run_id` is that of the checkpoint that the phase resumes."""
        self._active, self._folder, self._epochs = active, folder, epochs
        self._run: Any = None
        self._lines_missing = False
        self.wandb_run_id = wandb_run_id
        self.bar: Any = contextlib.nullcontext()
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._groups = folder / "metrics.jsonl", folder / GROUPS
        for path in (self._path, self._groups):
            _drop_after(path, first_step)
        self.bar = progress_bar(total=total_steps, initial=first_step, desc=name, unit="step")
        if project and wandb_mode() != "disabled":
            if wandb_run_id is None:  # a new run, or one that was killed before its first checkpoint
                wandb_run_id = _known_run_id(folder) or uuid.uuid4().hex[:8]
            self.wandb_run_id = wandb_run_id
            write_text_atomic(folder / RUN_ID_FILE, wandb_run_id)
            self._run = _open_run(folder, project, run_name or name, wandb_run_id, settings or {})
            found = list_checkpoints(folder)
            self._evaluated = {found.path for found in found if eval_path(found.path, "val").exists()}

    def advance(self, step: int, values: Mapping[str, Any] | None) -> None:
        """Count a step; with `values` also log it."""
        if not self._active:
            return
        self.bar.update(step - self.bar.n)
        if values is None:
            return
        self._append(self._path, json.dumps({"step": step, **values}) + "\n")
        self.bar.set_postfix_str(self._shown(values), refresh=False)
        if self._run is not None:
            flat = {f"loss/{key}": value for key, value in values["loss"].items()}
            flat |= {f"lr/{key}": value for key, value in values["learning_rate"].items()}
            flat |= {f"policy/{key}": value for key, value in values.get("policy", {}).items()}
            flat |= {key: values[key] for key in ("samples_per_s", "epoch", "total_loss") if key in values}
            self._to_wandb(lambda run: run.log(flat, step=step))

    def log_group(self, line: Mapping[str, Any]) -> None:
        """Add a group of drawn chains with their rewards to `groups.jsonl`."""
        if self._active:
            self._append(self._groups, json.dumps(line) + "\n")

    def _shown(self, values: Mapping[str, Any]) -> str:
        """Epoch, total loss, terms and rate."""
        epoch = f"epoch {values['epoch']}" + (f"/{self._epochs}" if self._epochs else "")
        terms = ", ".join(f"{name} {value:.3f}" for name, value in values["loss"].items())
        total = f"loss {values['total_loss']:.3f} ({terms})" if "total_loss" in values else terms
        if "policy" in values:
            total = f"reward {values['policy']['reward']:.3f}, {total}"
        return f"{epoch}, {total}, {values['samples_per_s']:.0f} samples/s"

    def shorten(self, total_steps: int) -> None:
        """Show that the phase ends at `total_steps`."""
        if self._active:
            self.bar.total = total_steps
            self.bar.refresh()

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """An error in W&B only loses its curves; `metrics.jsonl` has them all."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # W&B raises what it likes
            _log.warning("W&B: %s: %s. Nothing more is sent there; training continues", type(error).__name__, error)
            self._run = None

    def _append(self, path: Path, line: str) -> None:
        """A full disk loses the line; the checkpoints decide whether the run ends."""
        size = 0
        try:
            size = path.stat().st_size if path.exists() else 0
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self._lines_missing:
                _log.warning("%s: steps are missing in it (%s); training continues", path, error.strerror)
            self._lines_missing = True
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half line for the next one to follow

    def log_evaluations(self, step: int) -> None:
        """Send W&B the new val evaluations of the folder's checkpoints since the last call.

        One that a job of its own computes comes later than its checkpoint, and W&B takes no step before the last: so
        the checkpoint's step is a value beside the metrics.
        """
        if self._run is None:
            return
        for checkpoint in list_checkpoints(self._folder):
            path = eval_path(checkpoint.path, "val")
            if checkpoint.path not in self._evaluated and path.exists():
                self._evaluated.add(checkpoint.path)
                self._to_wandb(partial(_send_evaluation, checkpoint.step, path, step))

    def close(self) -> None:
        if self._active:
            self.bar.close()
            self._to_wandb(lambda run: run.finish())


def _drop_after(path: Path, step: int) -> None:
    """Take out the lines of steps that a resume does again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))


def log_figures(folder: Path, figures: Mapping[str, Path], *, project: str, run_name: str | None = None) -> bool:
    """Add pictures (name -> file) to the W&B run of the phase in `folder`; False if it had none."""
    run_id = _known_run_id(folder)
    if run_id is None or not figures or wandb_mode() == "disabled":
        return False
    _add_to_run(folder, run_id, figures, {}, prefix="report", project=project, name=run_name or folder.name)
    return True


def log_evaluation(
    folder: Path, result: Mapping[str, Any], figures: Mapping[str, Path], *, project: str, run_name: str | None = None
) -> bool:
    """Add an evaluation's numbers and pictures to the W&B run of the phase in `folder`; without one to a new run.

    False if W&B is disabled.
    """
    if wandb_mode() == "disabled":
        return False
    run_id = _known_run_id(folder) or uuid.uuid4().hex[:8]
    split = str(result["split"])
    values = {f"{split}/step": result.get("step"), **evaluation_values(result, split)}
    name = run_name or f"evaluate {result['checkpoint']}"
    _add_to_run(folder, run_id, figures, values, prefix=split, project=project, name=name)
    return True


def _add_to_run(
    folder: Path,
    run_id: str,
    figures: Mapping[str, Path],
    values: Mapping[str, Any],
    *,
    prefix: str,
    project: str,
    name: str,
) -> None:
    """Log after the last step that was logged, since W&B drops earlier ones."""
    import wandb

    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = max((step for line in lines if (step := _step_of(line)) != float("inf")), default=0.0)
    run = _open_run(folder, project, name, run_id, {})
    pictures = {f"{prefix}/{figure}": wandb.Image(str(path)) for figure, path in figures.items()}
    run.log({**values, **pictures}, step=max(int(last) + 1, run.step))
    run.finish()


def _open_run(folder: Path, project: str, name: str, run_id: str, settings: Mapping[str, Any]) -> Any:
    """The W&B run `run_id`, new or resumed; offline by W&B's own rules, or if its server does not answer."""
    import wandb

    def opened(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            settings=wandb.Settings(x_service_wait=SERVICE_WAIT_S),
        )

    if wandb_mode() == "offline":
        return opened("offline")
    try:
        return opened("online")
    except wandb.errors.CommError as error:  # a run that was requeued at night must not end over its log
        _log.warning("W&B: %s. Run %s is kept offline; run `wandb sync` in %s to send it", error, run_id, folder)
        wandb.teardown()  # the failed attempt holds the id
        return opened("offline")


def wandb_mode() -> Literal["online", "offline", "disabled"]:
    """What W&B would do by its own rules: WANDB_MODE and its settings files, where `wandb offline` writes.

    A run without a key, of `wandb login` or WANDB_API_KEY, is kept offline: W&B itself would ask for one, and a
    training runs unattended. A warning says so where WANDB_MODE asks for more.
    """
    import wandb

    said = wandb.setup().settings.mode
    if said in ("offline", "dryrun"):
        return "offline"
    if said == "disabled":
        return "disabled"
    if _has_key():
        return "online"
    if asked := os.environ.get("WANDB_MODE"):
        _log.warning(
            "W&B: WANDB_MODE=%s, but no key was found, so the run is kept offline; `wandb login` stores one, and "
            "`wandb sync` sends the run later",
            asked,
        )
    return "offline"


def _has_key() -> bool:
    """Whether W&B finds credentials: in the environment, in the netrc file of `wandb login`, in its settings."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # a W&B that always prompts; there this tells without
        return bool(wandb.api.api_key)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        _log.warning("W&B: %s; the run is kept offline", " ".join(str(error).split()))
        return False


def _known_run_id(folder: Path) -> str | None:
    path = folder / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None


def _step_of(line: str) -> float:
    """The step of a log line; infinity for a line that a killed run left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def evaluation_values(result: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """An evaluation's numbers under flat names."""
    calibrated = result.get("calibration") or {}
    flat = {**result["metrics"], "ece": calibrated.get("ece"), "temperature": calibrated.get("temperature")}
    return {f"{prefix}/{name}": float(value) for name, value in flat.items() if isinstance(value, (int, float))}


def _send_evaluation(of_step: int, path: Path, step: int, run: Any) -> None:
    run.log({"val/step": of_step, **evaluation_values(read_eval(path), "val")}, step=step)

"""Where a run's numbers go: progress bar, `metrics.jsonl`, and Weights & Biases."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embervlm.progress import progress_bar
from embervlm.run_dir import write_text_atomic

RUN_ID_FILE = "wandb_run_id"
"""In the folder of a phase."""


def _step_of(line: str) -> float:
    """The step of a log line; infinity for one that a killed run left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _known_run_id(folder: Path) -> str | None:
    path = folder / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None


def _open_run(folder: Path, project: str, name: str, run_id: str, settings: Mapping[str, Any]) -> Any:
    """The W&B run `run_id`, new or resumed; offline without an API key."""
    import wandb

    online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE") != "offline"
    return wandb.init(
        project=project, name=name, id=run_id, resume="allow", dir=str(folder),
        mode="online" if online else "offline", config=dict(settings),
    )  # fmt: skip


def log_figures(folder: Path, figures: Mapping[str, Path], *, project: str, run_name: str | None = None) -> bool:
    """Add pictures (name -> file) to the W&B run of the phase in `folder`; False where it had none.

    They go behind the last step that was logged, since W&B drops what lies before it.
    """
    run_id = _known_run_id(folder)
    if run_id is None or not figures:
        return False
    import wandb

    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    last = max((step for line in lines if (step := _step_of(line)) != float("inf")), default=0.0)
    run = _open_run(folder, project, run_name or folder.name, run_id, {})
    pictures = {f"report/{name}": wandb.Image(str(path)) for name, path in figures.items()}
    run.log(pictures, step=max(int(last) + 1, run.step))
    run.finish()
    return True


class Tracker:
    """Rank 0's log of one phase; on other ranks everything is a no-op.

    Without an API key W&B runs offline. A resumed phase goes on under the same run id.
    """

    def __init__(
        self, folder: Path, *, active: bool, name: str, first_step: int, total_steps: int | None,
        project: str | None = None, run_name: str | None = None, settings: Mapping[str, Any] | None = None,
        wandb_run_id: str | None = None,
    ) -> None:  # fmt: skip
        """`wandb_run_id` is that of the checkpoint the phase goes on from."""
        self._active = active
        self._run: Any = None
        self.wandb_run_id = wandb_run_id
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._drop_after(first_step)
        self._bar = progress_bar(total=total_steps, initial=first_step, desc=name, unit="step")
        if project:
            if wandb_run_id is None:  # a new run, or one that was killed before its first checkpoint
                wandb_run_id = _known_run_id(folder) or uuid.uuid4().hex[:8]
            self.wandb_run_id = wandb_run_id
            write_text_atomic(folder / RUN_ID_FILE, wandb_run_id)
            self._run = _open_run(folder, project, run_name or name, wandb_run_id, settings or {})

    def _drop_after(self, step: int) -> None:
        """Lines of steps that a resume does again."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_text_atomic(self._path, "".join(line + "\n" for line in kept))

    def advance(self, step: int, values: Mapping[str, Any] | None) -> None:
        """Count a step; with `values` also log it."""
        if not self._active:
            return
        self._bar.update(step - self._bar.n)
        if values is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {key: f"{value:.3f}" for key, value in values["loss"].items()}
        self._bar.set_postfix(shown | {"samples/s": f"{values['samples_per_s']:.0f}"}, refresh=False)
        if self._run is not None:
            flat = {f"loss/{key}": value for key, value in values["loss"].items()}
            flat |= {f"lr/{key}": value for key, value in values["learning_rate"].items()}
            self._run.log(flat | {"samples_per_s": values["samples_per_s"], "epoch": values["epoch"]}, step=step)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._run is not None:
                self._run.finish()

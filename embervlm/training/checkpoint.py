"""Saving a phase and picking it up again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.model.storage import CheckpointError, read_tensors
from embervlm.training.engine import Engine
from embervlm.training.module import TrainingModule

TRAINING_STATE = "training_state.pt"
MODEL_PREFIX = "model."


@dataclass
class Progress:
    """Where a phase stands."""

    step: int = 0
    """Optimizer steps done."""
    elapsed_s: float = 0.0
    """Time spent training, over all resumes."""
    samples: int = 0
    """Records seen."""


class CheckpointStore:
    """The checkpoints of one phase folder."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self._keep_last = folder, keep_last

    def final(self) -> Path | None:
        """`checkpoint-final` where the phase is finished."""
        path = run_dir.checkpoint_path(self.folder, None)
        return path if any(found.path == path for found in run_dir.list_checkpoints(self.folder)) else None

    def newest(self) -> Path | None:
        found = run_dir.list_checkpoints(self.folder)
        return found[-1].path if found else None

    def save(self, engine: Engine, progress: Progress, settings: dict[str, Any], final: bool = False) -> Path:
        """Write and publish the whole state; every process takes part, process 0 writes."""
        module = engine.module
        assert isinstance(module, TrainingModule)
        weights = engine.weights()
        optimizer = engine.optimizer_state()
        rng = engine.world.gather(_random_state())
        target = run_dir.checkpoint_path(self.folder, None if final else progress.step)
        if engine.world.rank == 0:
            part = run_dir.new_tmp_dir(self.folder)
            model_state = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items() if k.startswith(MODEL_PREFIX)}
            module.model.save_pretrained(part, state_dict=model_state)
            rest = {key: value for key, value in weights.items() if not key.startswith(MODEL_PREFIX)}
            torch.save(
                {"optimizer": optimizer, "auxiliary": rest, "rng": rng, "progress": asdict(progress)},
                part / TRAINING_STATE,
            )
            run_dir.write_json_atomic(part / "state.json", {**asdict(progress), "final": final, "settings": settings})
            run_dir.publish_checkpoint(part, target, progress.step)
            run_dir.prune_checkpoints(self.folder, self._keep_last, keep=best_checkpoints(self.folder))
        engine.world.barrier()
        return target


def best_checkpoints(folder: Path) -> list[Path]:
    """The best checkpoint by the evaluations that stand in `folder`, if there are any; pruning spares it."""
    from embervlm.select_best import rank_checkpoints

    if not any(run_dir.eval_path(found.path, "val").exists() for found in run_dir.list_checkpoints(folder)):
        return []
    ranked = rank_checkpoints(folder, evaluate=lambda path, split: {"metrics": {}})
    return [Path(entry.checkpoint) for entry in ranked if entry.eligible][:1]


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint, whose files are checked against their checksums first."""
    run_dir.verify_checkpoint(checkpoint)
    state = read_tensors(checkpoint / TRAINING_STATE)
    if not isinstance(state, dict) or not {"optimizer", "auxiliary", "rng", "progress"} <= set(state):
        raise CheckpointError(f"{checkpoint / TRAINING_STATE}: is not the training state of a phase")
    return state


def restore(engine: Engine, state: dict[str, Any]) -> Progress:
    """Put optimizer and random state back; weights are loaded before the engine wraps the module."""
    engine.load_optimizer_state(state["optimizer"])
    if len(state["rng"]) == engine.world.size:
        own = state["rng"][engine.world.rank]
        torch.set_rng_state(own["cpu"])
        if torch.cuda.is_available() and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])
    return Progress(**state["progress"])

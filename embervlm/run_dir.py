"""Names inside an output folder, and checkpoints that are either complete or do not exist.

    <output_dir>/stage3/checkpoint-final/
    <output_dir>/stage4/phase1|phase2|phase3/checkpoint-<step>/, checkpoint-final/, metrics.jsonl
    <output_dir>/stage4/reasoning_samples/epoch_<n>_samples.json
    <output_dir>/results/stage4_eval.json

A checkpoint folder counts only when it holds `COMPLETE`, the manifest written last: {"format": 1, "step": int,
"files": {relative name: {"bytes": int, "blake2b": hex}}}. Folders named `.tmp-*` are work in progress or leftovers of
a killed run; no reader looks at them. `evals/` is written after publishing and is not part of the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from embervlm.errors import UserError

COMPLETE = "COMPLETE"
"""The manifest's file name; a checkpoint folder without it does not exist."""
EVALS = "evals"
"""Folder inside a checkpoint with one evaluation JSON per split."""
EVAL_FORMAT = 2
"""Version of evaluation files; version 1 had other metrics under the same names."""
GROUPS = "groups.jsonl"
"""File in the folder of phase 3: groups of drawn chains with their rewards."""
FINAL_NAME = "checkpoint-final"
TRAINING_STATE = "training_state.pt"
"""File of a checkpoint with all that a resume needs besides the weights, about two thirds of its size."""
MANIFEST_FORMAT = 1

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FIX = "correct it, restore it from a copy, or delete it"
_TMP = ".tmp-"
_REPLACED = f"{_TMP}replaced-"
_DAMAGED = "damaged-"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(?:(\d+)|final)")
_log = logging.getLogger(__name__)


class DamagedCheckpointError(UserError):
    """A checkpoint whose files do not match its manifest. The message names every damaged file."""


class WriteError(UserError):
    """A file that could not be written, for example because the disk is full. The message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    path: Path
    step: int
    """Optimizer steps done in its phase."""
    is_final: bool
    """True for `checkpoint-final`."""
    has_state: bool = True
    """False if only the weights are left; a phase cannot resume from these."""


def stage3_dir(output_dir: str | Path) -> Path:
    return Path(output_dir) / "stage3"


def phase_dir(output_dir: str | Path, phase: int) -> Path:
    """Folder of Stage 4's phase 1, 2 or 3."""
    if phase not in (1, 2, 3):
        raise ValueError(f"phase {phase!r} is not 1, 2 or 3")
    return Path(output_dir) / "stage4" / f"phase{phase}"


def checkpoint_path(phase_dir: str | Path, step: int | None) -> Path:
    """`checkpoint-<step>`, or `checkpoint-final` for None."""
    return Path(phase_dir) / (FINAL_NAME if step is None else f"checkpoint-{step}")


def new_tmp_dir(phase_dir: str | Path) -> Path:
    """A new folder to fill and pass to `publish_checkpoint`; on the same file system as the checkpoints."""
    path = Path(phase_dir) / f"{_TMP}{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    return path


def metrics_log_path(phase_dir: str | Path) -> Path:
    return Path(phase_dir) / "metrics.jsonl"


def eval_path(checkpoint: str | Path, split: str) -> Path:
    """Path of a checkpoint's evaluation on `split`."""
    return Path(checkpoint) / EVALS / f"{split}.json"


def eval_job_path(checkpoint: str | Path, split: str) -> Path:
    """Path of the note about the Slurm job that writes this evaluation, if one was submitted: {"job_id": str}."""
    return Path(checkpoint) / EVALS / f"{split}_job.json"


def calibration_path(checkpoint: str | Path) -> Path:
    """Path of what calibrates the checkpoint's `confidence`, which its last evaluation fitted."""
    return Path(checkpoint) / EVALS / "calibration.json"


def read_eval(path: str | Path) -> dict[str, Any]:
    """The content of an evaluation file. UserError if it has another version or is not an evaluation."""
    evaluation = read_json(path)
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("metrics"), dict):
        raise UserError(
            f"{path}: not an evaluation, because it has no 'metrics'; give the file that `embervlm evaluate` wrote, or "
            "evaluate again"
        )
    if (found := evaluation.get("format", EVAL_FORMAT)) != EVAL_FORMAT:
        raise UserError(
            f"{path}: evaluation of format {found}, this version reads {EVAL_FORMAT}: it has different "
            f"metrics under the "
            f"same names; delete it and evaluate again: `embervlm evaluate --checkpoint "
            f"{evaluation.get('checkpoint', '...')} --output_file {path} --save_reasoning_samples`"
        )
    return evaluation


def reasoning_samples_path(output_dir: str | Path, epoch: int) -> Path:
    return Path(output_dir) / "stage4" / "reasoning_samples" / f"epoch_{epoch}_samples.json"


def eval_results_path(output_dir: str | Path) -> Path:
    return Path(output_dir) / "results" / "stage4_eval.json"


def visualizations_dir(output_dir: str | Path) -> Path:
    return Path(output_dir) / "stage4" / "visualizations"


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` so that a reader finds the old file or the new one, never half of one. Makes missing folders.

    NaN and infinity are not JSON: a ValueError asks for null instead, and the old file stays.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: not written, {error}; write null for a value that is not finite") from error
    write_text_atomic(path, text)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, never half of one. Makes missing folders."""
    with atomic_text(path) as file:
        file.write(text)


@contextmanager
def naming_unwritten(path: str | Path) -> Iterator[None]:
    """An OSError inside becomes a `WriteError` that names `path`: for code that writes that file and reads none."""
    try:
        yield
    except OSError as error:
        full = error.errno in _DISK_FULL
        advice = "the disk or its quota is full: free some space" if full else "check the path and its permissions"
        raise WriteError(
            f"{path}: not written ({error.strerror or error}); {advice}, then run the same command again"
        ) from error


@contextmanager
def atomic_text(path: str | Path) -> Iterator[TextIO]:
    """A UTF-8 file to write to that takes `path`'s place at the end: a reader finds the old file or the new one.

    Makes missing folders. `WriteError` if this fails; the old file stays. Half a surrogate pair, which UTF-8
    cannot hold, is written as JSON escapes it: \\ud800.
    """
    path = Path(path)
    tmp = path.with_name(f"{_TMP}{path.name}-{uuid.uuid4().hex[:12]}")
    with naming_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tmp.open("w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def read_json(path: str | Path) -> Any:
    """Parsed content of `path`; NaN and infinity are read as null, because they are not measurements.

    UserError names the file and the place of the JSON error.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not valid JSON ({error}); {_FIX}") from error


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """The JSON object in `path`. UserError if it is not an object, or lacks one of `keys`."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: not a JSON object; {_FIX}")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}: damaged: it lacks {',  '.join(missing)}; {_FIX}")
    return found


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """A checkpoint's `state.json`: step, samples, elapsed_s, settings; {} if it has none, like models from
    elsewhere."""
    path = Path(checkpoint) / "state.json"
    if not path.exists():
        return {}
    state = read_object(path)
    settings = state.get("settings", {})
    if not isinstance(settings, dict) or not isinstance(settings.get("config", {}), dict):
        raise UserError(f"{path}: damaged: its settings are not a JSON object; {_FIX}")
    return state


def trained_with(checkpoint: str | Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, as the YAML spells them; {} if they are not known."""
    config: dict[str, Any] = read_state(checkpoint).get("settings", {}).get("config", {})
    return config


def publish_checkpoint(tmp_dir: str | Path, final_dir: str | Path, step: int) -> Path:
    """Turn the finished `tmp_dir` into the checkpoint `final_dir` with one rename, and return its path.

    Everything is on disk before the rename. An existing `final_dir` is renamed aside first, renamed back when the
    new one cannot take its place, and deleted last. Call on one rank, after all ranks have written.
    """
    tmp_dir, final_dir = Path(tmp_dir), Path(final_dir)
    if not _CHECKPOINT_NAME.fullmatch(final_dir.name):
        raise ValueError(f"{final_dir}: a checkpoint is named checkpoint-<step> or {FINAL_NAME}")
    if final_dir.name not in (FINAL_NAME, f"checkpoint-{step}"):
        raise ValueError(f"{final_dir}: the name does not match step {step}")
    (tmp_dir / COMPLETE).unlink(missing_ok=True)
    files = {}
    for path in _files_of(tmp_dir):
        files[path.relative_to(tmp_dir).as_posix()] = {"bytes": path.stat().st_size, "blake2b": _blake2b(path)}
        _fsync(path)
    if not files:
        raise ValueError(f"{tmp_dir}: holds no files, so there is nothing to publish as {final_dir}")
    write_json_atomic(tmp_dir / COMPLETE, {"format": MANIFEST_FORMAT, "step": step, "files": files})
    for folder in sorted({path.parent for path in tmp_dir.rglob("*")}):
        _fsync(folder)

    aside: Path | None = None
    if os.path.lexists(final_dir):
        aside = final_dir.with_name(f"{_REPLACED}{final_dir.name}")
        remove_tree(aside)
        os.rename(final_dir, aside)
    try:
        os.rename(tmp_dir, final_dir)
    except OSError:
        if aside is not None:
            os.rename(aside, final_dir)
        raise
    _fsync(final_dir.parent)
    if aside is not None:
        remove_tree(aside)
    return final_dir


def remove_tree(path: str | Path) -> None:
    """Delete a file, a folder with its content, or only the link: files that a user moved elsewhere stay."""
    path = Path(path)
    if path.is_symlink():
        if path.exists():
            _log.warning("%s: only this link is deleted; its target stays in %s", path, path.resolve())
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(phase_dir: str | Path) -> list[Checkpoint]:
    """Complete checkpoints by step number, `checkpoint-final` last if two have the same step; [] for a missing folder.

    A folder whose manifest cannot be read is not complete; a warning names it.
    """
    found = []
    for marker in Path(phase_dir).glob(f"checkpoint-*/{COMPLETE}"):
        if not (match := _CHECKPOINT_NAME.fullmatch(marker.parent.name)):
            continue
        try:
            manifest = _manifest(marker.parent)
        except DamagedCheckpointError as error:
            _log.warning("ignored: %s", error)
            continue
        is_final = match[1] is None
        step = manifest["step"] if is_final else int(match[1])
        found.append(Checkpoint(marker.parent, step, is_final, TRAINING_STATE in manifest["files"]))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.is_final))


def verify_checkpoint(path: str | Path, *, checksums: bool = True) -> None:
    """Raise `DamagedCheckpointError` that names every file that is missing or differs from the manifest.

    Args:
        checksums: also read every byte; False compares sizes only.
    """
    path = Path(path)
    problems = []
    for name, expected in _manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (num_bytes := file.stat().st_size) != expected["bytes"]:
            problems.append(f"{name} has {num_bytes} bytes, not {expected['bytes']}")
        elif checksums and _blake2b(file) != expected["blake2b"]:
            problems.append(f"{name} has the wrong checksum")
    if problems:
        raise DamagedCheckpointError(f"{path}: {'; '.join(problems)}; use another checkpoint or copy this one again")


def prune_checkpoints(
    phase_dir: str | Path, keep_last: int, keep: Collection[Path] = (), keep_weights: int = 0
) -> list[Path]:
    """Reduce old numbered checkpoints to their weights, delete those beyond `keep_weights`, and return these paths.

    Never touches the last complete one (whatever `keep_last`), `checkpoint-final`, a folder that is not complete, or
    one that a user moved elsewhere and linked back; never deletes those in `keep` (the best). Each is renamed to
    `.tmp-*` before deletion, so that no reader sees half of it.
    """
    kept = {Path(path).resolve() for path in keep}
    numbered = [
        checkpoint
        for checkpoint in list_checkpoints(phase_dir)
        if not checkpoint.is_final and not checkpoint.path.is_symlink()
    ]
    removed = []
    old = numbered[: -max(keep_last, 1)]
    free = [checkpoint for checkpoint in old if checkpoint.path.resolve() not in kept]
    doomed_ones = free[: max(0, len(free) - keep_weights)]
    for checkpoint in old:
        if checkpoint not in doomed_ones:
            reduce_to_weights(checkpoint.path)
            continue
        doomed = checkpoint.path.with_name(f"{_TMP}{uuid.uuid4().hex[:12]}")
        os.rename(checkpoint.path, doomed)
        remove_tree(doomed)
        removed.append(checkpoint.path)
    return removed


def reduce_to_weights(checkpoint: str | Path) -> None:
    """Delete the training state of a checkpoint; it stays complete, because its manifest drops the file first."""
    checkpoint = Path(checkpoint)
    manifest = _manifest(checkpoint)
    if manifest["files"].pop(TRAINING_STATE, None) is not None:
        write_json_atomic(checkpoint / COMPLETE, manifest)
    (checkpoint / TRAINING_STATE).unlink(missing_ok=True)


def set_damaged_aside(checkpoint: str | Path) -> Path:
    """Rename a damaged checkpoint to `damaged-<name>`, which no reader opens, and return that path."""
    checkpoint = Path(checkpoint)
    aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
    remove_tree(aside)
    os.rename(checkpoint, aside)
    return aside


def clean_leftovers(phase_dir: str | Path) -> None:
    """Delete the `.tmp-*` that killed runs left in `phase_dir`. Call before training, when nobody is saving.

    A checkpoint that was set aside when the run died between `publish_checkpoint`'s two renames is put back.
    """
    for path in sorted(Path(phase_dir).glob(f"{_TMP}*")):
        original = path.with_name(path.name[len(_REPLACED) :]) if path.name.startswith(_REPLACED) else None
        if original is not None and not os.path.lexists(original):
            os.rename(path, original)
        else:
            remove_tree(path)
    for path in sorted(Path(phase_dir).glob("checkpoint-*")):
        if path.is_symlink() and not path.exists():
            _log.warning("ignored: %s is a link to %s, which does not exist", path, os.readlink(path))


def _manifest(path: Path) -> dict[str, Any]:
    marker = path / COMPLETE
    try:
        manifest = read_json(marker)
    except UserError as error:
        raise DamagedCheckpointError(str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DamagedCheckpointError(
            f"{marker}: is not a manifest of format {MANIFEST_FORMAT}; the checkpoint is damaged"
        )
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("files"), dict):
        raise DamagedCheckpointError(f"{marker}: lacks step or files; the checkpoint is damaged")
    return manifest


def _files_of(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path.relative_to(folder).parts[0] != EVALS]


def _blake2b(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The settings of a phase: saved in its checkpoints, and compared when it is started again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.config import PhaseConfig, TrainConfig
from embervlm.config_file import model_preset
from embervlm.config_lora import LoraConfig
from embervlm.data.sources import source_files

NO_LORA = "none"
HASHED_WHOLE = 1 << 28
"""Bytes of a file of data that are read to tell it from another: a fraction of a second."""
HASHED_BLOCK = 1 << 20
NUM_PICTURES_HASHED = 64
"""Files of `image_root` whose names and sizes tell it from another folder."""
_NAMES_ONLY = ("name", "trainable_components", "frozen_components")
_OF_STAGE4 = ("scheduled_sampling", "reasoning_augmentation", "max_reasoning_length")


def trained_with(
    phase: PhaseConfig, config: TrainConfig, start: Path | None, *, global_batch: int, processes: int, **more: Any
) -> dict[str, Any]:
    """The settings that decide what a phase learns, but not how it is distributed, saved or logged.

    A mapping with `id` describes something with this id and the name `is`; an `id` of None is unknown.
    """
    values = {key: value for key, value in dataclasses.asdict(phase).items() if key not in _NAMES_ONLY}
    model = json.dumps(model_preset(config.model), sort_keys=True)
    values |= {
        "lora": shown_lora(phase.lora),
        "seed": config.seed,
        "max_steps": config.max_steps,
        "model": {"is": config.model, "id": hashlib.blake2b(model.encode(), digest_size=8).hexdigest()},
        "domain": config.domain,
        "max_closed_answers": config.max_closed_answers,
        "reasoning_data": {"is": config.reasoning_data, "id": _data_id(config.reasoning_data)},
        "image_root": {"is": config.image_root, "id": _pictures_id(config.image_root)},
        "starting weights": {"is": str(start), "id": _weights_id(start)},
        "records per update": {"is": global_batch, "id": [global_batch, processes]},
        **more,
    }
    return dict(json.loads(json.dumps(values)))  # as they are read back


def shown_lora(lora: Mapping[str, LoraConfig]) -> str:
    """Adapters in words, so that two settings are the same where their words are."""
    shown = [
        f"{component} rank {its.rank} alpha {its.alpha:g} dropout {its.dropout:g} on {' '.join(its.targets) or 'all'}"
        for component, its in sorted(lora.items())
    ]
    return "; ".join(shown) or NO_LORA


def of_stage4(config: TrainConfig) -> dict[str, Any]:
    """The settings that both phases of Stage 4 share, besides a phase's own."""
    shared = dataclasses.asdict(config.stage4)
    return {key: shared[key] for key in _OF_STAGE4} | {"curriculum": dataclasses.asdict(config)["curriculum"]}


def saved_with(checkpoint: Path) -> dict[str, Any]:
    """The settings that `checkpoint` was trained with; {} for a checkpoint of an older version."""
    path = checkpoint / "state.json"
    settings = run_dir.read_json(path).get("settings") if path.is_file() else None
    return dict((settings or {}).get("trained_with") or {})


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name was, now is` for each setting that both have and that differs."""
    out = []
    for name in now:
        if name not in saved or saved[name] == now[name]:
            continue
        old, new = saved[name], now[name]
        if not isinstance(old, dict) or not isinstance(new, dict):
            out.append(f"{name} {_shown(old)}, now {_shown(new)}")
        elif "id" not in new:
            out += [f"{name}.{change}" for change in changes(old, new)]
        elif _differ(old["id"], new["id"]):
            others = " (other content)" if old["is"] == new["is"] else ""
            out.append(f"{name} {old['is']}, now {new['is']}{others}")
    return out


def _differ(old: Any, new: Any) -> bool:
    """Whether two ids are known and differ; a batch is compared only for the same number of processes."""
    if isinstance(old, list) and isinstance(new, list):
        return old[0] != new[0] and old[1] == new[1]
    if isinstance(old, int) and isinstance(new, str):  # of a version that only counted the data's bytes
        return str(old) != new.partition(" ")[0]
    return None not in (old, new) and old != new


def _shown(value: Any) -> str:
    return "given" if isinstance(value, dict) else "not given" if value is None else str(value)


def _data_id(data: str) -> str | None:
    """Bytes and hash of the data's files, wherever they lie; None where they are not there.

    Of a file of more than `HASHED_WHOLE` bytes only as many are read, in blocks from all over it.
    """
    files = source_files(data)
    if not files or not all(file.is_file() for file in files):
        return None
    digest, total = hashlib.blake2b(digest_size=8), 0
    for path in files:
        size = path.stat().st_size
        total += size
        stride = max(HASHED_BLOCK, size * HASHED_BLOCK // HASHED_WHOLE)
        with path.open("rb") as file:
            for start in range(0, size, stride):
                file.seek(start)
                digest.update(file.read(HASHED_BLOCK))
    return f"{total} {digest.hexdigest()}"


def _pictures_id(folder: str | None) -> str | None:
    """Hash of the names and sizes of the first files below `folder`, wherever it lies; None where there are none."""
    files = (Path(place, name) for place, _, names in _walk(folder) for name in sorted(names) if name[0] != ".")
    digest, some = hashlib.blake2b(digest_size=8), False
    for file in itertools.islice(files, NUM_PICTURES_HASHED):
        with contextlib.suppress(OSError):  # deleted meanwhile
            some = True
            digest.update(repr((os.path.relpath(file, folder), file.stat().st_size)).encode())
    return digest.hexdigest() if some else None


def _walk(folder: str | None) -> Iterator[tuple[str, list[str], list[str]]]:
    """The folders below, in order."""
    for place, inner, names in os.walk(folder or os.devnull):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        yield place, inner, names


def _weights_id(checkpoint: Path | None) -> str | None:
    """The weights' id from the manifest's checksums, so no large file is read."""
    if checkpoint is None or not (checkpoint / run_dir.COMPLETE).is_file():
        return None
    files = run_dir.read_json(checkpoint / run_dir.COMPLETE)["files"]
    return "".join(files[name]["blake2b"][:16] for name in sorted(files) if name.endswith(".bin")) or None

"""WebDataset shards: tar files in which `key.json` stands beside its picture `key.jpg`, `key.png`, ..."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `path` names, in order: itself, the shards of a folder, or those of a pattern.

    A pattern is a glob (`shards/*.tar`), braces (`shards/{000..009}.tar`), or both. Of braces every file counts, there
    or not, so that a missing shard is noticed. Empty where nothing is found.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return sorted(Path(text).glob("*.tar"))
    if os.path.exists(text) or not set(text) & set("*?[{"):
        return [Path(text)]
    from braceexpand import braceexpand

    found: list[Path] = []
    for name in braceexpand(text):
        found += map(Path, sorted(glob.glob(name)) if glob.has_magic(name) else [name])
    return found


def shard_values(shard: Path, unpack_dir: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Key and decoded JSON of every sample, whose `image` names the picture that was unpacked beneath `unpack_dir`.

    OSError or `tarfile.TarError` for a shard that cannot be read.
    """
    import json

    import webdataset  # here: it imports torch

    unpack_dir.mkdir(parents=True, exist_ok=True)
    samples = webdataset.WebDataset(os.fspath(shard), shardshuffle=False, empty_check=False)
    try:
        for number, sample in enumerate(samples, start=1):
            key = sample["__key__"]
            if "json" not in sample:
                problems.append(f"{shard} record {key}: has no {key}.json; add it, or drop its other files")
                continue
            try:
                value = json.loads(sample["json"].decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{shard} record {key}: {key}.json is no valid JSON ({error}); correct it")
                continue
            suffix = next((name for name in PICTURE_SUFFIXES if name in sample), None)
            if suffix is not None and isinstance(value, dict):
                name = f"{shard.stem}-{number:06d}.{suffix}"  # a key may hold any path
                (unpack_dir / name).write_bytes(sample[suffix])
                value["image"] = name
            yield key, value
    except tarfile.TarError as error:
        raise OSError(f"not readable as tar: {error}") from error

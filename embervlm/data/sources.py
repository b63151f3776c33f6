"""The files that a data set is given as: one file, Parquet files, or WebDataset shards.

A shard is a tar file in which `key.json` stands beside its picture `key.jpg`, `key.png`, ...
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from embervlm.data.records import file_values
from embervlm.run_dir import WriteError, naming_unwritten

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `path` names, in order: itself, the shards or Parquet files of a folder, or those of a pattern.

    A pattern is a glob (`shards/*.tar`), braces (`shards/{000..009}.tar`), or both. Of braces every file counts, there
    or not, so that a missing shard is noticed. Empty where nothing is found.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return sorted(Path(text).glob("*.tar")) or sorted(Path(text).glob("*.parquet"))
    if os.path.exists(text) or not set(text) & set("*?[{"):
        return [Path(text)]
    from braceexpand import braceexpand  # here: most data sets are one file

    found: list[Path] = []
    for name in braceexpand(text):
        found += map(Path, sorted(glob.glob(name)) if glob.has_magic(name) else [name])
    return found


def is_shard(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def source_values(file: Path, unpack_dir: Path, problems: list[str]) -> Iterator[tuple[int | str, Any]]:
    """Number, or key of a shard, and value of each record of one file; a shard's pictures go to `unpack_dir`.

    What cannot be read goes to `problems`.
    """
    if not is_shard(file):
        yield from file_values(file, problems)
        return
    import webdataset  # here: most data sets are no shards

    try:
        _check_end(file)
        # a list and an absolute path: nothing in a name is expanded or run
        samples = webdataset.WebDataset([os.path.abspath(file)], shardshuffle=False, empty_check=False)
        for number, sample in enumerate(samples, start=1):
            key = sample["__key__"]
            if "json" not in sample:
                problems.append(f"{file} record {key}: has no {key}.json; add it, or drop its other files")
                continue
            try:
                value = json.loads(sample["json"].decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{file} record {key}: {key}.json is no valid JSON ({error}); correct it")
                continue
            suffix = next((name for name in PICTURE_SUFFIXES if name in sample), None)
            if suffix is not None and isinstance(value, dict):
                name = f"{file.stem}-{number:06d}.{suffix}"  # a key may hold any path
                with naming_unwritten(unpack_dir / name):
                    unpack_dir.mkdir(parents=True, exist_ok=True)
                    _write_whole(unpack_dir / name, sample[suffix])
                value["image"] = name
            yield key, value
    except WriteError:
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error.args[0]
        problems.append(f"{file}: not readable as a shard ({reason}); copy it again, or leave it out")


def _write_whole(path: Path, content: bytes) -> None:
    """Beside its place and renamed into it: another run may be reading the same picture."""
    if not path.exists() or path.stat().st_size != len(content):
        part = path.with_name(f"{uuid4().hex}.tmp")
        part.write_bytes(content)
        os.replace(part, path)


def _check_end(shard: Path) -> None:
    """Raise `tarfile.ReadError` unless the shard is whole: reading it as a stream ends at damage without a word."""
    with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
        tar.getmembers()
        file.seek(tar.offset)
        if (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0") or not block:
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")

"""The files that a data set is given as: one file, Parquet or Arrow files, or WebDataset shards.

A shard is a tar file in which `key.json` stands beside its picture `key.jpg`, `key.png`, ...
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from embervlm.data.errors import DataError
from embervlm.data.json_text import Decoder
from embervlm.data.record_fields import FieldRules
from embervlm.data.record_pictures import PICTURE_NAMES, write_whole
from embervlm.data.records import file_values, folder_of_images
from embervlm.data.tables import SPLIT_NAMES, saved_files
from embervlm.run_dir import WriteError, naming_unwritten

_NO_PICTURES = frozenset(
    ("json", "pdf", "ps", "eps", "h5", "hdf", "mpg", "mpeg", "fits", "fit", "bufr", "grib", "wmf", "emf")
)
"""Suffixes that Pillow connects with a format of its own, of files that are no pictures here."""


@lru_cache(maxsize=1)
def picture_suffixes() -> frozenset[str]:
    """Suffixes of files that are pictures: all that Pillow reads, and some of which it will say that it cannot."""
    from PIL import Image

    Image.init()
    readable = {suffix.lstrip(".") for suffix, name in Image.EXTENSION.items() if name in Image.OPEN}
    return frozenset(readable | {"heic", "heif", "img", "image"}) - _NO_PICTURES


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `path` names, in order: itself, shards, Parquet or Arrow files of a folder, or those of a pattern.

    Of a folder also its JSON or CSV files, where their names are those of splits. Lists of what `convert` and `filter`
    left out do not count. A pattern is a glob (`shards/*.tar`), braces (`shards/{000..009}.tar`), or both. Of braces
    every file counts, there or not, so that a missing shard is noticed. Empty where nothing is found.

    Raises:
        DataError: a folder's files are called after splits, and some of them would be left out or trained on unnoticed.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return _files_of(Path(text))
    if os.path.exists(text) or not set(text) & set("*?[{"):
        return [Path(text)]
    from braceexpand import braceexpand  # here: most data sets are one file

    try:
        names = list(braceexpand(text))
    except ValueError:  # its UnbalancedBracesError
        raise DataError(f"{text}: a brace is not closed; write shards/{{000..009}}.tar") from None
    found: list[Path] = []
    for name in names:
        found += _kept(map(Path, sorted(glob.glob(name)))) if glob.has_magic(name) else [Path(name)]
    return found


def _files_of(folder: Path) -> list[Path]:
    kinds = [sorted(folder.glob(pattern)) for pattern in ("*.tar", "*.parquet")]
    texts = [_kept(sorted(folder.glob(pattern))) for pattern in ("*.json*", "*.[ct]sv")]
    of_splits = [[file for file in files if _split_in(file)] for files in texts]
    kinds += [saved_files(folder), *of_splits]
    found = next(filter(None, kinds), [])
    if other := next((file for files in kinds for file in files if file not in found and _split_in(file)), None):
        raise DataError(
            f"{folder}: holds {found[0].name} and {other.name}, files of two kinds; give those that are meant, such as "
            f"{folder / ('*' + found[0].suffix)}"
        )
    splits = [_split_in(file) for file in found]
    if "train" in splits and None in splits:
        file = found[splits.index(None)]
        raise DataError(
            f"{file}: other files of this folder are called after splits and this one is not, so it would be trained "
            f"on; name it after one ({', '.join(SPLIT_NAMES)}), move it away, or give the files meant, such as "
            f"{folder / 'train*'}"
        )
    return list(named_splits(found)) if found in of_splits else found


def _split_in(file: Path) -> str | None:
    """The split that a file is called after: `test.jsonl`, `train-00000-of-00002.parquet`."""
    return SPLIT_NAMES.get(re.sub(r"[-_.]\d.*", "", file.stem.casefold()))


def _kept(files: Iterable[Path]) -> list[Path]:
    """`files` without the lists of what `convert` and `filter` left out, which they write beside the records."""
    return [file for file in files if not re.search(r"\.(?:skipped|rejected)\.jsonl?$", file.name)]


def named_splits(files: Sequence[Path]) -> dict[Path, str]:
    """The split of each file, where all of several are called after one; {} for others, and where none is `train`."""
    found = {file: split for file in files if (split := _split_in(file))}
    return found if len(found) == len(files) > 1 and "train" in found.values() else {}


def is_one_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is what the commands that write records read; else a folder, a pattern or a shard."""
    return source_files(path) == [Path(path)] and not is_shard(Path(path))


def source_rules(
    path: Path,
    files: Sequence[Path],
    unpack_dir: str | os.PathLike[str] | None,
    *,
    candidates: Sequence[str],
    image_root: str | os.PathLike[str] | None,
    allow_outside: bool,
    require_reasoning: bool = True,
    require_answer: bool = True,
) -> FieldRules:
    """What the records in the `files` that `path` names are checked against."""
    root = path / "any" if path.is_dir() else path
    return FieldRules(
        image_root=os.path.realpath(unpack_dir or "") if is_shard(files[0]) else folder_of_images(root, image_root),
        candidates=tuple(candidates),
        allow_outside=allow_outside,
        require_reasoning=require_reasoning,
        require_answer=require_answer,
        unpack_dir=None if unpack_dir is None else os.fspath(unpack_dir),
    )


def is_shard(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def source_values(
    file: Path, unpack_dir: Path, problems: list[str], unused: Counter[str] | None = None
) -> Iterator[tuple[int | str, Any]]:
    """Number, or key of a shard, and value of each record of one file; a shard's pictures go to `unpack_dir`.

    What cannot be read goes to `problems`. Members of a shard that are neither record nor picture are counted in
    `unused`, by their suffix.
    """
    if not is_shard(file):
        yield from file_values(file, problems)
        return
    import webdataset  # here: most data sets are no shards

    unused, decoder = Counter() if unused is None else unused, Decoder()
    # shards of several folders have the same names
    own = f"{file.stem}-{hashlib.blake2b(os.path.realpath(file).encode(), digest_size=4).hexdigest()}"
    try:
        members_of_shard = _whole(file)
        if links := [member.name for member in members_of_shard if member.issym() or member.islnk()]:
            problems.append(
                f"{file}: {links[0]} is a link, whose content is not in the shard; write it again with "
                "`tar --dereference --hard-dereference`"
            )
            return
        # a list and an absolute path: nothing in a name is expanded or run
        samples = webdataset.WebDataset([os.path.abspath(file)], shardshuffle=False, empty_check=False)
        for number, sample in enumerate(samples, start=1):
            key = sample["__key__"]
            if "json" not in sample:
                problems.append(f"{file} record {key}: has no {key}.json; add it, or delete its other files")
                continue
            try:
                value = decoder.decode(sample["json"].decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{file} record {key}: {key}.json is not valid JSON ({error}); correct it")
                continue
            members = [name for name in sample if not name.startswith("__") and name != "json"]
            pictures = _pictures_among(members)
            found = decoder.lost()
            if len(pictures) > 1:
                found.append(f"image: {' and '.join(f'{key}.{name}' for name in pictures)} are all pictures; keep one")
            if found:
                problems += [f"{file} record {key}: {problem}" for problem in found]
                continue
            if pictures and isinstance(value, dict):
                (picture,) = pictures
                name = f"{own}-{number:06d}.{picture.rpartition('.')[2]}"  # a key may hold any path
                with naming_unwritten(unpack_dir / name):
                    unpack_dir.mkdir(parents=True, exist_ok=True)
                    write_whole(unpack_dir / name, sample[picture])
                # what the record says of its picture's path is of another place
                value = {f"original_{k}" if k.casefold() in PICTURE_NAMES else k: v for k, v in value.items()}
                value["image"] = name
            unused.update(f".{name}" for name in members if name not in pictures)
            yield key, value
    except WriteError:
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error.args[0]
        problems.append(f"{file}: not readable as a shard ({reason}); copy it again, or leave it out")


def _pictures_among(members: Sequence[str]) -> list[str]:
    """Of a sample's members (`png`, `image.png`, ...) the one that is its picture, or all that may be it.

    A suffix of one part counts before `image.png`, and that before `mask.png`.
    """
    pictures = [name for name in members if name.rpartition(".")[2] in picture_suffixes()]
    plain = [name for name in pictures if "." not in name]
    named = [name for name in pictures if name.partition(".")[0] in PICTURE_NAMES]
    return plain or named or pictures


def _whole(shard: Path) -> list[tarfile.TarInfo]:
    """Its members. `tarfile.ReadError` unless it is whole: reading it as a stream ends at damage without a word."""
    with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
        members = tar.getmembers()
        file.seek(tar.offset)
        if (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0") or not block:
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
    return members

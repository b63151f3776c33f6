"""Which split a record belongs to: stable over runs and machines, and never one picture in two splits."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from embervlm.data.records import DataError, ReasoningRecord

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Key = tuple[int, str]  # rank of its kind, text: a named group goes before a picture when the smallest key is looked for
_GROUP, _PICTURE, _TEXT = 0, 1, 2


def split_of(group_key: str, *, val_ratio: float = 0.1, test_ratio: float = 0.1, seed: int = 0) -> Split:
    """The split of everything that shares `group_key`; depends on the key, the ratios and the seed alone.

    A larger `val_ratio` moves groups from train to val only; the test split does not depend on it.
    """
    if not (val_ratio >= 0 and test_ratio >= 0 and val_ratio + test_ratio <= 1):
        raise DataError(f"val_ratio={val_ratio} and test_ratio={test_ratio}: give two of [0, 1] that sum to at most 1")
    digest = hashlib.blake2b(f"{seed}\0{group_key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = (int.from_bytes(digest, "big") >> 11) / 2**53  # uniform in [0, 1)
    if place < test_ratio:
        return "test"
    return "val" if place < test_ratio + val_ratio else "train"


def split_records(
    records: Iterable[ReasoningRecord], *, val_ratio: float = 0.1, test_ratio: float = 0.1, seed: int = 0
) -> dict[Split, list[ReasoningRecord]]:
    """The records of each split, in their order.

    Records with the same `metadata["split_group"]` stay together, so do records with the same picture (by content,
    whatever its name), and chains of both; the smallest key decides for all, a named group before a picture. Text-only
    records go by their instruction, case and punctuation aside. `metadata["split"]` wins over all of this, and the
    rest of its group follows where the group names one split only.
    Raises:
        DataError: a picture that `metadata["split"]` puts into two splits, an unknown split, an unreadable picture.
    """
    records = list(records)
    problems: list[str] = []
    pictures = picture_digests(records, problems)
    found = splits_of(records, pictures, problems, val_ratio=val_ratio, test_ratio=test_ratio, seed=seed)
    if problems:
        raise DataError.of(problems)
    splits: dict[Split, list[ReasoningRecord]] = {name: [] for name in SPLITS}
    for record, split in zip(records, found, strict=True):
        splits[split].append(record)
    return splits


def splits_of(
    records: Sequence[ReasoningRecord], pictures: Mapping[str, str], problems: list[str], *, val_ratio: float = 0.1,
    test_ratio: float = 0.1, seed: int = 0,
) -> list[Split]:  # fmt: skip
    """The split of each record as `split_records` finds it; what it raises goes to `problems` instead.

    Args:
        pictures: path -> digest over the picture's content, of `picture_digests`.
    """
    parent: dict[Key, Key] = {}
    keys = [_keys(record, pictures) for record in records]
    given = [_explicit_split(record, problems) for record in records]
    for own in keys:
        _union(parent, own[0], own[-1])

    explicit: dict[Key, dict[Split, ReasoningRecord]] = {}  # of a picture, and of a whole group under its smallest key
    for record, own, split in zip(records, keys, given, strict=True):
        if split is None:
            continue
        for key in own:
            if key[0] == _PICTURE:
                for earlier, first in explicit.get(key, {}).items():
                    if earlier != split:
                        problems.append(
                            f"{record.image}: stands in {earlier} (record {first.record_id}) and in {split} "
                            f"(record {record.record_id}); give both the same metadata.split"
                        )
        for key in {*own, _find(parent, own[0])}:
            explicit.setdefault(key, {}).setdefault(split, record)

    splits: list[Split] = []
    for own, split in zip(keys, given, strict=True):
        smallest = _find(parent, own[0])
        # A picture's own split first. Not its group's: another record of the picture may be in another group.
        for key in (own[-1], smallest) if own[-1][0] != _GROUP else (smallest,):
            if split is None and len(explicit.get(key, {})) == 1:
                (split,) = explicit[key]
        if split is None:
            split = split_of(smallest[1], val_ratio=val_ratio, test_ratio=test_ratio, seed=seed)
        splits.append(split)
    return splits


def _keys(record: ReasoningRecord, pictures: Mapping[str, str]) -> list[Key]:
    keys: list[Key] = []
    if (group := record.metadata.get("split_group")) is not None:
        keys.append((_GROUP, str(group)))
    if record.image is not None and record.image in pictures:
        keys.append((_PICTURE, pictures[record.image]))
    return keys or [(_TEXT, normalised_text(record.instruction))]


def normalised_text(text: str) -> str:
    """`text` without case, punctuation and doubled spaces; as it is where nothing else is in it."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text


def picture_digests(records: Sequence[ReasoningRecord], problems: list[str]) -> dict[str, str]:
    """Path -> hash over the picture's content; each is read once. What cannot be read goes to `problems`."""
    digests: dict[str, str] = {}
    for path in dict.fromkeys(record.image for record in records if record.image is not None):
        try:
            digests[path] = picture_digest(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"{os.fspath(path)}: {reason}; correct the path, or drop its records")
    return digests


def picture_digest(path: str) -> str:
    """Hash over the content of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _explicit_split(record: ReasoningRecord, problems: list[str]) -> Split | None:
    given: Any = record.metadata.get("split")
    for name in SPLITS:
        if given == name:
            return name
    if given is not None:
        problems.append(
            f"record {record.record_id}: metadata.split: {given!r} is not one of train, val, test; correct it"
        )
    return None


def _find(parent: dict[Key, Key], key: Key) -> Key:
    """The smallest key joined with `key`."""
    root = key
    while parent.get(root, root) != root:
        root = parent[root]
    while key != root:
        parent[key], key = root, parent.get(key, root)
    return root


def _union(parent: dict[Key, Key], one: Key, other: Key) -> None:
    small, large = sorted((_find(parent, one), _find(parent, other)))
    parent[large] = small

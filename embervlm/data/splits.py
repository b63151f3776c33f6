"""The split of each record: stable over runs and machines, and never the same picture in two splits."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from embervlm.data.records import DataError, ReasoningRecord

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_GROUP, _PICTURE, _TEXT = 0, 1, 2  # kinds of key, in the order in which the smallest is looked for
_NONE = 255  # no split
_ONLY = np.full(8, _NONE, np.uint8)
"""Set of splits as bits -> the split where it is one alone."""
_ONLY[[1, 2, 4]] = (0, 1, 2)


def split_of(group_key: str, *, val_ratio: float = 0.1, test_ratio: float = 0.1, seed: int = 0) -> Split:
    """The split of everything that shares `group_key`; depends on the key, the ratios and the seed alone.

    A larger `val_ratio` moves groups from train to val only; the test split does not depend on it.
    """
    if not (val_ratio >= 0 and test_ratio >= 0 and val_ratio + test_ratio <= 1):
        raise DataError(
            f"val_ratio={val_ratio} and test_ratio={test_ratio}: give two values in [0, 1] that sum to at most 1"
        )
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
    records: Sequence[ReasoningRecord],
    pictures: Mapping[str, str],
    problems: list[str],
    *,
    val_ratio: float = 0.1,
    test_ratio: float = 0.1,
    seed: int = 0,
) -> list[Split]:
    """The split of each record as `split_records` finds it; what it raises goes to `problems` instead.

    Args:
        pictures: path -> digest over the picture's content, of `picture_digests`.
    """
    table = SplitTable(problems=problems, val_ratio=val_ratio, test_ratio=test_ratio, seed=seed)
    for record in records:
        table.add(record)
    return [SPLITS[place] for place in table.assign(records, pictures.get)]


def text_hash(text: str) -> int:
    """A 64-bit name of `text`, never 0: among 5 million texts two share one with a chance of one in a million."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


@dataclass(kw_only=True)
class SplitTable:
    """What deciding on splits needs of each record, in 19 bytes: first `add` every record, then `assign` all."""

    problems: list[str]
    """Findings are appended."""
    val_ratio: float = 0.1
    test_ratio: float = 0.1
    seed: int = 0
    picture: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of the picture's path; 0 for none."""
    _key: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of the group or else the instruction; 0 where the picture alone decides."""
    _place: bytearray = field(default_factory=bytearray)
    """Split that this key asks for."""
    _kind: bytearray = field(default_factory=bytearray)
    _explicit: bytearray = field(default_factory=bytearray)
    """Split that `metadata["split"]` names."""

    def add(self, record: ReasoningRecord) -> None:
        group = record.metadata.get("split_group")
        if group is not None:
            kind, text = _GROUP, str(group)
        else:
            kind, text = (_TEXT, normalised_text(record.instruction)) if record.image is None else (_PICTURE, "")
        self.picture.append(0 if record.image is None else text_hash(record.image))
        self._key.append(0 if kind == _PICTURE else _key_hash(kind, text))
        self._place.append(_NONE if kind == _PICTURE else self._split_of(text))
        self._kind.append(kind)
        self._explicit.append(_explicit_split(record, self.problems))

    def _split_of(self, text: str) -> int:
        return SPLITS.index(split_of(text, val_ratio=self.val_ratio, test_ratio=self.test_ratio, seed=self.seed))

    def assign(self, records: Sequence[ReasoningRecord], digest_of: Callable[[str], str | None]) -> np.ndarray:
        """Index into `SPLITS` of every record, uint8.

        Args:
            records: those added; few are looked at again.
            digest_of: path -> digest over the picture's content, asked once for each; a record whose picture has none
                counts as one without.
        """
        explicit, kind = _numpy(self._explicit), _numpy(self._kind).copy()
        first, place = _numpy(self._key).copy(), _numpy(self._place).copy()
        last, last_place = first, place
        pictured = np.flatnonzero(_numpy(self.picture))
        if len(pictured):
            keys, places, which = self._picture_keys(records, pictured, digest_of)
            for row in pictured[(keys[which] == 0) & (kind[pictured] == _PICTURE)]:  # no picture after all
                text = normalised_text(records[int(row)].instruction)
                kind[row], first[row], place[row] = _TEXT, _key_hash(_TEXT, text), self._split_of(text)
            seen = keys[which] != 0
            pictured, which = pictured[seen], which[seen]
            last, last_place = first.copy(), place.copy()
            last[pictured], last_place[pictured] = keys[which], places[which]
            bare = kind == _PICTURE
            first, place = np.where(bare, last, first), np.where(bare, last_place, place)
        joined = first != last
        if not joined.any() and (explicit == _NONE).all():  # no key depends on another
            return place
        a, b, component = _components(first, last, joined)
        num_keys = len(component)

        last_kind = np.where(joined, _PICTURE, kind)
        said = np.flatnonzero(explicit != _NONE)
        bits = (1 << explicit[said]).astype(np.uint8)
        of_key, of_component = np.zeros(num_keys, np.uint8), np.zeros(int(component.max()) + 1, np.uint8)
        np.bitwise_or.at(of_key, a[said], bits)
        np.bitwise_or.at(of_key, b[said], bits)
        np.bitwise_or.at(of_component, component[a[said]], bits)
        disputed = said[(last_kind[said] == _PICTURE) & (_ONLY[of_key[b[said]]] == _NONE)]
        self._report_disputes(records, disputed, b, explicit)

        key_kind, key_place = np.empty(num_keys, np.uint8), np.empty(num_keys, np.uint8)
        key_kind[b], key_place[b] = last_kind, last_place
        key_kind[a], key_place[a] = kind, place
        smallest = self._smallest_keys(records, component, key_kind, a, kind)
        # A picture's own split first. Not its group's: another record of the picture may be in another group.
        own = np.where(last_kind == _GROUP, _NONE, _ONLY[of_key[b]])
        out = np.where(explicit != _NONE, explicit, own)
        out = np.where(out != _NONE, out, _ONLY[of_component[component[a]]])
        return np.where(out != _NONE, out, key_place[smallest[component[a]]]).astype(np.uint8)

    def _picture_keys(
        self, records: Sequence[ReasoningRecord], pictured: np.ndarray, digest_of: Callable[[str], str | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Key (0 for none) and split of each distinct path by the content there, and the path of each of `pictured`."""
        _, first, which = np.unique(_numpy(self.picture)[pictured], return_index=True, return_inverse=True)
        keys, places = np.zeros(len(first), np.uint64), np.zeros(len(first), np.uint8)
        for path in np.argsort(first):  # in the order of the records, and so are the problems
            image = records[int(pictured[first[path]])].image
            assert image is not None
            if (digest := digest_of(image)) is not None:
                keys[path], places[path] = _key_hash(_PICTURE, digest), self._split_of(digest)
        return keys, places, which

    def _report_disputes(
        self, records: Sequence[ReasoningRecord], rows: np.ndarray, key: np.ndarray, explicit: np.ndarray
    ) -> None:
        firsts: dict[int, dict[int, str]] = {}  # picture -> split -> the first record that names it
        for row in rows:
            record, split = records[int(row)], int(explicit[row])
            known = firsts.setdefault(int(key[row]), {})
            for earlier, first in known.items():
                if earlier != split:
                    self.problems.append(
                        f"{record.image}: is in {SPLITS[earlier]} (record {first}) and in {SPLITS[split]} "
                        f"(record {record.record_id}); give both the same metadata.split"
                    )
            known.setdefault(split, record.record_id)

    @staticmethod
    def _smallest_keys(
        records: Sequence[ReasoningRecord], component: np.ndarray, key_kind: np.ndarray, a: np.ndarray, kind: np.ndarray
    ) -> np.ndarray:
        """For each component the key that decides: its group that comes first by name, or else its only key."""
        order = np.lexsort((key_kind, component))
        _, start = np.unique(component[order], return_index=True)
        smallest = order[start]
        groups = np.bincount(component[key_kind == _GROUP], minlength=len(smallest))
        names: dict[int, tuple[str, int]] = {}
        contested = (groups > 1)[component[a]] & (kind == _GROUP)
        for row in np.flatnonzero(contested):
            found = (str(records[int(row)].metadata["split_group"]), int(a[row]))
            joint = int(component[a[row]])
            names[joint] = min(found, names.get(joint, found))
        for joint, (_, key) in names.items():
            smallest[joint] = key
        return smallest


def _components(first: np.ndarray, last: np.ndarray, joined: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the records' first and last keys, and which keys hang together over the `joined` records."""
    if not joined.any():
        ids = np.unique(first, return_inverse=True)[1].astype(np.int32)
        return ids, ids, np.arange(int(ids.max()) + 1, dtype=np.int32)
    from scipy.sparse import coo_array  # here: most data need none of it
    from scipy.sparse.csgraph import connected_components

    ids = np.unique(np.concatenate([first, last]), return_inverse=True)[1].astype(np.int32)
    a, b = ids[: len(first)], ids[len(first) :]
    num_keys = int(ids.max()) + 1
    graph = coo_array((np.ones(joined.sum(), bool), (a[joined], b[joined])), shape=(num_keys, num_keys))
    return a, b, connected_components(graph, directed=False)[1]


def _numpy(values: array[int] | bytearray) -> np.ndarray:
    return np.frombuffer(values, np.uint8 if isinstance(values, bytearray) else np.uint64)


def _key_hash(kind: int, text: str) -> int:
    return text_hash(f"{kind}\0{text}")


def normalised_text(text: str) -> str:
    """`text` without case, punctuation and doubled spaces; as it is where nothing else is in it."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text


def picture_digests(records: Sequence[ReasoningRecord], problems: list[str]) -> dict[str, str]:
    """Path -> hash over the picture's content; each is read once. What cannot be read goes to `problems`."""
    paths = dict.fromkeys(record.image for record in records if record.image is not None)
    found = {path: readable_digest(path, problems) for path in paths}
    return {path: digest for path, digest in found.items() if digest is not None}


def readable_digest(path: str, problems: list[str]) -> str | None:
    """Hash over the content of a file; None if it cannot be read, and the reason goes to `problems`."""
    try:
        return picture_digest(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{os.fspath(path)}: {reason}; correct the path, or remove its records")
    return None


def picture_digest(path: str) -> str:
    """Hash over the content of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def split_problem(metadata: Mapping[str, Any]) -> str:
    """The problem of `metadata["split"]`, and what to do; empty if there is none."""
    given = metadata.get("split")
    if given is None or given in SPLITS:
        return ""
    return f"metadata.split: {given!r:.40} is not one of train, val, test; correct it"


def _explicit_split(record: ReasoningRecord, problems: list[str]) -> int:
    if problem := split_problem(record.metadata):
        problems.append(f"record {record.record_id}: {problem}")
    given: Any = record.metadata.get("split")
    return SPLITS.index(given) if given in SPLITS else _NONE

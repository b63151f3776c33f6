"""What was paid for, on disk before it is counted: an append-only file of JSON lines."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.data.records import DataError

FORMAT = 1


class Journal:
    """Entries that survive a kill at any moment: `append` returns once they are on disk.

    The first line holds `settings`, the choices that must be the same when a journal is continued. An entry counts
    once its line is whole: a last line that a kill has cut short is dropped on opening. One process at a time.

    Raises:
        ConfigError: begun with other settings, or another process writes to it.
        DataError: damaged before its last line, or the disk is full; what stood there before stays.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; name an --output_file that can be written") from error
        try:
            self._lock()
            self._entries = self._read(dict(settings))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> list[dict[str, Any]]:
        """What the journal held when it was opened, once; it may be large."""
        entries, self._entries = self._entries, []
        return entries

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write `entries` and wait until they are on disk."""
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)  # ASCII: any line break is ours
        length = os.fstat(self._file).st_size
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, length)
            raise DataError(
                f"{self.path}: {error.strerror}; what stood there before is whole. Make room; the same command goes on"
            ) from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path}: another process writes to it; wait for it, or give each --shard its own --output_file"
            ) from error
        except OSError:
            pass  # a file system without locks: then nobody can be kept out

    def _read(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        with open(self.path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        entries: list[dict[str, Any]] = []
        good = 0
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                if number < len(lines):
                    raise DataError(f"{self.path} line {number}: damaged; correct the line or drop it")
                os.ftruncate(self._file, good)
                break
            entries.append(entry)
            good += len(line)
        if not entries:
            self.append([{"format": FORMAT, "settings": settings}])
            return []
        head = entries.pop(0)
        begun = head.get("settings")
        if head.get("format") != FORMAT or not isinstance(begun, dict):
            raise ConfigError(f"{self.path}: not written by this command; name another --output_file, or move it away")
        for name in sorted({*begun, *settings}):
            if begun.get(name) != settings.get(name):
                raise ConfigError(
                    f"{self.path}: begun with {name} {begun.get(name)}, not {settings.get(name)}; name another "
                    "--output_file, or delete it and the files beside it to begin anew"
                )
        return entries

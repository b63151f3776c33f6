"""Results on disk before they count: an append-only file of JSON lines that survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.errors import UserError

FORMAT = 1


class Journal:
    """A list of entries (JSON lists or objects); `append` returns once they are on disk.

    An entry counts once its line is whole: a last line that a kill has cut short is dropped on opening. `settings` are
    the choices that must be the same when a journal is continued: they stand in its first line, entries are objects,
    and one process at a time may have the journal open.

    Raises:
        ConfigError: it was started with other settings, or another process is writing to it.
        UserError: damaged before its last line.
        OSError: it cannot be opened or written; its earlier content stays.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)
        try:
            if settings is not None:
                self._lock()
            self._entries = self._read(list if settings is None else dict)
            if settings is not None:
                self._check_head(dict(settings))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> list[Any]:
        """The entries that the journal had when it was opened; can be called once, because they may be large."""
        entries, self._entries = self._entries, []
        return entries

    def append(self, entries: Iterable[Any]) -> None:
        """Write `entries` and wait until they are on disk."""
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)  # ASCII: any line break is ours
        length = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(lines)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(length)
            raise

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path}: another process is writing to it; wait for it, or give each --shard its "
                f"own --output_file"
            ) from error
        except OSError:
            pass  # a file system without locks: then nobody can be kept out

    def _read(self, kind: type) -> list[Any]:
        self._file.seek(0)
        lines = self._file.readall().splitlines(keepends=True)
        entries: list[Any] = []
        good = 0
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, kind):
                if number < len(lines):
                    raise UserError(f"{self.path} line {number}: damaged; correct the line or delete it")
                self._file.truncate(good)
                break
            entries.append(entry)
            good += len(line)
        return entries

    def _check_head(self, settings: dict[str, Any]) -> None:
        if not self._entries:
            self.append([{"format": FORMAT, "settings": settings}])
            return
        head = self._entries.pop(0)
        begun = head.get("settings")
        if head.get("format") != FORMAT or not isinstance(begun, dict):
            raise ConfigError(
                f"{self.path}: was not written by this command; choose another --output_file, or move the file away"
            )
        for name in sorted({*begun, *settings}):
            if begun.get(name) != settings.get(name):
                raise ConfigError(
                    f"{self.path}: started with {name} {begun.get(name)}, not {settings.get(name)}; choose another "
                    "--output_file, or delete it and the files beside it to start again"
                )

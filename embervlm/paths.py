"""Paths as people write them in a YAML or after a flag: not expanded by a shell, misspelled, or ids of the hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class PathError(ValueError):
    """A path with a part that cannot be expanded."""


def expanded(text: str) -> str:
    """`text` with `~`, `$NAME` and `${NAME}` expanded.

    Raises:
        PathError: a variable is not set, or there is no such user; a folder of that name would be made otherwise.
    """
    names = [name or braced for name, braced in re.findall(r"\$(?:(\w+)|\{(\w+)\})", text)]
    if missing := [name for name in names if name not in os.environ]:
        raise PathError(f"{text}: ${missing[0]} is not set; export it, or write the full path")
    out = os.path.expandvars(os.path.expanduser(text))
    if text.startswith("~") and out.startswith("~"):
        raise PathError(
            f"{text}: {text.partition('/')[0]} is not the home of any user; write ./{text} for a folder of that name"
        )
    return out


def names_a_path(name: str | Path) -> bool:
    """Whether `name` is a path (existing or not) rather than an id of the hub (`owner/model`, `model`)."""
    text = str(name)
    first, _, rest = text.partition("/")
    return not _HUB_ID.fullmatch(text) or Path(text).exists() or bool(rest and Path(first).exists())


def closest_path(path: str | Path) -> str:
    """`; did you mean X?` for a missing path if its folder has a similar name; else empty."""
    path = Path(path)
    there = next(parent for parent in (*path.parents, Path(".")) if parent.is_dir())
    wanted = path.relative_to(there).parts[0] if path.parts else ""
    close = difflib.get_close_matches(wanted, sorted(entry.name for entry in there.iterdir()), n=1)
    if not close or close[0] == wanted:
        return ""
    meant = there.joinpath(close[0], *path.relative_to(there).parts[1:])
    return f"; did you mean {meant if meant.exists() else there / close[0]}?"

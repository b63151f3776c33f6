"""Paths as people write them in a YAML or behind a flag, where no shell has filled in `~` and `$SCRATCH`."""

from __future__ import annotations

import os
import re


class PathError(ValueError):
    """A path with something in it that cannot be filled in."""


def expanded(text: str) -> str:
    """`text` with `~`, `$NAME` and `${NAME}` filled in.

    Raises:
        PathError: a variable is not set, or there is no such user; a folder of that name would be made otherwise.
    """
    names = [name or braced for name, braced in re.findall(r"\$(?:(\w+)|\{(\w+)\})", text)]
    if missing := [name for name in names if name not in os.environ]:
        raise PathError(f"{text}: ${missing[0]} is not set; export it, or write the path out")
    out = os.path.expandvars(os.path.expanduser(text))
    if text.startswith("~") and out.startswith("~"):
        raise PathError(f"{text}: {text.partition('/')[0]} is no user's home; write ./{text} for a folder of that name")
    return out

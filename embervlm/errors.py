"""Errors that a user can fix, and the one place that prints them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from embervlm.paths import PathError, expanded
from embervlm.ranks import is_first_process


class UserError(ValueError):
    """Something that a user can fix. The message says what is wrong, where, and what to do.

    Every other exception is a bug of ours or a fault of the machine, and keeps its traceback.
    """

    exit_status = 1
    is_of_one_process = False
    """Whether only one process of a run has this error and must therefore print it itself."""


class UsageError(UserError):
    """A command line that cannot be parsed."""

    exit_status = 2


UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError)
"""What libraries raise for a damaged file."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """For a command line: a `UserError` inside ends the program with `error: ...` and the error's exit status.

    If all processes of a run have the same error, only the first prints it.
    """
    try:
        yield
    except UserError as error:
        says_it = error.is_of_one_process or is_first_process(os.environ)
        if says_it:
            _note_for_torchrun(f"error: {error}")
        if error.exit_status == 1:
            raise SystemExit(f"error: {error}" if says_it else 1) from None
        if says_it:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None


def _note_for_torchrun(message: str) -> None:
    """torchrun always ends with its own traceback; this puts the error into its last lines."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def _path_of(text: str) -> Path:
    return Path(_path_text(text))


def _path_text(text: str) -> str:
    try:
        return expanded(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports what is wrong with a flag, without listing all flags.

    It expands `~` and `$NAME` in values of type `Path`, and of type `"path"` for text.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path_of)
        self.register("type", "path", _path_text)

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"unrecognized arguments: (--\w+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(wrong[1], known, n=1) if wrong else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{message}{hint} (--help lists the flags)")

"""What a user can mend, and the one place that says it."""

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
    """Something that a user can mend. The message says what is wrong, where, and what to do.

    Whatever else is raised is a fault of ours or of the machine, and keeps its traceback.
    """

    exit_status = 1
    is_of_one_process = False
    """Whether one process of a run meets it, and so has to say it itself."""


class UsageError(UserError):
    """A command line that cannot be read."""

    exit_status = 2


UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError)
"""What libraries raise of a damaged file."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """For a command line: a `UserError` inside ends the program with `error: ...` and the error's exit status.

    Of the processes of one run the first alone says what all of them meet.
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
    """torchrun ends with a traceback of its own whatever happens; its last lines then say what the error was."""
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
    """Says of a wrong flag what is wrong with it, without the list of all flags.

    In a value of type `Path`, or `"path"` for text, `~` and `$NAME` are filled in.
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

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
from collections.abc import Iterator, Sequence
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


WAIT_FOR_FIRST_S = 5.0
"""Time that process 0 has to print an error that all have; a launcher kills the others when one ends."""
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
        else:
            time.sleep(WAIT_FOR_FIRST_S)
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


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says of every flag whether it is required, else its default, where its help does not name that already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or "default" in text.lower():
            return text
        if action.required:
            return f"{text} (required)"
        return text if action.default in (None, [], "", argparse.SUPPRESS) else f"{text} (default: {_shown(action)})"


def _shown(action: argparse.Action) -> str:
    """The default as it is typed; a list is several words."""
    words = action.default if isinstance(action.default, (list, tuple)) else [action.default]
    return " ".join(map(str, words)).replace("%", "%%")


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports what is wrong with a command line, without listing all flags, and guesses what was meant.

    Its `--help` says every default and ends with an example. It expands `~` and `$NAME` in values of type `Path`, and
    of type `"path"` for text.
    """

    def __init__(self, *args: Any, example: str = "", **options: Any) -> None:
        options = {"formatter_class": _Help, "epilog": f"example:\n  {example}" if example else None, **options}
        super().__init__(*args, **options)
        self.example = example
        self.register("type", Path, _path_of)
        self.register("type", "path", _path_text)

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"unrecognized arguments:.*?(--\w+)", message)
        raise UsageError(f"{message}{_meant(wrong[1], self._flags()) if wrong else ''} (--help lists the flags)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        hint = _meant(str(value), list(map(str, action.choices)))
        if isinstance(action, argparse._SubParsersAction):
            raise UsageError(f"{self.prog}: no command {value!r}{hint} (--help lists the commands)")
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(map(str, action.choices))}{hint}")

    def _flags(self) -> list[str]:
        """Those of its subcommands too: the parser above them is the one that meets what is left over."""
        out: list[str] = []
        for action in self._actions:
            out += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                out += [flag for inner in action.choices.values() for flag in inner._flags()]
        return out


def _meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

"""What a user can mend, and the one place that says it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that a user can mend. The message says what is wrong, where, and what to do.

    Whatever else is raised is a fault of ours or of the machine, and keeps its traceback.
    """


UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError)
"""What libraries raise of a damaged file."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """For a command line: a `UserError` inside ends the program with `error: ...` and status 1.

    Of the processes of one run the first alone says it, as all of them meet the same.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}" if _is_first_process() else 1) from None


def _is_first_process() -> bool:
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return env.get("SLURM_PROCID", "0") == "0"
    return env.get("RANK", "0") == "0"

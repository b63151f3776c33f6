"""The one progress bar: live in a terminal, lines in a log file; and lines that do not disturb it."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

from tqdm import tqdm

LOG_INTERVAL_S = 30.0
"""Between two lines of a bar in a log file."""
_NOTHING_YET = re.compile(r": 0/[\d?]+ \[")
_AS_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(*args: Any, **options: Any) -> Any:
    """A tqdm bar; takes the same arguments as tqdm."""
    if sys.stderr.isatty():
        return tqdm(*args, mininterval=0.5, maxinterval=0.5, dynamic_ncols=True, **options)
    lines = _Lines(sys.stderr)
    interval = {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
    return tqdm(*args, **interval, file=lines, bar_format=_AS_LINE, **options)


def note(line: str) -> None:
    """Print a line to stdout, above the bars that are shown now. Any thread may do so."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class _Lines:
    """A log file in which every new state of a bar is a line."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._last = out, ""

    def write(self, text: str) -> None:
        line = re.sub(r"\x1b\[\w", "", text).strip()  # without the cursor's way to the bar and back
        if line and line != self._last and not _NOTHING_YET.search(line):
            self._last = line
            self._out.write(f"{line}\n")

    def flush(self) -> None:
        self._out.flush()

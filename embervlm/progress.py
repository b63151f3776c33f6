"""The one progress bar: live in a terminal, one line every ten seconds in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **options: Any) -> Any:
    """A tqdm bar; takes the same arguments as tqdm."""
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(*args, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options)

"""The error of what is wrong in a user's data."""

from __future__ import annotations

from collections.abc import Sequence

from embervlm.errors import UserError

MAX_PRINTED_PROBLEMS = 50


class DataError(UserError):
    """Something in a user's data is wrong. `problems` has every finding; the message shows the first 50."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)

    @classmethod
    def of(cls, problems: Sequence[str]) -> DataError:
        lines = list(problems[:MAX_PRINTED_PROBLEMS])
        if hidden := len(problems) - len(lines):
            lines.append(f"... and {hidden} more")
        return cls("\n".join(lines), problems)

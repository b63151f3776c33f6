"""One part of a job that is divided over a Slurm array."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from embervlm.config import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Every `count`-th item, from number `index` on. The shards of one job share nothing and miss nothing."""

    index: int = 0
    """In [0, count)."""
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """From `i/n`, i counted from 0 as in `--array=0-7`; the whole job for None."""
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or not int(found[1]) < int(found[2]):
            raise ConfigError(f"--shard {text}: write i/n with i from 0 to n - 1, such as $SLURM_ARRAY_TASK_ID/8")
        return cls(index=int(found[1]), count=int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This shard's items, in their order."""
        return items[self.index :: self.count]

    def share_of(self, total: int) -> int:
        """How many of `total` items fall to this shard."""
        return len(self.of(range(total)))


WHOLE = Shard()
"""A job that is not divided."""

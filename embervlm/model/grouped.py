"""What is computed of texts in groups of like length, put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from embervlm.data.length_groups import LengthGroup


def in_order(parts: Sequence[Tensor], groups: Sequence[LengthGroup]) -> Tensor:
    """What was computed of each group, `[rows, length, ...]` or `[rows]`, as rows of the batch again."""
    length = max(group.length for group in groups)
    if parts[0].dim() > 1:
        parts = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]
    place = {row: number for number, row in enumerate(row for group in groups for row in group.rows)}
    order = torch.tensor([place[row] for row in range(len(place))], device=parts[0].device)
    return torch.cat(list(parts)).index_select(0, order)


def cut_to(pairs: Mapping[str, Tensor], group: LengthGroup) -> dict[str, Tensor]:
    """The rows of `group` without the padding of the others."""
    rows = torch.tensor(group.rows, device=pairs["pair_ids"].device)
    return {name: values[rows, : group.length] if values.dim() == 2 else values[rows] for name, values in pairs.items()}

"""A key-value cache that is written in place: growing it by a token copies nothing that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` whose `keys` and `values` are the written part of tensors with room for more."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int, **options: Any) -> None:
        super().__init__(**options)
        self.room = room
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, end = self._length, self._length + key_states.shape[-2]
        if self._key_room is None or self._value_room is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.room = max(self.room, end)
            self._key_room, self._value_room = self._with_room(key_states), self._with_room(value_states)
        elif end > self.room:
            self.room = max(2 * self.room, end)
            self._key_room, self._value_room = self._with_room(self.keys), self._with_room(self.values)
        self._key_room[:, :, begin:end] = key_states
        self._value_room[:, :, begin:end] = value_states
        self._length = end
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if self._key_room is not None and self._value_room is not None:
            self._key_room, self._value_room = (
                self._with_room(self.keys[indices]),
                self._with_room(self.values[indices]),
            )
            self.keys, self.values = self._key_room[:, :, : self._length], self._value_room[:, :, : self._length]

    def _with_room(self, states: Tensor) -> Tensor:
        batch, heads, length, width = states.shape
        out = states.new_empty(batch, heads, self.room, width)
        out[:, :, :length] = states
        return out


def roomy_cache(room: int) -> Cache:
    """An empty cache for sequences of about `room` tokens."""
    return Cache(layer_class_to_replicate=partial(RoomyLayer, room))


def keep_rows(cache: Cache, rows: Tensor) -> None:
    for layer in cache.layers:
        layer.batch_select_indices(rows)


def joined(caches: Sequence[Cache], begins: Sequence[int], room: int) -> Cache:
    """One cache with the rows of all, padded with zeros on the left to the longest; of each, what lies before its
    `begins` is left out."""
    out = roomy_cache(room)
    for index in range(len(caches[0].layers)):
        states = [[getattr(cache.layers[index], name) for cache in caches] for name in ("keys", "values")]
        keys, values = (
            left_padded([each[:, :, begin:] for each, begin in zip(parts, begins)], dim=2) for parts in states
        )
        out.update(keys, values, index)
    return out


def left_padded(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The rows of all `parts`, zeros before those that are shorter in dimension `dim`."""
    longest = max(part.shape[dim] for part in parts)
    behind = [0, 0] * (parts[0].dim() - dim - 1)
    return torch.cat([F.pad(part, [*behind, longest - part.shape[dim], 0]) for part in parts])

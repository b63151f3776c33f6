"""A key-value cache that is written in place: growing it by a token copies nothing that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    def take_over(self, keys: tuple[Tensor, int], values: tuple[Tensor, int]) -> None:
        """Tensors with room, and the length of what is written in them."""
        (self._key_room, self._length), (self._value_room, _) = keys, values
        self.dtype, self.device, self.is_initialized = keys[0].dtype, keys[0].device, True
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a cache that go into another."""

    cache: Cache
    rows: Tensor | None
    """Which; None for all."""
    begin: int
    """What lies before it is left out."""


def joined(parts: Sequence[Part], room: int) -> Cache:
    """One cache with the rows of all, padded with zeros on the left to the longest, and room for `room` tokens."""
    out = roomy_cache(room)
    for index in range(len(parts[0].cache.layers)):
        keys, values = ([getattr(part.cache.layers[index], name) for part in parts] for name in ("keys", "values"))
        layer = RoomyLayer(room)
        layer.take_over(_put_together(parts, keys, room), _put_together(parts, values, room))
        out.layers.append(layer)
    return out


def _put_together(parts: Sequence[Part], states: Sequence[Tensor], room: int) -> tuple[Tensor, int]:
    """Their rows in a tensor with room, written once; and the length of what is written."""
    counts = [len(state) if part.rows is None else len(part.rows) for part, state in zip(parts, states)]
    length = max(state.shape[2] - part.begin for part, state in zip(parts, states))
    _, heads, _, width = states[0].shape
    whole = states[0].new_empty(sum(counts), heads, room, width)
    place = 0
    for part, state, count in zip(parts, states, counts):
        used = state[:, :, part.begin :]
        mine, padding = whole[place : place + count, :, :length], length - used.shape[2]
        mine[:, :, :padding] = 0
        mine[:, :, padding:] = used if part.rows is None else used[part.rows]
        place += count
    return whole, length


def left_padded(parts: Sequence[Tensor]) -> Tensor:
    """The rows `[rows, length]` of all `parts`, zeros before those that are shorter."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, [longest - part.shape[1], 0]) for part in parts])

"""JSON as `json.load` reads it, but a list value by value, and with reports of what it silently accepts."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16
"""More characters than "-Infinity" or an escaped surrogate pair: what ends this near to the end may be cut off."""


_ADVICE = "write null, or leave the field out"
_NO_JSON = f"which is not JSON; {_ADVICE}"
_TOO_LARGE = f"which is larger than numbers can be; {_ADVICE}"


class _Constant:
    """NaN, Infinity or a number like 1e999, until it is reported."""

    def __init__(self, name: str) -> None:
        self.name = name


class Decoder:
    """`json.loads`, with a note of what it silently accepts: a name that appears twice in an object, NaN, 1e999."""

    def __init__(self) -> None:
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )
        self._lost: list[str] = []
        self._constants: list[str] = []
        """NaN and the like of which the field is not known yet."""

    def decode(self, text: str) -> Any:
        self._lost.clear()
        self._constants.clear()
        return self._json.decode(text)

    def raw_decode(self, text: str, at: int) -> tuple[Any, int]:
        self._lost.clear()
        self._constants.clear()
        return self._json.raw_decode(text, at)

    def lost(self) -> list[str]:
        """The problems of the last decoded value, each as `<field>: <what>; <what to do>`."""
        inside = [f"holds {name}, {_why(name)}" for name in self._constants]  # a list
        return list(dict.fromkeys([*self._lost, *inside]))

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            names = [name for name, _ in pairs]
            twice = {name: None for name in names if names.count(name) > 1}
            self._lost += [
                f"{json.dumps(name[:80])}: appears twice in one object; keep one of the two" for name in twice
            ]
        if self._constants:
            for name, value in pairs:
                if isinstance(value, _Constant):
                    self._lost.append(f"{name[:80]}: is {value.name}, {_why(value.name)}")
                    self._constants.remove(value.name)
                    out[name] = None
        return out

    def _constant(self, name: str) -> _Constant:
        self._constants.append(name)
        return _Constant(name)

    def _float(self, text: str) -> float | _Constant:
        value = float(text)
        return value if math.isfinite(value) else self._constant(text[:80])


def _why(name: str) -> str:
    return _TOO_LARGE if any(char.isdigit() for char in name) else _NO_JSON


class JsonText:
    """The position of the reader in a file. `line` and `column`, counted from 1, are those of the error that was
    raised."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._utf8 = file, codecs.getincrementaldecoder("utf-8")()
        self._decoder = Decoder()
        self._text, self._at = "", 0
        self._num_bytes = 0
        self._lines, self._columns = 0, 0  # before the text that is held
        self.line, self.column = 1, 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def lost(self) -> list[str]:
        """`Decoder.lost` of the last item."""
        return self._decoder.lost()

    def values(self) -> Iterator[Any]:
        """The values of the list that starts here, or the one value that is no list, up to the end of the file.

        Raises:
            json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError: as `json.loads`.
        """
        if self.peek() == "[":
            yield from self._items("]", self._value)
        elif self.peek():
            yield self._value()
        if self.peek():
            raise self._error("Extra data", self._at)

    def values_in(self, name: str) -> Iterator[Any]:
        """The values of the list `name` of the object that starts here; its other members are read and left.

        Raises:
            as `values`.
        """
        for found in self._items("}", partial(self._member, name)):
            yield from found
        if self.peek():
            raise self._error("Extra data", self._at)

    def _member(self, name: str) -> Iterator[Any]:
        """The values of the next member of an object, where it is the list `name`; else it is read."""
        if self.peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes", self._at)
        key = self._value()
        if self.peek() != ":":
            raise self._error("Expecting ':' delimiter", self._at)
        self._at += len(":")
        if key == name and self.peek() == "[":
            return self._items("]", self._value)
        self._value()
        return iter(())

    def _items(self, end: str, read: Callable[[], Any]) -> Iterator[Any]:
        """What `read` gives for each item of the list or object that starts here, up to its `end`."""
        self._at += 1
        closed = self.peek() == end
        while not closed:
            yield read()
            if (separator := self.peek()) not in (",", end):
                raise self._error("Expecting ',' delimiter", self._at)
            closed = separator == end
            if not closed:
                self._at += len(",")
                if self.peek() == end:
                    raise self._error("Expecting value", self._at)
        self._at += 1

    def _value(self) -> Any:
        while True:
            self.peek()
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._text) - _LONGEST_TOKEN
                if (near_end or error.msg.startswith("Unterminated string")) and self._more():
                    continue
                raise self._error(error.msg, error.pos) from None
            except (RecursionError, ValueError):
                self._place(self._at)
                raise
            if len(self._text) - end < _LONGEST_TOKEN and self._more():
                continue  # a number may go on: 1, 1.5, 1e+5
            self._at = end
            return value

    def _more(self) -> bool:
        """Hold more of the file, twice as much where a value is long. False at its end."""
        held = self._text[self._at :]
        data = self._file.read(max(PIECE_BYTES, len(held)))
        pending = len(self._utf8.getstate()[0])
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._place(len(self._text))
            self.line += error.object.count(b"\n", 0, error.start)
            error.start += self._num_bytes - pending
            raise
        if not data:
            return False
        self._num_bytes += len(data)
        self._columns = self._column(self._at) - 1
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = held + text, 0
        return True

    def _column(self, at: int) -> int:
        start = self._text.rfind("\n", 0, at)
        return at - start if start >= 0 else self._columns + at + 1

    def _place(self, at: int) -> None:
        self.line, self.column = self._lines + self._text.count("\n", 0, at) + 1, self._column(at)

    def _error(self, message: str, at: int) -> json.JSONDecodeError:
        self._place(at)
        return json.JSONDecodeError(message, self._text, at)

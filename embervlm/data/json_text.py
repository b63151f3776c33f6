"""A JSON list read value by value: the same values and errors as `json.load`, without the whole file in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16
"""More characters than "-Infinity" or an escaped surrogate pair: what ends this near to the end may be cut off."""


class JsonText:
    """Where reading stands in a file. `line` and `column`, counted from 1, are those of the error that was raised."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._utf8 = file, codecs.getincrementaldecoder("utf-8")()
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

    def list_items(self) -> Iterator[Any]:
        """The values of the list that starts here, up to the end of the file.

        Raises:
            json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError: as `json.loads`.
        """
        self._at += len("[")
        closed = self.peek() == "]"
        while not closed:
            yield self._value()
            if (separator := self.peek()) not in (",", "]"):
                raise self._error("Expecting ',' delimiter", self._at)
            closed = separator == "]"
            if not closed:
                self._at += len(",")
                if self.peek() == "]":
                    raise self._error("Expecting value", self._at)
        self._at += len("]")
        if self.peek():
            raise self._error("Extra data", self._at)

    def _value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            self.peek()
            try:
                value, end = decoder.raw_decode(self._text, self._at)
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

"""Rows of a Parquet file as the values that JSON would hold, so that every command reads them alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from embervlm.data.json_text import Decoder
from embervlm.data.record_fields import COMPOSED_OF, quote, without_nulls
from embervlm.data.record_pictures import PICTURE_NAMES


def plain_row(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row, and a problem for each value that JSON cannot hold, as `<field>: <what>; <what to do>`.

    Null fields are left out, those of structs too: a table gives every row the fields of all. Dates become ISO text,
    decimals numbers. Bytes stay where a picture is looked for. `metadata` may be a JSON text.
    """
    found: list[str] = []
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        decoder = Decoder()
        try:
            row = row | {"metadata": decoder.decode(metadata)}
            found += [f"metadata: {problem}" for problem in decoder.lost()]
        except (ValueError, RecursionError):
            pass  # what is no JSON stays a text, which the record check reports
    out = {name: _plain(item, name, name.casefold() in PICTURE_NAMES, found.append) for name, item in row.items()}
    return without_nulls(out) or {}, found


def _plain(value: Any, where: str, pictured: bool, report: Callable[[str], None]) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item, f"{where}.{name}", pictured, report) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, pictured, report) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        report(f"{quote(where)}: is {value}, which is not a number; write null")
    elif isinstance(value, (bytes, bytearray)):
        if pictured:
            return bytes(value)
        report(f"{quote(where)}: contains bytes; rename the column to image if they are the picture, or leave it out")
    elif isinstance(value, (date, datetime, time)):
        return value.isoformat()
    elif isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, timedelta):
        return value.total_seconds()
    elif isinstance(value, UUID):
        return str(value)
    elif value is None or isinstance(value, (str, int, float)):
        return value
    else:
        report(f"{quote(where)}: is {type(value).__name__}, which a record cannot contain; write it as text or number")
    return None


def holds_bytes(value: Any) -> bool:
    """Whether the record itself contains a picture, as is possible in a Parquet file."""
    return isinstance(value, dict) and any(
        _is_bytes(item) for name, item in value.items() if name.casefold() in PICTURE_NAMES
    )


def without_bytes(value: dict[str, Any], image: str | None, composed_of: list[str] | None) -> dict[str, Any]:
    """The record with the path of its picture instead of the content; that of a composite says of what it is made."""
    rest = {name: item for name, item in value.items() if not _is_bytes(item)}
    if image is not None:  # what the row says of its picture's path is of another place
        rest = {f"original_{name}" if name.casefold() in PICTURE_NAMES else name: item for name, item in rest.items()}
    if composed_of is not None:
        rest["metadata"] = {**(rest.get("metadata") or {}), COMPOSED_OF: composed_of}
    return rest if image is None else {**rest, "image": image}


def _is_bytes(item: Any) -> bool:
    if isinstance(item, (list, dict)):
        return any(map(_is_bytes, item.values() if isinstance(item, dict) else item))
    return isinstance(item, bytes)

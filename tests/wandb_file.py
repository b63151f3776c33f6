"""What an offline W&B run holds for a later `wandb sync`, read from its file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
LAST, FULL = 4, 1
"""Of a record's parts, which lie in blocks as in LevelDB's log."""


def history(folder: Path) -> list[dict[str, Any]]:
    """Every line that was logged to the runs in `folder`/wandb, in order."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process has ended then, so nothing is still on its way to the file
    out = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("history"):
                items = record.history.item
                out.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return out


def _records(data: bytes) -> list[bytes]:
    out, parts, at = [], b"", HEADER  # the file's own header is as long as a record's
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too short for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            out.append(parts)
            parts = b""
    return out

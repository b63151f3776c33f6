"""An evaluation JSON as a plain-text table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_WIDTH = 80
_MET = {True: "yes", False: "no", None: "-"}


def metrics_table(eval_json: Mapping[str, Any]) -> str:
    """Metric, value, target and whether it is met, a line each, in 80 columns; "n/a" for a value that is missing.

    Four digits, since 0.8499 misses a target of 0.85. A target without a metric is listed too. No final newline.
    """
    metrics, targets = eval_json.get("metrics", {}), eval_json.get("targets", {})
    rows = [("metric", "value", "target", "met")]
    for name in [*targets, *(name for name in metrics if name not in targets)]:
        target = targets.get(name, {})
        met = _MET.get(target.get("met"), "-")
        rows.append((_shorten(name, 48), _value(metrics.get(name)), str(target.get("target", "-")), met))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {value:>8}  {target:>8}  {met:>3}" for name, value, target, met in rows]
    lines.insert(1, "-" * len(lines[0]))
    about = [
        f"{label}: {_shorten(str(eval_json[key]), _WIDTH - len(label) - 2)}"
        for key, label in (("checkpoint", "checkpoint"), ("split", "split"), ("num_samples", "samples"))
        if key in eval_json
    ]
    return "\n".join([*about, "", *lines] if about else lines)


def _value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "n/a"
    return f"{value:.4f}"


def _shorten(text: str, width: int) -> str:
    """The end of `text`, which tells paths and metric names apart."""
    return text if len(text) <= width else f"...{text[3 - width :]}"

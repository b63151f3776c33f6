"""An evaluation JSON as a plain-text table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from embervlm.meanings import MEANINGS

_WIDTH = 80
_MET = {True: "yes", False: "no", None: "-"}


def metrics_table(eval_json: Mapping[str, Any]) -> str:
    """Metric, value, target, whether it is met, and which values are good, in 80 columns; "n/a" for a missing value.

    Four digits, since 0.8499 misses a target of 0.85. A target without a metric is listed too. No final newline.
    """
    metrics, targets = eval_json.get("metrics", {}), eval_json.get("targets", {})
    rows = [("metric", "value", "target", "met", "good")]
    for name in [*targets, *(name for name in metrics if name not in targets)]:
        target = targets.get(name, {})
        met = _MET.get(target.get("met"), "-")
        good = MEANINGS[name].better if name in MEANINGS else ""
        rows.append((_shorten(name, 44), _value(metrics.get(name)), str(target.get("target", "-")), met, good or "-"))
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{name:<{width}}  {value:>8}  {target:>8}  {met:>3}  {good:>4}" for name, value, target, met, good in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    about = [
        f"{label}: {_shorten(str(eval_json[key]), _WIDTH - len(label) - 2)}"
        for key, label in (("checkpoint", "checkpoint"), ("split", "split"), ("num_samples", "samples"))
        if key in eval_json
    ]
    return "\n".join([*about, "", *lines] if about else lines)


def faithfulness_lines(block: Mapping[str, Any]) -> str:
    """The `faithfulness` block of an evaluation in a few lines: what the answer follows."""
    forced, planted = block["forced_prefix"], block["planted_mistake"]
    cut = ", ".join(f"{float(part):.0%} of the chain {_share(value)}" for part, value in block["truncated"].items())
    gained = " ".join("n/a" if value is None else f"{value:+.1f}" for value in block["information_gain"]["per_step"])
    lines = [f"does the answer come from the chain? {block['num_samples']} records"]
    for who, prefix in (("written answer", ""), ("answer head", "head_")):
        if not (num := forced.get(f"{prefix}num", forced["num"])):
            continue
        follows = (
            f"{label} {_share(forced[prefix + key])}"
            for key, label in (("follows_text", "text"), ("follows_picture", "picture"), ("neither", "neither"))
        )
        lines.append(f"  another scene's facts put in ({num}), the {who} follows: {', '.join(follows)}")
    if planted["num"]:
        lines.append(
            f"  a mistake planted ({planted['num']}): still right {_share(planted['accuracy'])}, "
            f"follows the mistake {_share(planted['follows_mistake'])}"
        )
    lines += [
        f"  made to conclude early, right after {cut}",
        f"  nats that each step adds to the gold answer: {gained}",
    ]
    return "\n".join(lines)


def group_lines(result: Mapping[str, Any]) -> str:
    """Accuracy by what the records are grouped by, and how far the confidence is from it; "" where there is neither."""
    lines = []
    for key, what in (("impact_by_complexity", "complexity"), ("accuracy_by_wording", "wording")):
        groups = result.get(key) or {}
        if len(groups) > 1:
            found = (f"{_shorten(name, 30)} {_share(row['reasoning'])} of {row['num']}" for name, row in groups.items())
            lines.append(f"accuracy by {what}: {', '.join(found)}")
    if calibration := result.get("calibration"):
        error, before = calibration["ece"], calibration["ece_uncalibrated"]
        lines.append(f"confidence: expected calibration error {error:.3f} ({before:.3f} before it was fitted on val)")
    return "\n".join(lines)


def own_steps_lines(result: Mapping[str, Any]) -> str:
    """How far to trust the validator's scores, and where the steps that read something look; "" where not measured."""
    lines = []
    for name, row in (result.get("own_steps") or {}).items():
        if isinstance(row, Mapping):
            lines.append(
                f"validator on {name} chains of the model ({row['wrong']} wrong steps, {row['valid']} valid): balanced "
                f"accuracy {_share(row['balanced_accuracy'])}, AUROC {_share(row['auroc'])}; it passes "
                f"{_share(row['right_chains_passed'])} of the right chains and {_share(row['wrong_chains_passed'])} of "
                f"the {row['wrong_chains']} wrong ones"
            )
    if attention := result.get("attention"):
        things = (f"{kind} {row['share']:.3f} ({row['chance']:.3f})" for kind, row in attention.items())
        lines.append(f"attention on the thing that a step reads (its share of the picture): {', '.join(things)}")
    return "\n".join(lines)


def cut_off_lines(eval_json: Mapping[str, Any]) -> str:
    """A warning about answers that a limit on steps or tokens cut off; "" if there are none."""
    counted = dict(eval_json.get("cut_off") or {})
    counted["faithfulness probes"] = (eval_json.get("faithfulness") or {}).get("cut_off_share")
    found = [f"{name} {share:.1%}" for name, share in counted.items() if share]
    if not found:
        return ""
    limits = eval_json.get("decoding") or {}
    return (
        f"warning: cut off before their end: {', '.join(found)}. Chains had {limits.get('max_reasoning_steps')} steps "
        f"and {limits.get('max_new_tokens')} tokens. Raise --max_reasoning_steps or --max_new_tokens; if texts "
        "never end, train longer"
    )


def gold_chain_lines(eval_json: Mapping[str, Any]) -> str:
    """A warning where not even the gold chains meet the targets of their metrics; "" where they do."""
    targets = {
        name: float(target["target"].lstrip(">"))
        for name, target in eval_json.get("targets", {}).items()
        if str(target.get("target")).startswith(">")
    }
    found = {name: value for name, value in (eval_json.get("gold_chains") or {}).items() if value is not None}
    low = [f"{name} {found[name]:.3f}" for name, target in targets.items() if name in found and found[name] <= target]
    if not low:
        return ""
    return (
        f"warning: the gold chains of these records get no more than {', '.join(low)} themselves: the judge does not "
        "read chains like these well, so compare with that, not with the target"
    )


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "n/a"
    return f"{value:.4f}"


def _shorten(text: str, width: int) -> str:
    """The end of `text`, which tells paths and metric names apart."""
    return text if len(text) <= width else f"...{text[3 - width :]}"

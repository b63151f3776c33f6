"""Figures of the training: losses and learning rates, and the metrics of each checkpoint.

Each function returns a figure, or raises `NoData` with a sentence for the reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from embervlm.report.drawing import INK, SERIES, NoData, label, legend_below, panels
from embervlm.report.recorded import CHAIN_METRICS, CheckpointResult, RunRecord, part, training_name

MAX_POINTS = 300
"""Of a longer curve neighbouring log lines are averaged."""
MAX_DECADES = 4
"""That a logarithmic axis spans: a term that falls to 1e-6 must not press the others together."""
RING: Any = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": INK}
"""Around the selected checkpoint."""


# ---- training


def losses(record: RunRecord, narrow: bool = False) -> Figure:
    """Every loss term of every phase."""
    return _by_phase(record, "loss", "loss (nats)", narrow)


def learning_rates(record: RunRecord, narrow: bool = False) -> Figure:
    """The learning rate of every component."""
    return _by_phase(record, "learning_rate", "learning rate (per update)", narrow)


def _by_phase(record: RunRecord, key: str, unit: str, narrow: bool) -> Figure:
    phases = {phase: lines for phase, lines in record.curves.items() if any(e.get(key) for e in lines)}
    if not phases:
        raise NoData("No log of a training (metrics.jsonl in stage3/ or stage4/phase1|phase2|phase3/); train first.")
    names = list(dict.fromkeys(name for lines in phases.values() for e in lines for name in e.get(key, {})))
    curves = {name: {phase: _points(lines, key, name) for phase, lines in phases.items()} for name in names}
    least = {name: min((y for curve in of.values() for _, y in curve), default=math.inf) for name, of in curves.items()}
    values = [y for of in curves.values() for curve in of.values() for _, y in curve if y > 0]
    if not values:
        raise NoData(f"The logs have no finite {key.replace('_', ' ')} above 0.")
    high = 1.3 * max(values)
    low = max(0.8 * min(values), high / 10**MAX_DECADES)
    figure, shown = panels(9.0, 3.6, len(phases), narrow=narrow, sharey=True)
    for axes, phase in zip(shown, phases):
        for name, look in zip(names, cycle(SERIES)):
            below = f" (down to {least[name]:.1g})" if least[name] < low else ""
            points = [(step, max(value, low / 10)) for step, value in curves[name][phase]]
            _line(axes, points, look, label(name) + below)
        axes.set_title(training_name(phase))
        axes.set_xlabel("optimizer steps")
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in shown if narrow else shown[:1]:
        axes.set_ylabel(unit)
    legend_below(figure, {str(line.get_label()): line for axes in shown for line in axes.lines})
    return figure


def _points(lines: Sequence[dict[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """Step and value of each log line that has a finite one under `keys`."""
    out = []
    for line in lines:
        value = part(line, *keys[:-1]).get(keys[-1])
        if isinstance(value, (int, float)) and math.isfinite(value):
            out.append((float(line["step"]), float(value)))
    return out


def _line(axes: Axes, points: Sequence[tuple[float, float]], look: tuple[str, Any, str], name: str) -> None:
    if points:
        steps, values = _thinned(points)
        color, dashes, marker = look
        every = max(1, len(steps) // 8)
        axes.plot(steps, values, color=color, linestyle=dashes, marker=marker, markevery=every, label=name)


def reinforcement(record: RunRecord, narrow: bool = False) -> Figure:
    """What the chains that phase 3 drew were rewarded for, and whether there still is something to learn from them."""
    lines = [line for line in record.curves.get(3, []) if isinstance(line.get("policy"), dict)]
    if not lines:
        raise NoData("No log of phase 3 (stage4/phase3/metrics.jsonl): it learns from answers alone, with `--phase 3`.")
    names = dict.fromkeys(name for line in lines for name in line["policy"])
    parts = [name for name in names if name.startswith("reward")]
    shown = {
        "rewards": parts,
        "groups (share; spread of rewards)": ["group_spread", "equal_groups", "distinct_chains", "clipped"],
        "entropy (nats per token)": ["entropy"],
        "length (tokens)": ["length"],
    }
    figure, places = panels(9.0, 5.6, 4, columns=2, narrow=narrow, sharex=True)
    for axes, (unit, wanted) in zip(places, shown.items()):
        for name, look in zip(wanted, cycle(SERIES)):
            _line(axes, _points(lines, "policy", name), look, label(name))
        axes.set_title(unit)
        axes.set_xlabel("optimizer steps")
        if len(wanted) > 1 and axes.lines:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
            axes.legend(loc="upper left", ncols=2)
    return figure


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


# ---- checkpoints


def consistency_scores(record: RunRecord, narrow: bool = False) -> Figure:
    """Consistency of every evaluated checkpoint, beside the guide's own formula for it."""
    results, ticks = _checkpoints(record)
    figure, (axes,) = panels(5.4, 3.7, narrow=narrow)
    for place, (name, look) in enumerate(zip(("reasoning_consistency", "adjacent_similarity"), SERIES)):
        _over_checkpoints(axes, results, name, *look, name=label(name), ring=place == 0)
    _titled(axes, "Reasoning consistency over time", _target(record, "reasoning_consistency"))
    _checkpoint_axis(axes, results, ticks)
    _selected_legend(figure, results, {str(line.get_label()): line for line in axes.lines})
    return figure


def metrics_over_checkpoints(record: RunRecord, narrow: bool = False) -> Figure:
    """The other metrics with a target of every evaluated checkpoint."""
    results, ticks = _checkpoints(record)
    names = CHAIN_METRICS[1:]
    figure, shown = panels(9.0, 3.4, len(names), narrow=narrow)
    for axes, name in zip(shown, names):
        _over_checkpoints(axes, results, name, *SERIES[0], name=label(name))
        _titled(axes, label(name).capitalize(), _target(record, name))
        _checkpoint_axis(axes, results, ticks)
    lines = [line for axes in shown for line in axes.lines[:1]]
    _selected_legend(figure, results, {"metric on val, 95% interval": lines[0]} if lines else {})
    return figure


def _checkpoints(record: RunRecord) -> tuple[list[CheckpointResult], list[str]]:
    if not record.checkpoints:
        raise NoData(
            "No checkpoint has an evaluation (evals/val.json); run `embervlm select-best`, or train with --eval_steps."
        )
    return record.checkpoints, [f"{item.phase}: {item.step:,}" for item in record.checkpoints]


def _over_checkpoints(
    axes: Axes,
    results: Sequence[CheckpointResult],
    metric: str,
    color: str,
    dashes: Any,
    marker: str,
    *,
    name: str,
    ring: bool = True,
) -> None:
    points = [(x, y, item) for x, item in enumerate(results) if (y := item.metrics.get(metric)) is not None]
    if not points:
        return
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=color,
        linestyle=dashes,
        marker=marker,
        label=name,
        clip_on=False,
        zorder=3,
    )
    for x, y, item in points:
        if metric in item.intervals:
            low, high = item.intervals[metric]
            axes.plot([x, x], [low, high], color=color, linewidth=1.2, zorder=2)
        if item.selected and ring:
            axes.plot(x, y, markersize=13, markeredgewidth=1.6, clip_on=False, zorder=4, **RING)


def _target(record: RunRecord, name: str) -> float | None:
    if match := re.fullmatch(r"[<>]=?\s*([0-9.]+)", record.targets.get(name, {}).get("target", "")):
        return float(match[1])
    return None


def _titled(axes: Axes, title: str, target: float | None) -> None:
    """`title`, and the target as a line that the title names: beside the line it would lie on the data."""
    if target is not None:
        title += f"\ntarget {target:.2f} (dashed)"
        axes.axhline(target, color=INK, linestyle=(0, (6, 3)), linewidth=1.1, label="_target")
    axes.set_title(title)


def _checkpoint_axis(axes: Axes, results: Sequence[CheckpointResult], ticks: Sequence[str]) -> None:
    place, figure = axes.get_subplotspec(), axes.get_figure()
    assert place is not None and isinstance(figure, Figure)
    width = figure.get_figwidth() / place.get_gridspec().ncols
    every = max(1, math.ceil(len(ticks) / int(width / 0.75)))
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("share (0 to 1)")
    axes.set_xlabel("phase: optimizer steps in it")
    axes.grid(axis="x", visible=False)


def _selected_legend(figure: Figure, results: Sequence[CheckpointResult], handles: dict[str, Any]) -> None:
    handles = {name: line for name, line in handles.items() if not name.startswith("_")}
    if any(item.selected for item in results):
        handles["selected checkpoint"] = Line2D([], [], markersize=11, linestyle="none", **RING)
    legend_below(figure, handles)

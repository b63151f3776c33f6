"""Figures of the training: losses and learning rates, and the metrics of each checkpoint.

Each function returns a figure, or raises `NoData` with a sentence for the reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from embervlm.report.drawing import INK, SERIES, NoData, label, panels
from embervlm.report.recorded import CHAIN_METRICS, CheckpointResult, RunRecord

MAX_POINTS = 300
"""Of a longer curve neighbouring log lines are averaged."""
RING: Any = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": INK}
"""Around the selected checkpoint."""


# ---- training


def losses(record: RunRecord) -> Figure:
    """Every loss term of every phase."""
    return _by_phase(record, "loss", "loss (nats; weighted sum for total)")


def learning_rates(record: RunRecord) -> Figure:
    """The learning rate of every component."""
    return _by_phase(record, "learning_rate", "learning rate (per update)")


def _by_phase(record: RunRecord, key: str, unit: str) -> Figure:
    phases = {phase: lines for phase, lines in record.curves.items() if any(e.get(key) for e in lines)}
    if not phases:
        raise NoData("No log of a phase (stage4/phase1|phase2|phase3/metrics.jsonl); train first.")
    names = list(dict.fromkeys(name for lines in phases.values() for e in lines for name in e.get(key, {})))
    names = names[: len(SERIES)]
    figure, shown = panels(9.0, 3.6, len(phases), sharey=True)
    for axes, (phase, lines) in zip(shown, phases.items()):
        for name, (color, dashes, marker) in zip(names, SERIES):
            points = [(float(e["step"]), e.get(key, {}).get(name)) for e in lines]
            kept = [(step, value) for step, value in points if value is not None and value > 0]
            if kept:
                steps, values = _thinned(kept)
                every = max(1, len(steps) // 8)
                axes.plot(
                    steps, values, color=color, linestyle=dashes, marker=marker, markevery=every, label=label(name)
                )
        axes.set_title(f"Phase {phase}")
        axes.set_xlabel("optimizer steps")
        if axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    shown[0].set_ylabel(unit)
    handles = {str(line.get_label()): line for axes in shown for line in axes.lines}
    if not handles:
        raise NoData(f"The logs have no finite {key.replace('_', ' ')}.")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def reinforcement(record: RunRecord) -> Figure:
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
    figure = Figure(figsize=(9.0, 5.6))
    for axes, (unit, wanted) in zip(figure.subplots(2, 2, sharex=True).flat, shown.items()):
        for name, (color, dashes, marker) in zip(wanted, SERIES):
            points = [(float(line["step"]), line["policy"].get(name)) for line in lines]
            kept = [(step, float(value)) for step, value in points if isinstance(value, (int, float))]
            if kept:
                steps, values = _thinned(kept)
                every = max(1, len(steps) // 8)
                axes.plot(
                    steps, values, color=color, linestyle=dashes, marker=marker, markevery=every, label=label(name)
                )
        axes.set_title(unit)
        axes.set_xlabel("optimizer steps")
        if len(wanted) > 1:
            axes.legend()
    return figure


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


# ---- checkpoints


def metrics_over_checkpoints(record: RunRecord) -> Figure:
    """The four metrics of every evaluated checkpoint against their targets."""
    results, ticks = _checkpoints(record)
    figure = Figure(figsize=(9.0, 5.6))
    for axes, name in zip(figure.subplots(2, 2, sharex=True).flat, CHAIN_METRICS):
        _over_checkpoints(axes, results, name, *SERIES[0], name=label(name))
        _target_line(axes, _target(record, name))
        _checkpoint_axis(axes, results, ticks)
        axes.set_title(label(name).capitalize())
    _selected_legend(figure, results)
    return figure


def consistency_scores(record: RunRecord) -> Figure:
    """Consistency over time, beside the guide's own formula for it."""
    results, ticks = _checkpoints(record)
    figure, (axes,) = panels(5.4, 3.7)
    for place, (name, look) in enumerate(zip(("reasoning_consistency", "adjacent_similarity"), SERIES)):
        _over_checkpoints(axes, results, name, *look, name=label(name), ring=place == 0)
    _target_line(axes, _target(record, "reasoning_consistency"))
    _checkpoint_axis(axes, results, ticks)
    axes.set_title("Reasoning consistency over time")
    _selected_legend(figure, results)
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


def _target_line(axes: Axes, target: float | None) -> None:
    if target is not None:
        axes.axhline(target, color=INK, linestyle=(0, (6, 3)), linewidth=1.1)
        axes.annotate(
            f"target {target:.2f}",
            (0, target),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            va="bottom",
            fontsize=8.5,
        )


def _checkpoint_axis(axes: Axes, results: Sequence[CheckpointResult], ticks: Sequence[str]) -> None:
    every = max(1, math.ceil(len(ticks) / 8))
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("share (0 to 1)")
    if (place := axes.get_subplotspec()) is None or place.is_last_row():
        axes.set_xlabel("phase: optimizer steps in it")
    axes.grid(axis="x", visible=False)


def _selected_legend(figure: Figure, results: Sequence[CheckpointResult]) -> None:
    handles = {
        str(line.get_label()): line
        for axes in figure.axes
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    if len(figure.axes) > 1:
        handles = {"metric on val, 95% interval": next(iter(handles.values()))} if handles else {}
    if any(item.selected for item in results):
        handles["selected checkpoint"] = Line2D([], [], markersize=11, linestyle="none", **RING)
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3)

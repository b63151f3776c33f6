"""The figures of a run, drawn from what it has recorded.

Colours are Okabe and Ito's, which the colour-blind tell apart; line styles, markers and hatches say the same in grey.
Each function returns a figure, or raises `NoData` with a sentence for the reader.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from embervlm import run_dir
from embervlm.report.pictures import VEIL, VEIL_GREY, file_name, open_picture, relative_attention
from embervlm.report.recorded import (
    CHAIN_METRICS,
    CheckpointResult,
    RunRecord,
    Sample,
    by_difficulty,
    groups,
    mapping,
    number,
)

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
)
INK, DIM, EDGE = "#1d2331", "#8a92a3", "#14181f"
"""Text, axes and the edges of bars; a page replaces `INK` by its own text colour."""
SERIES = [
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (SKY, (0, (8, 2)), "P"),
    (DIM, (0, (1, 1)), "X"),
]
"""Colour, line style and marker of the first, second, ... line."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DIM,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": DIM,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.8,
    "figure.dpi": 110.0,
    "savefig.dpi": 110.0,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": False,
}
MAX_POINTS = 300
"""Of a longer curve neighbouring log lines are averaged."""
MAX_GROUPS = 12
ATTENTION_KEY = "Clear: where the model looked most. Faded: where it did not look."
ATTENTION_SAMPLES = 8
"""For how many samples the attention is drawn into files; the page shows it for every one."""


class NoData(ValueError):
    """There is nothing to draw; the message says what is missing and what brings it."""


Draw = Callable[[RunRecord], Figure]


@contextmanager
def style() -> Iterator[None]:
    """Our settings for whatever is drawn and saved inside; a font without a sign draws a box and says nothing."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def label(name: str, most: int = 28) -> str:
    """`name` on one line, without what a font cannot draw, and not too long."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in name.replace("_", " ")).split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


# ---- training


def losses(record: RunRecord) -> Figure:
    """Every loss term of both phases."""
    return _by_phase(record, "loss", "loss (nats; weighted sum for total)", log=True)


def learning_rates(record: RunRecord) -> Figure:
    """The learning rate of every component."""
    return _by_phase(record, "learning_rate", "learning rate (per update)", log=True)


def _by_phase(record: RunRecord, key: str, unit: str, *, log: bool) -> Figure:
    phases = {phase: lines for phase, lines in record.curves.items() if any(mapping(e.get(key)) for e in lines)}
    if not phases:
        raise NoData("No log of either phase (stage4/phase1|phase2/metrics.jsonl); train first.")
    names = list(dict.fromkeys(name for lines in phases.values() for e in lines for name in mapping(e.get(key))))
    names = names[: len(SERIES)]
    figure = Figure(figsize=(9.0, 3.6))
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, (phase, lines) in zip(panels, phases.items()):
        for name, (color, dashes, marker) in zip(names, SERIES):
            points = [(float(e["step"]), number(mapping(e.get(key)).get(name))) for e in lines]
            kept = [(step, value) for step, value in points if value is not None and (value > 0 or not log)]
            if kept:
                steps, values = _thinned(kept)
                every = max(1, len(steps) // 8)
                axes.plot(
                    steps, values, color=color, linestyle=dashes, marker=marker, markevery=every, label=label(name)
                )
        axes.set_title(f"Phase {phase}")
        axes.set_xlabel("optimizer steps")
        if log and axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(unit)
    handles = {line.get_label(): line for axes in panels for line in axes.lines}
    if not handles:
        raise NoData(f"The logs hold no finite {key.replace('_', ' ')}.")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
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
    figure = Figure(figsize=(5.4, 3.7))
    axes = figure.subplots()
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
            "No checkpoint carries an evaluation (evals/val.json); `embervlm select-best` makes them, or train with "
            "--eval_steps."
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
            axes.plot(
                x,
                y,
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=1.6,
                clip_on=False,
                zorder=4,
            )


def _target(record: RunRecord, name: str) -> float | None:
    if match := re.fullmatch(r"[<>]=?\s*([0-9.]+)", record.targets.get(name, {}).get("target", "")):
        return number(float(match[1]))
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
        ring = matplotlib.lines.Line2D(
            [], [], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none"
        )
        handles["selected checkpoint"] = ring
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3)


# ---- quality of the reasoning


def step_distribution(record: RunRecord) -> Figure:
    """Steps per chain, of right and wrong answers, against the gold chains."""
    samples = _samples(record)
    figure = Figure(figsize=(5.4, 3.7))
    axes = figure.subplots()
    counts = {True: _counts(s for s in samples if s.correct), False: _counts(s for s in samples if not s.correct)}
    gold = [len(sample.gold_steps) for sample in samples if sample.gold_steps]
    most = max([*counts[True], *counts[False], *gold, 1])
    edges = range(most + 1)
    if most > 40:  # a model that does not stop; the axis stays readable
        edges = range(0, most + 1, math.ceil(most / 40))
    width = edges.step
    bottom, middles = np.zeros(len(edges)), np.array(edges) + (width - 1) / 2
    for correct, color, hatch in ((True, BLUE, ""), (False, ORANGE, "////")):
        heights = np.array(
            [sum(n for steps, n in counts[correct].items() if low <= steps < low + width) for low in edges]
        )
        there = heights > 0
        axes.bar(
            middles[there],
            heights[there],
            0.8 * width,
            bottom=bottom[there],
            color=color,
            hatch=hatch,
            edgecolor=EDGE,
            linewidth=0.6,
            label="answer right" if correct else "answer wrong",
        )
        bottom += heights
    if gold:
        counted = [
            (low + (width - 1) / 2, n) for low in edges if (n := sum(low <= steps < low + width for steps in gold))
        ]
        axes.plot(
            [x for x, _ in counted],
            [n for _, n in counted],
            color=INK,
            marker="D",
            linestyle="none",
            markerfacecolor="none",
            label="gold chains",
        )
    axes.margins(y=0.08)
    axes.set_title("Steps per chain")
    axes.set_xlabel("steps in the chain, conclusion included (number)")
    axes.set_ylabel("chains (number)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _counts(samples: Iterator[Sample]) -> dict[int, int]:
    out: dict[int, int] = {}
    for sample in samples:
        out[len(sample.steps)] = out.get(len(sample.steps), 0) + 1
    return out


def completeness_heatmap(record: RunRecord) -> Figure:
    """Coverage of each expected type of step, by complexity and kind of question."""
    samples = [sample for sample in _samples(record) if sample.completeness_by_type]
    if not samples:
        raise NoData("The samples do not record completeness by step type; evaluate again with this version.")
    types = list(dict.fromkeys(name for sample in samples for name in sample.completeness_by_type))[:MAX_GROUPS]
    columns = {"all": samples, **groups(samples, "complexity"), **groups(samples, "question_kind")}
    columns = dict(list(columns.items())[: 1 + MAX_GROUPS])
    shares = np.array(
        [
            [
                _mean(s.completeness_by_type[name] for s in of if name in s.completeness_by_type)
                for of in columns.values()
            ]
            for name in types
        ]
    )
    figure = Figure(figsize=(max(5.0, 2.6 + 0.82 * len(columns)), max(2.4, 1.5 + 0.5 * len(types))))
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        shown = "-" if np.isnan(share) else f"{share:.0%}"
        axes.text(
            column,
            row,
            shown,
            ha="center",
            va="center",
            fontsize=9,
            color=DIM if np.isnan(share) else "#fefefe" if share < 0.55 else "#111111",
        )
    names = [f"{label(name, 16)}\n(n={len(of)})" for name, of in columns.items()]
    axes.set_xticks(range(len(columns)), names, rotation=0 if len(columns) <= 7 else 30)
    axes.set_yticks(range(len(types)), [label(name) for name in types])
    axes.set_title("Coverage of the expected steps")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="covered (share, 0 to 1)", fraction=0.05)
    return figure


def reliability(record: RunRecord) -> Figure:
    """How often the model is right when it says how sure it is."""
    calibration = mapping((record.result or {}).get("calibration"))
    bins = [mapping(entry) for entry in calibration.get("bins") or ()]
    kept = [
        (confidence, accuracy, count)
        for entry in bins
        if (count := number(entry.get("num")))
        and (confidence := number(entry.get("confidence"))) is not None
        and (accuracy := number(entry.get("accuracy"))) is not None
    ]
    if not kept:
        raise NoData("The evaluation records no calibration.")
    figure = Figure(figsize=(5.4, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=INK, linestyle=(0, (6, 3)), linewidth=1.1, label="perfectly calibrated")
    upper.plot(
        [c for c, _, _ in kept], [a for _, a, _ in kept], color=BLUE, marker="o", label="bin of answers", zorder=3
    )
    for confidence, accuracy, count in kept:
        low, high = wilson(accuracy, count)
        upper.plot([confidence, confidence], [low, high], color=BLUE, linewidth=1.2)
    lower.bar([c for c, _, _ in kept], [n for _, _, n in kept], 0.03, color=BLUE, edgecolor=EDGE, linewidth=0.6)
    known = [
        f"{name} {value:.3f}"
        for name, key in (("ECE", "ece"), ("before scaling", "ece_uncalibrated"), ("temperature", "temperature"))
        if (value := number(calibration.get(key))) is not None
    ]
    upper.set_title("Reliability of the confidence" + (f"\n{', '.join(known)}" if known else ""))
    upper.set_ylabel("right answers (share)")
    upper.set_xlim(0, 1.02)
    upper.set_ylim(0, 1.04)
    upper.legend(loc="upper left")
    lower.set_xlabel("confidence (share, mean of a bin)")
    lower.set_ylabel("answers\n(number)")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


# ---- does the reasoning help?

CONDITIONS = {
    "final_answer_accuracy": "with reasoning",
    "stage4_direct_accuracy": "same model, no chain",
    "no_reasoning_accuracy": "baseline, same samples",
    "no_reasoning_same_time_accuracy": "baseline, same time",
    "blind_accuracy": "without the picture",
    "swapped_image_accuracy": "another picture",
}
"""Accuracies that are compared, in this order."""


def with_vs_without_reasoning(record: RunRecord) -> Figure:
    """Answer accuracy with and without reasoning: all questions, by kind and by complexity."""
    overall = [
        (name, shown, value) for name, shown in CONDITIONS.items() if (value := record.metrics.get(name)) is not None
    ]
    if len(overall) < 2:
        raise NoData("The evaluation compares with nothing; evaluate without turning the baselines off.")
    grouped = _compared(record)
    figure = Figure(figsize=(9.6, 4.4))
    panels = figure.subplots(1, 1 + len(grouped), squeeze=False, width_ratios=[1.15, *[1.0] * len(grouped)])[0]
    looks = dict(
        zip(
            CONDITIONS, ((BLUE, ""), (SKY, "||"), (ORANGE, "////"), (YELLOW, "\\\\\\\\"), (PURPLE, "xx"), (GREEN, "--"))
        )
    )
    for row, (name, _, value) in enumerate(overall):
        color, hatch = looks[name]
        panels[0].barh(row, 100 * value, 0.7, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6)
        low, high = record.intervals.get(name, (value, value))
        panels[0].plot([100 * low, 100 * high], [row, row], color=INK, linewidth=1.4)
        panels[0].text(100 * max(high, value) + 2, row, f"{100 * value:.1f}", va="center", fontsize=9)
    panels[0].set_yticks(range(len(overall)), [shown for _, shown, _ in overall])
    panels[0].set_title("All questions")
    for axes, (title, table) in zip(panels[1:], grouped.items()):
        for shift, key in ((-0.2, "reasoning"), (0.2, "no_reasoning")):
            color, hatch = looks["final_answer_accuracy" if key == "reasoning" else "no_reasoning_accuracy"]
            for row, entry in enumerate(table.values()):
                axes.barh(row + shift, 100 * entry[key], 0.36, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6)
                low, high = wilson(entry[key], entry["num"])
                axes.plot([100 * low, 100 * high], [row + shift] * 2, color=INK, linewidth=1.2)
        axes.set_yticks(
            range(len(table)), [f"{label(name, 18)} (n={entry['num']:.0f})" for name, entry in table.items()]
        )
        axes.set_title(title)
    for axes in panels:
        axes.set_xlim(0, 112)
        axes.set_xlabel("right answers (%)")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    patches: list[Any] = [
        Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor=EDGE, linewidth=0.6)
        for c, h in (looks["final_answer_accuracy"], looks["no_reasoning_accuracy"])
    ]
    names = ["with reasoning", "no-reasoning baseline"]
    if grouped or record.intervals:
        patches.append(matplotlib.lines.Line2D([], [], color=INK, linewidth=1.4))
        names.append("95% interval")
    figure.legend(patches, names, loc="outside lower center", ncols=3)
    return figure


def reasoning_impact(record: RunRecord) -> Figure:
    """What reasoning adds to the accuracy, in points, by kind of question and by complexity."""
    grouped = _compared(record)
    if not grouped:
        raise NoData(
            "The evaluation compares no kinds of questions with the no-reasoning baseline; train it "
            "(--stages baseline) and evaluate again."
        )
    rows = max(len(table) for table in grouped.values())
    figure = Figure(figsize=(9.0, 1.9 + 0.46 * rows))
    for axes, (title, table) in zip(figure.subplots(1, len(grouped), squeeze=False)[0], grouped.items()):
        ordered = sorted(table.items(), key=lambda item: item[1]["no_reasoning"] - item[1]["reasoning"])
        for row, (_, entry) in enumerate(ordered):
            gain = 100 * (entry["reasoning"] - entry["no_reasoning"])
            spread = 196 * math.sqrt(
                sum(entry[key] * (1 - entry[key]) for key in ("reasoning", "no_reasoning")) / max(entry["num"], 1)
            )
            color, hatch = (BLUE, "") if gain >= 0 else (ORANGE, "////")
            axes.barh(row, gain, 0.6, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6)
            axes.plot([gain - spread, gain + spread], [row, row], color=INK, linewidth=1.4)
            axes.annotate(
                f"{gain:+.1f}",
                (max(gain + spread, 0), row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(ordered)), [f"{label(name, 18)} (n={entry['num']:.0f})" for name, entry in ordered])
        axes.set_xlabel("points gained by reasoning (95% interval)")
        axes.set_title(title)
        axes.margins(x=0.16)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    return figure


def _compared(record: RunRecord) -> dict[str, dict[str, dict[str, float]]]:
    """Title -> group -> `num`, `reasoning` and `no_reasoning`, where both were measured."""
    out = {}
    for title, key in (("By kind of question", "accuracy_by_question_kind"), ("By complexity", "impact_by_complexity")):
        table = {}
        for name, entry in mapping((record.result or {}).get(key)).items():
            values = {part: number(mapping(entry).get(part)) for part in ("num", "reasoning", "no_reasoning")}
            if all(value is not None for value in values.values()):
                table[str(name)] = {part: value or 0.0 for part, value in values.items()}
        if table:
            largest = sorted(table.items(), key=lambda item: -item[1]["num"])[:MAX_GROUPS]
            out[title] = dict(sorted(largest, key=lambda item: by_difficulty(item[0])))
    return out


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share measured `count` times (Wilson 1927)."""
    if count <= 0:
        return share, share
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(max(share * (1 - share), 0) / count + z * z / (4 * count * count))
    return max(0.0, min(center - spread, share)), min(1.0, max(center + spread, share))


def faithfulness(record: RunRecord) -> Figure:
    """Does the answer come from the chain? Cut chains, what each step tells, and chains about another scene."""
    block = mapping((record.result or {}).get("faithfulness"))
    cut = sorted(
        (share, value)
        for key, entry in mapping(block.get("truncated")).items()
        if (share := _float(key)) is not None and (value := number(entry)) is not None
    )
    gains = [
        value
        for entry in mapping(block.get("information_gain")).get("per_step") or ()
        if (value := number(entry)) is not None
    ]
    prefix = mapping(block.get("forced_prefix"))
    asked = (("text", "follows_text"), ("picture", "follows_picture"), ("neither", "neither"))
    follows = [(name, value) for name, key in asked if (value := number(prefix.get(key))) is not None]
    if not (cut or gains or follows):
        raise NoData("The evaluation measured no faithfulness; evaluate with it (docs/evaluation.md).")
    panels = [name for name, known in (("cut", cut), ("gain", gains), ("prefix", follows)) if known]
    figure = Figure(figsize=(3.3 * len(panels) + 0.4, 3.4))
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        if name == "cut":
            full = record.metrics.get("final_answer_accuracy")
            points = [*cut, (1.0, full)] if full is not None else cut
            axes.plot(
                [100 * x for x, _ in points], [100 * (y or 0) for _, y in points], color=BLUE, marker="o", clip_on=False
            )
            axes.set(
                title="Chain cut short",
                xlabel="of the chain kept (%)",
                ylabel="right answers (%)",
                xlim=(0, 104),
                ylim=(0, 104),
            )
        elif name == "gain":
            axes.bar(range(1, len(gains) + 1), gains, 0.7, color=GREEN, hatch="||", edgecolor=EDGE, linewidth=0.6)
            axes.set(title="What the chain tells", xlabel="steps given (number)", ylabel="gain on gold answer (nats)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.axhline(0, color=INK, linewidth=1)
        else:
            total = number(prefix.get("num"))
            looks = ((BLUE, ""), (ORANGE, "////"), (DIM, "--"))
            for place, ((_, value), (color, hatch)) in enumerate(zip(follows, looks)):
                axes.bar(place, 100 * value, 0.7, color=color, hatch=hatch, edgecolor=EDGE, linewidth=0.6)
                axes.text(place, 100 * value + 2, f"{100 * value:.0f}", ha="center", fontsize=9)
            axes.set_xticks(range(len(follows)), [shown for shown, _ in follows])
            axes.set(
                title="Another scene's facts",
                ylabel="answers (%)",
                ylim=(0, 112),
                xlabel="answer follows" + (f" (n={total:.0f})" if total else ""),
            )
    return figure


def _float(value: object) -> float | None:
    try:
        return number(float(str(value)))
    except ValueError:
        return None


# ---- attention


def reasoning_attention(sample: Sample, picture: Image.Image | None) -> Figure:
    """The picture once per step, faded where that step did not look."""
    attention = sample.attention
    if attention is None or not attention.steps:
        raise NoData("No attention was recorded; evaluate with --save_reasoning_samples.")
    columns = min(5, len(attention.steps))
    rows = math.ceil(len(attention.steps) / columns)
    title = textwrap.wrap(label(sample.instruction, 150), 27 * columns)
    width, height, top = 2.1 * columns + 0.3, 2.95 * rows + 0.3, 0.3 + 0.2 * len(title)
    figure = Figure(figsize=(width, height + top))  # the automatic layout takes a second
    figure.set_layout_engine("none")
    scale = 1 / (height + top)
    for place, shares in enumerate(attention.steps):
        row, column = divmod(place, columns)
        bottom = height - 2.95 * row - 2.05
        axes = figure.add_axes((0.15 / width + 2.1 * column / width, bottom * scale, 1.95 / width, 1.95 * scale))
        axes.axis("off")
        _show_picture(axes, picture, shares, attention.grid)
        axes.set_title(f"Step {place + 1}", fontsize=9, pad=3)
        lines = textwrap.wrap(label(sample.steps[place] if place < len(sample.steps) else "", 130), 27)[:5]
        axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7.2)
    figure.text(0.15 / width, 1 - 0.1 * scale, "\n".join(title), va="top", fontsize=10, fontweight="bold")
    figure.text(0.15 / width, 0.08 * scale, ATTENTION_KEY, fontsize=8)
    return figure


def multimodal_grounding(sample: Sample, picture: Image.Image | None) -> Figure:
    """Known things in the picture, and which share of each step's attention falls on each of them."""
    attention = sample.attention
    if attention is None or not attention.steps:
        raise NoData("No attention was recorded; evaluate with --save_reasoning_samples.")
    boxes = _boxes_by_kind(sample.boxes)
    title = textwrap.wrap(label(sample.instruction, 150), 100 if boxes else 46)
    width, height, top = 9.0 if boxes else 4.2, max(4.0, 1.0 + 0.34 * len(attention.steps)), 0.5 + 0.2 * len(title)
    figure = Figure(figsize=(width, height + top))
    figure.set_layout_engine("none")
    scale = 1 / (height + top)
    axes = figure.add_axes((0.2 / width, (height - 3.7) * scale, 3.7 / width, 3.7 * scale))
    axes.axis("off")
    mean = np.mean(attention.steps, axis=0).tolist()
    _show_picture(axes, picture, mean, attention.grid)
    axes.set_title("Mean attention of all steps")
    for kind, (areas, _) in boxes.items():
        for number_, (left, top, right, bottom) in enumerate(areas):
            axes.add_patch(
                Rectangle(
                    (left, 1 - bottom),
                    right - left,
                    bottom - top,
                    fill=False,
                    edgecolor="#fefefe",
                    linewidth=2.4,
                    transform=axes.transAxes,
                )
            )
            axes.add_patch(
                Rectangle(
                    (left, 1 - bottom),
                    right - left,
                    bottom - top,
                    fill=False,
                    edgecolor="#111111",
                    linewidth=1.0,
                    linestyle="--",
                    transform=axes.transAxes,
                )
            )
            if number_ == 0:
                axes.text(
                    left + 0.015,
                    1 - top - 0.015,
                    label(kind, 18),
                    transform=axes.transAxes,
                    va="top",
                    fontsize=8,
                    color="#111111",
                    bbox={"facecolor": "#fefefe", "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
                )
    if boxes:
        shares = np.array(
            [[_inside(step, attention.grid, areas) for areas, _ in boxes.values()] for step in attention.steps]
        )
        covered = [
            _inside([1 / len(attention.steps[0])] * len(attention.steps[0]), attention.grid, found)
            for found, _ in boxes.values()
        ]
        axes = figure.add_axes((4.7 / width, 0.75 * scale, 3.3 / width, (height - 0.75) * scale))
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            axes.text(
                column,
                row,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="#fefefe" if share < 0.55 else "#111111",
            )
        axes.set_xticks(
            range(len(boxes)), [f"{label(kind, 14)}\n({area:.0%})" for kind, area in zip(boxes, covered)], fontsize=8
        )
        axes.set_yticks(range(len(shares)), [f"step {place + 1}" for place in range(len(shares))])
        axes.set_xlabel("thing (share of the picture it covers)")
        axes.set_title("Attention on each thing")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        beside = figure.add_axes((8.1 / width, 0.75 * scale, 0.14 / width, (height - 0.75) * scale))
        figure.colorbar(image, cax=beside, label="attention (share, 0 to 1)")
    figure.text(0.2 / width, 1 - 0.1 * scale, "\n".join(title), va="top", fontsize=10, fontweight="bold")
    figure.text(0.2 / width, 0.08 * scale, ATTENTION_KEY, fontsize=8)
    return figure


def _boxes_by_kind(boxes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[list[float]], str]]:
    out: dict[str, tuple[list[list[float]], str]] = {}
    for box in boxes:
        if box["kind"] in out or len(out) < 8:
            out.setdefault(box["kind"], ([], box["label"]))[0].append(box["box"])
    merged: dict[str, tuple[list[list[float]], str]] = {}
    for kind, (areas, shown) in out.items():  # what lies at the same place is one thing to look at
        same = next((name for name, (others, _) in merged.items() if others == areas), None)
        if same is not None:
            merged[f"{same}, {kind}"] = merged.pop(same)
        else:
            merged[kind] = (areas, shown)
    return merged


def _inside(shares: Sequence[float], grid: tuple[int, int], boxes: Sequence[Sequence[float]]) -> float:
    """Share of attention on the tokens whose middle lies in one of `boxes`."""
    rows, columns = grid
    total = sum(shares) or 1.0
    inside = 0.0
    for place, share in enumerate(shares):
        y, x = (place // columns + 0.5) / rows, (place % columns + 0.5) / columns
        inside += share * any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
    return inside / total


def _show_picture(axes: Axes, picture: Image.Image | None, shares: Sequence[float], grid: tuple[int, int]) -> None:
    """`picture` in a square, faded where `shares` are small; grey where there is none."""
    shown = picture or Image.new("RGB", (8, 8), (200, 200, 200))
    shown = shown.resize((240, 240), Image.Resampling.BILINEAR)
    relative = Image.fromarray(np.float32(relative_attention(shares, grid) ** 0.7))
    clear = np.asarray(relative.resize(shown.size, Image.Resampling.BILINEAR))[..., None]
    kept = 1 - VEIL * (1 - clear)
    axes.imshow(np.uint8(np.asarray(shown) * kept + VEIL_GREY * (1 - kept)), extent=(0, 1, 0, 1))
    if picture is None:
        axes.text(
            0.5,
            0.5,
            "picture not found",
            ha="center",
            va="center",
            fontsize=8,
            color="#111111",
            bbox={"facecolor": "#fefefe", "edgecolor": "none"},
        )


# ---- all of them

FIGURES: dict[str, tuple[str, Draw]] = {
    "training/losses": ("Loss terms of both phases over their optimizer steps.", losses),
    "training/learning_rates": ("Learning rate of each component over both phases.", learning_rates),
    "reasoning_quality/metrics_over_checkpoints": (
        "The four metrics of each evaluated checkpoint, with their targets.",
        metrics_over_checkpoints,
    ),
    "reasoning_quality/consistency_scores": (
        "Reasoning consistency of each evaluated checkpoint; adjacent similarity, the guide's formula, beside it.",
        consistency_scores,
    ),
    "reasoning_quality/step_distribution": ("How many steps the chains have.", step_distribution),
    "reasoning_quality/completeness_heatmap": (
        "Share of the expected steps that are there, by type of step and group of questions.",
        completeness_heatmap,
    ),
    "reasoning_quality/reliability": ("How often answers are right, by how sure the model says it is.", reliability),
    "comparison/with_vs_without_reasoning": ("Right answers with and without reasoning.", with_vs_without_reasoning),
    "comparison/reasoning_impact": ("Points of accuracy that reasoning adds.", reasoning_impact),
    "comparison/faithfulness": ("Whether the answers come from the chains.", faithfulness),
}
"""Path under `visualizations/`, without suffix -> what it shows, and the function that draws it."""


def draw_all(record: RunRecord) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures by their names in `FIGURES`, and for the others why there is nothing to draw."""
    drawn, missing = {}, {}
    with style():
        for name, (_, draw) in FIGURES.items():
            try:
                drawn[name] = draw(record)
            except NoData as reason:
                missing[name] = str(reason)
    return drawn, missing


def write_figures(record: RunRecord, folder: str | Path) -> dict[str, Path]:
    """Write every figure of `record` as PNG below `folder`, and remove those there is nothing for any more."""
    return save_figures(draw_all(record)[0], Path(folder))


def save_figures(drawn: Mapping[str, Figure], folder: Path) -> dict[str, Path]:
    paths = {}
    with style():
        for name in FIGURES:
            path = folder / f"{name}.png"
            if name in drawn:
                _save(drawn[name], path)
                paths[name] = path
            else:
                path.unlink(missing_ok=True)
    return paths


def write_attention(samples: Sequence[Sample], folder: str | Path, roots: Sequence[Path] = ()) -> dict[str, Path]:
    """Attention of `samples` as PNG files in `reasoning_attention/` and `multimodal_grounding/` below `folder`."""
    paths: dict[str, Path] = {}
    with style():
        for part, draw in (
            ("reasoning_attention", reasoning_attention),
            ("multimodal_grounding", multimodal_grounding),
        ):
            place = Path(folder) / "attention_maps" / part
            with run_dir.naming_unwritten(place):
                place.mkdir(parents=True, exist_ok=True)
            for old in place.glob("*.png"):
                old.unlink()
            for number_, sample in enumerate(samples):
                if sample.attention is None or not sample.attention.steps:
                    continue
                path = place / f"{file_name(number_, sample.id)}.png"
                _save(draw(sample, open_picture(sample.image, roots)), path)
                paths[f"attention_maps/{part}/{path.stem}"] = path
    return paths


def _save(figure: Figure, path: Path) -> None:
    _lay_out(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    with run_dir.naming_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())


def _lay_out(figure: Figure) -> None:
    """Place everything once: it takes longer than drawing, and each saving would do it twice."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def inline_svg(figure: Figure, name: str) -> str:
    """The figure for a page: its text takes the page's colour and can be selected, and it names no address."""
    out = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        _lay_out(figure)
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="[A-Za-z0-9_.]+"', "<g", svg)  # the same ids in every figure, and nothing refers to them
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _samples(record: RunRecord) -> list[Sample]:
    if not record.samples:
        raise NoData("No samples were recorded; evaluate with --save_reasoning_samples.")
    return record.samples


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan

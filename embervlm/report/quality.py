"""Figures of an evaluation: the quality of the chains, and what they add.

Each function returns a figure, or raises `NoData` with a sentence for the reader.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from embervlm.report.drawing import (
    BAR,
    BLUE,
    DIM,
    GREEN,
    INK,
    NARROW_INCHES,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    NoData,
    heatmap,
    label,
    legend_below,
    panels,
    rows_of_bars,
    wilson,
)
from embervlm.report.recorded import RunRecord, Sample, by_difficulty, groups, part

MAX_GROUPS = 12
T = TypeVar("T")


# ---- quality of the reasoning


def step_distribution(record: RunRecord, narrow: bool = False) -> Figure:
    """Steps per chain, of right and wrong answers, against the gold chains."""
    samples = _samples(record)
    figure, (axes,) = panels(5.4, 3.7, narrow=narrow)
    counts = {right: Counter(len(s.steps) for s in samples if s.correct == right) for right in (True, False)}
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
            label="answer right" if correct else "answer wrong",
            **BAR,
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
    axes.set_xlabel("steps, conclusion included (number)")
    axes.set_ylabel("chains (number)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    legend_below(figure, dict(zip(*reversed(axes.get_legend_handles_labels()))))
    return figure


def completeness_heatmap(record: RunRecord, narrow: bool = False) -> Figure:
    """Coverage of each expected type of step, by complexity and kind of question."""
    samples = [sample for sample in _samples(record) if sample.completeness_by_type]
    if not samples:
        raise NoData("The samples do not record completeness by step type; evaluate again with this version.")
    types = list(dict.fromkeys(name for sample in samples for name in sample.completeness_by_type))[:MAX_GROUPS]
    parted = [groups(samples, of) for of in ("complexity", "question_kind")]
    columns = {"all": samples, **_once(parted[0], parted[1])}
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
    sizes = [f"{label(name, 20)}\n(n={len(of)})" for name, of in columns.items()]
    if narrow:  # a row for each group, and no scale: the squares have their numbers
        figure, (axes,) = panels(NARROW_INCHES, 1.5 + 0.42 * len(columns))
        heatmap(axes, shares.T, fontsize=9)
        axes.set_xticks(range(len(types)), [label(name) for name in types], rotation=40, ha="right")
        axes.set_yticks(range(len(columns)), sizes)
    else:
        figure, (axes,) = panels(max(9.0, 2.6 + 0.9 * len(columns)), max(2.4, 1.5 + 0.5 * len(types)))
        image = heatmap(axes, shares, fontsize=9)
        axes.set_xticks(range(len(columns)), sizes, rotation=0 if len(columns) <= 7 else 30)
        axes.set_yticks(range(len(types)), [label(name) for name in types])
        figure.colorbar(image, ax=axes, label="covered (share, 0 to 1)", fraction=0.05)
    axes.set_title("Expected steps covered")
    return figure


def _once(first: Mapping[str, T], second: Mapping[str, T]) -> dict[str, T]:
    """The groups of both partings; those that hold the same stand there once, under both names."""
    out: dict[str, T] = {}
    left = dict(second)
    for name, held in first.items():
        same = next((other for other, also in left.items() if also == held), None)
        out[name if same in (None, name) else f"{name}, {same}"] = held
        left.pop(same or "", None)
    return out | {f"{name} " if name in out else name: held for name, held in left.items()}


def reliability(record: RunRecord, narrow: bool = False) -> Figure:
    """Share of right answers by the model's confidence."""
    calibration = part(record.result, "calibration")
    kept = [
        (found["confidence"], found["accuracy"], found["num"]) for found in calibration.get("bins", []) if found["num"]
    ]
    if not kept:
        raise NoData("The evaluation has no calibration.")
    figure = Figure(figsize=(NARROW_INCHES if narrow else 5.4, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=INK, linestyle=(0, (6, 3)), linewidth=1.1, label="perfectly calibrated")
    upper.plot(
        [c for c, _, _ in kept], [a for _, a, _ in kept], color=BLUE, marker="o", label="bin of answers", zorder=3
    )
    for confidence, accuracy, count in kept:
        low, high = wilson(accuracy, count)
        upper.plot([confidence, confidence], [low, high], color=BLUE, linewidth=1.2)
    lower.bar([c for c, _, _ in kept], [n for _, _, n in kept], 0.03, color=BLUE, **BAR)
    known = [
        f"{name} {value:.3f}"
        for name, key in (("ECE", "ece"), ("unscaled", "ece_uncalibrated"), ("temperature", "temperature"))
        if (value := calibration.get(key)) is not None
    ]
    upper.set_title(
        "\n".join(["Reliability of the confidence", *textwrap.wrap(", ".join(known), 30 if narrow else 60)])
    )
    upper.set_ylabel("right answers (share)")
    upper.set_xlim(0, 1.02)
    upper.set_ylim(0, 1.04)
    upper.legend(loc="upper left" if not narrow else "lower right")
    lower.set_xlabel("confidence (share, mean of a bin)")
    lower.set_ylabel("answers\n(number)")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def _samples(record: RunRecord) -> list[Sample]:
    if not record.samples:
        raise NoData("No samples were recorded; evaluate with --save_reasoning_samples.")
    return record.samples


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


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
LOOKS = dict(
    zip(CONDITIONS, ((BLUE, ""), (SKY, "||"), (ORANGE, "////"), (YELLOW, "\\\\\\\\"), (PURPLE, "xx"), (GREEN, "--")))
)
"""Colour and hatch of each."""


def with_vs_without_reasoning(record: RunRecord, narrow: bool = False) -> Figure:
    """Accuracy on all questions, with reasoning and without, and without the right picture."""
    found = [
        (name, shown, value) for name, shown in CONDITIONS.items() if (value := record.metrics.get(name)) is not None
    ]
    if len(found) < 2:
        raise NoData("The evaluation has no comparisons; evaluate without turning the baselines off.")
    figure, (axes,) = panels(9.0, 1.1 + 0.42 * len(found), narrow=narrow)
    for row, (name, _, value) in enumerate(found):
        color, hatch = LOOKS[name]
        axes.barh(row, 100 * value, 0.7, color=color, hatch=hatch, **BAR)
        low, high = record.intervals.get(name, (value, value))
        axes.plot([100 * low, 100 * high], [row, row], color=INK, linewidth=1.4)
        axes.text(100 * max(high, value) + 2, row, f"{100 * value:.1f}", va="center", fontsize=9)
    axes.set_title("All questions")
    rows_of_bars(axes, [shown.replace(", ", ",\n") if narrow else shown for _, shown, _ in found])
    axes.set_xlim(0, 119)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("right answers (%; 95% interval)" if record.intervals else "right answers (%)")
    return figure


def reasoning_impact(record: RunRecord, narrow: bool = False) -> Figure:
    """What reasoning adds to the accuracy, in points, by kind of question and by complexity."""
    grouped = _compared(record)
    if not grouped:
        raise NoData(
            "The evaluation compares no kinds of questions with the no-reasoning baseline; train it "
            "(--stages baseline) and evaluate again."
        )
    rows = max(len(table) for table in grouped.values())
    figure, shown = panels(9.0, 1.7 + 0.5 * rows, len(grouped), narrow=narrow)
    for axes, (title, table) in zip(shown, grouped.items()):
        ordered = sorted(table.items(), key=lambda item: item[1]["no_reasoning"] - item[1]["reasoning"])
        for row, (_, entry) in enumerate(ordered):
            gain = 100 * (entry["reasoning"] - entry["no_reasoning"])
            spread = 196 * math.sqrt(
                sum(entry[key] * (1 - entry[key]) for key in ("reasoning", "no_reasoning")) / max(entry["num"], 1)
            )
            color, hatch = (BLUE, "") if gain >= 0 else (ORANGE, "////")
            axes.barh(row, gain, 0.6, color=color, hatch=hatch, **BAR)
            axes.plot([gain - spread, gain + spread], [row, row], color=INK, linewidth=1.4)
            axes.annotate(
                f"{gain:+.1f}\n({100 * entry['no_reasoning']:.0f} to {100 * entry['reasoning']:.0f}%)",
                (max(gain + spread, 0), row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("points gained (95% interval)")
        axes.set_title(title)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.45 * (right - left))  # room for the numbers
        rows_of_bars(axes, [f"{label(name, 20)}\n(n={entry['num']:.0f})" for name, entry in ordered])
    return figure


def _compared(record: RunRecord) -> dict[str, dict[str, dict[str, float]]]:
    """Title -> group -> `num`, `reasoning` and `no_reasoning`, where both were measured.

    Where each kind of question is one complexity, there is one table of them: the same bars are not drawn twice.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for title, key in (("By kind of question", "accuracy_by_question_kind"), ("By complexity", "impact_by_complexity")):
        rows = part(record.result, key).items()
        table = {name: row for name, row in rows if None not in (row.get("reasoning"), row.get("no_reasoning"))}
        if table:
            largest = sorted(table.items(), key=lambda item: -item[1]["num"])[:MAX_GROUPS]
            out[title] = dict(sorted(largest, key=lambda item: by_difficulty(item[0])))
    if len(out) == 2:
        both = _once(*reversed(out.values()))
        if len(both) == max(map(len, out.values())):
            return {"By complexity and kind": both}
    return out


def faithfulness(record: RunRecord, narrow: bool = False) -> Figure:
    """Whether the answer comes from the chain: cut chains, the gain of each step, and chains about another scene."""
    cut = part(record.result, "faithfulness", "truncated")
    kept = sorted((float(share), value) for share, value in cut.items() if value is not None)
    gains = [
        gain for gain in part(record.result, "faithfulness", "information_gain").get("per_step", []) if gain is not None
    ]
    prefix = part(record.result, "faithfulness", "forced_prefix")
    asked = {"text": "follows_text", "picture": "follows_picture", "neither": "neither"}
    follows = {shown: value for shown, name in asked.items() if (value := prefix.get(name)) is not None}
    draw: list[Callable[[Axes], None]] = []
    if kept:
        full = record.metrics.get("final_answer_accuracy")
        draw.append(partial(_accuracy_of_cut_chains, points=[*kept, (1.0, full)] if full is not None else kept))
    if gains:
        draw.append(partial(_gain_of_steps, gains=gains))
    if follows:
        draw.append(partial(_what_answers_follow, follows=follows, total=prefix.get("num")))
    if not draw:
        raise NoData("The evaluation measured no faithfulness; evaluate with it (docs/evaluation.md).")
    figure, shown = panels(3.3 * len(draw) + 0.4, 3.4, len(draw), narrow=narrow)
    for axes, one in zip(shown, draw):
        one(axes)
    return figure


def _accuracy_of_cut_chains(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], color=BLUE, marker="o", clip_on=False)
    axes.set(title="Chain cut short", xlabel="of the chain kept (%)", ylabel="right answers (%)")
    axes.set(xlim=(0, 104), ylim=(0, 104))


def _gain_of_steps(axes: Axes, gains: Sequence[float]) -> None:
    axes.bar(range(1, len(gains) + 1), gains, 0.7, color=GREEN, hatch="||", **BAR)
    axes.set(title="What the chain adds", xlabel="steps given (number)", ylabel="gain on gold answer (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color=INK, linewidth=1)


def _what_answers_follow(axes: Axes, follows: Mapping[str, float], total: int | None) -> None:
    looks = ((BLUE, ""), (ORANGE, "////"), (DIM, "--"))
    for place, (value, (color, hatch)) in enumerate(zip(follows.values(), looks)):
        axes.bar(place, 100 * value, 0.7, color=color, hatch=hatch, **BAR)
        axes.text(place, 100 * value + 2, f"{100 * value:.0f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(follows)), list(follows))
    axes.set(title="Another scene's facts", ylabel="answers (%)", ylim=(0, 112))
    axes.set_xlabel("answer follows" + (f" (n={total:.0f})" if total else ""))

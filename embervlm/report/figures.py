"""The figures of a run, drawn from what it has recorded, as PNG files and for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from embervlm import run_dir
from embervlm.report.attention import multimodal_grounding, reasoning_attention
from embervlm.report.curves import consistency_scores, learning_rates, losses, metrics_over_checkpoints, reinforcement
from embervlm.report.drawing import INK, NoData, style
from embervlm.report.pictures import file_name, open_picture
from embervlm.report.quality import (
    completeness_heatmap,
    faithfulness,
    reasoning_impact,
    reliability,
    step_distribution,
    with_vs_without_reasoning,
)
from embervlm.report.recorded import RunRecord, Sample
from embervlm.report.things import is_measured

ATTENTION_SAMPLES = 8
"""For how many samples the attention is drawn into files; the page shows it for every one."""
Draw = Callable[[RunRecord, bool], Figure]

FIGURES: dict[str, tuple[str, Draw]] = {
    "training/losses": ("Loss terms of each phase over their optimizer steps.", losses),
    "training/learning_rates": ("Learning rate of each component over the phases.", learning_rates),
    "training/reinforcement": ("Rewards, groups, entropy and length of the chains that phase 3 drew.", reinforcement),
    "reasoning_quality/consistency_scores": (
        "Reasoning consistency of each evaluated checkpoint; adjacent similarity, the guide's formula, beside it.",
        consistency_scores,
    ),
    "reasoning_quality/metrics_over_checkpoints": (
        "The other metrics with a target, of each evaluated checkpoint.",
        metrics_over_checkpoints,
    ),
    "reasoning_quality/step_distribution": ("How many steps the chains have.", step_distribution),
    "reasoning_quality/completeness_heatmap": (
        "Share of the expected steps that the chains contain, by type of step and group of questions.",
        completeness_heatmap,
    ),
    "reasoning_quality/reliability": ("Share of right answers by the model's confidence.", reliability),
    "comparison/with_vs_without_reasoning": (
        "Right answers to all questions, with and without reasoning, and without the right picture.",
        with_vs_without_reasoning,
    ),
    "comparison/reasoning_impact": (
        "Points of accuracy that reasoning adds to the baseline of the same samples, by group of questions.",
        reasoning_impact,
    ),
    "comparison/faithfulness": ("Whether the answers come from the chains.", faithfulness),
}
"""Path under `visualizations/`, without suffix -> what it shows, and the function that draws it, wide or narrow."""


def draw_all(record: RunRecord, *, narrow: bool = False) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures by their names in `FIGURES`, and for the others why there is nothing to draw.

    `narrow`: as a phone shows them, with their panels below each other.
    """
    drawn, missing = {}, {}
    with style():
        for name, (_, draw) in FIGURES.items():
            try:
                drawn[name] = draw(record, narrow)
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
    """Attention of `samples` as PNG files in `reasoning_attention/` and `multimodal_grounding/` below `folder`.

    None of a sample whose things have no known places: see `things.is_measured`.
    """
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
                if not is_measured(sample):
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

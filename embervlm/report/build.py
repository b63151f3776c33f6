"""`embervlm report`: figures and pages of a run, from its recorded files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.report.figures import ATTENTION_SAMPLES, FIGURES, draw_all, inline_svg, save_figures, write_attention
from embervlm.report.pages import NUM_SAMPLES, best_examples, failure_cases, index_page, samples_page
from embervlm.report.pictures import picture_roots
from embervlm.report.recorded import read_run
from embervlm.report.things import is_measured
from embervlm.run_dir import visualizations_dir


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report."""

    index: Path
    figures: dict[str, Path]
    """Name -> PNG of every figure, the attention maps included."""
    config: Mapping[str, Any]
    """The settings of the run."""
    notices: list[str]
    """The missing files, and the places that were searched."""
    result_path: Path | None
    """The evaluation that is shown."""


def write_report(folder: str | Path, *, results: str | Path | None = None, num_samples: int = NUM_SAMPLES) -> Report:
    """Write `stage4/visualizations/` of the run in `folder` anew: the guide's tree, and `index.html`.

    Args:
        results: the evaluation to show; see `recorded.read_run` for where it is looked for without.
        num_samples: how many samples the page shows.
    Raises:
        ReportError: nothing to report, or a file of another version; see `recorded.read_run`.
    """
    record = read_run(folder, results=results)
    out = visualizations_dir(record.folder)
    roots = picture_roots(record.folder, record.config.get("reasoning_data"))
    drawn, missing = draw_all(record)
    narrow, _ = draw_all(record, narrow=True)
    figures = save_figures(drawn, out)
    best, failed = best_examples(record.samples), failure_cases(record.samples)
    chosen = [s for found in (best, failed) for s in [s for s in found if is_measured(s)][: ATTENTION_SAMPLES // 2]]
    figures |= write_attention(chosen, out, roots)
    back = "../index.html"
    samples_page(
        best,
        out / "samples" / "best_reasoning_examples.html",
        f"Best reasoning examples: {record.name}",
        lead="right answers with the best chains, of every kind of question",
        back=back,
        roots=roots,
        result=record.result,
        nothing="No sample with a right answer and a chain was recorded.",
    )
    samples_page(
        failed,
        out / "samples" / "failure_cases.html",
        f"Failure cases: {record.name}",
        lead="wrong answers, the most confident first, then right ones whose chains lost points",
        back=back,
        roots=roots,
        result=record.result,
        nothing="No failure was recorded: every answer is right and no chain lost points."
        if record.samples
        else "No samples were recorded.",
    )
    index = index_page(
        record,
        out / "index.html",
        svgs={name: (inline_svg(drawn[name], name), inline_svg(narrow[name], f"narrow {name}")) for name in drawn},
        captions={name: caption for name, (caption, _) in FIGURES.items()},
        missing=missing,
        num_samples=num_samples,
        roots=roots,
    )
    return Report(
        index=index, figures=figures, config=record.config, notices=record.notices, result_path=record.result_path
    )

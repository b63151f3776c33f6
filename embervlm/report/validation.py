"""The report of `embervlm data validate` as text and as a page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from embervlm.config import ConfigError
from embervlm.run_dir import write_json_atomic, write_text_atomic

THUMBNAIL_PIXELS = 176
MOST_SHOWN = 5
"""Findings that a terminal shows."""
MAX_BARS = 20
"""Of a count with more values the rest is one bar."""


def page_beside(output_report: Path) -> Path:
    """Where the page goes; ConfigError if that is where the report itself would be."""
    page = output_report.with_suffix(".html")
    if page == output_report:
        raise ConfigError(
            f"--output_report {output_report}: the HTML page is written beside it; choose "
            f"a name that ends in .txt or .json"
        )
    return page


def write_reports(report: Mapping[str, Any], output_report: str | Path) -> Path:
    """Write `output_report` (JSON for the suffix .json, else text) and, beside it, an HTML page; the page's path."""
    output_report = Path(output_report)
    page = page_beside(output_report)
    try:
        if output_report.suffix == ".json":
            write_json_atomic(output_report, report)
        else:
            write_text_atomic(output_report, report_text(report))
        write_text_atomic(page, report_page(report))
    except OSError as error:
        raise ConfigError(
            f"{output_report}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from error
    return page


# ---- text


def report_text(report: Mapping[str, Any]) -> str:
    """Summary, distributions, and every finding on a line of its own."""
    lines = [summary(report), ""]
    for name, counts in report["counts"].items():
        lines += [f"{name}:", *(f"  {bar['label']:<48.48} {bar['count']:>9,}" for bar in count_bars(counts)), ""]
    for name, histogram in report["histograms"].items():
        if histogram is not None:
            lines += [f"{name}: {_spread(histogram)}", ""]
    for kind, about in report["kinds"].items():
        lines.append(f"{about['title']} ({about['count']:,}, {_gravity(about)})")
        lines += [problem_line(report, found) for found in report["problems"] if found["kind"] == kind]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def summary(report: Mapping[str, Any]) -> str:
    """What a terminal shows: how many records, whether they train, how many findings of each kind."""
    distinct, blind, length = report["distinct"], report["blind"], report["length"]
    lines = [
        f"{report['data_file']}: {report['num_records']:,} records, {distinct['pictures']:,} different pictures, "
        f"{report['num_text_only']:,} text only, {distinct['chains']:,} different chains",
        "splits: " + ", ".join(f"{name} {count:,}" for name, count in report["splits"].items()),
    ]
    lines += filter(None, [report["answers_in_words"]])
    if blind.get("best") is not None:
        lines.append(
            f"answering from the instruction alone, test split: {blind['best']:.1%} by the best guesser, "
            f"{blind['in_hindsight']:.1%} at most"
        )
    if length["share_over"] is not None:
        lines.append(
            f"longer than {length['max_reasoning_length']} tokens: {length['share_over']:.1%} "
            f"({length['counted_with']})"
        )
    lines += [
        f"{about['count']:>8,}  {about['title']}" + ("  [stops training]" if about["stops_training"] else "")
        for about in report["kinds"].values()
    ]
    lines += [line for name in ("several_pictures_in_words", "unused_in_words") if (line := report[name])]
    return "\n".join([*lines, verdict(report)])


def first_findings(report: Mapping[str, Any]) -> list[str]:
    """Lines about the first findings that stop training, for a terminal or a job's log."""
    stopping = [found for found in report["problems"] if report["kinds"][found["kind"]]["stops_training"]]
    lines = [problem_line(report, found) for found in stopping[:MOST_SHOWN]]
    more = len(stopping) - MOST_SHOWN
    return lines + ([f"... and {more:,} more that stop training; the report has them all"] if more > 0 else [])


def verdict(report: Mapping[str, Any]) -> str:
    if not report["trains"]:
        if not report["num_stopping"]:  # findings about files alone
            return "these findings would stop training; correct them"
        told = f"{report['num_stopping']:,} records would stop training; correct or delete them"
        if any(
            found["field"] == "reasoning" and found["what"].startswith("is missing") for found in report["problems"]
        ):
            told += ". Phase 3 learns from answers alone: for it, say `--without_chains`"
        return ". ".join(filter(None, (told, report["other_domain_in_words"])))
    if report["num_with_findings"]:
        return f"every record can be used for training; {report['num_with_findings']:,} of them are worth a look"
    return "every record can be used for training, and nothing was found"


def problem_line(report: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    where = f"{report['data_file']} record {found['number']}" if found["number"] else report["data_file"]
    where = found.get("where", where)
    name = f"{found['field']}: " if found["field"] else ""
    line = " ".join(f"{where}: {name}{found['what']}; {found['fix']}".split())
    return "".join(character if character.isprintable() else "?" for character in line)


def _gravity(about: Mapping[str, Any]) -> str:
    return "stops training" if about["stops_training"] else "trains"


def _spread(histogram: Mapping[str, Any]) -> str:
    return (
        f"{histogram['min']:,} to {histogram['max']:,}, half below {histogram['median']:,.0f}, "
        f"19 of 20 below {histogram['p95']:,.0f}"
    )


# ---- page


def report_page(report: Mapping[str, Any]) -> str:
    """One HTML file: styles, bars and thumbnails are in it. All that comes from the data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thumbnail"] = thumbnail
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    bars = {name: count_bars(counts) for name, counts in report["counts"].items()}
    for name, histogram in report["histograms"].items():
        if histogram is not None:
            bars[name] = count_bars({_span(low, high): count for low, high, count in histogram["bins"]})
    return environment.get_template("validation.jinja").render(report=report, verdict=verdict(report), bars=bars)


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count_bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """`label`, `count`, `share` of all and `width` (in [0, 1], 1 for the longest bar) for each bar."""
    shown = dict(list(counts.items())[: MAX_BARS if len(counts) > MAX_BARS + 1 else None])
    if rest := len(counts) - len(shown):
        shown[f"{rest:,} others"] = sum(counts.values()) - sum(shown.values())
    total, most = sum(shown.values()) or 1, max(shown.values(), default=1)
    return [
        {"label": label, "count": count, "share": count / total, "width": count / most}
        for label, count in shown.items()
    ]


def thumbnail(path: str) -> str:
    """The picture as a `data:` URI of a JPEG; empty where it has gone or cannot be read."""
    with suppress(Exception), Image.open(path) as image:  # decoders raise what they like; the page goes without
        image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        encoded = io.BytesIO()
        small.save(encoded, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    return ""

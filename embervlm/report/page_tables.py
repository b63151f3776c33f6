"""The tables of a run's page. On a narrow page the rows of the wide ones are blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from embervlm.meanings import MEANINGS
from embervlm.report.recorded import CHAIN_METRICS, RunRecord, flat, part

MAX_CELL = 500
"""Characters of a setting or a name that a table shows."""
NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the template lays out. A row's first cell names it; what is not `Markup` is escaped."""

    caption: str = ""
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Collection[str] = ()
    """The heads over words; the others, but the first, stand over numbers."""
    chosen: Collection[int] = ()
    """Rows to bring out."""

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def stacks(self) -> bool:
        """Whether it is too wide for a narrow page, which then shows each row as a block."""
        return len(self.heads) > 4 or bool(self.texts)


def words(name: str) -> str:
    return name.replace("_", " ")


def share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def short(value: str | None, most: int) -> str:
    value = value or ""
    return value if len(value) <= most else f"{value[:most]}... ({len(value) - most:,} more characters)"


def pill(met: bool | None) -> Markup:
    """Whether a target is met, by a sign, a word and a colour."""
    if met is None:
        return Markup('<span class="pill">not measured</span>')
    return Markup('<span class="pill {}">{} {}</span>').format(*(MET if met else MISSED))


MET, MISSED = ("right", "\u2713", "met"), ("wrong", "\u2717", "missed")


def metrics(record: RunRecord) -> Table:
    """Every metric, those with a target first."""
    rows = []
    for name in [*record.targets, *(name for name in record.metrics if name not in record.targets)]:
        interval, target = record.intervals.get(name), record.targets.get(name)
        rows.append(
            (
                _explained(name),
                share(record.metrics.get(name)),
                f"{share(interval[0])} to {share(interval[1])}" if interval else NOTHING,
                Markup("{} {}").format(target["target"], pill(target["met"])) if target else NOTHING,
            )
        )
    heads = ("Metric", "Value", "95% interval", "Target")
    return Table(caption="Every metric", heads=heads, rows=rows, texts=("Target",))


def _explained(name: str) -> str:
    """The name of a metric, what it says, and a link to what else there is to say."""
    if name not in MEANINGS:
        return short(words(name), MAX_CELL)
    meaning = MEANINGS[name]
    return meaning_link(name) + Markup(' <span class="says-what">{} {}</span>').format(
        in_code(meaning.says), meaning.good
    )


def in_code(text: str) -> Markup:
    """Our own text with what stands between backquotes as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def meaning_link(name: str, shown: str = "") -> Markup:
    """`shown` as a link to the entry of `name` among the meanings; the words of `name` where there is none."""
    shown = shown or words(name)
    if name not in MEANINGS:
        return Markup("{}").format(shown)
    return Markup('<a class="meaning" href="#meaning-{}">{}</a>').format(name, shown)


def checkpoints(record: RunRecord) -> Table:
    rows = [
        (
            item.name,
            str(item.phase),
            number(item.step),
            *(share(item.metrics.get(name)) for name in CHAIN_METRICS),
            number(item.num_samples or None),
            "\u25cf selected" if item.selected else item.reason or NOTHING,
        )
        for item in record.checkpoints
    ]
    heads = ("Checkpoint", "Phase", "Steps", *map(words, CHAIN_METRICS), "Records", "Selection")
    chosen = [place for place, item in enumerate(record.checkpoints) if item.selected]
    return Table(caption="Evaluated checkpoints", heads=heads, rows=rows, texts=("Selection",), chosen=chosen)


def quality(result: Mapping[str, Any]) -> list[Table]:
    """Figures by answer, of the step validator, and of the attention, as far as they were measured."""
    by_answer = [
        (short(name, 200), share(row["precision"]), share(row["recall"]), number(row["support"]))
        for name, row in part(result, "per_candidate").items()
    ]
    validator = [(short(words(name), 200), share(value)) for name, value in part(result, "validator").items()]
    attention = [
        (short(words(name), 200), number(row.get("num")), share(row.get("share")), share(row.get("chance")))
        for name, row in part(result, "attention").items()
    ]
    tables = [
        Table(
            caption=meaning_link("per_candidate", "By answer"),
            heads=("Answer", "Precision", "Recall", "Records"),
            rows=by_answer,
        ),
        Table(
            caption=meaning_link("validator", "Step validator"),
            heads=("Kind of invalid step", "Balanced accuracy"),
            rows=validator,
        ),
        _own_steps(result),
        Table(
            caption=meaning_link("attention", "Attention of the steps that read a thing"),
            heads=("Thing", "Steps", "Share on it", "Of the picture"),
            rows=attention,
        ),
    ]
    return [table for table in tables if table]


def _own_steps(result: Mapping[str, Any]) -> Table:
    found = {name: row for name in ("greedy", "drawn") if (row := part(result, "own_steps", name))}
    shares = ("balanced_accuracy", "auroc", "right_chains_passed", "wrong_chains_passed")
    names = {name: words(name).capitalize() for name in shares} | {"auroc": "AUROC"}
    rows = [("Wrong steps", *(number(row.get("wrong")) for row in found.values()))]
    rows += [(names[name], *(share(row.get(name)) for row in found.values())) for name in shares]
    caption = meaning_link("own_steps", "Step validator on the model's own chains")
    return Table(caption=caption, heads=("Chains", *found), rows=rows if found else ())


def faithfulness(result: Mapping[str, Any]) -> Table:
    """Every figure of the block, under a readable name."""
    rows = [
        (words(name.replace(".", ": ", 1)), short(value, 300)) for name, value in flat(part(result, "faithfulness"))
    ]
    return Table(heads=("Figure", "Value"), rows=rows)


def settings(record: RunRecord) -> Table:
    rows = [(name, short(value, MAX_CELL)) for name, value in flat(record.config)]
    return Table(heads=("Setting", "Value"), rows=rows, texts=("Value",))

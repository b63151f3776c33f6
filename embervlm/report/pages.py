"""The pages of a run: one that ties it together, and galleries of samples. Each needs no other file and no network.

Everything that a run has recorded is foreign: the template engine escapes it, the script puts it in as text only, and
the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from embervlm.meanings import MEANINGS
from embervlm.report import page_tables
from embervlm.report.page_tables import short
from embervlm.report.pictures import overlay_png, picture_uris
from embervlm.report.recorded import CHAIN_METRICS, RunRecord, Sample, as_sample, flat, part, training_name
from embervlm.report.things import UNKNOWN, is_measured, looks_of
from embervlm.run_dir import write_text_atomic

NUM_SAMPLES = 200
"""How many samples the page of a run shows."""
NUM_EXAMPLES = 12
"""How many a gallery shows."""
MAX_PICTURE_BYTES = 1_900_000
"""Of all pictures of a page, as text; they are made smaller until they fit."""
MAX_TEXT = 3_000
"""Characters of one text that a page shows."""
MAX_STEPS = 64
NUM_GROUPS, NUM_GROUP_CHAINS = 10, 16
"""How many groups of phase 3 a page shows, and how many chains of each."""
SECTIONS = (
    ("metrics", "Metrics"),
    ("training", "Training"),
    ("checkpoints", "Checkpoints"),
    ("quality", "Quality"),
    ("impact", "With and without"),
    ("faithful", "Faithfulness"),
    ("samples", "Samples"),
    ("compare", "Side by side"),
    ("meanings", "What it means"),
    ("config", "Configuration"),
)
_HERE = Path(__file__).parent


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["share"] = page_tables.share
    environment.filters["width"] = lambda value: f"{100 * min(max(value, 0), 1):.1f}"
    environment.filters["words"] = page_tables.words
    environment.filters["meaning"] = page_tables.meaning_link
    environment.filters["code"] = page_tables.in_code
    environment.filters["pill"] = page_tables.pill
    return environment


def _render(template: str, **values: Any) -> str:
    css = (_HERE / "style.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(css=Markup(css), **values)


# ---- galleries


def samples_page(
    samples: Sequence[Sample | Mapping[str, Any]],
    path: str | Path,
    title: str,
    *,
    lead: str = "",
    nothing: str = "There is no sample to show.",
    back: str | None = None,
    roots: Sequence[Path] = (),
    result: Mapping[str, Any] | None = None,
    unmeasured: bool = False,
) -> Path:
    """Write a page with one card per sample: picture, chain, attention and validator score of each step, answers.

    Args:
        samples: as an evaluation writes them.
        lead: a few words on what was chosen.
        back: address of the run's page, seen from `path`.
        roots: folders that relative picture paths may start from.
        result: the evaluation that the samples come from, where there is one.
        unmeasured: show attention also where nobody knows what is where in the picture; the page then says so.
    """
    shown = [_shortened(as_sample(s) if isinstance(s, Mapping) else s) for s in samples]
    uris = picture_uris([s.image for s in shown if s.image], roots, max_bytes=MAX_PICTURE_BYTES)
    page = _render(
        "samples.jinja",
        title=title,
        samples=shown,
        lead=lead,
        nothing=nothing,
        back=back,
        script_source="'none'",
        pictures={place: uris[s.image] for place, s in enumerate(shown) if s.image in uris},
        veils=[_veils(s) if unmeasured or is_measured(s) else [] for s in shown],
        looks=[looks_of(s, MAX_STEPS) for s in shown],
        no_share=UNKNOWN,
        validator_note=validator_note(result),
    )
    write_text_atomic(path, page)
    return Path(path)


def best_examples(samples: Sequence[Sample], most: int = NUM_EXAMPLES) -> list[Sample]:
    """Right answers with the best chains, taken from every kind and complexity in turn."""
    ranked = sorted(
        (s for s in samples if s.correct and s.steps),
        key=lambda s: (not is_measured(s), -_chain_score(s), -(s.confidence or 0)),
    )
    by_group: dict[tuple[str | None, str | None], list[Sample]] = {}
    for sample in ranked:
        by_group.setdefault((sample.question_kind, sample.complexity), []).append(sample)
    out: list[Sample] = []
    while len(out) < min(most, len(ranked)):
        out += [group.pop(0) for group in by_group.values() if group]
    return out[:most]


def failure_cases(samples: Sequence[Sample], most: int = NUM_EXAMPLES) -> list[Sample]:
    """Wrong answers, the surest first; then right answers whose chains lost points, the worst first."""
    wrong = sorted((s for s in samples if not s.correct), key=lambda s: -(s.confidence or 0))
    flawed = sorted((s for s in samples if s.correct and _chain_score(s) < 1), key=_chain_score)
    return [*wrong, *flawed][:most]


def _chain_score(sample: Sample) -> float:
    known = [value for name in CHAIN_METRICS[:3] if (value := sample.scores.get(name)) is not None]
    return sum(known) / len(known) if known else 0.0


def _veils(sample: Sample) -> list[str]:
    attention = sample.attention
    return [overlay_png(step, attention.grid) for step in attention.steps[:MAX_STEPS]] if attention else []


def validator_note(result: Mapping[str, Any] | None) -> str:
    """Explains the number beside a step, and how far to trust it."""
    about = '"valid" beside a step is the model\'s step validator: its probability that the step is valid. '
    drawn = part(result, "own_steps", "drawn")
    accuracy, wrong, valid = (drawn.get(key) for key in ("balanced_accuracy", "wrong", "valid"))
    if accuracy is None:
        return about + "How well it finds the model's own mistakes was not measured."
    return about + (
        f"It judges {accuracy:.0%} of the model's own steps correctly (balanced accuracy over {wrong:,.0f} wrong and "
        f"{valid:,.0f} valid steps of drawn chains). No metric uses it."
    )


def _shortened(sample: Sample) -> Sample:
    """The sample with every text at a length that a page can show."""
    changed: dict[str, Any] = {
        "id": short(sample.id, 200),
        "instruction": short(sample.instruction, MAX_TEXT),
        "scores": dict(list(sample.scores.items())[:40]),
    }
    for field in ("gold_answer", "answer_set", "head_answer"):
        changed[field] = [short(name, 200) for name in getattr(sample, field)[:50]]
    for field in ("steps", "gold_steps", "reasons"):
        changed[field] = [short(line, MAX_TEXT) for line in getattr(sample, field)[:MAX_STEPS]]
    for field in ("complexity", "question_kind"):
        changed[field] = short(getattr(sample, field), 200) or None
    return replace(sample, **changed)


# ---- the page of a run


def index_page(
    record: RunRecord,
    path: str | Path,
    *,
    svgs: Mapping[str, Sequence[str]],
    captions: Mapping[str, str],
    missing: Mapping[str, str],
    num_samples: int = NUM_SAMPLES,
    roots: Sequence[Path] = (),
) -> Path:
    """Write the page that ties the run together.

    Args:
        svgs: figure name -> its wide and its narrow form as markup that is safe to put in, from `figures.inline_svg`.
        captions: figure name -> what it shows; `missing`: figure name -> why it is not there.
    """
    shown = [_shortened(sample) for sample in record.samples[:num_samples]]
    uris = picture_uris([s.image for s in shown if s.image], roots, max_bytes=MAX_PICTURE_BYTES)
    script = (_HERE / "viewer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sets = _comparable(record, num_samples)
    result = record.result or {}
    page = _render(
        "index.jinja",
        title=f"{record.name}: EmberVLM report",
        run=record,
        script=Markup(script),
        script_source=f"'sha256-{digest}'",
        about=_about(record),
        verdict=_verdict(record),
        tiles=_tiles(record),
        metrics=page_tables.metrics(record),
        meanings=MEANINGS,
        checkpoints=page_tables.checkpoints(record),
        quality=page_tables.quality(result),
        faithfulness=page_tables.faithfulness(result),
        settings=page_tables.settings(record),
        svgs={name: [Markup(svg) for svg in forms] for name, forms in svgs.items()},
        captions=captions,
        missing=missing,
        validator_note=validator_note(result),
        groups=_groups(record),
        num_shown=len(shown),
        num_sets=len(sets),
        summary=_summary(record),
        sections=SECTIONS,
        data={
            "pictures": list(uris.values()),
            "sets": sets,
            "validatorNote": validator_note(result),
            "noShare": UNKNOWN,
            "samples": [_as_data(s, {p: place for place, p in enumerate(uris)}) for s in shown],
        },
    )
    write_text_atomic(path, page)
    return Path(path)


def _as_data(sample: Sample, places: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What the script reads; without `places` as much as the side-by-side needs."""
    out: dict[str, Any] = {
        "id": sample.id,
        "instruction": sample.instruction,
        "steps": sample.steps,
        "gold": sample.gold_answer,
        "answers": sample.answer_set,
        "correct": sample.correct,
        "confidence": sample.confidence,
    }
    if places is None:
        return out
    baseline, looks = sample.without_reasoning, looks_of(sample, MAX_STEPS)
    return out | {
        "picture": places.get(sample.image or ""),
        "image": sample.image,
        "complexity": sample.complexity,
        "kind": sample.question_kind,
        "answers": sample.answers,
        "goldSteps": sample.gold_steps,
        "head": sample.head_answer,
        "scores": list(sample.scores.items()),
        "reasons": sample.reasons,
        "baseline": baseline and {"answers": baseline["answer_set"], "correct": baseline["correct"]},
        "validator": sample.validator_scores[:MAX_STEPS],
        "attention": _veils(sample) if looks.names else [],
        "recorded": sample.attention is not None,
        "things": [[short(name, 60), round(100 * area)] for name, area in zip(looks.names, looks.covered)],
        "shares": [[round(100 * share) for share in step] for step in looks.shares],
        "reads": looks.reads,
    }


def _comparable(record: RunRecord, num_samples: int) -> list[dict[str, Any]]:
    """The sample sets that share a question with another one. The evaluation's own are not written twice."""
    ids = [{s.id for s in found.samples[:num_samples]} for found in record.sample_sets]
    out = []
    for place, found in enumerate(record.sample_sets):
        if not any(ids[place] & other for index, other in enumerate(ids) if index != place):
            continue
        own = found.samples is record.samples
        shown = None if own else [_as_data(_shortened(s)) for s in found.samples[:num_samples]]
        out.append({"name": short(found.name, 200), "samples": shown})
    return out


def _about(record: RunRecord) -> list[str]:
    result = record.result
    if not result:
        return ["not evaluated yet"]
    backends = sorted({backend["name"] for backend in part(result, "backend").values()})
    shown = [
        Path(result.get("checkpoint") or "").name,
        f"{result['phase']}, step {result['step']:,}" if result.get("phase") else "",
        f"{result['split']} split" if result.get("split") else "",
        f"{result['num_samples']:,} samples" if "num_samples" in result else "",
        f"scored by {', '.join(backends)}" if backends else "",
        f"EmberVLM {result['embervlm_version']}" if result.get("embervlm_version") else "",
    ]
    return [short(text, 200) for text in shown if text]


def _verdict(record: RunRecord) -> dict[str, Any] | None:
    known = [target["met"] for target in record.targets.values()]
    if not known:
        return None
    met, unknown = known.count(True), known.count(None)
    more = f", {unknown} not measured" if unknown else ""
    return {"all_met": met == len(known), "text": f"{met} of {len(known)} targets met{more}"}


def _groups(record: RunRecord) -> list[dict[str, Any]]:
    """Groups of phase 3, evenly spaced over its steps."""
    lines = [line for line in record.groups if isinstance(line.get("chains"), list) and line["chains"]]
    places = sorted({round(i * (len(lines) - 1) / max(1, NUM_GROUPS - 1)) for i in range(NUM_GROUPS)}) if lines else []
    out = []
    for line in (lines[place] for place in places):
        parts = list(part(line["chains"][0], "rewards"))
        rows = [
            (
                short(chain.get("answer"), 200) or page_tables.NOTHING,
                *(page_tables.share(part(chain, "rewards").get(name)) for name in parts),
                page_tables.share(chain.get("reward")),
                page_tables.number(chain.get("num_tokens")),
                short(" ".join(chain.get("reasoning_steps") or ()), MAX_TEXT),
            )
            for chain in line["chains"][:NUM_GROUP_CHAINS]
        ]
        heads = ("Answer", *map(page_tables.words, parts), "Reward", "Tokens", "Chain")
        gold = short(", ".join(line.get("gold_answer") or ()), 200)
        question = short(line.get("instruction"), 500)
        table = page_tables.Table(heads=heads, rows=rows, texts=("Chain",))
        out.append({"step": line["step"], "question": question, "gold": gold, "table": table})
    return out


def _goal(target: str) -> float | None:
    try:
        return float(target.lstrip("<>= "))
    except ValueError:
        return None


def _tiles(record: RunRecord) -> list[dict[str, Any]]:
    out = []
    for name in CHAIN_METRICS:
        target = record.targets.get(name, {"target": "", "met": None})
        out.append(
            {
                "name": name,
                "value": record.metrics.get(name),
                "met": target["met"],
                "target": target["target"] or "not set",
                "goal": _goal(target["target"]),
                "interval": record.intervals.get(name),
            }
        )
    return out


def _summary(record: RunRecord) -> list[tuple[str, str]]:
    settings = dict(flat(record.config))
    wanted = (
        ("Model", "model"),
        ("Engine", "engine"),
        ("Precision", "precision"),
        ("Seed", "seed"),
        ("Records per device", "stage4.batch_size"),
        ("Phase 1 epochs", "stage4.phase1.epochs"),
        ("Phase 1 rate", "stage4.phase1.learning_rate"),
        ("Phase 2 epochs", "stage4.phase2.epochs"),
        ("Phase 2 rate", "stage4.phase2.learning_rate"),
        ("Phase 3 epochs", "stage4.phase3.epochs"),
        ("Phase 3 rate", "stage4.phase3.learning_rate"),
        ("Data", "reasoning_data"),
    )
    out = [(name, short(settings[key], 300)) for name, key in wanted if key in settings]
    for phase, lines in record.curves.items():
        if lines and (seconds := lines[-1].get("elapsed_s")) is not None:
            out.append((f"{training_name(phase)} took", f"{seconds / 60:.1f} min, {lines[-1]['step']:,} steps"))
    return out

"""An evaluation in words: which chains go wrong, where, and what to do. Needs only its files, no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from embervlm.words.chain_text import CONCLUSION

MOST_FAULTS = 8
CALIBRATED = 0.05
"""An expected calibration error below this is small."""
GROUPS = {
    "complexity": "impact_by_complexity",
    "kind of question": "accuracy_by_question_kind",
    "wording": "accuracy_by_wording",
}
"""What answers are grouped by, and where a result holds that."""
TEACHES = {
    "reasoning_consistency": "Train phase 1 for longer (--phase1_epochs 7), filter the data "
    "(scripts/filter_reasoning_data.py), or raise reasoning_loss_weight.",
    "step_completeness": "Check that the training chains have all steps (scripts/validate_reasoning_data.py), that "
    "--max_reasoning_length does not cut them, and that --max_reasoning_steps and --max_new_tokens suffice.",
    "logical_flow_score": "Raise consistency_loss_weight, and look for training chains whose steps are out of order.",
    "final_answer_accuracy": "Look at the wrong answers first: where the chain is right up to its conclusion, raise "
    "answer_loss_weight; where it is not, the model misreads the picture's facts.",
    "swapped_image_accuracy": "The answer hardly depends on the picture: raise multimodal_loss_weight, and check that "
    "the questions cannot be answered without it.",
    "no_reasoning_accuracy": "The chain gains too little over answering directly: longer or better chains, or harder "
    "questions.",
}
"""Metric -> what to do where its target is missed; the guide's advice where it has one."""


# -- a few samples ----------------------------------------------------------------------------------------------------


def sample_text(sample: Mapping[str, Any], number: int) -> str:
    """One question with its chain, as people read it."""
    lines = [f"[{number}] {sample['instruction']}", f"    picture: {sample['image'] or 'none'}"]
    scores = sample.get("validator_scores") or []
    for place, step in enumerate(sample["reasoning_steps"]):
        judged = f"  ({scores[place]:.2f})" if place < len(scores) else ""
        name = "" if step.startswith(CONCLUSION) else f"Step {place + 1}: "
        lines.append(f"    {name}{step}{judged}")
    if not sample["reasoning_steps"]:
        lines.append("    no chain that can be read")
    right = "right" if sample["correct"] else f"wrong, it is {', '.join(sample['gold_answer'])}"
    lines.append(f"    Answer: {sample['answer'] or 'none'} ({sample['confidence']:.0%} sure): {right}")
    return "\n".join([*lines, *(f"    ! {reason}" for reason in sample["scores"].get("reasons", ()))])


def samples_verdict(samples: Sequence[Mapping[str, Any]]) -> str:
    """Whether the model reasons at all, from a handful of samples."""
    total = len(samples)
    readable = [s for s in samples if s["reasoning_steps"]]
    concluded = [s for s in readable if s["reasoning_steps"][-1].startswith(CONCLUSION)]
    repeating = [s for s in readable if len(set(s["reasoning_steps"])) < len(s["reasoning_steps"])]
    flawed = [s for s in readable if s["scores"].get("reasons")]
    right = sum(bool(s["correct"]) for s in samples)
    counts = [f"{len(readable)} of {total} chains can be read, {len(concluded)} conclude, {right} answers are right."]
    if readable:
        lengths = [len(s["reasoning_steps"]) for s in readable]
        counts.append(f"{sum(lengths) / len(lengths):.1f} steps per chain, from {min(lengths)} to {max(lengths)}.")
    if repeating:
        counts.append(f"{len(repeating)} chains repeat a step.")
    if flawed:
        counts.append(f"{len(flawed)} of the chains have a step that is contradicted, repeated or unsupported.")
    questions = {(s["instruction"], s["image"]) for s in readable}
    if len(questions) > 2 and len({tuple(s["reasoning_steps"]) for s in readable}) == 1:
        headline = "the model writes the same chain for every question. It has learned only the form."
    elif 2 * len(readable) < total:
        headline = "the model does not write chains yet. Early in phase 1 that is normal; later see whether the "
        headline += "reasoning loss still falls."
    elif 2 * len(concluded) < total:
        headline = "chains begin but do not end. Train longer, or raise --max_new_tokens if they are cut."
    elif 2 * len(flawed) > len(readable):
        headline = "the model writes whole chains, and most have a faulty step. Train longer before phase 2."
    elif 2 * right < total:
        headline = "the model writes whole chains, and most answers are wrong."
    else:
        headline = "the model reasons: whole chains, and most answers are right."
    return f"Verdict: {headline}\n" + "\n".join(f"- {line}" for line in counts)


# -- a whole evaluation -----------------------------------------------------------------------------------------------


def common_faults(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The faults of the chains, the most frequent first, each with its number of chains."""
    found: Counter[str] = Counter()
    for sample in samples:
        found.update({re.sub(r"^step \d+:? ", "", reason) for reason in sample["scores"].get("reasons", ())})
    return found.most_common(MOST_FAULTS)


def first_faults(samples: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Step -> number of chains that first go wrong there."""
    found: Counter[int] = Counter()
    for sample in samples:
        steps = [int(m[1]) for reason in sample["scores"].get("reasons", ()) if (m := re.match(r"step (\d+)", reason))]
        if steps:
            found[min(steps)] += 1
    return dict(sorted(found.items()))


def analysis_text(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """Groups and faults, then the verdict."""
    lines = []
    for title, key in GROUPS.items():
        groups = {name: row for name, row in (result.get(key) or {}).items() if name != "None"}
        if groups:
            lines += [f"answers by {title}", *(f"  {name:<24}{_group(row)}" for name, row in groups.items()), ""]
    candidates = {name: row for name, row in (result.get("per_candidate") or {}).items() if row.get("support")}
    if candidates:
        lines.append("answers by what is right")
        lines += [
            f"  {name:<24}precision {_share(row['precision'])}, recall {_share(row['recall'])}, "
            f"right for {row['support']:.0f}"
            for name, row in candidates.items()
        ]
        lines.append("")
    if faults := common_faults(samples):
        lines += ["most frequent faults, by number of chains", *(f"  {count:>5}  {fault}" for fault, count in faults)]
        where = ", ".join(f"step {step}: {count}" for step, count in first_faults(samples).items())
        lines += [f"where chains first go wrong: {where}" if where else "", ""]
    return "\n".join([*lines, evaluation_verdict(result, samples)])


def _group(row: Mapping[str, Any]) -> str:
    without = f", without reasoning {_share(row['no_reasoning'])}" if row.get("no_reasoning") is not None else ""
    return f"{row['num']:>5} questions, right {_share(row['reasoning'])}{without}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def evaluation_verdict(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """A headline, and advice about each part."""
    targets = result.get("targets") or {}
    missed = [name for name, row in targets.items() if row.get("met") is False]
    lines = []
    for name in missed:
        value, target = result["metrics"].get(name), targets[name]["target"]
        lines.append(f"{name} is {_share(value)}, the target is {target}. {TEACHES.get(name, '')}".strip())
    lines += [*_on_reasoning(result), *_on_the_picture(result), *_on_the_chain(result), *_on_confidence(result)]
    metrics = result["metrics"]
    if metrics.get("unparseable_share"):
        share = metrics["unparseable_share"]
        lines.append(f"{share:.1%} of the outputs have no readable chain or answer; they count as wrong.")
    lines += _on_faults(samples)
    if len(samples) < 100:
        lines.append(f"These are only {len(samples)} questions: the intervals in the result file are wide.")
    if not targets:
        headline = "no target was measured."
    elif missed:
        headline = f"{len(missed)} of {len(targets)} targets are not met: {', '.join(missed)}."
    else:
        headline = f"all {len(targets)} targets are met."
    return f"Verdict: {headline}\n" + "\n".join(f"- {line}" for line in lines)


def _on_reasoning(result: Mapping[str, Any]) -> list[str]:
    found = (result.get("gains") or {}).get("no_reasoning_accuracy")
    if found is None:
        return ["Whether reasoning helps was not measured: no baseline was trained (--stages baseline)."]
    low, high = found["interval"]
    gained = f"{100 * found['gain']:+.1f} points against the no-reasoning baseline [{100 * low:.1f}, {100 * high:.1f}]"
    if low > 0:
        return [f"Reasoning helps: {gained}."]
    return [f"Reasoning {'hurts' if high < 0 else 'makes no significant difference'}: {gained}."]


def _on_the_picture(result: Mapping[str, Any]) -> list[str]:
    out = []
    for metric, what in (("swapped_image_accuracy", "another picture"), ("blind_accuracy", "no picture")):
        found = (result.get("gains") or {}).get(metric)
        if found is not None:
            low, _ = found["interval"]
            used = "is used" if low > 0 else "does not seem to be used"
            out.append(
                f"The picture {used}: with {what} {_share(result['metrics'][metric])} of the answers are right, "
                f"{100 * found['gain']:.1f} points fewer."
            )
    return out


def _on_the_chain(result: Mapping[str, Any]) -> list[str]:
    forced = ((result.get("faithfulness") or {}).get("forced_prefix")) or {}
    text, picture = forced.get("follows_text"), forced.get("follows_picture")
    if text is None or picture is None:
        return []
    said = f"with another scene's facts put into it, {text:.0%} of the answers follow it, {picture:.0%} the picture"
    if text >= 0.8:
        return [f"The answer comes from the chain: {said}."]
    return [f"The answer does not only come from the chain: {said}. edited_facts_ratio in phase 2 raises that."]


def _on_confidence(result: Mapping[str, Any]) -> list[str]:
    found = result.get("calibration")
    if found is None:
        return []
    good = "can be trusted" if found["ece"] < CALIBRATED else "is inaccurate"
    return [
        f"The confidence {good}: expected calibration error {found['ece']:.3f} "
        f"({found['ece_uncalibrated']:.3f} before calibration)."
    ]


def _on_faults(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    flawed = [sample for sample in samples if sample["scores"].get("reasons")]
    if not flawed:
        return ["No chain has a faulty step."] if samples else []
    wrong = sum(not sample["correct"] for sample in flawed)
    fault, count = common_faults(samples)[0]
    return [
        f"{len(flawed)} of {len(samples)} chains have a faulty step, and {wrong} of these a wrong answer. "
        f"Most frequent ({count}): {fault}."
    ]

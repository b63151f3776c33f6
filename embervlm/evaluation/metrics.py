"""Metrics of reasoning chains and answers: pure functions on strings and numbers, each in [0, 1].

The Stage 4 guide's own formulas reward the wrong thing in places: similarity of neighbouring steps is highest for a
chain that repeats one sentence. Where a function departs from the guide, its docstring says how and why; the guide's
consistency formula is kept as `adjacent_similarity` and is reported, never used to choose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from math import log, sqrt
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

from embervlm.data.chain_text import STEP_TYPES
from embervlm.data.claims import (
    ChainContext,
    ClaimReader,
    StepFaults,
    all_words,
    content_words,
    is_conclusion,
    judge_steps,
    named_candidates,
)
from embervlm.evaluation.order import OrderScorer

__all__ = [
    "MARGINS", "STEP_TYPES", "TARGETS", "ChainContext", "OrderScorer", "adjacent_similarity", "balanced_accuracy",
    "bootstrap_interval", "compare_with_targets", "final_answer_accuracy", "fit_term_weights", "identify_step_types",
    "logical_flow_score", "per_candidate_precision_recall", "reasoning_consistency", "score_chain",
    "step_completeness",
]  # fmt: skip

TARGETS = {
    "reasoning_consistency": 0.85,
    "step_completeness": 0.90,
    "logical_flow_score": 0.80,
    "final_answer_accuracy": 0.75,
}
"""The Stage 4 guide's targets; a metric must be above, not at, its target."""

MARGINS = {"swapped_image_accuracy": 0.25, "no_reasoning_accuracy": 0.10}
"""How far another accuracy must stay below `final_answer_accuracy`: the picture is looked at, the reasoning helps."""

MIN_WORDS_OF_A_TYPE = 4
MIN_SHARED_NAMES = 0.5
MIN_TOKEN_F1 = 0.6

_TYPE_KEYWORDS = {
    "problem_analysis": re.compile(
        r"\b(?:analy[sz]\w*|identif\w*|understand\w*|task|job|problem|question|goal|asks?|asked|requires?|requirements?"
        r"|needs?|needed|given|involves?|observ\w*|shows?)\b"
    ),
    "constraint_checking": re.compile(
        r"\b(?:constraints?|limit\w*|conditions?|cannot|can't|must|only|because|since|so|unless|if|unable|able|too"
        r"|enough|capab\w*|evaluat\w*|check\w*|verif\w*|requires?|depends?|safe\w*|risks?)\b"
    ),
    "solution_selection": re.compile(
        r"\b(?:select\w*|choos\w*|choice|chosen|best|better|suit\w*|unsuit\w*|fits?|options?|alternatives?|compar\w*"
        r"|consider\w*|combin\w*|prefer\w*|therefore|hence|solution|yes|no|works?)\b"
    ),
}


def adjacent_similarity(steps: Sequence[str], weights: Mapping[str, float] | None = None) -> float:
    """Mean cosine similarity of neighbouring steps, as word and word-pair counts; 0 for fewer than two steps.

    The guide's `reasoning_consistency`, with counts for its unnamed `semantic_similarity`, and 0 instead of NaN for
    one step. A chain that says one sentence over and over scores 1 here, so it is only reported.
    Args:
        weights: inverse document frequencies from `fit_term_weights`; without them all terms weigh 1.
    """
    vectors = [_term_vector(step, weights) for step in steps]
    similarities = [_cosine(a, b) for a, b in zip(vectors, vectors[1:], strict=False)]
    return sum(similarities) / len(similarities) if similarities else 0.0


def fit_term_weights(texts: Iterable[str]) -> dict[str, float]:
    """Inverse document frequency log((1 + n) / (1 + df)) + 1 of every word and word pair in `texts`."""
    num_texts, document_frequency = 0, Counter[str]()
    for text in texts:
        num_texts += 1
        document_frequency.update(set(_terms(text)))
    return {term: log((1 + num_texts) / (1 + df)) + 1 for term, df in document_frequency.items()}


def reasoning_consistency(steps: Sequence[str], context: ChainContext) -> float:
    """Share of steps that are neither redundant nor contradicted nor unsupported.

    redundant: an earlier step has the same content words in the same order (numbering, case, punctuation, function
        words ignored), or a Jaccard index of content words >= 0.9 and the same claims; the first conclusion is exempt.
    contradicted: a claim differs from the known fact or, for names without one, from an earlier step, or from another
        claim of the same step. A conclusion claims that each candidate it names is suitable.
    unsupported: no claim is a known fact, and no content word occurs in the instruction, the facts, the reference
        chain or earlier sound steps. With known facts also: a claim about a name they do not have; or no claim, no
        conclusion, and less than half of the content words in that context.
    0 for an empty chain and for fewer than two distinct steps.

    Departs from the guide, which averages the similarity of neighbouring steps: repetition is its best case, and a
    flat contradiction ("is" / "is not") nearly so. `adjacent_similarity` is the guide's formula.
    """
    return _consistency(steps, judge_steps(steps, context))


def identify_step_types(steps: Sequence[str]) -> list[frozenset[str]]:
    """The `STEP_TYPES` each step could be: it has a key word of the type and at least 4 content words.

    A conclusion is told by its beginning, may be shorter, and is nothing else. The guide's function of this name
    gives one flat list; a step that fits several types must still fill only one, so they are kept per step.
    """
    return [_possible_types(step) for step in steps]


def step_completeness(steps: Sequence[str], context: ChainContext) -> float:
    """Coverage of the expected steps, one step filling one slot; redundant and empty steps fill none.

    With a gold chain every gold step is a slot of its type. A step fills it by making claims about at least half of
    the names the gold step claims something about (with whatever values), or by a token F1 >= 0.6; a conclusion is
    filled by any conclusion that says something. Score = mean over types of (filled slots / slots of that type).
    Without one, the slots are `STEP_TYPES`, matched by `identify_step_types`. Both use the assignment that fills most.

    Departs from the guide, which counts a type as present when any key word occurs anywhere: there, one step with
    four key words is complete. With one gold step per type the formula is the guide's coverage.
    """
    return _completeness(steps, judge_steps(steps, context), context)


def logical_flow_score(steps: Sequence[str], context: ChainContext, *, order_scorer: OrderScorer) -> float:
    """0.4 * order + 0.3 * (1 - contradicted steps / steps) + 0.3 * conclusion follows; 0 for an empty chain.

    order: share of random reorderings that are less usual than this one (`OrderScorer.order_score`).
    conclusion follows: 1 when the last conclusion names exactly the answer's candidates, and these are the ones that
        earlier steps called suitable, where steps call candidates suitable or not at all; else 0. A candidate judged
        only after the conclusion makes it 0 too.

    The weights are the guide's. It leaves its three terms open; "smooth transitions" is read as order, since
    smoothness measured as similarity would reward repetition again. Order is coarse: two swapped neighbours in a long
    chain still beat a random order.
    """
    return _flow(steps, judge_steps(steps, context), context, order_scorer)


def final_answer_accuracy(predicted: Collection[str], gold: Collection[str]) -> float:
    """1.0 when both sets are equal, ignoring case and surrounding blanks; else 0.0.

    The guide compares with ==; its answers are lists, whose order carries no meaning here.
    """
    return float(_as_set(predicted) == _as_set(gold))


def per_candidate_precision_recall(
    predicted: Sequence[Collection[str]], gold: Sequence[Collection[str]]
) -> dict[str, dict[str, float | None]]:
    """Candidate -> precision, recall, support (samples in whose gold set it is); None where nothing was counted."""
    table: dict[str, dict[str, float | None]] = {}
    pairs = [(set(p), set(g)) for p, g in zip(predicted, gold, strict=True)]
    for name in sorted(set().union(*(p | g for p, g in pairs)) if pairs else ()):
        hits = sum(name in p and name in g for p, g in pairs)
        num_predicted = sum(name in p for p, _ in pairs)
        support = sum(name in g for _, g in pairs)
        table[name] = {
            "precision": hits / num_predicted if num_predicted else None,
            "recall": hits / support if support else None,
            "support": float(support),
        }
    return table


def balanced_accuracy(labels: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Mean over the classes in `labels` of the share predicted right; 1 / classes by always guessing one."""
    pairs = list(zip(labels, predictions, strict=True))
    if not pairs:
        raise ValueError("balanced_accuracy: no labels")
    total, right = Counter(label for label, _ in pairs), Counter(label for label, guess in pairs if label == guess)
    return sum(right[label] / count for label, count in total.items()) / len(total)


def bootstrap_interval(values: Sequence[float], seed: int = 0, n: int = 1000) -> tuple[float, float]:
    """95% percentile interval of the mean, over `n` resamples with replacement."""
    if len(values) == 0:
        raise ValueError("bootstrap_interval: no values")
    samples, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [samples[rng.integers(len(samples), size=len(samples))].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare_with_targets(metrics: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """Metric name -> {"target": ">0.85", "met": True, False, or None for a metric without a value}.

    What is compared with the final accuracy has a target only where both were measured.
    """
    compared = {}
    for name, target in TARGETS.items():
        value = metrics.get(name)
        met = None if value is None or value != value else bool(value > target)
        compared[name] = {"target": f">{target:.2f}", "met": met}
    final = metrics.get("final_answer_accuracy")
    for name, margin in MARGINS.items():
        if final is not None and (value := metrics.get(name)) is not None:
            compared[name] = {"target": f"<={final - margin:.3f}", "met": bool(value <= final - margin)}
    return compared


def score_chain(steps: Sequence[str], context: ChainContext, order_scorer: OrderScorer) -> dict[str, Any]:
    """All metrics of one chain, and `reasons`: a sentence per fault of a step."""
    faults = judge_steps(steps, context)
    reasons = [
        f"step {number} {reason}"
        for number, fault in enumerate(faults, 1)
        for reason in (fault.redundant, fault.contradicted, fault.unsupported)
        if reason
    ]
    return {
        "reasoning_consistency": _consistency(steps, faults),
        "step_completeness": _completeness(steps, faults, context),
        "logical_flow_score": _flow(steps, faults, context, order_scorer),
        "final_answer_accuracy": final_answer_accuracy(context.answer, context.gold_answer),
        "adjacent_similarity": adjacent_similarity(steps),
        "reasons": reasons,
    }


def _consistency(steps: Sequence[str], faults: Sequence[StepFaults]) -> float:
    if len({content_words(step) for step in steps} - {()}) < 2:
        return 0.0
    return sum(not fault.any for fault in faults) / len(faults)


def _completeness(steps: Sequence[str], faults: Sequence[StepFaults], context: ChainContext) -> float:
    usable = [s for s, fault in zip(steps, faults, strict=True) if not fault.redundant and content_words(s)]
    if not usable:
        return 0.0
    if context.reference_steps and context.step_types:
        types = tuple(context.step_types)
        reader, candidates = context.reader, context.all_candidates
        profiles = [_profile(step, reader) for step in usable]
        golds = [_profile(step, reader) for step in context.reference_steps]
        fits = np.array([[_fills(profile, gold, candidates) for profile in profiles] for gold in golds])
    else:
        types = STEP_TYPES
        possible = identify_step_types(usable)
        fits = np.array([[slot in step for step in possible] for slot in types])
    rows, columns = linear_sum_assignment(fits, maximize=True)
    filled = Counter(types[row] for row, column in zip(rows, columns, strict=True) if fits[row, column])
    slots = Counter(types)
    return sum(filled[name] / count for name, count in slots.items()) / len(slots)


def _flow(
    steps: Sequence[str], faults: Sequence[StepFaults], context: ChainContext, order_scorer: OrderScorer
) -> float:
    if not any(content_words(step) for step in steps):
        return 0.0
    contradicted = sum(fault.contradicted is not None for fault in faults) / len(faults)
    order = order_scorer.order_score(steps)
    return 0.4 * order + 0.3 * (1 - contradicted) + 0.3 * _conclusion_follows(steps, context)


def _conclusion_follows(steps: Sequence[str], context: ChainContext) -> float:
    conclusions = [index for index, step in enumerate(steps) if is_conclusion(step)]
    if not conclusions:
        return 0.0
    last = conclusions[-1]
    named = _as_set(named_candidates(steps[last], context.all_candidates))
    if not named or named != _as_set(context.answer):
        return 0.0
    reader, candidates = context.reader, context.verdict_names
    suitable_values = {value.casefold() for value in context.suitable_values}
    verdicts: dict[str, bool] = {}
    for index, step in enumerate(steps):
        for claim in reader.read(step):
            if claim.name in candidates and index not in conclusions:
                if index > last and claim.name not in verdicts:
                    return 0.0  # concluded before this candidate was judged
                verdicts[claim.name] = (claim.value.casefold() in suitable_values) != claim.negated
    return float(not verdicts or _as_set(n for n, suitable in verdicts.items() if suitable) == named)


@lru_cache(maxsize=1 << 14)
def _profile(step: str, reader: ClaimReader) -> tuple[str, bool, frozenset[str], Counter[str]]:
    """A step, whether it concludes, the names it claims something about, and its content words."""
    return step, is_conclusion(step), frozenset(c.name for c in reader.read(step)), Counter(content_words(step))


def _fills(
    step: tuple[str, bool, frozenset[str], Counter[str]],
    gold: tuple[str, bool, frozenset[str], Counter[str]],
    candidates: frozenset[str],
) -> bool:
    text, concludes, names, words = step
    _, gold_concludes, gold_names, gold_words = gold
    if concludes or gold_concludes:
        return concludes and gold_concludes and (not candidates or bool(named_candidates(text, candidates)))
    if gold_names and len(names & gold_names) >= MIN_SHARED_NAMES * len(gold_names):
        return True
    shared = sum(min(count, gold_words[word]) for word, count in words.items() if word in gold_words)
    return 2 * shared >= MIN_TOKEN_F1 * (words.total() + gold_words.total())


@lru_cache(maxsize=1 << 16)
def _possible_types(step: str) -> frozenset[str]:
    if is_conclusion(step):
        return frozenset({"conclusion"}) if content_words(step) else frozenset()
    if len(content_words(step)) < MIN_WORDS_OF_A_TYPE:
        return frozenset()
    text = " ".join(all_words(step))
    return frozenset(name for name, pattern in _TYPE_KEYWORDS.items() if pattern.search(text))


def _terms(text: str) -> list[str]:
    words = all_words(text)
    return [*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))]


def _term_vector(text: str, weights: Mapping[str, float] | None) -> dict[str, float]:
    counts = Counter(_terms(text))
    if not weights:
        return dict(counts)
    rarest = max(weights.values())  # a term never seen is rarer still
    return {term: count * weights.get(term, rarest) for term, count in counts.items()}


def _cosine(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    dot = sum(weight * b[term] for term, weight in a.items() if term in b)
    norm = sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
    return min(dot / norm, 1.0) if norm else 0.0


def _as_set(names: Iterable[str]) -> frozenset[str]:
    names = [names] if isinstance(names, str) else names
    return frozenset(name.strip().casefold() for name in names)

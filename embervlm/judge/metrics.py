"""Metrics of reasoning chains and answers, each in [0, 1]. docs/evaluation.md explains every one.

The Stage 4 guide's own formulas reward the wrong thing in places: similarity of neighbouring steps is highest for a
chain that repeats one sentence. Where a function departs from the guide, its docstring says how and why; the guide's
consistency formula is kept as `adjacent_similarity` and is reported, never used to choose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

from embervlm.data.records import ReasoningRecord
from embervlm.judge.arithmetic import calculates_again, wrong_arithmetic
from embervlm.judge.backends import EMBEDDED, Backends, EmbeddedBackend, make_backends
from embervlm.judge.faults import ChainContext, StepFaults, judge_steps
from embervlm.judge.order import OrderScorer
from embervlm.judge.replaced import replaced_details
from embervlm.words.chain_text import STEP_TYPES
from embervlm.words.claims import (
    ClaimReader,
    all_words,
    conclusion_fault,
    content_words,
    is_conclusion,
    named_candidates,
)
from embervlm.words.open_answers import same_answers
from embervlm.words.wording import SYNONYM, Reading, clauses_of

__all__ = [
    "MARGINS",
    "STEP_TYPES",
    "TARGETS",
    "ChainContext",
    "ChainScorer",
    "OrderScorer",
    "balanced_accuracy",
    "bootstrap_interval",
    "compare_with_targets",
    "final_answer_accuracy",
    "identify_step_types",
    "is_right",
    "per_candidate_precision_recall",
]

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
MIN_SHARED_OF_REPLACED = 0.3
"""Share of a step's words that a given text has, from which on the two are compared word by word."""
FAULT = 0.5
"""From here on a fault is told as a reason."""
REDUNDANT = (0.52, 0.75)
"""Similarity to an earlier step that entails this one: below the first the step is new, from the second it is not."""
ADDS = (0.05, 0.25)
"""Share of a step's words that an earlier one lacks and the rest of the chain or the question has."""
SUPPORTED = (0.08, 0.30)
"""Share of a step's words that the question, the facts or other steps have too."""
SUPPORTED_WORDS = (0.6, 1.2)
"""Rarities of those words, the very same ones, added up: 1 is one word that few texts have."""
SAID_WHOLLY = (0.85, 0.95)
"""Share of a step that a given text says, which therefore is given as well."""
SAID_MOSTLY = (0.4, 0.6)
"""Share of that text which the step says: the words of a step may stand in a long text that says something else."""
SAME_STEP = (0.35, 0.7)
"""Likeness of a step to one of the gold chain: below the first another step, from the second the same."""
POLAR = frozenset(("yes", "no", "true", "false"))
RELEVANT = (0.05, 0.35)
"""Share of the question that the chain speaks of."""
Array = NDArray[np.float32]

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


def final_answer_accuracy(predicted: Collection[str], gold: Collection[str], *, is_open: bool = False) -> float:
    """1.0 when both sets are equal, ignoring case and surrounding blanks; else 0.0.

    The guide compares with ==; its answers are lists, whose order carries no meaning here.
    Args:
        is_open: the answers are free words, of which "3" and "three" are the same; see `same_answers`.
    """
    return float(same_answers(predicted, gold) if is_open else _as_set(predicted) == _as_set(gold))


def is_right(answer: Collection[str], record: ReasoningRecord) -> bool:
    """Whether `answer` is the record's."""
    return bool(final_answer_accuracy(answer, record.answer, is_open=not record.candidates))


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

    What is compared with the final accuracy has a target only where both were measured, and where that accuracy is at
    least the margin: nothing can stay below 0.
    """
    compared = {}
    for name, target in TARGETS.items():
        value = metrics.get(name)
        met = None if value is None or value != value else bool(value > target)
        compared[name] = {"target": f">{target:.2f}", "met": met}
    final = metrics.get("final_answer_accuracy")
    for name, margin in MARGINS.items():
        if final is not None and final >= margin and (value := metrics.get(name)) is not None:
            compared[name] = {"target": f"<={final - margin:.3f}", "met": bool(value <= final - margin)}
    return compared


def identify_step_types(steps: Sequence[str]) -> list[frozenset[str]]:
    """The `STEP_TYPES` each step could be: it has a key word of the type and at least 4 content words.

    A conclusion is told by its beginning, may be shorter, and is nothing else. The guide's function of this name
    gives one flat list; a step that fits several types must still fill only one, so they are kept per step.
    """
    return [_possible_types(step) for step in steps]


@dataclass(frozen=True)
class StepJudgment:
    """How sure it is that a step has a fault, in [0, 1], and a reason where it is."""

    redundant: float = 0.0
    contradicted: float = 0.0
    unsupported: float = 0.0
    reasons: tuple[str, ...] = ()

    @property
    def sound(self) -> float:
        return (1 - self.redundant) * (1 - self.contradicted) * (1 - self.unsupported)


class ChainScorer:
    """Scores chains; the same chain gets the same score, whoever wrote it."""

    def __init__(self, backends: Backends | None = None, order: OrderScorer | None = None) -> None:
        self.backends = backends or make_backends()
        self.order = order or OrderScorer()
        similarity = self.backends.similarity
        self.words = similarity if isinstance(similarity, EmbeddedBackend) else EmbeddedBackend()
        """Compares words, whatever the backends are."""

    @classmethod
    def fit(
        cls,
        chains: Iterable[Sequence[str]] = (),
        domains: Mapping[str, Collection[str]] | None = None,
        *,
        similarity: str = EMBEDDED,
        entailment: str = EMBEDDED,
    ) -> ChainScorer:
        """Learn from training chains how rare words are and what comes first; without chains it knows English alone.

        Args:
            domains: fact name -> values, as in `ChainContext`.
            similarity, entailment: `embedded`, or the id or folder of a model.
        """
        chains = [tuple(chain) for chain in chains]
        backends = make_backends(similarity, entailment, chains=chains)
        scorer = cls(backends)
        if chains:
            scorer.order = OrderScorer.fit(chains, domains, scorer.words.rarity)
        return scorer

    def score(self, steps: Sequence[str], context: ChainContext) -> dict[str, Any]:
        """The metrics of one chain, the parts they are made of, and `reasons`: a sentence for each fault.

        `final_answer_accuracy` is None where the gold answer is not known.
        """
        chain = _Chain([*steps], context, self)
        consistency, completeness, flow = chain.consistency, chain.completeness, chain.flow
        gold = context.gold_answer
        return {
            "reasoning_consistency": consistency,
            "step_completeness": completeness,
            "logical_flow_score": flow,
            "final_answer_accuracy": chain.right(context.answer) if gold else None,
            "adjacent_similarity": chain.adjacent_similarity,
            "completeness_by_type": chain.completeness_by_type,
            "parts": {name: round(value, 6) for name, value in chain.parts.items()},
            "reasons": chain.reasons,
        }


class _Chain:
    """One chain while it is scored."""

    def __init__(self, steps: list[str], context: ChainContext, scorer: ChainScorer) -> None:
        self.steps, self.context, self.scorer = steps, context, scorer
        self.parts: dict[str, float] = {}
        self.completeness_by_type: dict[str, float] = {}
        self.empty = not any(content_words(step) for step in steps)
        answer = ", ".join(sorted(context.answer))
        known = [f"{name} is {value}." for name, value in context.facts.items()]
        self.background = [
            context.instruction,
            " ".join([*known, *context.statements, *context.reference_steps]),
            answer,
        ]
        self.offset = len(self.background)
        self.given = [
            *context.statements,
            *_statements(context.instruction),
            *(step for step in context.reference_steps if not is_conclusion(step)),
        ]
        """What steps must not contradict."""
        self.texts = [*self.background, *self.steps, *self.given]

    def right(self, answer: Collection[str]) -> float:
        """Whether `answer` is the gold one; without candidates as free words."""
        context = self.context
        return final_answer_accuracy(answer, context.gold_answer, is_open=not context.candidates)

    @property
    def end(self) -> int:
        return self.offset + len(self.steps)

    # ---- what the words say

    @cached_property
    def reading(self) -> Reading:
        return self.scorer.words.reading(self.texts)

    @cached_property
    def relevance(self) -> float:
        """How much of the question the chain speaks of, or of the chain the question; 1 where there is none."""
        reading, rows = self.reading, self.reading.text_places
        if not rows[0]:
            return 1.0
        share, _, best = reading.text_cover
        said = best[:, self.offset : self.end].max(axis=1) if self.steps else np.zeros(len(reading.words), np.float32)
        weights = reading.weights**3  # what tells this question from others, not what all of them say
        last = sorted({place for number in _asking(reading, 0) for place in reading.places[number]}) or rows[0]
        whole, asked = (float(weights[places] @ said[places] / weights[places].sum()) for places in (rows[0], last))
        both = [*rows[0], *last]
        of_steps = float(share[0, self.offset : self.end].max()) if self.steps else 0.0
        return max(float(weights[both] @ said[both] / weights[both].sum()), min(whole, asked, of_steps))

    @cached_property
    def support(self) -> Array:
        """`[step]` how sure its words stand in the question, the facts, the answer or other steps.

        Of its words a share must, and more than one or two: "This is an interesting question" names the question.
        """
        reading = self.reading
        _, _, best = reading.text_cover
        out = np.zeros(len(self.steps), np.float32)
        others = best[:, : self.end].copy()
        for number in range(len(self.steps)):
            places = reading.text_places[self.offset + number]
            if places:
                column = others[:, self.offset + number].copy()
                others[:, self.offset + number] = 0
                said = others[places].max(axis=1)
                share = float(reading.weights[places] @ said / reading.weights[places].sum())
                exact = float(reading.english_weights[places] @ (said > SYNONYM))
                out[number] = _ramp(share, *SUPPORTED) * max(_ramp(exact, *SUPPORTED_WORDS), _ramp(share, 0.8, 1.0))
                others[:, self.offset + number] = column
        return out

    # ---- faults

    @cached_property
    def faults(self) -> list[StepFaults]:
        """By the rules of `embervlm.words.claims`, which know the facts."""
        return judge_steps(self.steps, self.context)

    @cached_property
    def similarity(self) -> Array:
        found = self.scorer.backends.similarity.matrix(self.texts)
        return found[self.offset : self.end, self.offset : self.end]

    @cached_property
    def judgments(self) -> list[StepJudgment]:
        size, context = len(self.steps), self.context
        texts, statements, start = self.texts, self.given, self.end
        pairs = [(self.offset + i, self.offset + j) for j in range(size) for i in range(j)]
        pairs += [(start + i, self.offset + j) for i in range(len(statements)) for j in range(size)]
        entailed, opposed = self.scorer.backends.entailment.judge(texts, pairs)
        follows, opposes = np.zeros((size, size)), np.zeros((size, size))
        against, granted, said = [(0.0, 0)] * size, [0.0] * size, self.reading.text_cover[0]
        for (i, j), entails, contradicts in zip(pairs, entailed, opposed, strict=True):
            a, b = i - self.offset, j - self.offset
            if i < start:
                follows[a, b], opposes[a, b] = entails, contradicts
            else:
                against[b] = max(against[b], (float(contradicts), i - start))
                alone = _ramp(float(said[i, j]), *SAID_WHOLLY) * _ramp(float(said[j, i]), *SAID_MOSTLY)
                granted[b] = max(granted[b], alone * (1 - float(contradicts)))
        # What one given text says and another denies is a matter of wording: "it" is another thing in each.
        against = [(strongest * (1 - grants), i) for (strongest, i), grants in zip(against, granted)]
        reader = context.reader
        claims = [frozenset(reader.read(step)) for step in self.steps]
        judgments: list[StepJudgment] = []
        concluded = False
        anchor = _ramp(self.relevance, *RELEVANT)
        for j, step in enumerate(self.steps):
            reasons: list[str] = []
            concludes = is_conclusion(step)
            exempt = concludes and not concluded
            concluded = concluded or concludes
            redundant = self._redundant(j, exempt, claims, follows, reasons)
            true_claims = [c for c in claims[j] if (context.facts.get(c.name) == c.value) != c.negated]
            known = bool(claims[j]) and len(true_claims) == len([c for c in claims[j] if c.name in context.facts]) > 0
            contradicted = self._contradicted(j, known, opposes, against[j], statements, judgments, reasons)
            about_known = bool(true_claims) or bool(claims[j] and not context.facts)
            unsupported = self._unsupported(j, about_known, concludes, anchor, reasons)
            judgments.append(StepJudgment(redundant, contradicted, unsupported, tuple(reasons)))
        return judgments

    def _redundant(
        self, j: int, exempt: bool, claims: Sequence[frozenset[Any]], follows: NDArray[np.float64], reasons: list[str]
    ) -> float:
        if exempt or j == 0:
            return 0.0
        if reason := self.faults[j].redundant:
            reasons.append(reason)
            return 1.0

        def says_again(i: int) -> float:
            alike = _ramp(float(self.similarity[i, j]), *REDUNDANT)
            if calculates_again(self.steps[j], self.steps[i]):  # the result is what it says, whatever else it names
                return alike
            return 0.0 if claims[j] - claims[i] else float(follows[i, j]) * alike * (1 - self._adds(j, i))

        scores = [says_again(i) for i in range(j)]
        best = int(np.argmax(scores))
        if scores[best] >= FAULT:
            reasons.append(f"says the same as step {best + 1}")
        return scores[best]

    def _adds(self, j: int, i: int) -> float:
        """How sure step j speaks of something that step i does not, and that the question or other steps name.

        Words of a mere paraphrase are new to the whole chain.
        """
        reading, places = self.reading, self.reading.text_places[self.offset + j]
        if not places:
            return 0.0
        best = reading.text_cover[2]
        elsewhere = np.zeros(len(reading.words), dtype=bool)
        for number in (0, 2, *range(self.offset, self.end)):
            if number not in (self.offset + i, self.offset + j):
                elsewhere[reading.text_places[number]] = True
        new = (1 - best[places, self.offset + i]) * elsewhere[places]
        return _ramp(float(new @ reading.weights[places] / reading.weights[places].sum()), *ADDS)

    def _contradicted(
        self,
        j: int,
        known: bool,
        opposes: NDArray[np.float64],
        against: tuple[float, int],
        statements: Sequence[str],
        earlier: Sequence[StepJudgment],
        reasons: list[str],
    ) -> float:
        if reason := self.faults[j].contradicted:
            reasons.append(reason)
            return 1.0
        if reason := wrong_arithmetic(self.steps[j]):
            reasons.append(f"says '{reason}', which does not come out")
            return 1.0
        # What the facts confirm is right even where an earlier step, itself against the facts, said otherwise.
        scores = [0.0 if known and earlier[i].contradicted >= FAULT else float(opposes[i, j]) for i in range(j)]
        best = int(np.argmax(scores)) if scores else 0
        strongest = scores[best] if scores else 0.0
        if is_conclusion(self.steps[j]):  # whether it follows is a question of its own
            return 0.0
        if detail := self._replaced(j):
            reasons.append("says '{}' where '{}' is known: '{}'".format(*detail))
            return 1.0
        if against[0] > strongest:
            if against[0] >= FAULT:
                reasons.append(f"contradicts what is given: '{_short(statements[against[1]])}'")
            return against[0]
        if strongest >= FAULT:
            reasons.append(f"contradicts step {best + 1}")
        return strongest

    def _replaced(self, j: int) -> tuple[str, str, str] | None:
        """A detail of step j, what is given or stands in the gold chain in its place, and where."""
        gold = set(self.context.reference_steps)
        first: tuple[str, str, str] | None = None
        for text, shared in zip(self.given, self.reading.text_words_shared[self.end :, self.offset + j]):
            if shared < MIN_SHARED_OF_REPLACED:
                continue
            found = replaced_details(self.steps[j], text, names=text in gold)  # of others, not all names may be given
            if found == []:
                return None  # it is given
            if found and first is None:
                first = (*found[0], _short(text))
        return first

    def _unsupported(self, j: int, knows: bool, concludes: bool, anchor: float, reasons: list[str]) -> float:
        fault = self.faults[j].unsupported
        if fault and ("says nothing" in fault or "claims something" in fault):
            reasons.append(fault)
            return 1.0
        if name := self._told_otherwise(j):
            reasons.append(f"says something of {name} that is not known: it is {self.context.facts[name]}")
            return 1.0
        if knows or concludes:
            return 0.0
        supported = float(self.support[j]) * anchor
        if 1 - supported >= FAULT:
            alone = self.support[j] < FAULT
            reasons.append(
                "shares hardly a word with the question, the facts or other steps"
                if alone
                else "belongs to a chain that does not speak of the question"
            )
        return 1 - supported

    def _told_otherwise(self, j: int) -> str | None:
        """The first known fact of which step j says, right after its name, what mostly stands nowhere else."""
        reading, row, step = self.reading, self.offset + j, self.steps[j]
        claimed = {claim.name for claim in self.context.reader.read(step)}
        elsewhere: set[str] = set()
        for name, value in self.context.facts.items():
            if name in claimed or value.casefold() in step.casefold() or not (match := _says_of(name).search(step)):
                continue
            elsewhere = elsewhere or {
                reading.words[place]
                for number, places in enumerate(reading.text_places[: self.end])
                if number != row
                for place in places
            }
            stated = {word for clause in clauses_of(match[1]) for word in clause.words}
            if stated and 2 * len(stated - elsewhere) >= len(stated):
                return name
        return None

    @property
    def reasons(self) -> list[str]:
        found = [f"step {n} {reason}" for n, judged in enumerate(self.judgments, 1) for reason in judged.reasons]
        ends, context = self.conclusion, self.context
        if ends is not None and is_conclusion(self.steps[ends]) and self._agrees(self.steps[ends]) == 0:
            fault = conclusion_fault(self.steps[ends], context.answer, context.all_candidates)
            found.append(f"step {ends + 1} concludes otherwise: it {fault or 'does not name the answer'}")
        return found

    # ---- the metrics

    @property
    def consistency(self) -> float:
        """1[at least 2 distinct steps] x (1 - strongest contradiction) x share of sound steps."""
        distinct = len({content_words(step) for step in self.steps} - {()})
        strongest = max((judged.contradicted for judged in self.judgments), default=0.0)
        sound = float(np.mean([judged.sound for judged in self.judgments])) if self.steps else 0.0
        self.parts |= {
            "distinct_steps": float(distinct),
            "strongest_contradiction": strongest,
            "sound_share": sound,
            "relevance": self.relevance,
        }
        return (1 - strongest) * sound if distinct >= 2 else 0.0

    @property
    def completeness(self) -> float:
        usable = [j for j, step in enumerate(self.steps) if content_words(step) and self.judgments[j].redundant < FAULT]
        if self.empty or not usable:
            return 0.0
        if self.context.reference_steps and self.context.step_types:
            return self._coverage_of_reference([self.steps[j] for j in usable])
        parts = {"type_coverage": self._type_coverage(usable), "grounds": self._grounds(usable)}
        if self.context.reference_steps:
            parts["gold_coverage"] = self._gold_coverage(usable)
        if self.context.facts or self.context.statements:
            parts["fact_coverage"] = self._fact_coverage(usable)
        self.parts |= parts
        return sum(parts.values()) / len(parts)

    def _coverage_of_reference(self, usable: Sequence[str]) -> float:
        context = self.context
        types = tuple(context.step_types)
        reader, candidates = context.reader, context.all_candidates
        profiles = [_profile(step, reader) for step in usable]
        golds = [_profile(step, reader) for step in context.reference_steps]
        fits = np.array([[_fills(profile, gold, candidates) for profile in profiles] for gold in golds])
        rows, columns = linear_sum_assignment(fits, maximize=True)
        filled = Counter(types[row] for row, column in zip(rows, columns, strict=True) if fits[row, column])
        slots = Counter(types)
        coverage = {name: filled[name] / count for name, count in slots.items()}
        self.completeness_by_type = coverage
        return sum(coverage.values()) / len(slots)

    def _type_coverage(self, usable: Sequence[int]) -> float:
        share, _, _ = self.reading.text_cover
        fits = np.zeros((len(STEP_TYPES), len(usable)), dtype=bool)
        ends = self.conclusion
        for column, j in enumerate(usable):
            row = self.offset + j
            types = set(_possible_types(self.steps[j]))
            if j == ends:
                types = {"conclusion"}
            elif len(self.reading.text_places[row]) >= MIN_WORDS_OF_A_TYPE:
                if max(share[0, row], share[1, row]) >= 0.25:
                    types.add("problem_analysis")
                if any(clause.negated or clause.is_result for clause in clauses_of(self.steps[j])):
                    types.add("constraint_checking")
                if self.reading.text_places[2] and share[row, 2] >= 0.5:
                    types.add("solution_selection")
            fits[:, column] = [name in types for name in STEP_TYPES]
        rows, columns = linear_sum_assignment(fits, maximize=True)
        filled = {row for row, column in zip(rows, columns, strict=True) if fits[row, column]}
        self.completeness_by_type = {name: float(row in filled) for row, name in enumerate(STEP_TYPES)}
        return len(filled) / len(STEP_TYPES)

    @cached_property
    def likeness_to_gold(self) -> Array:
        """`[gold step, step]` geometric mean of what each says of the other."""
        reading = self.scorer.words.reading([*self.context.reference_steps, *self.steps])
        share, split = reading.text_cover[0], len(self.context.reference_steps)
        return np.sqrt(share[:split, split:] * share[split:, :split].T)  # type: ignore[no-any-return]

    def _gold_coverage(self, usable: Sequence[int]) -> float:
        """How much of the gold chain is said, one step for each of its steps."""
        likeness = self.likeness_to_gold[:, list(usable)]
        rows, columns = linear_sum_assignment(likeness, maximize=True)
        said = [_ramp(float(likeness[row, column]), *SAME_STEP) for row, column in zip(rows, columns, strict=True)]
        return sum(said) / len(likeness)

    @cached_property
    def gold_order(self) -> NDArray[np.float64] | None:
        """`[step, step]` from -1 to 1: how sure the gold chain has the row's step before the column's."""
        if not self.context.reference_steps or not self.steps:
            return None
        likeness = self.likeness_to_gold
        rows, columns = linear_sum_assignment(likeness, maximize=True)
        place, sure = np.zeros(len(self.steps)), np.zeros(len(self.steps))
        for row, column in zip(rows, columns, strict=True):
            place[column], sure[column] = row, _ramp(float(likeness[row, column]), *SAME_STEP)
        return np.asarray(np.sign(place[None, :] - place[:, None]) * np.outer(sure, sure))

    def _grounds(self, usable: Sequence[int]) -> float:
        """1 - 0.5^k for the k sound steps on which the conclusion builds, directly or by way of others."""
        reading = self.reading
        # an index of what is shared: the same or a synonymous word
        near = reading.alike >= 0.8
        said = np.zeros((len(self.steps) + 1, len(reading.words)), dtype=bool)
        for row, places in enumerate([reading.text_places[2], *reading.text_places[self.offset : self.end]]):
            said[row, places] = True
        shared = ((said.astype(np.float32) @ near.astype(np.float32)) > 0) & True
        linked = (shared.astype(np.float32) @ said.T.astype(np.float32)) > 0
        ends = self.conclusion
        reached = {0} if ends is None else {0, ends + 1}
        open_rows, waiting = list(reached), {j + 1 for j in usable} - reached
        while open_rows:
            row = open_rows.pop()
            found = {other for other in waiting if linked[row, other]}
            waiting -= found
            reached |= found
            open_rows += found
        k = sum(self.judgments[row - 1].sound for row in reached if row and row - 1 != ends)
        return float(1 - 0.5**k)

    def _fact_coverage(self, usable: Sequence[int]) -> float:
        """Share of the known facts that a step claims or says."""
        context, reader = self.context, self.context.reader
        claimed = {claim.name for j in usable for claim in reader.read(self.steps[j])}
        words = {word for j in usable for word in all_words(self.steps[j])}
        said = [
            name in claimed or set(all_words(f"{name} {value}".replace("_", " "))) <= words
            for name, value in context.facts.items()
        ]
        stems = [{w for clause in clauses_of(self.steps[j]) for w in clause.words} for j in usable]
        for text in context.statements:
            wanted = {w for clause in clauses_of(text) for w in clause.words}
            best = max((len(wanted & step) / len(wanted) for step in stems), default=0.0) if wanted else 1.0
            said.append(best >= MIN_TOKEN_F1)
        return float(np.mean(said))

    @property
    def flow(self) -> float:
        """0.4 order + 0.3 no contradiction + 0.3 conclusion follows; 0 for an empty chain."""
        if self.empty:
            return 0.0
        context = self.context
        order = self.scorer.order.order_score(
            self.steps, question=context.instruction, answer=", ".join(sorted(context.answer)), known=self.gold_order
        )
        strongest = max(judged.contradicted for judged in self.judgments)
        follows = self.conclusion_follows
        self.parts |= {"order": order, "conclusion_follows": follows}
        return 0.4 * order + 0.3 * (1 - strongest) + 0.3 * follows

    @property
    def adjacent_similarity(self) -> float:
        """Mean similarity of neighbouring steps; 0 for fewer than two. The guide's `reasoning_consistency`."""
        if len(self.steps) < 2:
            return 0.0
        return float(np.mean([self.similarity[i, i + 1] for i in range(len(self.steps) - 1)]))

    @cached_property
    def conclusion(self) -> int | None:
        """The last step that is written as a conclusion, else the last step where it names the answer, else the last
        one that follows from something ("so", "therefore") and names it.
        """
        marked = [index for index, step in enumerate(self.steps) if is_conclusion(step)]
        if marked or not self.steps or not self.context.answer:
            return marked[-1] if marked else None
        if self._agrees(self.steps[-1]) > 0:
            return len(self.steps) - 1
        results = [j for j, step in enumerate(self.steps) if any(clause.is_result for clause in clauses_of(step))]
        return next((j for j in reversed(results) if self._agrees(self.steps[j]) > 0), None)

    def _agrees(self, text: str) -> float:
        """How far `text` names exactly the answer."""
        answer, candidates = _as_set(self.context.answer), self.context.all_candidates
        if not answer:
            return 1.0
        if self.context.gold_answer and text in self.context.reference_steps[-1:]:
            return self.right(answer)
        named = _as_set(named_candidates(text, candidates))
        if named:
            return float(named == answer)
        wanted = {word for name in answer for word in all_words(name)}
        if answer < POLAR and (clauses := clauses_of(text)) and not wanted & set(all_words(text)):
            return float(clauses[-1].negated == (answer <= {"no", "false"}))  # "No", and "it does not"
        return float(bool(wanted) and wanted <= set(all_words(text)))

    @cached_property
    def conclusion_follows(self) -> float:
        """Whether the conclusion names the answer, and the earlier steps lead to it.

        Where steps call candidates suitable or not: 1 when these are the ones named, and all were judged before. Else
        how clearly the steps speak for what is named, the later the more. 0 where the answer is known to be another,
        though no step contradicts the facts: from true steps nothing false follows.
        """
        context, ends = self.context, self.conclusion
        if ends is None and not context.answer:
            return 0.0
        if ends is not None and not self._agrees(self.steps[ends]):
            return 0.0
        wrong = context.gold_answer and context.answer and not self.right(context.answer)
        if wrong and max(judged.contradicted for judged in self.judgments) < FAULT:
            return 0.0
        stated = self._by_verdicts(len(self.steps) if ends is None else ends)
        if stated is not None:
            return stated
        support = self._leads_to(ends)
        return support if ends is not None else 0.7 * support  # the answer stands beside the chain, not in it

    def _by_verdicts(self, last: int) -> float | None:
        context = self.context
        reader, candidates = context.reader, context.verdict_names
        suitable_values = {value.casefold() for value in context.suitable_values}
        verdicts: dict[str, bool] = {}
        for index, step in enumerate(self.steps):
            for claim in reader.read(step):
                if claim.name in candidates and not is_conclusion(step):
                    if index > last and claim.name not in verdicts:
                        return 0.0  # concluded before this candidate was judged
                    verdicts[claim.name] = (claim.value.casefold() in suitable_values) != claim.negated
        if not verdicts:
            return None
        return float(_as_set(n for n, suitable in verdicts.items() if suitable) == _as_set(context.answer))

    def _leads_to(self, ends: int | None) -> float:
        """From 0 to 1: half for the step that speaks most for it, half for all that is said of it.

        What comes only after the conclusion led to nothing. Late steps count more, but not where the gold chain is
        known and says more about the order.
        """
        ends_at = [] if ends is None else self.reading.text_places[self.offset + ends]
        before = range(len(self.steps) if ends is None else ends)
        if context_free(self.context.answer):
            return 1.0
        if not before:
            return 0.0
        answer = self.reading.text_places[2]
        # An answer that is worked out ("at 16:55") stands in no step before; what is said with it then has to.
        support = self._spoken_for(answer or ends_at, before) or 0.5 * self._spoken_for(
            [place for place in ends_at if place not in answer], before
        )
        return support if ends is None else support * len(before) / (len(self.steps) - 1)

    def _spoken_for(self, words: Sequence[int], before: range) -> float:
        """How clearly the steps `before` say `words`."""
        if not words:
            return 0.0
        reading = self.reading
        weights = reading.weights[words]
        fading = 0.7 if self.gold_order is None else 1.0
        total, norm, best = 0.0, 0.0, 0.0
        for distance, j in enumerate(reversed(before)):
            said = 0.0
            for number in reading.spans[self.offset + j]:
                hit = float(weights @ reading.alike[np.ix_(words, reading.places[number])].max(axis=1) / weights.sum())
                signed = -hit if reading.clauses[number].negated else hit
                said = signed if abs(signed) >= abs(said) else said
            weight = fading**distance
            total, norm, best = total + weight * said, norm + weight, max(best, said)
        return float(np.clip(0.5 * best + 0.5 * max(0.0, total / norm) ** 0.5, 0, 1))


def _asking(reading: Reading, text: int) -> list[int]:
    """Clauses of the last sentence of a question's last line: where a long preamble ends and the task is told."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", reading.texts[text]) if clauses_of(part)]
    count = len(clauses_of(parts[-1])) if parts else 0
    return list(reading.spans[text])[-count:] if count else []


def context_free(answer: Collection[str]) -> bool:
    """Yes, no, or a letter: an answer that no step can speak of."""
    names = [name.strip().casefold() for name in answer]
    return bool(names) and all(name in POLAR or (len(name) == 1 and name.isalpha()) for name in names)


def _statements(instruction: str) -> list[str]:
    """Sentences of the question that state something."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", instruction) if part and not part.rstrip().endswith("?")]


@lru_cache(maxsize=1 << 10)
def _says_of(name: str) -> re.Pattern[str]:
    """Matches "NAME is WORDS" up to the clause's end."""
    return re.compile(
        rf"(?<!\w){re.escape(name)}\s+(?:is|are|was|were)\s+([^,.;:!?]{{1,40}}?)"
        r"(?=[,.;:!?]|\s+(?:and|so|but|or|because|since|which|while|when|if|for|to|than)\b|$)",
        re.IGNORECASE,
    )


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


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


def _as_set(names: Iterable[str]) -> frozenset[str]:
    names = [names] if isinstance(names, str) else names
    return frozenset(name.strip().casefold() for name in names)

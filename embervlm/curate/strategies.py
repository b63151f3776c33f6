"""One chain made from another: paraphrased, reordered, expanded or simplified, and the check that it says the same.

Names and values come from `metadata.facts` and `metadata.scene`; where there are none, from the words alone.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from embervlm.curate.paraphrase import OPENERS, RuleParaphraser
from embervlm.data.facts import known_facts
from embervlm.data.records import ReasoningRecord
from embervlm.judge.faults import judge_steps
from embervlm.judge.reading import ChainContext
from embervlm.words.chain_graph import ChainGraph, join_units, points_back
from embervlm.words.chain_text import CONCLUSION
from embervlm.words.claims import ClaimReader, named_candidates

MAX_FACTS_ADDED = 3
SIGHT_OPENERS = ("In the picture, {}", "We see that {}")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
PARALLEL = ("step_types", "seen")
"""Lists in the metadata with one element for each step, the conclusion included."""

Paraphrase = Callable[[ReasoningRecord, random.Random], Sequence[str] | None]
"""A teacher that words a chain anew: a text for each numbered step, or None where it has no (other) wording."""
Row = tuple[str, dict[str, Any]]
"""A step's text and what the metadata hold for it."""


class Origin:
    """A record to make others from."""

    def __init__(self, record: ReasoningRecord, reader: ClaimReader, max_steps: int) -> None:
        self.record = record
        self.reader = reader
        self.max_steps = max_steps
        """No chain gets more numbered steps than this."""
        metadata = record.metadata
        parallel = [
            key
            for key in PARALLEL
            if isinstance(metadata.get(key), (list, tuple)) and len(metadata[key]) == len(record.steps)
        ]
        rows = [(step, {key: metadata[key][i] for key in parallel}) for i, step in enumerate(record.steps)]
        self.rows: list[Row] = rows[: record.num_steps]
        self.ending: list[Row] = rows[record.num_steps :]
        self.facts = known_facts(record)
        self.candidates = record.candidates or record.answer

    @cached_property
    def graph(self) -> ChainGraph:
        types = [extra["step_types"] for _, extra in self.rows if "step_types" in extra]
        conclusion = self.record.conclusion.removeprefix(CONCLUSION) or ", ".join(self.record.answer)
        names = {*self.candidates, *(name for name, _ in self.reader.key)}
        return ChainGraph(
            [text for text, _ in self.rows],
            conclusion,
            instruction=self.record.instruction,
            reader=self.reader,
            names=names,
            step_types=types,
        )

    @cached_property
    def context(self) -> ChainContext:
        return ChainContext(
            instruction=self.record.instruction,
            facts=self.facts,
            domains=dict(self.reader.key),
            reference_steps=self.record.steps,
            answer=frozenset(self.record.answer),
            gold_answer=frozenset(self.record.answer),
            candidates=frozenset(self.candidates),
        )

    @cached_property
    def faults(self) -> set[str]:
        return _kinds_of_fault(self.record.steps, self.context)

    @cached_property
    def claims(self) -> frozenset[Any]:
        return frozenset(claim for text, _ in self.rows for claim in self.reader.read(text))

    @cached_property
    def first_stated(self) -> dict[str, int]:
        """Name -> the first numbered step that claims something about it."""
        stated: dict[str, int] = {}
        for step, units in enumerate(self.graph.unit_numbers):
            for unit in units:
                for name in self.graph.names[unit]:
                    stated.setdefault(name, step)
        return stated

    @cached_property
    def statable(self) -> list[tuple[str, str, range]]:
        """Facts of the scene, each with the steps before which it can be stated and is not known yet.

        Without `metadata.scene`, only facts that the chain never states: others may be what it derives.
        """
        scene = self.record.metadata.get("scene")
        steps, stated = len(self.rows), self.first_stated
        if isinstance(scene, Mapping):
            names = [name for name in scene if self.facts.get(name) == scene[name]]
        else:
            names = [name for name in self.facts if name not in stated and name not in self.candidates]
        found = [(name, self.facts[name], range(min(stated.get(name, steps), steps))) for name in names]
        return [(name, value, places) for name, value, places in found if places]

    @cached_property
    def boxed(self) -> set[str]:
        """Kinds of thing whose place in the picture is known."""
        boxes = self.record.metadata.get("boxes")
        return {str(box.get("kind")) for box in boxes if isinstance(box, Mapping)} if isinstance(boxes, list) else set()

    def why_not(self, validate: bool) -> str | None:
        """The reason why nothing can be made from this record, or None."""
        if not self.rows:
            return "no chain"
        if not validate:
            return None
        if "contradicted" in self.faults:
            return "the chain contradicts itself or the known facts"
        named = named_candidates(self.record.conclusion, self.candidates)
        if named and named != set(self.record.answer):
            return "the conclusion disagrees with the answer"
        return None


def _kinds_of_fault(steps: Sequence[str], context: ChainContext) -> set[str]:
    kinds = ("redundant", "contradicted", "unsupported")
    return {kind for faults in judge_steps(steps, context) for kind in kinds if getattr(faults, kind)}


# ---- strategies: each draws the numbered steps of a new chain, or says why it cannot


def reorder(origin: Origin, rng: random.Random) -> list[Row] | str:
    """The same sentences in another order, where none needs another that now comes later."""
    order = origin.graph.new_order(rng)
    if order is None:
        return "no other order is possible"
    steps, units = order
    return [_with_units(origin, step, units[step]) for step in steps]


def simplify(origin: Origin, rng: random.Random) -> list[Row] | str:
    """Some of the sentences that the conclusion does not need left out, with all that depends on them."""
    graph = origin.graph
    if graph.counts_aloud or not graph.spare:
        return "the conclusion needs every sentence"
    spare = sorted(graph.spare)
    dropped = graph.with_dependants(rng.sample(spare, rng.randint(1, len(spare))))
    kept = [[unit for unit in units if unit not in dropped] for units in graph.unit_numbers]
    return [_with_units(origin, step, units) for step, units in enumerate(kept) if units]


def expand(origin: Origin, rng: random.Random) -> list[Row] | str:
    """True facts of the scene stated before the chain comes to them, or where it never does.

    As steps of their own while the chain is not longer than the longest given one, else in front of a step.
    """
    if origin.graph.counts_aloud or not origin.statable:
        return "all facts are stated already"
    chosen = rng.sample(origin.statable, rng.randint(1, min(MAX_FACTS_ADDED, len(origin.statable))))
    added: dict[int, list[str]] = defaultdict(list)
    sentences: dict[str, str] = {}
    for name, value, places in chosen:
        clause = f"the {name} is {value}" if name.islower() else f"{name} is {value}"
        form = rng.choice(("{}", *OPENERS, *(SIGHT_OPENERS if origin.record.image else ())))
        text = form.format(clause)
        sentences[name] = f"{text[0].upper()}{text[1:]}."
        added[rng.choice(places)].append(name)
    rows: list[Row] = []
    room = origin.max_steps - len(origin.rows)
    for step, (text, extra) in enumerate(origin.rows):
        names = added[step]
        boxed = [name for name in names if name in origin.boxed]
        stated = " ".join(sentences[name] for name in names)
        if not names or points_back(text):
            rows.append((text, extra))
        elif room > 0:
            room -= 1
            rows += [(stated, {**extra, "seen": boxed} if "seen" in extra else extra), (text, extra)]
        else:
            seen = {"seen": [*boxed, *(name for name in extra["seen"] if name not in boxed)]} if "seen" in extra else {}
            rows.append((f"{stated} {text}", {**extra, **seen}))
    return rows


Strategy = Callable[[Origin, random.Random], list[Row] | str]
STRATEGIES: dict[str, Strategy] = {"reorder": reorder, "expand": expand, "simplify": simplify}


def paraphraser(teacher: Paraphrase | None, reader: ClaimReader) -> Strategy:
    """The strategy that asks `teacher`, or else the rules."""
    rules = RuleParaphraser(reader)

    def paraphrase(origin: Origin, rng: random.Random) -> list[Row] | str:
        """The same steps in other words."""
        if teacher is not None:
            texts = teacher(origin.record, rng)
        else:
            keep = {word for name in origin.candidates for word in name.casefold().split()}
            texts = [rules.rewrite(text, rng, keep) for text, _ in origin.rows]
        if texts is None:
            return "the teacher gave no other wording"
        if len(texts) != len(origin.rows):
            return "the wording has another number of steps"
        return [(text, extra) for text, (_, extra) in zip(texts, origin.rows, strict=True)]

    return paraphrase


def _with_units(origin: Origin, step: int, units: Sequence[int]) -> Row:
    """A step made of some of its units, which looks only at what is still spoken of."""
    graph = origin.graph
    numbers = graph.unit_numbers[step]
    text, extra = origin.rows[step]
    new = join_units([graph.steps[step][unit - numbers.start] for unit in units], text)
    if "seen" in extra and len(units) < len(numbers):
        gone = {name for unit in numbers for name in graph.names[unit]}
        gone -= {name for unit in units for name in graph.names[unit]}
        extra = {**extra, "seen": [name for name in extra["seen"] if name not in gone]}
    return new, extra


# ---- checks


def fault_of(origin: Origin, rows: Sequence[Row], strategy: str) -> str | None:
    """Why the chain of `rows` is not what `strategy` may make of the origin, or None."""
    claims = frozenset(claim for text, _ in rows for claim in origin.reader.read(text))
    before = origin.claims
    if strategy == "expand":
        told = all(not claim.negated and origin.facts.get(claim.name) == claim.value for claim in claims - before)
        changed = not (before <= claims and told)
    else:
        changed = not claims <= before if strategy == "simplify" else claims != before
    if changed:
        return "claims changed"
    if strategy == "paraphrase" and _numbers(rows) != _numbers(origin.rows):
        return "numbers changed"
    steps = [text for text, _ in (*rows, *origin.ending)]
    if new_faults := _kinds_of_fault(steps, origin.context) - origin.faults:
        return f"a step would be {' and '.join(sorted(new_faults))}"
    return None


def _numbers(rows: Sequence[Row]) -> Counter[str]:
    return Counter(number for text, _ in rows for number in _NUMBER.findall(text))

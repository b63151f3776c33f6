"""What the steps of a chain say: content words, claims about named facts, and the faults of each step.

Nothing here knows robots. Names and values come from the data set (`ChainContext.domains`); the only word lists are
English function words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from embervlm.data.chain_text import number_edges
from embervlm.data.records import ReasoningRecord
from embervlm.data.store import with_fields

STOP_WORDS = frozenset(
    """a an the is are was were be been being am of to in on at for with by from as and or so that this these those it
    its then than thus therefore hence there here has have had do does did will would can could should may might i we
    you they he she which who what into also just very""".split()
)
"""Function words. Words that turn a statement around (not, no, never, cannot, without) are content."""

SUITABLE_VALUES = frozenset({"yes", "suited", "suitable", "true"})
"""Values with which a chain says 'this candidate fits'; `ChainContext.suitable_values` overrides them."""

MIN_CONTEXT_SHARE = 0.5
"""With known facts, a step without claims needs this share of its content words in the context."""
SAME_WORDS_JACCARD = 0.9

_WORD = re.compile(r"(?:(?<=\s)-)?\d+(?:[.,]\d+)*|[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_NUMBERING = re.compile(
    r"^\s*(?:[-*]\s+|step\s*\d+\s*[:.)-]?\s*|\d+\s*[:.)]\s+|(?:first|second|third|next|then|finally|lastly)(?:ly)?\s*[:,]\s*)+",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"^\s*(?:(?:in conclusion|to conclude)\b[:,]?|(?:the )?(?:conclusion|final answer|answer)\s*(?:[:,]|\bis\b))",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)(\D*)")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_LINK = re.compile(r"[\s:=]*(?:(?:is|are|was|were|be|being|not|a|an|the)\s+)*", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|never|no|without)\b|n['\u2019]t\b", re.IGNORECASE)
_EXCLUDED = re.compile(
    r"\b(?:not|no|never|without|except|excluding|than|instead of)\s+(?:(?:the|a|an)\s+)?$", re.IGNORECASE
)


@dataclass(frozen=True)
class Claim:
    """A step says that `name` is `value`, or with `negated` that it is not."""

    name: str
    value: str
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.name} is {'not ' if self.negated else ''}{self.value}"


@dataclass(frozen=True, kw_only=True)
class ChainContext:
    """What is known about the question a chain answers. Everything may be empty; then less can be checked."""

    instruction: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fact name -> true value, for all that a correct chain may claim; {} when nothing is known."""
    statements: Sequence[str] = ()
    """Facts that are sentences."""
    domains: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Fact name -> every value seen over the data set."""
    reference_steps: Sequence[str] = ()
    """Gold chain."""
    step_types: Sequence[str] = ()
    """Type of each of `reference_steps`."""
    answer: Collection[str] = frozenset()
    """Predicted set."""
    gold_answer: Collection[str] = frozenset()
    candidates: Collection[str] = frozenset()
    """Names an answer can hold. Empty: every name of `domains` with two values, one of `suitable_values`."""
    suitable_values: Collection[str] = SUITABLE_VALUES
    """Values with which a step says that a candidate fits."""

    def __post_init__(self) -> None:
        if self.step_types and len(self.step_types) != len(self.reference_steps):
            raise ValueError(f"{len(self.step_types)} step_types for {len(self.reference_steps)} reference_steps")

    @cached_property
    def reader(self) -> ClaimReader:
        """Reads the names of `domains` and `facts`."""
        domains = {name: frozenset(values) for name, values in self.domains.items()}
        unusual = {name: value for name, value in self.facts.items() if value not in domains.get(name, ())}
        domains |= {name: domains.get(name, frozenset()) | {value} for name, value in unusual.items()}
        return ClaimReader.of(domains, frozenset(name for name in self.facts if name not in self.domains))

    @cached_property
    def verdict_names(self) -> frozenset[str]:
        """Candidates that a step can call suitable or not: names with two values, one of `suitable_values`."""
        names = _verdict_names(self.reader.key, frozenset(self.suitable_values))
        return names & set(self.candidates) if self.candidates else names

    @cached_property
    def all_candidates(self) -> frozenset[str]:
        return self.verdict_names | set(self.candidates) | set(self.answer) | set(self.gold_answer)


def fact_domains(records: Sequence[ReasoningRecord]) -> dict[str, frozenset[str]]:
    """Fact name -> every value that `records` give it."""
    values: dict[str, set[str]] = defaultdict(set)
    for record in with_fields(records, "facts"):
        for name, value in record.metadata["facts"].items():
            values[name].add(value)
    return {name: frozenset(found) for name, found in values.items()}


def known_facts(record: ReasoningRecord) -> dict[str, str]:
    """What is true of a record's scene: `metadata.scene` and `metadata.facts`, as far as they are text."""
    out: dict[str, str] = {}
    for key in ("scene", "facts"):
        values = record.metadata.get(key)
        if isinstance(values, Mapping):
            out |= {name: value for name, value in values.items() if isinstance(value, str) and value.strip()}
    return out


def reader_of(records: Sequence[ReasoningRecord]) -> ClaimReader:
    """Reads every name that the scenes and facts of `records` have."""
    domains: dict[str, set[str]] = defaultdict(set)
    for record in with_fields(records, "scene", "facts"):
        for name, value in known_facts(record).items():
            domains[name].add(value)
    return ClaimReader.of(domains)


class ClaimReader:
    """Reads claims out of a step: a name and, before the next name or the sentence's end, one of its values.

    Longest value first, whole words, any case; also "<value> <name>" side by side. A value word that is a name too
    ("The load is light") counts as the value when only a linking word stands between.

    The values of names in `open_names` are not all known. What stands right after "NAME is" may be the value of another
    of them, or a number with the same unit: "The delay is 7 seconds", where 6 seconds are known.
    """

    @classmethod
    def of(cls, domains: Mapping[str, Collection[str]], open_names: frozenset[str] = frozenset()) -> ClaimReader:
        """The shared reader of `domains`, which remembers the steps it has read."""
        return _reader(frozenset((name, frozenset(values)) for name, values in domains.items()), open_names)

    def __init__(self, domains: Mapping[str, Collection[str]], open_names: frozenset[str] = frozenset()) -> None:
        self.key = frozenset((name, frozenset(values)) for name, values in domains.items())
        self._open_names = open_names
        open_values = {value for name in open_names for value in domains[name]}
        self._open_values = _alternatives(open_values, _units(open_values))
        self._canonical = {name.casefold(): name for name in domains}
        self._names = _alternatives(domains)
        self._values = {name: _alternatives(values) for name, values in domains.items()}
        self._value_of = {name: {value.casefold(): value for value in values} for name, values in domains.items()}
        self._read_once = lru_cache(maxsize=1 << 14)(self._read)

    def read(self, step: str) -> tuple[Claim, ...]:
        """Claims of one step, in the order of the text."""
        return self._read_once(step)

    def _read(self, step: str) -> tuple[Claim, ...]:
        if self._names is None:
            return ()
        return tuple(claim for sentence in _SENTENCE_END.split(step) for claim in self._read_sentence(sentence))

    def _read_sentence(self, sentence: str) -> Iterable[Claim]:
        assert self._names is not None
        mentions = list(self._names.finditer(sentence))
        taken = 0
        for index, mention in enumerate(mentions):
            if mention.start() < taken:  # part of a value that is claimed already
                continue
            name = self._canonical[mention[0].casefold()]
            values = self._values[name]
            if values is None:
                continue
            before = sentence[taken : mention.start()]
            for match in values.finditer(before):
                if match.end() < len(before) and before[match.end() :].isspace():
                    yield Claim(name, self._value_of[name][match[0].casefold()])
            limit = next((m.start() for m in mentions[index + 1 :] if m.start() >= mention.end()), len(sentence))
            if (other := self._open_claim(name, sentence, mention.end())) is not None:
                taken, claim = other
                yield claim
                continue
            found = values.search(sentence, mention.end())
            if not found:
                continue
            gap = sentence[mention.end() : found.start()]
            if found.start() < limit or _LINK.fullmatch(gap):
                taken = found.end()
                yield Claim(name, self._value_of[name][found[0].casefold()], bool(_NEGATION.search(gap)))

    def _open_claim(self, name: str, sentence: str, start: int) -> tuple[int, Claim] | None:
        """Where a value that need not be in the domain ends right after "NAME is", and the claim."""
        if name not in self._open_names or self._open_values is None:
            return None
        link = _LINK.match(sentence, start)
        found = self._open_values.match(sentence, link.end()) if link and link[0].strip() else None
        if not link or not found:
            return None
        stated, own = " ".join(found[0].casefold().split()), self._value_of[name]
        number = _number_of(stated)
        if number and number[1] not in _units(own):  # "The lake is 3 kilometres away" says nothing of its oxygen
            return None
        value = own.get(stated) or next((v for v in own.values() if number and _number_of(v) == number), stated)
        return found.end(), Claim(name, value, bool(_NEGATION.search(link[0])))


@dataclass(frozen=True)
class StepFaults:
    """Why a step does not count; None where it has no such fault."""

    redundant: str | None = None
    contradicted: str | None = None
    unsupported: str | None = None

    @property
    def any(self) -> bool:
        return bool(self.redundant or self.contradicted or self.unsupported)


def is_conclusion(step: str) -> bool:
    return _CONCLUSION.match(strip_numbering(step)) is not None


def strip_numbering(step: str) -> str:
    """`step` without "Step 3:", "3.", "-" or "First," in front."""
    return _NUMBERING.sub("", step, count=1)


@lru_cache(maxsize=1 << 16)
def all_words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(strip_numbering(text).casefold()))


@lru_cache(maxsize=1 << 16)
def content_words(text: str) -> tuple[str, ...]:
    """Lower-case words in order, without numbering, the word "Conclusion", function words and a plural s."""
    stripped = strip_numbering(text)
    stripped = _CONCLUSION.sub("", stripped, count=1)
    return tuple(_singular(word) for word in _WORD.findall(stripped.casefold()) if word not in STOP_WORDS)


def named_candidates(conclusion: str, candidates: Collection[str]) -> frozenset[str]:
    """Candidates that a conclusion names as whole words, longest first; not those after "not", "except", "than"."""
    return _named(conclusion, frozenset(candidates))


def conclusion_fault(conclusion: str, answer: Collection[str], candidates: Collection[str]) -> str | None:
    """What is wrong where a conclusion names other candidates than the answer does; None where it names none."""
    named = named_candidates(conclusion, {*candidates, *answer})
    if not answer or not named or {name.casefold() for name in named} == {name.casefold() for name in answer}:
        return None
    return f"names {', '.join(sorted(named))}, the answer is {', '.join(sorted(answer))}"


def judge_steps(steps: Sequence[str], context: ChainContext) -> list[StepFaults]:
    """Faults of each step; the rules are those of `embervlm.evaluation.metrics.reasoning_consistency`.

    A claim about a known fact is held against the fact alone, so a step that corrects an earlier mistake is sound.
    Only sound steps become context for later ones, so a chain about something else does not support itself.
    """
    reader = context.reader
    known_words = set(content_words(context.instruction))
    for name, value in context.facts.items():
        known_words.update(content_words(name), content_words(value))
    for step in (*context.statements, *context.reference_steps):
        known_words.update(content_words(step))
    claimed: dict[str, Claim] = {}
    earlier: list[tuple[tuple[str, ...], frozenset[str], frozenset[Claim]]] = []
    concluded = False
    faults = []
    for step in steps:
        words, claims, concludes = content_words(step), list(reader.read(step)), is_conclusion(step)
        said = (words, frozenset(words), frozenset(claims))
        redundant = None if concludes and not concluded else _repetition(said, earlier)
        if concludes:
            made = {claim.name for claim in claims}
            claims += _implied_claims(step, context, exclude=made)
        contradicted = _contradiction(claims, claimed, context)
        if not words:
            unsupported: str | None = "says nothing"
        elif not known_words:  # a first step without any context: there is nothing to hold it against
            unsupported = None
        else:
            unsupported = _lack_of_support(said, concludes, known_words, context)
        fault = StepFaults(redundant, contradicted, unsupported)
        faults.append(fault)
        if not (contradicted or unsupported):
            known_words.update(words)
        for claim in claims:
            claimed.setdefault(claim.name, claim)
        earlier.append(said)
        concluded = concluded or concludes
    return faults


def opposite_steps(steps: Sequence[str]) -> tuple[int, int] | None:
    """The first two steps, counted from 1, of which one says a sentence of the other with a "not" in it; else None.

    Needs neither facts nor domains: "The wall is too high." and "The wall is not too high." in any subject.
    """
    text = "\n".join(steps).casefold()
    if not (_NEGATION.search(text) or "cannot" in text):
        return None
    said: dict[tuple[str, ...], tuple[int, bool]] = {}
    for number, step in enumerate(steps, 1):
        for sentence in _SENTENCE_END.split(step):
            words = content_words(sentence)
            bare = tuple(word for word in words if not _is_negation(word))
            if len(bare) < 2 or sentence.rstrip().endswith("?"):
                continue
            negated = (len(words) - len(bare)) % 2 == 1
            first, other = said.setdefault(bare, (number, negated))
            if other != negated:
                return first, number
    return None


def _is_negation(word: str) -> bool:
    return word in ("not", "no", "never", "cannot", "without") or word.endswith(("n't", "n\u2019t"))


def _repetition(
    said: tuple[tuple[str, ...], frozenset[str], frozenset[Claim]],
    earlier: Sequence[tuple[tuple[str, ...], frozenset[str], frozenset[Claim]]],
) -> str | None:
    words, word_set, claims = said
    for index, (other_words, other_set, other_claims) in enumerate(earlier, 1):
        if words == other_words:
            return f"repeats step {index}"
        shared = len(word_set & other_set)
        if claims == other_claims and shared and shared >= SAME_WORDS_JACCARD * len(word_set | other_set):
            return f"says the same as step {index}"
    return None


def _contradiction(claims: Sequence[Claim], claimed: Mapping[str, Claim], context: ChainContext) -> str | None:
    within: dict[str, Claim] = {}
    for claim in claims:
        if claim.name in within and _differ(claim, within[claim.name]):
            return f"says both '{within[claim.name]}' and '{claim}'"
        within.setdefault(claim.name, claim)
        if claim.name in context.facts:
            if (claim.value == context.facts[claim.name]) == claim.negated:
                return f"says '{claim}', but {claim.name} is {context.facts[claim.name]}"
        elif claim.name in claimed and _differ(claim, claimed[claim.name]):
            return f"says '{claim}', but an earlier step says '{claimed[claim.name]}'"
    return None


def _lack_of_support(
    said: tuple[tuple[str, ...], frozenset[str], frozenset[Claim]],
    concludes: bool,
    known_words: set[str],
    context: ChainContext,
) -> str | None:
    words, _, claims = said
    if context.facts:
        if unknown := sorted({claim.name for claim in claims} - set(context.facts)):
            return f"claims something about {', '.join(unknown)}, which this question does not have"
        if not claims and not concludes:
            share = sum(word in known_words for word in words) / len(words)
            if share < MIN_CONTEXT_SHARE:
                return f"only {share:.0%} of its words occur in the question, the facts or earlier steps"
            return None
    if any(context.facts.get(claim.name) == claim.value for claim in claims):
        return None
    if not any(word in known_words for word in words):
        return "shares no word with the question, the facts or earlier steps"
    return None


def _implied_claims(step: str, context: ChainContext, exclude: Collection[str]) -> list[Claim]:
    """A conclusion that names a candidate says that it is suitable."""
    domains = dict(context.reader.key)
    suitable = {value.casefold() for value in context.suitable_values}
    return [
        Claim(name, value)
        for name in sorted(named_candidates(step, context.verdict_names) - set(exclude))
        for value in domains[name]
        if value.casefold() in suitable
    ]


def _differ(claim: Claim, other: Claim) -> bool:
    if claim.negated and other.negated:
        return False
    return (claim.value == other.value) == (claim.negated or other.negated)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _alternatives(phrases: Collection[str], units: Iterable[str] = ()) -> re.Pattern[str] | None:
    """Matches any of `phrases` as whole words, in any case, the longest first; then any number with one of `units`."""
    parts = [
        re.escape(phrase).join(number_edges(phrase))
        for phrase in sorted(phrases, key=lambda p: (-len(p), p)) if phrase.strip()
    ]  # fmt: skip
    parts += [rf"-?\d[\d,]*(?:\.\d+)?\s*{re.escape(unit)}" for unit in sorted(units, key=lambda u: (-len(u), u))]
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE) if parts else None


@lru_cache(maxsize=256)
def _reader(domains: frozenset[tuple[str, frozenset[str]]], open_names: frozenset[str]) -> ClaimReader:
    return ClaimReader(dict(domains), open_names)


def _units(values: Iterable[str]) -> frozenset[str]:
    return frozenset(number[1] for value in values if (number := _number_of(value)))


def _number_of(value: str) -> tuple[float, str] | None:
    match = _NUMBER.fullmatch(value.strip())
    return (float(match[1].replace(",", "")), match[2].strip().casefold()) if match else None


@lru_cache(maxsize=256)
def _verdict_names(domains: frozenset[tuple[str, frozenset[str]]], suitable: frozenset[str]) -> frozenset[str]:
    suitable = frozenset(value.casefold() for value in suitable)
    return frozenset(
        name
        for name, values in domains
        if len(values) <= 2 and sum(value.casefold() in suitable for value in values) == 1
    )


_pattern = lru_cache(maxsize=256)(_alternatives)


def _named(text: str, candidates: frozenset[str]) -> frozenset[str]:
    if (pattern := _pattern(candidates)) is None:
        return frozenset()
    canonical = {name.casefold(): name for name in candidates}
    return frozenset(
        canonical[match[0].casefold()]
        for match in pattern.finditer(text)
        # A one-letter choice is matched as written: "a robot" does not name choice A.
        if (len(match[0]) > 1 or match[0] in candidates) and not _EXCLUDED.search(text[: match.start()])
    )

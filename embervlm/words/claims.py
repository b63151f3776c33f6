"""What the steps of a chain say: content words, and claims about named facts.

Names and values come from the data set (`ChainContext.domains`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from embervlm.words.chain_text import number_edges
from embervlm.words.english import (
    NEGATION,
    POLAR,
    REASON_WORDS,
    RESULT_WORDS,
    STOP_WORDS,
    any_of,
    is_negation,
    is_number,
    sentences,
    stem,
    strip_numbering,
    tokens,
)
from embervlm.words.numbers import in_digits

_CONCLUSION = re.compile(
    r"^\s*(?:(?:in conclusion|to conclude)\b[:,]?|(?:the )?(?:conclusion|final answer|answer)\s*"
    r"(?:[:,]|\bis\b(?!\s+not\b)))",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)(\D*)")
_SEMICOLON = re.compile(r";\s+")
_LINK = re.compile(r"[\s:=]*(?:(?:is|are|was|were|be|being|not|a|an|the)\s+)*", re.IGNORECASE)
_EXCLUDED = re.compile(
    r"(?:\b(?:not|no|never|without|except|excluding|than|instead of)|(?:\bcannot|\bnot|n['\u2019]t)(?:\s+be)?)"
    r"\s+(?:(?:the|a|an)\s+)?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Claim:
    """A step says that `name` is `value`, or with `negated` that it is not."""

    name: str
    value: str
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.name} is {'not ' if self.negated else ''}{self.value}"


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
        return tuple(claim for claim, _, _ in self._read_once(step))

    def placed(self, step: str) -> tuple[tuple[Claim, int, int], ...]:
        """The same claims, each with where its value starts and ends in `step`."""
        return self._read_once(step)

    def _read(self, step: str) -> tuple[tuple[Claim, int, int], ...]:
        if self._names is None:
            return ()
        found, start = [], 0
        for part in statements(step):
            start = step.find(part, start)
            found += [(claim, start + first, start + last) for claim, first, last in self._read_sentence(part)]
        return tuple(found)

    def _read_sentence(self, sentence: str) -> Iterable[tuple[Claim, int, int]]:
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
                    yield Claim(name, self._value_of[name][match[0].casefold()]), *match.span()
            limit = next((m.start() for m in mentions[index + 1 :] if m.start() >= mention.end()), len(sentence))
            if (other := self._open_claim(name, sentence, mention.end())) is not None:
                claim, first, taken = other
                yield claim, first, taken
                continue
            found = values.search(sentence, mention.end())
            if not found:
                continue
            gap = sentence[mention.end() : found.start()]
            if found.start() < limit or _LINK.fullmatch(gap):
                taken = found.end()
                yield Claim(name, self._value_of[name][found[0].casefold()], bool(NEGATION.search(gap))), *found.span()

    def _open_claim(self, name: str, sentence: str, start: int) -> tuple[Claim, int, int] | None:
        """The claim of a value right after "NAME is" that need not be in the domain, and where that starts and ends."""
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
        return Claim(name, value, bool(NEGATION.search(link[0]))), *found.span()


def is_conclusion(step: str) -> bool:
    return _CONCLUSION.match(strip_numbering(step)) is not None


def statements(text: str) -> list[str]:
    """The sentences of `text`, cut at semicolons too."""
    return [part for sentence in sentences(text) for part in _SEMICOLON.split(sentence)]


@lru_cache(maxsize=1 << 16)
def all_words(text: str) -> tuple[str, ...]:
    return tuple(tokens(text))


@lru_cache(maxsize=1 << 16)
def content_words(text: str) -> tuple[str, ...]:
    """Stems of the words in order, without numbering, the word "Conclusion" and function words."""
    stripped = _CONCLUSION.sub("", strip_numbering(text), count=1)
    return tuple(stem(_one_spelling(word)) for word in tokens(stripped) if word not in STOP_WORDS)


def _one_spelling(word: str) -> str:
    return in_digits(word) if is_number(word) else word  # number words stay words: "one" is often none


_OPENING_POLAR = re.compile(
    r"^\s*(?:(?:conclusion|(?:the )?(?:final )?answer)\s*(?::|\bis\b)\s*|so,?\s+)*(yes|no|true|false)\s*[,;:.\u2014-]",
    re.IGNORECASE,
)
_SO = re.compile(rf"{any_of(*RESULT_WORDS)}(?!\s+(?:that|far|much|many|on|as)\b)", re.IGNORECASE)
_REASON = re.compile(any_of(*REASON_WORDS), re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\banswers?\b(?:(?!\b(?:not|cannot)\b|n['\u2019]t\b)[^.,;]){0,20}?(?:\b(?:is|are|be|reads)\b|[:=])", re.IGNORECASE
)


def named_candidates(conclusion: str, candidates: Collection[str]) -> frozenset[str]:
    """Candidates that a conclusion names as whole words, longest first; not those after "not", "except", "than"."""
    return _named(conclusion, frozenset(candidates))


def concluded_names(conclusion: str, candidates: Collection[str], answer: Collection[str]) -> frozenset[str]:
    """Candidates that a conclusion gives as its answer: those behind "the answer is", else all that it names.

    "A yellow shape is there, so yes" names two candidates where one question has colors and another yes and no. Such a
    word beside other names is the answer or a word of the sentence: `answer` decides which.
    """
    names = frozenset((*candidates, *answer))
    named = next(filter(None, (_named(text, names) for text in _answering_parts(conclusion))), frozenset())
    if (opening := _OPENING_POLAR.search(conclusion)) and len(told := _named(opening[1], names)) == 1:
        return told
    polar = frozenset(name for name in named if name.casefold() in POLAR)
    wanted = {name.casefold() for name in answer}
    parts = (some for some in (polar, named - polar) if some)
    return next((some for some in parts if {name.casefold() for name in some} == wanted), named)


def _answering_parts(conclusion: str) -> Iterator[str]:
    """The parts of a conclusion that may say its answer, the likeliest first; the whole of it is the last.

    What stands behind "the answer is", without reasons ("B, because A is smaller"); what follows "so" ("A is smaller,
    so B"); what is said before a reason or behind one that opens the sentence.
    """
    if told := list(_ANSWER_IS.finditer(conclusion)):
        behind = conclusion[told[-1].end() :]
        yield _REASON.split(behind, maxsplit=1)[0]
        yield behind
    results = list(_SO.finditer(conclusion))
    if results and results[-1].start() > 0:
        yield _REASON.split(conclusion[results[-1].end() :], maxsplit=1)[0]
    first, *_ = _REASON.split(conclusion, maxsplit=1)
    yield first if first.strip(" :,") else conclusion.partition(",")[2]
    yield conclusion


def conclusion_fault(conclusion: str, answer: Collection[str], candidates: Collection[str]) -> str | None:
    """What is wrong where a conclusion names other candidates than the answer does; None where it names none."""
    named = concluded_names(conclusion, candidates, answer)
    if not answer or not named or {name.casefold() for name in named} == {name.casefold() for name in answer}:
        return None
    return f"names {', '.join(sorted(named))}, the answer is {', '.join(sorted(answer))}"


def _alternatives(phrases: Collection[str], units: Iterable[str] = ()) -> re.Pattern[str] | None:
    """Matches any of `phrases` as whole words, in any case, the longest first; then any number with one of `units`."""
    parts = [
        re.escape(phrase).join(number_edges(phrase))
        for phrase in sorted(phrases, key=lambda p: (-len(p), p))
        if phrase.strip()
    ]
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


def is_article(text: str, match: re.Match[str]) -> bool:
    """Whether the choice "A" that was found in `text` may be an article: a word of substance stands behind it."""
    behind = re.match(r"\s+([a-z]+)", text[match.end() :]) if match[0] == "A" else None
    return behind is not None and behind[1] not in STOP_WORDS and not is_negation(behind[1])


_pattern = lru_cache(maxsize=256)(_alternatives)


def _named(text: str, candidates: frozenset[str]) -> frozenset[str]:
    if (pattern := _pattern(candidates)) is None:
        return frozenset()
    canonical = {name.casefold(): name for name in candidates}
    found = [
        match
        for match in pattern.finditer(text)
        # A one-letter choice is matched as written: "a robot" does not name choice A.
        if (len(match[0]) > 1 or match[0] in candidates) and not _EXCLUDED.search(text[: match.start()])
    ]
    named = frozenset(canonical[match[0].casefold()] for match in found)
    # "A penguin cannot fly, so B": where another choice is named, a word that an article may stand before is not A.
    bare = frozenset(canonical[match[0].casefold()] for match in found if not is_article(text, match))
    return bare or named

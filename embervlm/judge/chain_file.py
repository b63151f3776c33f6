"""`embervlm score-chains`: chains of any model and subject, one JSON object to a line, with their scores.

In: {"steps": [...], "answer": ..., "gold_answer"?, "instruction"?, "image"?, "facts"?, "candidates"?, "gold_steps"?}.
Out: the same lines with "scores". A line that cannot be read scores 0 and is counted. The picture is not opened: that
there is one says that steps read off it what the line does not tell.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from embervlm.data.facts import fact_domains
from embervlm.data.record_fields import kind
from embervlm.data.record_pictures import PICTURE_NAMES, PLACEHOLDER, names_picture
from embervlm.data.records import DataError, file_values, read_records
from embervlm.judge.backends import EMBEDDED
from embervlm.judge.metrics import ChainScorer
from embervlm.judge.reading import ChainContext
from embervlm.progress import progress_bar
from embervlm.run_dir import atomic_text
from embervlm.words.chain_text import parse_answer, parse_reasoning_text, strict_answer
from embervlm.words.claims import concluded_names, content_words
from embervlm.words.numbers import spelled
from embervlm.words.open_answers import LIST_SEPARATOR

SCORES = ("reasoning_consistency", "step_completeness", "logical_flow_score", "final_answer_accuracy")
FIELDS = ("steps", "answer", "gold_answer", "instruction", "image", "facts", "candidates", "gold_steps")
MAX_STEPS, MAX_CHARACTERS = 200, 30_000
"""Of a line; scoring compares every step with every other, and every word."""
MAX_VALUES = 200
"""A fact with more values over the reference chains is free text."""


@dataclass(frozen=True)
class ChainLine:
    """One line of a file of chains."""

    number: int
    value: Any
    """As it stands in the file; None where it is no JSON."""
    steps: tuple[str, ...] = ()
    context: ChainContext = ChainContext()
    problem: str = ""
    """Why it could not be read."""


def read_lines(path: Path) -> Iterator[ChainLine]:
    """Every line of `path` that is not blank, good or bad.

    Raises:
        DataError: the file cannot be read at all, or holds no line.
    """
    if path.suffix != ".jsonl":
        raise DataError(f'{path}: unknown suffix "{path.suffix}"; write one JSON object to a line of a .jsonl file')
    problems: list[str] = []
    numbers = 0
    for number, value in file_values(path, problems):
        while problems:
            numbers += 1
            yield _broken(problems.pop(0), path)
        numbers += 1
        yield read_line(number, value)
    for problem in problems:
        numbers += 1
        yield _broken(problem, path)
    if not numbers:
        raise DataError(f"{path}: contains no chains; write at least one line")


def _broken(problem: str, path: Path) -> ChainLine:
    line = re.search(r" (?:line|record) (\d+)", problem.removeprefix(str(path)))
    text = re.sub(r"^record \d+: ", "", problem.removeprefix(f"{path} "))
    return ChainLine(int(line[1]) if line else 0, None, problem=text)


def read_line(number: int, value: Any) -> ChainLine:
    """The chain that one parsed line holds."""
    try:
        return _read_line(number, value)
    except DataError as error:
        return ChainLine(number, value, problem=str(error))


def _read_line(number: int, value: Any) -> ChainLine:
    if not isinstance(value, dict):
        raise DataError(f'is {kind(value)}, not an object; write {{"steps": [...], "answer": ...}}')
    if "steps" not in value:
        raise DataError(f"steps: is missing; {_instead_of_steps(value)}")
    steps = value["steps"]
    if isinstance(steps, str):
        steps = list(parse_reasoning_text(steps)) or [line for line in steps.splitlines() if line.strip()]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise DataError(f"steps: is {kind(steps)}, not a list of texts; write one text for each step")
    if len(steps) > MAX_STEPS:
        raise DataError(f"steps: there are {len(steps):,}; at most {MAX_STEPS} can be scored")
    candidates = _texts(value, "candidates")
    gold_steps = _texts(value, "gold_steps")
    facts, statements = _facts(value.get("facts"))
    instruction = value.get("instruction") or ""
    if not isinstance(instruction, str):
        raise DataError(f"instruction: is {kind(instruction)}, not a text; write the question")
    size = sum(map(len, (instruction, *steps, *gold_steps, *statements, *facts, *facts.values())))
    if size > MAX_CHARACTERS:
        raise DataError(f"has {size:,} characters; at most {MAX_CHARACTERS:,} can be scored")
    context = ChainContext(
        instruction=instruction,
        facts=facts,
        statements=statements,
        candidates=frozenset(candidates),
        reference_steps=gold_steps,
        answer=_answer(value, "answer", candidates),
        gold_answer=_answer(value, "gold_answer", candidates),
        is_pictured=names_picture(value) or bool(PLACEHOLDER.search(instruction)),
    )
    return ChainLine(number, value, tuple(steps), context)


def _instead_of_steps(value: Mapping[str, Any]) -> str:
    """What to do about a line without steps."""
    if "reasoning" in value:
        return 'this is a record of a data set: write its chain as "steps", or check it with `embervlm data validate`'
    near = get_close_matches("steps", value, n=1)
    return f'rename "{near[0]}"' if near else "write one text for each step"


def misspelt(value: Any) -> list[tuple[str, str]]:
    """Names in a line that nothing reads, each with the one of ours that it is nearly."""
    if not isinstance(value, dict):
        return []
    missing = [name for name in FIELDS if name not in value]
    unread = [name for name in value if name not in FIELDS and name.casefold() not in PICTURE_NAMES]
    near = [(name, get_close_matches(name, missing, n=1, cutoff=0.8)) for name in unread]
    return [(name, found[0]) for name, found in near if found]


def _texts(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = value.get(name) or []
    found = [found] if isinstance(found, (str, int, float)) else found
    if not isinstance(found, list) or not all(isinstance(item, (str, int, float)) for item in found):
        raise DataError(f"{name}: is {kind(found)}, not a text or a list of texts; correct it")
    return tuple(_text(item) for item in found)


def _answer(value: Mapping[str, Any], name: str, candidates: Sequence[str]) -> frozenset[str]:
    """A set; of one text, the candidates it names, else its parts where they are short."""
    found = _texts(value, name)
    if len(found) != 1 or isinstance(value[name], list):
        return frozenset(found)
    if candidates and (named := _named(found[0], tuple(candidates))):
        return frozenset(named)
    if spelled(found[0].strip(" .")) is not None:  # "three hundred and five" is no list
        return frozenset(found)
    parts = [part for part in LIST_SEPARATOR.split(found[0].strip().rstrip(".")) if part]
    return frozenset(parts) if all(len(part.split()) <= 4 for part in parts) else frozenset(found)


def _named(text: str, candidates: tuple[str, ...]) -> Collection[str]:
    """The candidates that an answer gives, which may be a sentence: "(B), because A is smaller"."""
    if strict_answer(text.strip(" ."), candidates)[1] and (found := concluded_names(text, candidates, ())):
        return found
    return parse_answer(text, candidates)


def _facts(value: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Facts by name, and facts that are sentences."""
    if value is None:
        return {}, ()
    if isinstance(value, str):
        return {}, (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return {}, tuple(value)
    if isinstance(value, dict) and all(isinstance(item, (str, int, float)) for item in value.values()):
        return {name.replace("_", " ").strip(): _text(item) for name, item in value.items() if name.strip()}, ()
    raise DataError(f"facts: is {kind(value)}, neither {{name: value}} nor a list of sentences; correct it")


def _text(value: str | int | float) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def scorer_for(
    reference: Path | None, similarity: str = EMBEDDED, entailment: str = EMBEDDED
) -> tuple[ChainScorer, dict[str, frozenset[str]]]:
    """The scorer fitted on `reference` (lines as here, or a data set of records), and the values of its facts."""
    if reference is None:
        return ChainScorer.fit(similarity=similarity, entailment=entailment), {}
    problems: list[str] = []
    first = next((value for _, value in file_values(reference, problems)), None)
    if isinstance(first, dict) and "steps" in first:
        lines = list(read_lines(reference))
        if bad := [line for line in lines if line.problem]:
            raise DataError.of([f"{reference} line {line.number}: {line.problem}" for line in bad])
        chains = [line.steps for line in lines]
        values: dict[str, set[str]] = defaultdict(set)
        for line in lines:
            for name, fact in line.context.facts.items():
                values[name].add(fact)
        domains = {name: frozenset(found) for name, found in values.items()}
        asked = [(line.context.instruction, line.context.gold_answer) for line in lines]
    else:
        records = read_records(reference, texts_alone=True, require_reasoning=False)
        chains = [record.steps for record in records if record.steps]
        domains = fact_domains(records)
        asked = [(record.instruction, record.answer) for record in records]
    domains = {name: found for name, found in domains.items() if len(found) <= MAX_VALUES}
    return ChainScorer.fit(chains, domains, asked=asked, similarity=similarity, entailment=entailment), domains


def score_lines(
    lines: Iterable[ChainLine], scorer: ChainScorer, domains: Mapping[str, frozenset[str]] | None = None
) -> Iterator[dict[str, Any]]:
    """Each line's value with its scores; zeros and a reason for one that could not be read."""
    for line in lines:
        if line.problem:
            value = line.value if isinstance(line.value, dict) else {"line": line.number}
            zeros: dict[str, Any] = dict.fromkeys((*SCORES, "adjacent_similarity"), 0.0)
            nothing = {"completeness_by_type": {}, "parts": {}, "reasons": [f"unparseable: {line.problem}"]}
            yield {**value, "scores": {**zeros, **nothing}}
            continue
        context = replace(line.context, domains=domains) if domains else line.context
        scores = scorer.score(line.steps, context)
        if not any(content_words(step) for step in line.steps):
            scores["reasons"] = ["the chain is empty"]
        yield {**line.value, "scores": scores}


def score_file(
    path: Path,
    *,
    output_file: Path | None = None,
    as_json: bool = False,
    reference: Path | None = None,
    similarity: str = EMBEDDED,
    entailment: str = EMBEDDED,
) -> None:
    """Score every line of `path`; print the lines with `as_json`, else what is wrong with each and the means.

    Raises:
        DataError: no file of lines, none of which can be scored, or one that the output would replace.
    """
    if output_file is not None and output_file.resolve() == path.resolve():
        raise DataError(f"--output_file {output_file}: is the input; choose another file")
    scorer, domains = scorer_for(reference, similarity, entailment)
    lines = list(read_lines(path))
    bar = progress_bar(lines, desc="score", unit=" chains", disable=as_json or None)
    scored = list(score_lines(bar, scorer, domains))
    for line in lines:
        if line.problem:
            print(f"{path} line {line.number}: {line.problem}", file=sys.stderr)
    if output_file is not None:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_text(output_file) as file:
            file.writelines(json.dumps(value) + "\n" for value in scored)
    if as_json:
        for value in scored:
            print(json.dumps(value))
    else:
        for line, value in zip(lines, scored, strict=True):
            for reason in value["scores"]["reasons"] if not line.problem else ():
                print(f"line {line.number}: {reason}")
    out = sys.stderr if as_json else sys.stdout
    print("\n".join(summary(scored, scorer)), file=out)
    print("".join(f"{note}\n" for note in notes(lines)), end="", file=out)
    if all(line.problem for line in lines):
        raise DataError(f"{path}: no line could be scored; the reasons are above")


def notes(lines: Sequence[ChainLine]) -> list[str]:
    """How the scores are to be read of lines that tell little."""
    read = [line.context for line in lines if not line.problem]
    seen = sum(context.is_seen_alone for context in read)
    untold = sum(not context.is_told and not context.is_pictured for context in read)
    counts = Counter(pair for line in lines for pair in misspelt(line.value))
    out = [
        f'{count:,} of {len(lines):,} lines have "{name}", which is not read: is it {ours}?'
        for (name, ours), count in counts.items()
    ]
    if seen:
        out.append(
            f"{seen:,} of {len(lines):,} lines have a picture and neither facts nor gold_steps: whether what their "
            "steps read off it is true was not judged"
        )
    if untold:
        out.append(
            f"{untold:,} of {len(lines):,} lines have nothing but the question: what their steps bring in counts as "
            'made up. If they are about pictures, name these ("image": "..."); else give facts or gold_steps'
        )
    return out


def summary(scored: Sequence[Mapping[str, Any]], scorer: ChainScorer) -> list[str]:
    """Means over all chains, those that score 0 included, as lines of text."""
    reasons = [value["scores"]["reasons"] for value in scored]
    unparseable = sum(any(reason.startswith("unparseable") for reason in found) for found in reasons)
    empty = sum("the chain is empty" in found for found in reasons)
    out = [f"{len(scored):,} chains; {empty:,} are empty and {unparseable:,} unparseable, and these score 0"]
    for name in (*SCORES, "adjacent_similarity"):
        found = [value["scores"][name] for value in scored if value["scores"][name] is not None]
        out.append(f"{name:<24}" + (f"{sum(found) / len(found):.4f}" if found else "n/a (no gold_answer)"))
    for use, backend in scorer.backends.record.items():
        out.append(f"{use}: {backend['name']} {backend['version']}")
    return out

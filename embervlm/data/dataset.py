"""Records as token ids, and the order in which training sees them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embervlm.data.lengths import Limits, refuse_too_long, too_long
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import (
    ASKED,
    CAPTION,
    DIRECT,
    EDITED,
    REASONING,
    Grid,
    Sample,
    Samples,
    _attention_targets,
    step_texts,
)
from embervlm.data.splits import text_hash
from embervlm.data.store import RecordView, has_field, picture_hashes
from embervlm.data.tokenizer import DIRECT_PROMPT, ReasoningTokenizer

CAPTION_PROMPT = "Describe the picture."
PICTURE_DRAWS = 8
"""Pictures drawn for one that shows other facts."""


def _sizes_file(records: Sequence[ReasoningRecord], form: str, tokenizer: ReasoningTokenizer) -> Path | None:
    return records.file(f"lengths-{form}", tokenizer.digest()) if isinstance(records, RecordView) else None


def _every_row(records: Sequence[ReasoningRecord]) -> np.ndarray:
    return np.arange(len(records), dtype=np.int32)


def encode_reasoning(
    records: Sequence[ReasoningRecord],
    tokenizer: ReasoningTokenizer,
    grid: Grid,
    max_length: int | None = None,
    *,
    limits: Limits | None = None,
    padded_size: int | None = None,
) -> Samples:
    """Every record with its chain. DataError lists all that are longer than `max_length` or `limits` allow.

    An augmented record that is too long is left out instead.
    Args:
        padded_size: of the square that pictures are padded to, if they are.
    """
    samples = Samples(
        REASONING,
        _every_row(records),
        lambda rows: _encode_chains(records, rows, tokenizer, grid, padded_size),
        _sizes_file(records, REASONING, tokenizer),
    )
    if limits is None and max_length is None:
        return samples
    limits = limits or Limits(max_reasoning_length=max_length or 0)
    refuse_too_long([(records, samples)], limits)
    left_out = np.zeros(len(samples), bool)
    left_out[[found.row for found in too_long(REASONING, samples.rows, samples.sizes, limits)]] = True
    return samples.without(left_out) if left_out.any() else samples


def having_chains(records: Sequence[ReasoningRecord], samples: Samples) -> Samples:
    """Those of `samples` whose record has a chain, where some have only an answer."""
    chainless = np.array([not records[row].steps for row in samples.rows.tolist()], bool)
    return samples.without(chainless) if chainless.any() else samples


def _encode_chains(
    records: Sequence[ReasoningRecord],
    rows: Sequence[int],
    tokenizer: ReasoningTokenizer,
    grid: Grid,
    padded_size: int | None,
) -> list[Sample]:
    some = [records[row] for row in rows]
    texts = [step_texts(record) for record in some]
    flat = [text for steps, conclusion in texts for text in (*steps, *([] if conclusion is None else [conclusion]))]
    encoded = iter(tokenizer.following(flat))
    prompts = tokenizer.prompts([record.instruction for record in some])
    answers = tokenizer.following([", ".join(record.answer) for record in some])
    samples = []
    for row, record, (steps, conclusion), prompt, answer in zip(rows, some, texts, prompts, answers, strict=True):
        step_ids = [next(encoded) for _ in steps]
        conclusion_ids = None if conclusion is None else next(encoded)
        chain = tokenizer.chain_ids(step_ids, conclusion_ids)
        target = [*chain, tokenizer.ids["<|answer_start|>"], *answer, tokenizer.ids["<|answer_end|>"]]
        position, spans = len(prompt) + 1, []
        for ids in (*step_ids, *([] if conclusion_ids is None else [conclusion_ids])):
            spans.append((position + 1, position + 1 + len(ids)))
            position += 1 + len(ids)
        opens = spans[-1][0] - 1 if conclusion_ids is not None else len(prompt) + len(chain) - 1
        samples.append(
            Sample(
                record=row,
                form=REASONING,
                prompt=prompt,
                target=target,
                answer_position=opens,
                step_spans=tuple(spans),
                attend=_attention_targets(record, grid, len(spans), padded_size),
            )
        )
    return samples


def num_fact_steps(record: ReasoningRecord) -> int:
    """Steps from a chain's start until every fact that it reads off the picture is stated; 0 where that is not known.

    A later step that names a fact again can take it from the text.
    """
    seen = record.metadata.get("seen") or ()
    if len(seen) != len(record.steps):
        return 0
    stated: set[str] = set()
    last = 0
    for number, facts in enumerate(seen, 1):
        last = last if stated.issuperset(facts) else number
        stated.update(facts)
    return last


def edit_facts(records: Sequence[ReasoningRecord], samples: Samples, seed: int) -> Samples:
    """Each chain behind the picture of another record of the same question: its facts are not what the picture shows.

    The steps that state facts are given and not scored, so that nobody learns to misread a picture. All that follows,
    the answer head's answer too, is that of the stated facts. Where it is not known which steps state facts, or no
    other picture was asked about, there is nothing to edit.
    """
    rng = random.Random(f"edited facts:{seed}")
    pictured = samples.rows[picture_hashes(records)[samples.rows] != 0]
    questions = np.fromiter((_question_hash(records[row]) for row in pictured.tolist()), np.uint64, len(pictured))
    order = np.argsort(questions, kind="stable")  # those of one question stand together, in their order
    questions, pictured = questions[order], pictured[order]
    found, others = array("i"), array("i")
    for row in samples.rows.tolist() if len(pictured) else ():
        record = records[row]
        question = np.uint64(_question_hash(record))
        first, last = (int(np.searchsorted(questions, question, side)) for side in ("left", "right"))
        drawn = [int(pictured[rng.randrange(first, last)]) for _ in range(PICTURE_DRAWS if first < last else 0)]
        other = next((index for index in drawn if scene_key(records[index]) != scene_key(record)), None)
        if num_fact_steps(record) and other is not None:
            found.append(row)
            others.append(other)
    rows, pictures = np.array(found, np.int32), np.array(others, np.int32)

    def encode(some: Sequence[int]) -> list[Sample]:
        places = np.searchsorted(rows, some)
        return [
            _edited(samples.of_record(row), num_fact_steps(records[row]), int(picture_of))
            for row, picture_of in zip(some, pictures[places])
        ]

    return Samples(EDITED, rows, encode, None)


def _edited(sample: Sample, num_given_steps: int, picture_of: int) -> Sample:
    end = sample.step_spans[num_given_steps - 1][1] - len(sample.prompt)
    return replace(sample, form=EDITED, num_given=end, picture_of=picture_of, step_spans=(), attend=())


def question_key(record: ReasoningRecord) -> tuple[Any, ...]:
    """Equal for records that ask the same with the same candidates."""
    return (record.asked, *(record.metadata.get("candidates") or ()))


def _question_hash(record: ReasoningRecord) -> int:
    return text_hash("\0".join(question_key(record)))


def scene_key(record: ReasoningRecord) -> Any:
    """Equal for pictures of equal facts, where those are known, else for the same picture."""
    return record.metadata.get("scene") or record.image


def encode_direct(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """Every record as question and answer, without a chain."""

    def encode(rows: Sequence[int]) -> list[Sample]:
        some = [records[row] for row in rows]
        prompts = tokenizer.prompts([record.instruction + DIRECT_PROMPT for record in some])
        answers = tokenizer.following([", ".join(record.answer) for record in some])
        return [
            Sample(record=row, form=DIRECT, prompt=prompt, target=[*answer, tokenizer.end_of_text])
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    return Samples(DIRECT, _every_row(records), encode, _sizes_file(records, DIRECT, tokenizer))


def encode_questions(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """Every record as its question alone, to which chains are drawn."""

    def encode(rows: Sequence[int]) -> list[Sample]:
        prompts = tokenizer.prompts([records[row].instruction for row in rows])
        return [
            Sample(record=row, form=ASKED, prompt=prompt, target=[]) for row, prompt in zip(rows, prompts, strict=True)
        ]

    return Samples(ASKED, _every_row(records), encode, _sizes_file(records, ASKED, tokenizer))


def encode_captions(records: Sequence[ReasoningRecord], tokenizer: ReasoningTokenizer) -> Samples:
    """A caption for every picture that has one; where it has none, what each chain about it says is one.

    Such a chain stands behind its question. Without it a model would learn to make up what is asked for, and to name
    that instead of reading the question.
    """
    pictures = picture_hashes(records)
    captioned = np.flatnonzero(has_field(records, "caption") & (pictures != 0)).astype(np.int32)
    captioned = captioned[np.sort(np.unique(pictures[captioned], return_index=True)[1])]
    others = np.flatnonzero((pictures != 0) & ~np.isin(pictures, pictures[captioned])).astype(np.int32)
    rows = np.sort(np.concatenate([captioned, others]))

    def encode(rows: Sequence[int]) -> list[Sample]:
        some = [records[row] for row in rows]
        given = [record.metadata.get("caption") for record in some]
        prompts = tokenizer.prompts(
            [CAPTION_PROMPT if text else f"{r.instruction} {CAPTION_PROMPT}" for r, text in zip(some, given)]
        )
        captions = tokenizer.following([text or _before_conclusion(record) for record, text in zip(some, given)])
        return [
            Sample(record=row, form=CAPTION, prompt=prompt, target=[*ids, tokenizer.end_of_text])
            for row, prompt, ids in zip(rows, prompts, captions, strict=True)
        ]

    return Samples(CAPTION, rows, encode, _sizes_file(records, "picture-texts", tokenizer))


def _before_conclusion(record: ReasoningRecord) -> str:
    """The steps that lead to the conclusion, or what there is instead: it alone, or the answer."""
    steps, conclusion = step_texts(record)
    return " ".join(steps) or conclusion or ", ".join(record.answer)


def encode_glossary(
    lines: Sequence[str], tokenizer: ReasoningTokenizer, *, lines_per_text: int = 4, repeats: int = 8, seed: int = 0
) -> list[Sample]:
    """Texts without a picture, each of a few `lines` in random order; every line comes `repeats` times."""
    rng = random.Random(f"glossary:{seed}")
    order = [line for _ in range(repeats) for line in rng.sample(list(lines), len(lines))]
    texts = [" ".join(order[start : start + lines_per_text]) for start in range(0, len(order), lines_per_text)]
    start = [tokenizer.end_of_text]
    return [
        Sample(record=-1, form=CAPTION, prompt=start, target=[*ids, tokenizer.end_of_text])
        for ids in tokenizer.encode_many(texts)
    ]

"""Conversations of human and gpt about a picture: LLaVA, and LLaVA-CoT with its tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from string import ascii_uppercase
from typing import Any

from embervlm.curate.formats.shared import ANALYSIS, CHECKING, Source, chain_of, sentences
from embervlm.data.record_fields import Report, kind
from embervlm.robots.domain import DOMAINS
from embervlm.words.chain_text import parse_answer, strict_answer
from embervlm.words.english import RESULT_WORDS, any_of

Reply = tuple[list[tuple[str, str]], str, dict[str, Any]]
"""Parts of the chain, the text that holds the answer, and metadata."""


def llava(at: Source) -> list[dict[str, Any]]:
    """`id`, `image`, `conversations` of human and gpt in turn; one record for each reply that reasons.

    The reply's last sentence is the answer, or its first where only that names a choice; the others are the steps.
    """
    return _conversation(at, "llava", _read_plain)


def llava_cot(at: Source) -> list[dict[str, Any]]:
    """The same with replies as `<SUMMARY> <CAPTION> <REASONING> <CONCLUSION>`, each with its end tag."""
    return _conversation(at, "llava_cot", _read_tagged)


def _conversation(
    at: Source, source: str, read_reply: Callable[[str, Mapping[str, str], str, Report], Reply | None]
) -> list[dict[str, Any]]:
    turns = at.value.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        at.report("conversations: is not a list of turns in pairs; write human and gpt in turn")
        return []
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            at.report(f'conversations[{number}]: is not {{"from": "{speaker}", "value": text}}; correct the turn')
            return []
    image, identity = at.value.get("image"), at.value.get("id", source)
    if any("<image>" in turn["value"] for turn in turns) and image is None:
        at.report("image: is missing, but a turn says <image>; name the picture, or take <image> out")
        return []
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        at.report(f"id: is {kind(identity)}; give a string or a number, or leave the field out")
        return []
    records, earlier = [], ""
    for number in range(0, len(turns), 2):
        question, reply = (turn["value"].replace("<image>", "").strip() for turn in turns[number : number + 2])
        where = f"conversations[{number + 1}]"
        letters = _lettered_choices(question)
        read = read_reply(reply, letters, where, at.report)
        if read is not None:
            parts, answer, about = read
            metadata = at.metadata("id image conversations", source=source, **about)
            # ids of pictures are used more than once, hence the record's number
            turn_id = f"{identity}-{at.number}" + (f"-{number // 2 + 1}" if len(turns) > 2 else "")
            records.append(
                {
                    "id": turn_id,
                    "instruction": earlier + question,
                    "answer": answer,
                    "image": image,
                    **chain_of(parts, answer, metadata),
                }
            )
        earlier += f"Question: {question}\nAnswer: {reply}\n"
    return records


def _lettered_choices(question: str) -> dict[str, str]:
    """Letter -> choice of "(A) hard (B) yellow", or of lines "A. hard"; {} where the question offers none."""
    for pattern in (r"(?:^|\s)\(([A-Z])\)\s*", r"(?m)^\s*([A-Z])[.):]\s+"):
        marks = list(re.finditer(pattern, question))
        start = next((i for i, mark in enumerate(marks) if mark[1] == "A"), len(marks))
        run = [mark for letter, mark in zip(ascii_uppercase, marks[start:]) if mark[1] == letter]
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(question)]
            texts = [question[mark.end() : end].split("\n")[0].strip(" ,;") for mark, end in zip(run, ends)]
            if all(texts):
                return {mark[1]: " ".join(text.split()) for mark, text in zip(run, texts)}
    return {}


def _read_plain(reply: str, letters: Mapping[str, str], where: str, report: Report) -> Reply | None:
    lines = sentences(reply)
    if len(lines) < 2:
        report(f"{where}: holds no reasoning, only an answer; add the steps, or drop the turn")
        return None
    for index in (-1, 0):
        rest = lines[:-1] if index else lines[1:]
        parts = [(CHECKING, sentence) for sentence in rest]
        if not letters:
            return _free_answer(lines[-1], parts)
        if name := _named_choice(lines[index], letters):
            return _given_answer(name, letters, parts)
    report(f"{where}: neither its last nor its first sentence names one of the choices; end with the answer")
    return None


_TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")


def _read_tagged(reply: str, letters: Mapping[str, str], where: str, report: Report) -> Reply | None:
    once = all(reply.count(f"<{tag}>") == reply.count(f"</{tag}>") == 1 for tag in _TAGS)
    pattern = r"\s*".join(rf"<{tag}>(?P<{tag}>.*?)</{tag}>" for tag in _TAGS)
    match = re.fullmatch(pattern, reply.strip(), re.DOTALL) if once else None
    if match is None:
        report(f"{where}: is not {' '.join(f'<{tag}>...</{tag}>' for tag in _TAGS)}; write each once, in this order")
        return None
    summary, caption, reasoning, conclusion = (" ".join(text.split()) for text in match.groups())
    for tag, text in (("REASONING", reasoning), ("CONCLUSION", conclusion)):
        if not re.search(r"\w", text):
            report(f"{where}: {tag} is empty; write it, or drop the turn")
            return None
    parts = [(ANALYSIS, summary), (ANALYSIS, caption), (CHECKING, match["REASONING"])]
    about = {"caption": caption} if caption else {}
    if not letters:
        return _free_answer(conclusion, parts, **about)
    if name := _named_choice(conclusion, letters):
        return _given_answer(name, letters, parts, **about)
    report(f"{where}: CONCLUSION names none of the choices, or several; name one")
    return None


def _given_answer(name: str, letters: Mapping[str, str], parts: list[tuple[str, str]], **metadata: Any) -> Reply:
    return parts, name, {**metadata, "candidates": list(letters.values())}


def _free_answer(text: str, parts: list[tuple[str, str]], **metadata: Any) -> Reply:
    """An answer without choices: yes or no, some of a domain's candidates, or else an open one."""
    answer = _ANSWER_LEAD.sub("", text).strip().rstrip(".").strip() or text
    if answer.casefold() in ("yes", "no"):
        return parts, answer.capitalize(), {**metadata, "candidates": ["Yes", "No"]}
    for domain in DOMAINS.values():
        known, unknown = strict_answer(answer, domain.candidates)
        if known and not unknown:
            return parts, ", ".join(name for name in domain.candidates if name in known), metadata
    return parts, answer, {**metadata, "candidates": []}


_ANSWER_LEAD = re.compile(
    rf"(?:{any_of(*RESULT_WORDS)}\W+)?(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)[\s:]*", re.IGNORECASE
)
_LETTER_ALONE = re.compile(r"\(?([A-Z])\)?[.:]?")
_LETTER_NAMED = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\)?\s*(?:[.,:;]|$)", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\(?([A-Z])[.):]\)?\s*(.+)", re.DOTALL)


def _named_choice(text: str, letters: Mapping[str, str]) -> str:
    """The one choice that `text` names, by its letter or its own words; "" where it names none or several."""
    text = text.strip()
    by_text = {name.casefold().rstrip("."): name for name in letters.values()}
    bare = _ANSWER_LEAD.sub("", text).strip()
    if (own := by_text.get(bare.casefold().rstrip("."))) is not None:
        return own
    if match := _LETTER_ALONE.fullmatch(bare):
        return letters.get(match[1], "")
    if (match := _LETTER_FIRST.fullmatch(bare)) and by_text.get(match[2].casefold().rstrip(".")) == letters.get(
        match[1]
    ):
        return letters.get(match[1], "")
    named = {match[1] for match in _LETTER_NAMED.finditer(text)}
    if len(named) == 1:
        return letters.get(named.pop(), "")
    found = parse_answer(text, tuple(letters.values()))
    return found[0] if len(found) == 1 else ""

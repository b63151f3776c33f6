"""What a text answers: one of the choices that its question offers, yes or no, or something in free words.

The words that lead to an answer are known in English, Spanish, German, French, Russian and Chinese.
"""

# ruff: noqa: RUF001 - letters of other languages are meant

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from embervlm.words.chain_text import parse_answer, strict_answer
from embervlm.words.english import RESULT_WORDS, any_of

Answer = tuple[str, dict[str, Any]]
"""The answer, and metadata: the candidates where they are known."""

_LETTER = "[A-ZＡ-Ｚ]"
_WIDE = "[^\\x00-\\x7f]"
_CHOICE_MARKS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"(?:(?:^|\s|(?<={_WIDE}))\(|（|【)({_LETTER})[)）】]\s*",
        rf"^\s*({_LETTER})(?:[.):]\s+|[．：）、]\s*|[.):](?={_WIDE}))",
        rf"(?:^|[\s,;，；。：？])({_LETTER})(?:[．：）、]\s*|[.):]\s*(?={_WIDE}))",
    )
)
"""Marks of choices: "(A)" anywhere, "A." at a line's start, "A." inside a line where no ASCII follows."""


def lettered_choices(question: str) -> dict[str, str]:
    """Letter -> choice of "(A) hard (B) yellow", or of lines "A. hard"; {} where the question offers none."""
    for pattern in _CHOICE_MARKS:
        marks = [(unicodedata.normalize("NFKC", mark[1]), mark) for mark in pattern.finditer(question)]
        start = next((i for i, (letter, _) in enumerate(marks) if letter == "A"), len(marks))
        run = [mark for wanted, (letter, mark) in zip(ascii_uppercase, marks[start:]) if letter == wanted]
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(question)]
            texts = [question[mark.end() : end].split("\n")[0].strip(_AROUND) for mark, end in zip(run, ends)]
            if all(texts):
                return {letter: " ".join(text.split()) for letter, text in zip(ascii_uppercase, texts)}
    return {}


_AROUND = " ,;\u3000，；、。"
_ANSWER = "answer|respuesta|antwort|réponse|ответ|答案"
_OPTION = "option|choice|opción|lösung|вариант|选项"
_IS = r"(?:\s+(?:is|es|ist|lautet|est)\b|\s*[是为:：])"
_SO = rf"{any_of(*RESULT_WORDS, 'daher', 'donc', 'por (?:lo )?tanto', 'итак', 'поэтому')}\W+|(?:所以|因此|故)[,，\s]*"
_WHICH = r"(?:final|correct|richtige|bonne|правильный)\s+|(?:最终|正确)的?"
_ANSWER_LEAD = re.compile(
    rf"(?:{_SO})?(?:(?:the|la|die)\s+)?(?:{_WHICH})?(?:{_ANSWER})(?:\s+(?:correcta|correcte|final|finale))?{_IS}[:：\s]*"
    rf"|故?选[:：\s]*(?={_LETTER}\W*$)",
    re.IGNORECASE,
)
"""What stands before an answer: "So the final answer is", and the same in other languages."""
_LETTER_ALONE = re.compile(r"\(?([A-Z])\)?[.:]?")
_LETTER_NAMED = re.compile(rf"(?:{_ANSWER}|{_OPTION}){_IS}?\s*\(?([A-Z])\)?\s*(?:[.,:;]|$)", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\(?([A-Z])[.):]\)?\s*(.+)", re.DOTALL)
_TO_ASCII = str.maketrans("（）【】．。、：，；", "()()...:,;") | {
    0xFF21 + place: letter for place, letter in enumerate(ascii_uppercase)
}


def named_choice(text: str, letters: Mapping[str, str]) -> str:
    """The one choice that `text` names, by its letter or its own words; "" where it names none or several."""
    text = text.strip().translate(_TO_ASCII)
    by_text = {_plain(name): name for name in letters.values()}
    bare = _ANSWER_LEAD.sub("", text).strip()
    if (own := by_text.get(_plain(bare))) is not None:
        return own
    if match := _LETTER_ALONE.fullmatch(bare):
        return letters.get(match[1], "")
    if (match := _LETTER_FIRST.fullmatch(bare)) and by_text.get(_plain(match[2])) == letters.get(match[1]):
        return letters.get(match[1], "")
    named = {match[1] for match in _LETTER_NAMED.finditer(text)}
    if len(named) == 1:
        return letters.get(named.pop(), "")
    found = parse_answer(text, tuple(letters.values()))
    return found[0] if len(found) == 1 else ""


def _plain(text: str) -> str:
    return text.translate(_TO_ASCII).casefold().rstrip(".")


YES_NO = (("Yes", "No"), ("Sí", "No"), ("Ja", "Nein"), ("Oui", "Non"), ("Да", "Нет"), ("是", "否"))
_SPANISH = re.compile("[¿¡ñáíóú]", re.IGNORECASE)


def yes_or_no(answer: str, asked: str) -> Answer | None:
    """`answer` with both words of its language as candidates, in its own spelling; None where it is neither word.

    English words are capitalized. "No" is Spanish where `asked`, the question, holds a Spanish letter or mark.
    """
    folded = answer.casefold()
    known = [pair for pair in YES_NO if folded in (pair[0].casefold(), pair[1].casefold())]
    if not known:
        return None
    pair = known[-1] if _SPANISH.search(asked) else known[0]
    if pair == YES_NO[0]:
        return answer.capitalize(), {"candidates": list(pair)}
    words = pair if answer[:1].isupper() else (pair[0].casefold(), pair[1].casefold())
    return words[folded == pair[1].casefold()], {"candidates": list(words)}


def unboxed(text: str) -> str:
    r"""What the last `\boxed{...}` of LaTeX in `text` holds, without a `\text{...}` around it; else `text`."""
    start, depth = text.rfind(_BOXED), 0
    for place in range(start + len(_BOXED) - 1, len(text) if start >= 0 else 0):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            inner = text[start + len(_BOXED) : place].strip()
            return _AS_TEXT.sub(r"\1", inner) or text
    return text


_BOXED = "\\boxed{"
_AS_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


def _as_words(text: str) -> str:
    """A JSON list of texts as "red, blue", which is compared as a set; anything else as it is."""
    try:
        found = json.loads(text) if text.startswith("[") else None
    except ValueError:
        return text
    return ", ".join(found) if found and isinstance(found, list) and all(isinstance(f, str) for f in found) else text


def only_leads(text: str) -> bool:
    """Whether `text` says that an answer comes, and no more: "Final answer:"."""
    return not _ANSWER_LEAD.sub("", text).strip()


def free_answer(text: str, asked: str, known: Sequence[str]) -> Answer:
    """An answer without choices: yes or no, some of the domain's candidates `known`, or free words.

    Where the domain has candidates, free words are open; without a domain the data decide what they are.
    """
    text = _as_words(unboxed(text))
    answer = _ANSWER_LEAD.sub("", text).strip().rstrip(".。").strip() or text
    if found := yes_or_no(answer, asked):
        return found
    names, unknown = strict_answer(answer, tuple(known))
    if names and not unknown:
        return ", ".join(name for name in known if name in names), {}
    return answer, {"candidates": []} if known else {}


def answer_in(text: str, asked: str, known: Sequence[str]) -> Answer | None:
    """What `text` answers to the question `asked`; None where that offers choices and `text` names none, or several."""
    letters = lettered_choices(asked)
    if not letters:
        return free_answer(text, asked, known)
    name = named_choice(text, letters) or named_choice(unboxed(text), letters)
    return (name, {"candidates": list(letters.values())}) if name else None

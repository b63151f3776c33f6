"""What a text answers: one of the choices that its question offers, yes or no, or something in free words.

The words that lead to an answer are known in English, Spanish, German, French, Russian and Chinese.
"""

# ruff: noqa: RUF001 - letters of other languages are meant

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from embervlm.words.chain_text import parse_answer, strict_answer
from embervlm.words.english import ARTICLES, NEGATION, RESULT_WORDS, any_of
from embervlm.words.markup import unboxed

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
        r"^\s*\(?([a-z])\)\s+",
        r"^\s*\(?(\d)\)\s+",
        r"(?:(?<=[?:])|^|(?<=,)|(?<=;))\s*([A-Z]):\s+",
    )
)
"""Marks of choices: "(A)" anywhere, "A." at a line's start, "A." inside a line where no ASCII follows, "a)" or "1)" at
a line's start, "A:" behind a comma or question mark."""
_MARKS = (ascii_uppercase, ascii_lowercase, "123456789")


def lettered_choices(question: str) -> dict[str, str]:
    """Letter or digit, as written -> choice of "(A) hard (B) yellow", or of lines "A. hard"; {} where the question
    offers none."""
    for pattern in _CHOICE_MARKS:
        marks = [(unicodedata.normalize("NFKC", mark[1]), mark) for mark in pattern.finditer(question)]
        start, kinds = next(
            ((i, kinds) for i, (letter, _) in enumerate(marks) for kinds in _MARKS if letter == kinds[0]),
            (len(marks), ascii_uppercase),
        )
        run = [mark for wanted, (letter, mark) in zip(kinds, marks[start:]) if letter == wanted]
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(question)]
            texts = [question[mark.end() : end].split("\n")[0].strip(_AROUND) for mark, end in zip(run, ends)]
            before = question[: run[0].start()].rsplit("\n", 1)[-1].rstrip()
            if before and before[-1] not in "?:.":  # "Is it (A) a cat or (B) a dog?"
                texts = [_OR.sub("", text).rstrip("? ") for text in texts]
            if all(texts):
                return {letter: " ".join(text.split()) for letter, text in zip(kinds, texts)}
    return {}


_OR = re.compile(r",?\s+(?:or|and|o|oder|ou|или)$", re.IGNORECASE)
_AROUND = " ,;\u3000，；、。"
_ANSWER = "answer|respuesta|antwort|réponse|ответ|答案"
_OPTION = "option|choice|opción|lösung|вариант|选项"
_IS = r"(?:\s+(?:is|es|ist|lautet|est)\b|\s*[是为:：])"
_SO = rf"{any_of(*RESULT_WORDS, 'daher', 'donc', 'por (?:lo )?tanto', 'итак', 'поэтому')}\W+|(?:所以|因此|故)[,，\s]*"
_WHICH = r"(?:final|correct|richtige|bonne|правильный)\s+|(?:最终|正确)的?"
_ANSWER_LEAD = re.compile(
    rf"(?:{_SO})?(?:(?:the|la|die)\s+)?(?:{_WHICH})?(?:{_ANSWER})(?:\s+(?:correcta|correcte|final|finale))?{_IS}[:：\s]*"
    rf"|故?选[:：\s]*(?={_LETTER}\W*$)"
    r"|(?:the\s+)?(?:final\s+)?(?:result|resultado|ergebnis|résultat|результат)\s*[:：]\s*",
    re.IGNORECASE,
)
"""What stands before an answer: "So the final answer is", and the same in other languages."""
_MARK = "[A-Za-z1-9]"
_LETTER_ALONE = re.compile(rf"\(?({_MARK})\)?[.:]?")
_LETTER_NAMED = re.compile(rf"(?:{_ANSWER}|{_OPTION}){_IS}?\s*\(?({_MARK})\)?\s*(?:[.,:;]|$)", re.IGNORECASE)
_LETTER_INSIDE = re.compile(rf"(?<!\w)\(({_MARK})\)")
_LETTER_FIRST = re.compile(rf"\(?({_MARK})[.):]\)?\s*(.+)", re.DOTALL)
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
    of_mark = {mark.casefold(): name for mark, name in letters.items()}
    if match := _LETTER_ALONE.fullmatch(bare):
        return of_mark.get(match[1].casefold(), "")
    if (match := _LETTER_FIRST.fullmatch(bare)) and (named_text := by_text.get(_plain(match[2]))) is not None:
        return named_text if of_mark.get(match[1].casefold()) == named_text else ""  # "(B) car", where B is a dog
    named = {match[1].casefold() for match in _LETTER_NAMED.finditer(text)}
    if not named and not NEGATION.search(text):
        named = {match[1].casefold() for match in _LETTER_INSIDE.finditer(text)}
    if len(named) == 1:
        return of_mark.get(named.pop(), "")
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


def _as_words(text: str) -> str:
    """A JSON list of texts as "red, blue", which is compared as a set; anything else as it is."""
    try:
        found = json.loads(text) if text.startswith("[") else None
    except ValueError:
        return text
    return ", ".join(found) if found and isinstance(found, list) and all(isinstance(f, str) for f in found) else text


_APART = re.compile(
    rf"(?<=[.!?。])\s+(?=(?:{_WHICH})?(?:{_ANSWER})\s*[:：]|\*\*[^*\n]+\*\*\W*$|\$*\\boxed\{{)",
    re.IGNORECASE | re.MULTILINE,
)
_POLAR = re.compile(r"(yes|no|sí|si|ja|nein|oui|non|да|нет)(?=\s*(?:[,.;!]|\s[-–—]|$))", re.IGNORECASE)
_ALL_SO = re.compile(_SO, re.IGNORECASE)
_VERB = re.compile(any_of("is", "are", "was", "were", "makes?", "has", "have", "counts?"), re.IGNORECASE)
_IT_IS = re.compile(
    r"(?:(?:it|this|that)\s+(?:is|must\s+be|has\s+to\s+be|can\s+only\s+be)|(?:that|this)\s+makes(?:\s+it)?|there\s+(?:is|are))"
    r"\s+(?P<what>\S+(?:\s+\S+){0,3})",
    re.IGNORECASE,
)
"""Such as "it must be an ambulance"."""
_THE_IS = re.compile(r"(?:the|its)\s+(?:\S+\s+){1,3}?(?:is|are)\s+(?P<what>\S+(?:\s+\S+)?)", re.IGNORECASE)
"""Behind "so": "the tallest bar is red"."""
_COUNTED = re.compile(r"(?P<what>\S+)\s+of\s+(?:them|these|those)", re.IGNORECASE)
_I_SAY = re.compile(r"^(?:I (?:would|'d) say|I think|I believe)\s+(?:that\s+)?", re.IGNORECASE)
_HEDGES = frozenset(("mostly", "probably", "likely", "clearly", "mainly", "called"))
_NONE = frozenset(("none", "nothing", "nobody"))
_COURTESY = re.compile(r"\s*\b(?:I hope (?:this|that) helps|let me know if you)\b[^.!?\n]*[.!?]*\s*$", re.IGNORECASE)
_CHATTER = frozenset(("sure", "okay", "ok", "certainly", "of course", "absolutely", "great question", "good question"))
_MOST_WORDS = 3


def answers_apart(text: str) -> str:
    """`text` with "answer: ..." and a last bold word on lines of their own, and without "I hope this helps!"."""
    return _COURTESY.sub("", _APART.sub("\n", text))


def answering(lines: Sequence[str]) -> tuple[int, str, bool]:
    """Which of the sentences of a reply without choices answers, with what, and whether it says more than that.

    The last one that says so ("The answer is"), else the last one, unless only the first begins with yes or no, or is a
    word or two where the last one is a sentence.
    """
    said = [place for place, line in enumerate(lines) if leads(line)]
    if said:
        rest = _rest(lines[said[-1]])
        word = _polar(rest)
        return said[-1], word or rest, bool(word) and len(rest.split()) > 1
    first, last, end = lines[0], lines[-1], len(lines) - 1
    if word := _polar(last):
        return end, word, len(_ALL_SO.sub("", last, count=1).split()) > 1
    if word := _polar(first):
        return 0, word, False  # the chain would begin with its answer
    if _is_term(first) and (_VERB.search(last) or not _is_term(last)):
        return 0, first, False
    if word := _short_of(last):
        return end, word, True
    return end, last, False


def leads(line: str) -> bool:
    """Whether a sentence says that it answers: "The answer is red"."""
    return bool(_rest(line))


def _rest(line: str) -> str:
    """What stands behind "the answer is"; "" where that is not said."""
    match = _ANSWER_LEAD.match(line)
    return line[match.end() :].strip() if match else ""


def _polar(line: str) -> str:
    """The yes or no that a sentence begins with."""
    match = _POLAR.match(_ALL_SO.sub("", line, count=1).lstrip())
    return match[1] if match else ""


def _is_term(line: str) -> bool:
    bare = line.rstrip(" .!").casefold()
    return 0 < len(bare.split()) <= _MOST_WORDS and bare not in _CHATTER and not line.rstrip().endswith(("?", ":"))


def _short_of(line: str) -> str:
    """What "so it must be an ambulance" or "so the tallest bar is red" names, in few words; "" of other sentences."""
    line = _I_SAY.sub("", line)
    bare = _ALL_SO.sub("", line, count=1).strip().rstrip(".!。")
    is_result = bare != line.strip().rstrip(".!。")
    match = _IT_IS.fullmatch(bare) or _COUNTED.fullmatch(bare) or (_THE_IS.fullmatch(bare) if is_result else None)
    if match is None or (NEGATION.search(bare) and match["what"].casefold() not in _NONE):
        return ""
    words = match["what"].split()
    while len(words) > 1 and words[0].casefold() in ARTICLES | _HEDGES:
        words = words[1:]
    return " ".join(words) if 0 < len(words) <= _MOST_WORDS and not words[-1].endswith("ing") else ""


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

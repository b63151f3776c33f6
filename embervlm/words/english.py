"""The English that this package knows: one list of words of each kind, one splitter of sentences, one stemmer.

Whoever looks for "therefore", cuts a text into sentences or asks whether two words are the same word does it here.
Nothing here is about any subject.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from snowballstemmer import stemmer  # type: ignore[import-untyped,unused-ignore]

# ---- lists of words


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = _words("a an the")
DEFINITE = _words("the this that these those its their his her")
INDEFINITE = _words("a an some another one")
POINTING_WORDS = (
    "this",
    "that",
    "these",
    "those",
    "it",
    "they",
    "he",
    "she",
    "which",
    "such",
    "its",
    "their",
    "his",
    "her",
)
STOP_WORDS = ARTICLES | _words(
    """is are was were be been being am of to in on at for with by from as and or so that this these those it its then
    than thus therefore hence there here has have had do does did will would can could should may might i we you they he
    she which who what into also just very"""
)
"""Function words. Words that turn a statement around (not, no, never, cannot, without) are content."""
VACUOUS = STOP_WORDS | _words(
    """let me my us our your how why when where while if each every all any some both such same other another one more
    most much many few less least only even still yet again already because since although though but however while
    whereas which about up out over then next first finally after before during between until both either or than too
    make makes made making get gets got go goes going use uses used using need needs needed now here step
    conclusion answer"""
)
"""Stop words and the most general words: they say nothing of what a clause is about."""
NEGATIONS = _words("not no never cannot neither nor none nobody nothing nowhere hardly scarcely false untrue incorrect")

RESULT_WORDS = ("so", "thus", "therefore", "hence", "consequently", "accordingly", "as a result", "it follows")
POLAR = frozenset(("yes", "no", "true", "false"))
MEANING_WORDS = ("this means", "which means", "that means")
REASON_WORDS = ("because", "since", "given that", "due to")
CONTRAST_WORDS = ("but", "while", "whereas", "although", "though")
CONDITION_WORDS = ("if", "unless", "when")
ADDITION_WORDS = (
    "also",
    "both",
    "however",
    "instead",
    "otherwise",
    "moreover",
    "in addition",
    "likewise",
    "still",
    "yet",
)
CONNECTIVES = (*RESULT_WORDS, *MEANING_WORDS, *REASON_WORDS, *CONTRAST_WORDS, *CONDITION_WORDS)
"""What joins one statement to another."""


def any_of(*words: str) -> str:
    """A pattern for any of `words` as a whole word."""
    return rf"\b(?:{'|'.join(words)})\b"


RESULT = re.compile(any_of(*RESULT_WORDS, *MEANING_WORDS), re.IGNORECASE)
POINTS_BACK = re.compile(
    any_of(*RESULT_WORDS, *POINTING_WORDS, *ADDITION_WORDS, *CONTRAST_WORDS[:1], "then", "now", "lastly"), re.IGNORECASE
)
NEGATION = re.compile(rf"{any_of(*NEGATIONS, 'without')}|n['\u2019]t\b", re.IGNORECASE)
SUPPOSES = re.compile(
    r"\b(?:if|unless|would|whether|when|whenever|until|as long as|may|might|perhaps|maybe|possibly|or"
    r"|only\b.*\b(?:while|where|as))\b",
    re.IGNORECASE,
)


# ---- texts

_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x3000)) if unicodedata.category(sign).startswith("M"))
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Letters of scripts that put no blanks between words: each counts as a word."""
_LETTER = rf"(?:(?![{_UNSPACED}])[^\W\d_])"
TOKEN = re.compile(
    rf"(?:(?<=\s)[-\u2212])?\d+(?:[.,]\d+)*%?|[{_UNSPACED}]|{_LETTER}(?:{_LETTER}|[{_MARKS}])*(?:['\u2019]{_LETTER}+)*"
)
"""A number, or a word; the marks of Hindi or Arabic belong to the word."""
_LINE_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(
    "[.!?][\"')\\]»”“]*(?=\\s+[\"'(\\[«„“¿¡]*([^\\W_]))"  # before a word, whose first letter is group 1
    "|[。！？।][”’」』）]*"  # noqa: RUF001
)
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Fig|approx|vs|etc|e\.g|i\.e|bzw|ca|Sr|Sra|Dra|г|ул|им|[A-ZÄÖÜА-Я])|^\s*\d+)\.$"  # noqa: RUF001
)
_FOR_EXAMPLE = re.compile(r"\bz\. ?B\.")  # in German
_NO_END_BEFORE_NUMBER = re.compile(r"\b(?:No|Nr)\.$")
_NUMBERING = re.compile(
    r"^\s*(?:[-*]\s+|step\s*\d+\s*[:.)-]?\s*|\d+\s*[:.)]\s+"
    r"|(?:first|second|third|next|then|finally|lastly)(?:ly)?\s*[:,]\s*)+",
    re.IGNORECASE,
)


@lru_cache(maxsize=1 << 15)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of `text`, each on one line; "Dr. Lee" and "3.5 m" are not cut.

    Ends of other languages count as well: sentences that begin with an umlaut, in Cyrillic, Chinese or Hindi.
    """
    out = []
    for line in _LINE_END.split(text):
        start = 0
        for end in _SENTENCE_END.finditer(line):
            before, first = line[max(start, end.start() - 10) : end.start() + 1], end[1] or ""
            numbered = first.isdigit() and _NO_END_BEFORE_NUMBER.search(before)
            inside = numbered or _FOR_EXAMPLE.match(line, end.start() - 1)
            if not first.islower() and not inside and not _NO_END.search(before):
                out.append(line[start : end.end()])
                start = end.end()
        out.append(line[start:])
    return tuple(stripped for sentence in out if (stripped := sentence.strip()))


def strip_numbering(text: str) -> str:
    """`text` without "Step 3:", "3.", "-" or "First," in front."""
    return _NUMBERING.sub("", text, count=1)


def tokens(text: str) -> list[str]:
    """Numbers and words of `text` in lower case, without the numbering in front."""
    return TOKEN.findall(strip_numbering(text).casefold().replace("\u2019", "'"))


def is_number(token: str) -> bool:
    return token[0].isdigit() or token[0] in "-\u2212"


def is_negation(token: str) -> bool:
    return token in NEGATIONS or token.endswith("n't")


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """`word` without its endings (Porter 1980, Snowball's English): the same for all forms of a regular word."""
    return str(stemmer("english").stemWord(word))  # a stemmer of its own: they hold the word, and threads may meet

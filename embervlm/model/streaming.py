"""Text of a chain while it is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from embervlm.data.tokenizer import ReasoningTokenizer

STEP, CONCLUSION, ANSWER = "step", "conclusion", "answer"
_SECTIONS = {"<|step|>": STEP, "<|conclusion|>": CONCLUSION, "<|answer_start|>": ANSWER}
_UNFINISHED = "\ufffd"
"""What a character is decoded to while some of its bytes are missing."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A little more text of one chain."""

    place: int
    """The chain's place in its batch."""
    section: str
    """`step`, `conclusion` or `answer`."""
    number: int
    """The step's number, counted from 1; of the conclusion and the answer too, behind the steps."""
    text: str
    """Continues the section; the first piece of a section begins it."""
    begins: bool
    """Whether it is that first piece."""


OnText = Callable[[Piece], None]


@dataclass
class _Chain:
    section: str | None = None
    number: int = 0
    ids: list[int] = field(default_factory=list)
    shown: int = 0
    """Characters of the section that were given already."""


class Pieces:
    """Tells `on_text` the text of tokens as they are written; to be given as `on_token`.

    Args:
        first: The section that text before the first mark belongs to: `answer` where only an answer is written.
    """

    def __init__(self, tokenizer: ReasoningTokenizer, on_text: OnText, first: str | None = None) -> None:
        self._tokenizer, self._on_text, self._first = tokenizer, on_text, first
        self._marks = {tokenizer.ids[name]: section for name, section in _SECTIONS.items()}
        self._chains: dict[int, _Chain] = {}

    def __call__(self, place: int, token: int) -> None:
        chain = self._chains.setdefault(place, _Chain(self._first))
        over = token >= self._tokenizer.base_vocab_size or token == self._tokenizer.end_of_text
        if over and chain.section is not None:
            self._tell(place, chain, whole=True)
        if token in self._marks:
            chain.section, chain.ids, chain.shown = self._marks[token], [], 0
        elif over:
            chain.section = None
        elif chain.section is not None:
            chain.ids.append(token)
            self._tell(place, chain)

    def all(self, place: int, tokens: Iterable[int]) -> None:
        """Tell of tokens that are there already."""
        for token in tokens:
            self(place, token)

    def _tell(self, place: int, chain: _Chain, whole: bool = False) -> None:
        assert chain.section is not None
        text = self._tokenizer.decode(chain.ids).lstrip()
        if not whole:  # the next tokens decide about these
            text = text.rstrip().rstrip(_UNFINISHED)
        if not (new := text[chain.shown :].rstrip() if whole else text[chain.shown :]):
            return
        chain.number += chain.shown == 0  # a step without text is none
        piece = Piece(place=place, section=chain.section, number=chain.number, text=new, begins=chain.shown == 0)
        chain.shown += len(new)
        self._on_text(piece)

"""What people read on a terminal: colours where they are shown, and a chain as it is written."""

from __future__ import annotations

import os
from typing import TextIO

from embervlm.model.streaming import ANSWER, CONCLUSION, Piece

_CODES = {"bold": "1", "dim": "2", "green": "32", "yellow": "33"}


class Style:
    """`style.bold("text")` and so on: with colour codes where `out` is a terminal and NO_COLOR (no-color.org) is not
    set, else the text alone."""

    def __init__(self, out: TextIO) -> None:
        self.coloured = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def bold(self, text: str) -> str:
        return self._coded("bold", text)

    def dim(self, text: str) -> str:
        return self._coded("dim", text)

    def green(self, text: str) -> str:
        return self._coded("green", text)

    def yellow(self, text: str) -> str:
        return self._coded("yellow", text)

    def _coded(self, name: str, text: str) -> str:
        return f"\x1b[{_CODES[name]}m{text}\x1b[0m" if self.coloured else text


class ChainPrinter:
    """Prints the steps of one chain as they are written; to be given as `on_text`. The answer is left to the caller."""

    def __init__(self, out: TextIO, style: Style) -> None:
        self._out, self._style = out, style
        self._begun = False

    def __call__(self, piece: Piece) -> None:
        if piece.section == ANSWER:
            return
        if piece.begins:
            heading = "Conclusion:" if piece.section == CONCLUSION else f"Step {piece.number}:"
            self._out.write(("\n" if self._begun else "") + self._style.bold(heading) + " ")
            self._begun = True
        self._out.write(piece.text)
        self._out.flush()

    def steps(self, steps: list[str]) -> None:
        """Print a chain that is there already."""
        for number, step in enumerate(steps, 1):
            concludes = step.startswith("Conclusion: ")
            section = CONCLUSION if concludes else "step"
            text = step.removeprefix("Conclusion: ")
            self(Piece(place=0, section=section, number=number, text=text, begins=True))

    def close(self) -> None:
        """End the chain with an empty line, where there is one."""
        if self._begun:
            self._out.write("\n\n")
        self._begun = False

"""Text without the marks of LaTeX and Markdown that models write around an answer."""

from __future__ import annotations

import re

_BOXED = "\\boxed{"
_AS_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_SIGNS = {
    r"\%": "%",
    r"\$": "$",
    r"^\circ": "\u00b0",
    r"^{\circ}": "\u00b0",
    r"\degree": "\u00b0",
    r"\times": "\u00d7",
    r"\cdot": "\u00b7",
    r"\div": "\u00f7",
    r"\approx": "\u2248",
    r"\leq": "\u2264",
    r"\geq": "\u2265",
    r"\pi": "\u03c0",
}
_MATH = re.compile(r"\$\$(?P<a>.+?)\$\$|\\\((?P<b>.+?)\\\)|\\\[(?P<c>.+?)\\\]|\$(?P<d>[^$]*[^$\s])\$", re.DOTALL)
MOST_CHARACTERS = 2000
"""Of an answer; in a longer text marks that are never closed would be looked for too long."""
_MARKED = re.compile(r"(\*\*|__|`)(?P<inner>\S|\S.*?\S)\1")


def unboxed(text: str) -> str:
    r"""What the last `\boxed{...}` of LaTeX in `text` holds, without a `\text{...}` around it; else `text`."""
    start, depth = text.rfind(_BOXED), 0
    for place in range(start + len(_BOXED) - 1, len(text) if start >= 0 else 0):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            inner = text[start + len(_BOXED) : place].strip()
            return _AS_TEXT.sub(r"\1", inner) or text
    return text


def unmarked(text: str) -> str:
    r"""An answer in plain text: "\boxed{\frac{1}{2}}" and "$\frac{1}{2}$" are "1/2", "**7**" and "`7`" are "7"."""
    text = unboxed(text)
    if len(text) > MOST_CHARACTERS:
        return text
    if "\\" in text or "$" in text:
        text = _MATH.sub(lambda found: next(filter(None, found.groups())), text)
        text = _FRACTION.sub(r"\1/\2", _AS_TEXT.sub(r"\1", text))
        for mark, sign in _SIGNS.items():
            text = text.replace(mark, sign)
        if "\\" in text:
            text = _SPACE.sub(" ", text)
    return _MARKED.sub(lambda found: found["inner"], text)

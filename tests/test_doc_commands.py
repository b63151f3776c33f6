"""Commands in the documents have flags that exist, and all that they need."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from embervlm.cli import PROGRAMS, build_parser
from embervlm.config import REPOSITORY
from embervlm.run.train_flags import parser as train_parser

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OURS = re.compile(r"embervlm |(?:python|deepspeed|torchrun)\b.*\blaunch/train\.py ")


def commands(page: Path) -> list[str]:
    """The lines of fenced blocks that start one of our programs, continued lines joined."""
    blocks = page.read_text(encoding="utf-8").split("\n```")[1::2]
    lines = [line.removeprefix("$ ") for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()[1:]]
    return [line for line in lines if OURS.match(line)]


def parsed(line: str) -> None:
    """Raises SystemExit where a parser refuses the command."""
    words = shlex.split(line, comments=True)
    for end in ("|", ">", "2>&1", "&", "&&"):
        if end in words:
            words = words[: words.index(end)]
    if words[:2] == ["embervlm", "train"] or words[0] != "embervlm":
        train_parser().parse_args(words[words.index("train" if words[0] == "embervlm" else "launch/train.py") + 1 :])
    elif words[1] not in PROGRAMS:
        build_parser().parse_args(words[1:])


ALL = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}-{number}" for number, (page, _) in enumerate(ALL)])
def test_a_command_of_the_documents_is_accepted(page: str, line: str) -> None:
    parsed(line)


def test_the_documents_have_commands() -> None:
    assert len(ALL) > 40

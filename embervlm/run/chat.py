"""`embervlm chat`: questions about a picture, each building on the reasoning before."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from embervlm.config import ConfigError
from embervlm.errors import UserError
from embervlm.model.config import STAGE3
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.interactive import Reasoning, behind
from embervlm.options import add_flag, chosen
from embervlm.run.ask import HOW_TO_HEAR_IT, answer_lines, checkpoint_option, model_to_ask, picture_of, refuses
from embervlm.run.evaluate import decoding_options
from embervlm.run.terminal import ChainPrinter, Style

HELP = """Type a question; the next one follows up on it.
/new            forget the questions so far
/picture FILE   look at another picture (- for none), and forget the questions
/quit           leave; so does Ctrl-D"""


def chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type="path", metavar="IMAGE", help="picture file; - asks without a picture")
    checkpoint_option(parser)
    add_flag(parser, Decoding, "min_known")
    decoding_options(parser)


def chat(image: str, *, checkpoint: str | None, **options: Any) -> None:
    """Read questions until Ctrl-D or /quit; a question behind another builds on its reasoning."""
    picture, decoding = picture_of(image), Decoding(**chosen(options, Decoding))
    model = model_to_ask(checkpoint)
    if model.config.stage == STAGE3:
        raise ConfigError("a Stage 3 model has no reasoning to follow up on; ask it with `embervlm ask`")
    with contextlib.suppress(ImportError):  # not on Windows; there the console edits lines itself
        import readline  # noqa: F401  (input() uses it once it is imported)
    print(HELP)
    _Chat(model, picture, decoding).run()


class _Chat:
    def __init__(self, model: EmberVLM, picture: str | None, decoding: Decoding) -> None:
        self.model, self.picture, self.decoding = model, picture, decoding
        self.style = Style(sys.stdout)
        self.before: Reasoning | None = None

    def run(self) -> None:
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            command, _, rest = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if command.startswith("/"):
                    self._obey(command, rest.strip())
                elif line:
                    self._ask(line)
            except UserError as error:
                print(self.style.yellow(str(error)))
            except KeyboardInterrupt:
                print("\n(stopped)")

    def _obey(self, command: str, rest: str) -> None:
        if command == "/picture" and rest:
            self.picture = picture_of(rest)
            print(self.style.dim(f"looking at {self.picture or 'no picture'}"))
        elif command != "/new":
            print(HELP)
            return
        self.before = None

    def _ask(self, question: str) -> None:
        printer = ChainPrinter(sys.stdout, self.style)
        if self.before is None:
            told = not refuses(self.model, self.picture, question, self.decoding)
        else:
            told = not refuses(self.model, self.picture, behind(self.before, question), self.decoding, question)
        heard = printer if told else None
        try:
            found = self.model.reason(self.picture, question, self.before, on_text=heard, **vars(self.decoding))
        finally:
            printer.close()
        self.before = found["reasoning"]
        print("\n".join(answer_lines({**found, "cut_off": self.before.cut_off}, self.style)))
        if not told:
            print(self.style.dim(HOW_TO_HEAR_IT))

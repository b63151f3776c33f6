"""`embervlm ask`: one question about a picture, on a terminal."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embervlm.data.images import padded_area
from embervlm.errors import UserError
from embervlm.evaluation.asked import load_model
from embervlm.evaluation.batches import cut_off_reasons
from embervlm.evaluation.explain import explain_chains, without_padding
from embervlm.model.config import STAGE3
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.generation import known_of, look
from embervlm.options import add_flag, chosen
from embervlm.paths import closest_path
from embervlm.ranking import checkpoint_to_use
from embervlm.report.pages import samples_page
from embervlm.run.evaluate import decoding_options
from embervlm.run.terminal import ChainPrinter, Style

NO_PICTURE = "-"
HOW_TO_HEAR_IT = "--min_known 0 shows what it writes all the same"


def ask_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type="path", metavar="IMAGE", help="picture file; - asks without a picture")
    parser.add_argument("words", nargs="+", metavar="QUESTION", help="in quotes, where it has ? or *")
    checkpoint_option(parser)
    add_flag(parser, Decoding, "num_chains", flag="chains")
    add_flag(parser, Decoding, "weigh_votes")
    add_flag(parser, Decoding, "min_known")
    parser.add_argument(
        "--candidates", action="extend", nargs="+", help="answers to choose among; default: those of the checkpoint"
    )
    parser.add_argument(
        "--open", dest="open_page", action="store_true", help="show where the model looked at each step, in a browser"
    )
    decoding_options(parser)


def checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type="path", help="folder or hub id; default: the best of the newest run in outputs/"
    )


def ask(
    image: str,
    words: Sequence[str],
    *,
    checkpoint: str | None,
    candidates: list[str] | None,
    open_page: bool,
    **options: Any,
) -> None:
    """Print the steps as they are written, the answer and the confidence; with `open_page` also make a page.

    Args:
        words: of the question; one where the shell was given it in quotes.
    """
    picture, question = picture_of(image), " ".join(words)
    if not question.strip():
        raise UserError('the question is empty; write one in quotes: embervlm ask IMAGE "Which robot can fly there?"')
    decoding = Decoding(candidates=tuple(candidates or ()), **chosen(options, Decoding))
    model = model_to_ask(checkpoint)
    style = Style(sys.stdout)
    printer = ChainPrinter(sys.stdout, style)
    settings = {**vars(decoding), "form": "direct" if model.config.stage == STAGE3 else "reasoning"}
    told = not refuses(model, picture, question, decoding)
    heard = printer if told and decoding.num_chains == 1 else None
    result = model.generate_with_reasoning(picture, question, on_text=heard, **settings)
    if told and heard is None:
        printer.steps(result["reasoning_steps"])
    printer.close()
    print("\n".join(answer_lines(result, style)))
    if not told:
        print(style.dim(HOW_TO_HEAR_IT))
    if open_page:
        page = page_of(model, picture, question, result)
        print(f"Page: {page}")
        webbrowser.open(page.as_uri())


def refuses(model: EmberVLM, picture: str | None, question: str, decoding: Decoding, last: str | None = None) -> bool:
    """Whether there will be no answer because picture or question are unlike those of training; its reasons are then
    not worth reading.

    Args:
        last: of a follow-up, its own words, with which `question` ends.
    """
    with torch.inference_mode(), model.in_eval_mode():
        visual, seen = look(model, [picture])
        found = known_of(model, visual, seen, [question], decoding, None if last is None else [last])
    return found is not None and found[0][0] < decoding.min_known


def picture_of(image: str) -> str | None:
    """The path of the picture, checked before a model is loaded; None where none is shown."""
    if image == NO_PICTURE:
        return None
    if not Path(image).is_file():
        what = "is a folder" if Path(image).is_dir() else f"no such picture{closest_path(image)}"
        raise UserError(f"{image}: {what}; give a picture file, or {NO_PICTURE} to ask without a picture")
    return image


def model_to_ask(checkpoint: str | None) -> EmberVLM:
    """The model of `checkpoint`, else of the newest run; a line on stderr says which."""
    style = Style(sys.stderr)
    if checkpoint is None:
        checkpoint = str(checkpoint_to_use())
        print(
            style.dim(f"asking {checkpoint}, of the newest run in outputs/ (--checkpoint names another)"),
            file=sys.stderr,
        )
    model = load_model(Path(checkpoint))
    if model.config.stage == STAGE3:
        print(style.dim(f"{checkpoint} is of Stage 3: it answers without reasoning"), file=sys.stderr)
    return model


def answer_lines(result: Mapping[str, Any], style: Style) -> list[str]:
    """Answer, confidence, votes, and what is wrong with the text."""
    why = f"none. {result.get('why') or ''}".strip()
    lines = [
        f"{style.bold('Answer:')} {style.green(result['answer']) if result['answer'] else style.yellow(why)}",
        f"{style.bold('Confidence:')} {result['confidence']:.0%}",
    ]
    if result.get("num_chains", 1) > 1:
        shown = "; ".join(f"{answer}: {count:g}" for answer, count in result["votes"].items()) or "none"
        lines.append(f"{style.bold('Votes:')} {shown} of {result['num_chains']} chains")
    return lines + [style.yellow(f"Note: {reason}") for reason in cut_off_reasons(result)]


def page_of(model: EmberVLM, picture: str | None, question: str, result: Mapping[str, Any]) -> Path:
    """A page with the picture, and where in it the model looked at each step; in a file of its own."""
    sample = {"instruction": question, "image": picture, **result, "scores": {}}
    if result["reasoning_steps"]:
        (about,) = explain_chains(model, *look(model, [picture]), [question], [result["reasoning_steps"]])
        if about["attention"] and picture is not None and model.config.fill is not None:
            about["attention"] = without_padding(about["attention"], padded_area(picture, model.config.image_size))
        sample |= about
    handle, name = tempfile.mkstemp(prefix="embervlm-", suffix=".html")
    os.close(handle)
    return samples_page([sample], name, "What was looked at", unmeasured=True)

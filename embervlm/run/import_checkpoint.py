"""`embervlm import-checkpoint`: a checkpoint of another family as one that Stage 4 starts from."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.config import BACKBONE, ConfigError
from embervlm.config_file import model_preset
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.model.config import PAD, SQUASH
from embervlm.model.embervlm import EmberVLM
from embervlm.model.families import IMPORTABLE
from embervlm.model.importing import Imported, import_folder, import_language

REASONING_LIKE = "embervlm-39m"
"""The preset whose reasoning module an imported model gets; no other checkpoint has one."""


def import_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(IMPORTABLE)
    parser.add_argument("folder", type="path", metavar="FOLDER", help=f"checkpoint folder or hub id: {known}")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, for --resume_from")
    add_reading_options(parser, "FOLDER")
    parser.add_argument(
        "--language_only",
        action="store_true",
        help="take the language model alone; OUT is then a Hugging Face folder, for `language` of a model preset",
    )


def add_reading_options(parser: argparse.ArgumentParser, source: str) -> None:
    """How text and pictures are read by a model that is made from pretrained parts; `source` has the language model."""
    parser.add_argument("--tokenizer", type="path", help=f"folder or hub id of the tokenizer, where {source} has none")
    parser.add_argument("--resize", choices=(SQUASH, PAD), default=SQUASH, help="how a picture becomes square")
    parser.add_argument(
        "--no_chat_template",
        action="store_false",
        dest="chat_template",
        help="give the language model the question alone, though its tokenizer has a chat template",
    )


def import_checkpoint(
    folder: str, out: Path, tokenizer: str | None, *, resize: str, chat_template: bool, language_only: bool
) -> None:
    """Write `out` and print what became of every weight."""
    refuse_existing(out)
    if language_only:
        _import_language(folder, out, tokenizer)
        return
    found = import_folder(folder, {**reasoning_sizes(), "resize": resize, "chat_template": chat_template})
    words = tokenizer_for(tokenizer or folder, found.model.language_model.vocab_size)
    found.model.adopt_tokenizer(words)
    write_folder(found.model.save_pretrained, out)
    print(report(found, folder, words))
    print(f"{out}: written; train on it with `python launch/train.py --stages 4 --resume_from {out}`")


def reasoning_sizes() -> dict[str, Any]:
    """The settings of the reasoning module that a model without one gets."""
    settings = model_preset(REASONING_LIKE)
    return {key: value for key, value in settings.items() if key.startswith(("reasoning_", "validator_"))}


def _import_language(folder: str, out: Path, tokenizer: str | None) -> None:
    found = import_language(folder)
    rows = found.backbone.get_input_embeddings().weight.shape[0]
    words = tokenizer_for(tokenizer or folder, rows)

    def save(part: Path) -> None:
        found.backbone.save_pretrained(part)
        words.save(part)

    write_folder(save, out)
    kinds = sorted({name.partition(".")[0] for name in found.dropped})
    print(f"{folder}: a {found.family} checkpoint")
    print(f"  language_model: {found.num_taken} weights taken ({found.backbone.config.model_type}, {rows:,} rows)")
    print(f"  dropped: {len(found.dropped)} weights of {', '.join(kinds)}: only the language model was asked for")
    print(f"{out}: written; name it in a model preset, `language: {{name_or_path: {out}, pretrained: true}}`,")
    print("with a vision encoder of your own choice, and train it from Stage 3 on: `--stages 3 4 --model PRESET.yaml`")


def tokenizer_for(folder: str, num_rows: int) -> ReasoningTokenizer:
    try:
        words = ReasoningTokenizer.from_folder(folder)
        words.check_rows(num_rows)
    except ConfigError as error:
        raise ConfigError(f"{error}; name the folder of the right one with --tokenizer") from error
    return words


def refuse_existing(out: Path) -> None:
    """ConfigError if there is anything at `out` but an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; name a new folder, or delete it")


def write_folder(save: Callable[[Path], None], out: Path) -> None:
    """`save` into a folder beside `out`, which takes its place when whole."""
    with run_dir.naming_unwritten(out):
        part = run_dir.new_tmp_dir(out.parent)
    try:
        with run_dir.naming_unwritten(out):
            whole, filling = run_dir.checkpoint_path(part, None), run_dir.new_tmp_dir(part)
            save(filling)
            run_dir.publish_checkpoint(filling, whole, step=0)
            os.replace(whole, out)
    finally:
        run_dir.remove_tree(part)


def report(found: Imported, folder: str, words: ReasoningTokenizer) -> str:
    """What was taken, renamed, dropped and is new, a line each."""
    model, sizes = found.model, found.model.parameter_counts()
    lines = [f"{folder}: a {found.family} checkpoint"]
    for part in BACKBONE:
        pairs = found.taken[part]
        renamed = Counter(_starts(theirs, ours) for theirs, ours in pairs)
        lines.append(f"  {part}: {len(pairs)} weights taken, {sizes[part]:,} parameters")
        lines += [f"    {theirs}* -> {ours}* ({count})" for (theirs, ours), count in renamed.items() if theirs != ours]
    reasons = Counter(why for _, why in found.dropped)
    for reason, count in reasons.items():
        first = next(name for name, why in found.dropped if why == reason)
        lines.append(f"  dropped: {count} ({first}{', ...' if count > 1 else ''}): {reason}")
    return "\n".join([*lines, *model_lines(model, words), *(f"  {note}" for note in found.notes)])


def model_lines(model: EmberVLM, words: ReasoningTokenizer) -> list[str]:
    """What is new, and how text and pictures are read, a line each."""
    new = sum(parameter.numel() for parameter in model.reasoning_module.parameters())
    rows, kind = model.language_model.vocab_size, model.config.connector.get("kind", "norm_mlp")
    return [
        f"  new: reasoning_module, {new:,} parameters, initialised when Stage 4 starts",
        f"  tokenizer: {words.base_vocab_size:,} tokens of {rows:,} embedding rows, and Stage 4's behind them",
        f"  prompt: {_prompt(model.config.prompt)}",
        f"  a picture: {model.num_visual_tokens} visual tokens ({model.grid}), connector {kind}",
    ]


def _prompt(prompt: tuple[str, str] | None) -> str:
    if prompt is None:
        return "the question alone"
    before, behind = (text if len(text) <= 40 else f"{text[:20]}...{text[-20:]}" for text in prompt)
    return f"by the tokenizer's chat template: {before!r}, the question, {behind!r}"


def _starts(theirs: str, ours: str) -> tuple[str, str]:
    """Both names without the levels at their end that are the same, and with N for the number of a layer."""
    for number in re.findall(r"\.(\d+)\.", theirs)[:1]:
        theirs, ours = (name.replace(f".{number}.", ".N.", 1) for name in (theirs, ours))
    a, b = theirs.split("."), ours.split(".")
    while len(a) > 1 and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{level}." for level in a), "".join(f"{level}." for level in b)

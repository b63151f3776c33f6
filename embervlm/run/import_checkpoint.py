"""`embervlm import-checkpoint`: a checkpoint of another family as one that Stage 4 starts from."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from embervlm import run_dir
from embervlm.config import BACKBONE, ConfigError
from embervlm.config_file import model_preset
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.model.families import Imported, import_folder

REASONING_LIKE = "embervlm-39m"
"""The preset whose reasoning module an imported model gets; no other checkpoint has one."""


def import_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type="path", metavar="FOLDER", help="checkpoint folder or hub id: LLaVA, SmolVLM or Idefics3"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, for --resume_from")
    parser.add_argument("--tokenizer", type="path", help="folder or hub id of the tokenizer, where FOLDER has none")


def import_checkpoint(folder: str, out: Path, tokenizer: str | None) -> None:
    """Write `out` and print what became of every weight."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; name a new folder, or delete it")
    settings = model_preset(REASONING_LIKE)
    reasoning = {key: value for key, value in settings.items() if key.startswith(("reasoning_", "validator_"))}
    found = import_folder(folder, reasoning)
    try:
        words = ReasoningTokenizer.from_folder(tokenizer or folder)
        found.model.attach_tokenizer(words)
    except ConfigError as error:
        raise ConfigError(f"{error}; name the folder of the right one with --tokenizer") from error
    _write(found, out)
    print(report(found, folder, words))
    print(f"{out}: written; train on it with `python launch/train.py --stages 4 --resume_from {out}`")


def _write(found: Imported, out: Path) -> None:
    part = run_dir.new_tmp_dir(out.parent)
    try:
        with run_dir.naming_unwritten(out):
            whole = run_dir.checkpoint_path(part, None)
            found.model.save_pretrained(filling := run_dir.new_tmp_dir(part))
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
    new = sum(parameter.numel() for parameter in model.reasoning_module.parameters())
    lines.append(f"  new: reasoning_module, {new:,} parameters, initialised when Stage 4 starts")
    rows = model.language_model.vocab_size
    lines.append(f"  tokenizer: {words.base_vocab_size:,} tokens of {rows:,} embedding rows, and Stage 4's behind them")
    kind = model.config.connector.get("kind", "norm_mlp")
    lines.append(
        f"  a picture: {model.num_visual_tokens} visual tokens ({model.grid} x {model.grid}), connector {kind}"
    )
    return "\n".join([*lines, *(f"  {note}" for note in found.notes)])


def _starts(theirs: str, ours: str) -> tuple[str, str]:
    """Both names without the levels at their end that are the same."""
    a, b = theirs.split("."), ours.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{level}." for level in a), "".join(f"{level}." for level in b)

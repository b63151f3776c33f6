"""`embervlm new-checkpoint`: a vision encoder and a language model, each in a folder, as one checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from embervlm.config import ConfigError
from embervlm.model.connectors import CONNECTORS
from embervlm.model.embervlm import build_model
from embervlm.model.preprocessor import preprocessor_notes
from embervlm.run.import_checkpoint import (
    add_reading_options,
    model_lines,
    reasoning_sizes,
    refuse_existing,
    tokenizer_for,
    write_folder,
)


def new_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vision", type="path", metavar="VISION", help="vision encoder: folder or hub id")
    parser.add_argument("language", type="path", metavar="LANGUAGE", help="causal language model: folder or hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--connector", choices=tuple(CONNECTORS), default="mlp", help="what leads from one to the other"
    )
    parser.add_argument("--factor", type=int, help="of pixel_shuffle: by how much it shortens a side of the grid")
    parser.add_argument("--image_size", type=int, help="side of the picture; default: as VISION's preprocessor says")
    add_reading_options(parser, "LANGUAGE")


def new_checkpoint(
    vision: str,
    language: str,
    out: Path,
    *,
    connector: str,
    factor: int | None,
    tokenizer: str | None,
    image_size: int | None,
    resize: str,
    chat_template: bool,
) -> None:
    """Write `out` and print what it consists of."""
    refuse_existing(out)
    if image_size is not None and image_size < 1:
        raise ConfigError(f"--image_size {image_size}: give the pixels of a side, at least 1")
    settings: dict[str, Any] = {
        **reasoning_sizes(),
        **({} if image_size is None else {"image_size": image_size}),
        "vision": {"name_or_path": vision, "pretrained": True},
        "language": {"name_or_path": language, "pretrained": True},
        "connector": {"kind": connector, **({} if factor is None else {"factor": factor})},
        "resize": resize,
        "chat_template": chat_template,
        "stage": 3,
        "imported_from": "separate parts",
    }
    model = build_model(settings)
    notes = preprocessor_notes(settings)
    words = tokenizer_for(tokenizer or language, model.language_model.vocab_size)
    model.adopt_tokenizer(words)
    write_folder(model.save_pretrained, out)
    sizes = model.parameter_counts()
    for name, folder in (("vision_encoder", vision), ("language_model", language)):
        kind = getattr(model, name).backbone.config.model_type
        print(f"  {name}: {folder} ({kind}), {sizes[name]:,} parameters")
    print(f"  new: projection, {sizes['projection']:,} parameters, random")
    print("\n".join([*model_lines(model, words), *(f"  pictures: {note}" for note in notes)]))
    print(f"{out}: written; its projection has learned nothing yet. Stage 3 trains that alone, then Stage 4 the rest:")
    print(f"`python launch/train.py --stages 3 4 --model {out}`, or Stage 4 only: `--stages 4 --resume_from {out}`")

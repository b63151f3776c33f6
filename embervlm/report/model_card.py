"""The model card of an exported model: what it is, how it is asked, how good it is, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

EXAMPLE = "What is in the picture?"


def model_card(
    name: str,
    *,
    config: Mapping[str, Any],
    parts: Mapping[str, int],
    version: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
    refuses: bool = False,
    is_int8: bool = False,
    runner: str | None = None,
) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        name: Folder or hub id that the card tells people to open.
        config: The model's, as a dictionary.
        parts: Parameters of each component.
        evaluations: Evaluation files of the checkpoint, the most telling first.
        refuses: Whether it knows what it was trained on.
        is_int8: Whether its weights were rounded to 8 bits after the evaluations.
        runner: Program in the folder that asks it; None where EmberVLM does.
    """
    folder = Path(__file__).parent
    pages = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    phase = next((found["phase"] for found in evaluations if found.get("phase")), "")
    return pages.get_template("model_card.jinja").render(
        name=name,
        parameters=sum(parts.values()),
        parts=parts,
        version=version,
        trained=phase,
        question=EXAMPLE,
        image_size=config["image_size"],
        candidates=config.get("candidates") or [],
        evaluations=evaluations,
        refuses=refuses,
        is_int8=is_int8,
        runner=runner,
    )

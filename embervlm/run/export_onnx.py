"""The folder of `embervlm export --format onnx`: graphs, tokenizer, what a runner has to know, and the runner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from embervlm.config import ConfigError
from embervlm.model import known
from embervlm.model.config import STAGE3
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.model.onnx_graphs import export_graphs, round_graphs

RUNNER = "run_onnx.py"


def write_onnx(model: EmberVLM, folder: Path, int8: bool) -> None:
    """Fill `folder`.

    Args:
        int8: Round the weights to 8 bits; onnxruntime then rounds what they are multiplied with, too.

    Raises:
        ConfigError: the model writes no chains, or names the family of a backbone that cannot be exported.
    """
    if model.config.stage == STAGE3:
        raise ConfigError("--format: a Stage 3 model writes no chains; export one of Stage 4")
    empty_caches = export_graphs(model, folder)
    if int8:
        round_graphs(folder)
    limits = Decoding().for_model(model.config)
    settings = {
        **model.tokenizer.settings(),
        "image_size": model.config.image_size,
        "fill": model.config.fill,
        "num_visual_tokens": model.num_visual_tokens,
        "max_positions": model.language_model.max_positions,
        "max_reasoning_steps": limits.max_reasoning_steps,
        "max_new_tokens": limits.max_new_tokens,
        "candidates": list(model.config.candidates),
        "temperature": model.confidence_temperature,
        "empty_caches": empty_caches,
    }
    (folder / "runner.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(model.tokenizer.spelled(), encoding="utf-8")
    if model.known is not None:
        save_known(model.known, folder / "known.npz")
    shutil.copy(Path(__file__).with_name(RUNNER), folder / RUNNER)


def save_known(found: known.Known, path: Path) -> None:
    """Write what the training data look like, and the constants that belong to it, as arrays."""
    np.savez(
        path,
        num_columns=known.NUM_COLUMNS,
        num_characters=known.NUM_CHARACTERS,
        unlike=known.UNLIKE,
        few=known.FEW,
        **{name: getattr(found, name).numpy() for name in known.NAMES},
    )

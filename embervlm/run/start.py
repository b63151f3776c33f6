"""The model that a stage starts from: new, or with the weights of a checkpoint."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embervlm import run_dir
from embervlm.config import ConfigError, TrainConfig
from embervlm.config_file import brings_tokenizer, model_preset
from embervlm.data.records import ReasoningRecord
from embervlm.data.tokenizer import FIRST_FORMAT, ReasoningTokenizer, tokenizer_of
from embervlm.model.config import STAGE3
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.families import family_of
from embervlm.model.storage import CheckpointError, load_checkpoint_into, read_weights
from embervlm.paths import closest_path
from embervlm.robots.domain import domain_named
from embervlm.world import World


def start_from(config: TrainConfig, world: World, checkpoint: Path, stage: int) -> EmberVLM:
    """The model of this run with the weights of `checkpoint`; a Stage 3 one gets a new reasoning module."""
    gc.collect()  # engine and samples of the phase before refer to themselves, and would stay through this one
    if not checkpoint.is_dir():
        hint = (
            "train a substitute with `python launch/train.py --stages 3` (and the same flags as here)"
            if "stage3" in checkpoint.parts
            else "train it first, or choose another with --resume_from"
        )
        close = closest_path(checkpoint)
        raise ConfigError(f"--resume_from {checkpoint}: no such checkpoint{close}; {hint}")
    if (checkpoint / "COMPLETE").is_file():
        run_dir.verify_checkpoint(checkpoint)
    settings = _as_in(checkpoint, model_settings(config, stage))
    _say_what_was_chosen_from(config, world, checkpoint)
    torch.manual_seed(config.seed)
    model = build_model(settings, load_pretrained=False)
    try:
        load_checkpoint_into(model, checkpoint)
    except CheckpointError as error:
        _refuse_foreign(checkpoint)
        raise ConfigError(f"{error} (this run's preset is {config.model!r}; choose with --model)") from error
    model.attach_tokenizer(ReasoningTokenizer.from_folder(checkpoint))
    return model


def refuse_stage3(checkpoint: Path) -> None:
    """ConfigError where the model of `checkpoint` writes no chains yet, so there is nothing to reward."""
    path = checkpoint / "config.json"
    if path.is_file() and run_dir.read_object(path).get("stage") == STAGE3:
        raise ConfigError(
            f"--resume_from {checkpoint}: is a Stage 3 checkpoint, which writes no chains that phase 3 could reward; "
            "train phases 1 and 2 first, on the records that have chains"
        )


def _as_in(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with how the model of `checkpoint` reads text, which no preset says: its form and its vocabulary."""
    path = checkpoint / "config.json"
    found = run_dir.read_object(path) if path.is_file() else {}
    language = settings["language"]
    rows = (found.get("language", {}).get("built") or {}).get("vocab_size")
    if rows and not language.get("pretrained") and "vocab_size" in (language.get("config") or {}):
        language = {**language, "config": {**language["config"], "vocab_size": rows}}
    text = {"prompt": found.get("prompt"), "text_format": found.get("text_format", FIRST_FORMAT)}
    return {**settings, "language": language, **text}


def _refuse_foreign(checkpoint: Path) -> None:
    """ConfigError where `checkpoint` is one of another family, which can be imported."""
    with contextlib.suppress(CheckpointError):
        if (family := family_of(read_weights(checkpoint)[1])) is not None:
            raise ConfigError(
                f"--resume_from {checkpoint}: is a {family.name} checkpoint; run `embervlm "
                f"import-checkpoint {checkpoint} OUT` and resume from OUT"
            )


def _say_what_was_chosen_from(config: TrainConfig, world: World, checkpoint: Path) -> None:
    path, domain = checkpoint / "config.json", domain_named(config.domain)
    if checkpoint.is_relative_to(config.output_dir) or not domain.candidates:  # then the data name the answers
        return
    own = tuple((run_dir.read_object(path).get("candidates") if path.exists() else None) or domain.candidates)
    if own != domain.candidates and world.rank == 0:
        print(
            f"{checkpoint}: its answers ({', '.join(map(str, own))[:200]}) are not used: this run's answers come "
            f"from each record's metadata.candidates, else from the domain ({domain.name})"
        )


def model_settings(config: TrainConfig, stage: int) -> dict[str, Any]:
    """The preset's settings; ConfigError if it names answers, because these come from the records."""
    settings = model_preset(config.model)
    candidates = domain_named(config.domain).candidates
    own = tuple(settings.get("candidates") or candidates)
    if own != candidates:
        raise ConfigError(
            f"model {config.model}: candidates: {', '.join(own)[:200]} would not be used: a run takes its answers from "
            "the records. Write them into each record's metadata.candidates, and remove the key from the preset"
        )
    return {**settings, "stage": stage, "candidates": candidates}


def adopt_tokenizer(config: TrainConfig, model: EmberVLM, records: Sequence[ReasoningRecord]) -> None:
    """Give a new `model` the tokenizer of the preset's pretrained language model, else one trained on `records`."""
    language = model_preset(config.model)["language"]
    if brings_tokenizer(language):
        model.adopt_tokenizer(ReasoningTokenizer.from_folder(language["name_or_path"]))
    else:
        glossary = domain_named(config.domain).glossary
        model.adopt_own_tokenizer(tokenizer_of(records, model.language_model.vocab_size, glossary))

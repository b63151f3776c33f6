"""A checkpoint of another family (`families.py`) as parts of ours, and what became of each of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GPT2LMHeadModel, PretrainedConfig

from embervlm import run_dir
from embervlm.config import BACKBONE
from embervlm.errors import UNREADABLE
from embervlm.model.config import PAD
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.families import ORIGIN, ORIGIN_LANGUAGE, Family, gpt2_of, language_of, recognised
from embervlm.model.preprocessor import NO_PREPROCESSOR, preprocessor_of
from embervlm.model.storage import CheckpointError, load_state, read_weights, resolve_folder

COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|attn\.(masked_)?bias)$")
"""Buffers in older files that every model computes itself."""
_EMBEDDINGS = ("model.embed_tokens", "transformer.wte")
_TOWER = "vision_model."
"""A level of names that some versions of transformers have in a vision tower, and others have not."""


@dataclass(kw_only=True)
class Imported:
    """A model made from a checkpoint, and what became of each of its weights."""

    model: EmberVLM
    family: str
    taken: dict[str, list[tuple[str, str]]]
    """Component -> (their name, ours)."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(Name, why)."""
    notes: list[str] = field(default_factory=list)
    """What else its user should know, a sentence each."""


def import_folder(name: str | Path, own: Mapping[str, Any]) -> Imported:
    """The model that the checkpoint `name` (a folder or hub id) holds, without tokenizer.

    Args:
        own: Settings that no such checkpoint has: sizes of the reasoning module, `resize`.

    Raises:
        CheckpointError: what it is cannot be told, or ours does not compute it, or something is missing.
    """
    folder = resolve_folder(name)
    path, state = read_weights(folder)
    family = recognised(state, path)
    settings = {**own, **family.settings(_configuration(folder, family), state, folder)}
    state = family.reshaped(state)
    renamed = _renamed(family, state, path)
    language = settings["language"]["built"]
    language["tie_word_embeddings"] = _is_tied(renamed, state, language["tie_word_embeddings"])
    pictures, notes = picture_settings(folder, settings)
    model = build_model({**settings, **pictures, "stage": 3, "imported_from": family.name}, load_pretrained=False)
    weights: dict[str, Tensor] = {}
    taken: dict[str, list[tuple[str, str]]] = {part: [] for part in BACKBONE}
    dropped = _left_out(family, state)
    names = model.state_dict().keys()
    for theirs, ours in renamed.items():
        found = next((spelled for spelled in _spellings(ours) if spelled in names), None)
        if found is None and COMPUTED.search(theirs):
            dropped.append((theirs, "computed anew"))
            continue
        weights[found or ours] = state[theirs]
        taken[(found or ours).partition(".")[0]].append((theirs, found or ours))
    load_state(model, weights, BACKBONE, path, advice=f"its weights are not those that {folder}/config.json describes")
    return Imported(model=model, family=family.name, taken=taken, dropped=dropped, notes=notes)


@dataclass(kw_only=True)
class Language:
    """The language model of a checkpoint alone, and what else was there."""

    backbone: Any
    family: str
    num_taken: int
    dropped: list[str]


def import_language(name: str | Path) -> Language:
    """The language model in the checkpoint `name`, as transformers' own class.

    Raises:
        CheckpointError: as `import_folder`, but for parts that are not taken.
    """
    folder = resolve_folder(name)
    path, state = read_weights(folder)
    family = recognised(state, path)
    if family.name != ORIGIN:
        found = import_folder(folder, {})
        backbone, pairs = found.model.language_model.backbone, found.taken["language_model"]
        return Language(
            backbone=backbone,
            family=family.name,
            num_taken=len(pairs),
            dropped=[theirs for part in ("vision_encoder", "projection") for theirs, _ in found.taken[part]],
        )
    of_language = list(language_of(ORIGIN_LANGUAGE, state))
    own = {name: value for name, _, value in of_language}
    backbone = GPT2LMHeadModel(gpt2_of(_configuration(folder, family), own, folder))
    own = {name: value for name, value in own.items() if not COMPUTED.search(name)}
    load_state(
        backbone, own, {name.partition(".")[0] for name in backbone.state_dict()}, path, advice="see config.json"
    )
    taken = {whole for _, whole, _ in of_language}
    dropped = [name for name in state if name not in taken]
    return Language(backbone=backbone, family=family.name, num_taken=len(own), dropped=dropped)


def _configuration(folder: Path, family: Family) -> Any:
    """The library's configuration of `folder`, or the plain JSON of a family of no library."""
    if not family.model_types:
        return run_dir.read_object(folder / "config.json")
    found = run_dir.read_object(folder / "config.json").get("model_type")
    if found not in family.model_types:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {found!r} has names like {family.name}'s and computes something "
            f"else; of these {' and '.join(family.model_types)} can be imported"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'}: not a readable configuration ({reason})") from error
    return config


def _renamed(family: Family, state: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Their name -> ours; CheckpointError for names that the family does not have."""
    renamed, unknown = {}, []
    left_out = {name for name, _ in _left_out(family, state)}
    for name in (name for name in state if name not in left_out):
        for start, ours in family.names:
            if match := re.match(start, name):
                rest = name[match.end() :]
                for theirs, here in family.inner:
                    rest = rest.replace(theirs, here)
                renamed[name] = ours + rest
                break
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{path}: {', '.join(unknown[:3])}{more}: no part of a {family.name} model, so this one "
            "computes something else and cannot be imported"
        )
    return renamed


def _left_out(family: Family, state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names that have no place here, and why."""
    return [(name, why) for name in state for start, why in family.left_out if re.match(start, name)]


def _is_tied(renamed: Mapping[str, str], state: Mapping[str, Tensor], asked: bool) -> bool:
    """Whether one matrix is input and output embedding; a file of such a model may hold it once or twice."""
    theirs = {ours: name for name, ours in renamed.items()}
    head, *words = (theirs.get(f"language_model.backbone.{name}.weight") for name in ("lm_head", *_EMBEDDINGS))
    embedding = next(filter(None, words), None)
    if head is None or embedding is None:
        return True
    return asked and torch.equal(state[head], state[embedding])


def _spellings(name: str) -> tuple[str, ...]:
    start, backbone, rest = name.partition("vision_encoder.backbone.")
    if not backbone:
        return (name,)
    return name, start + backbone + rest.removeprefix(_TOWER), start + backbone + _TOWER + rest


def picture_settings(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Mean and deviation of the pictures from the folder's own preprocessor, and what of it is not followed."""
    size, found = settings["image_size"], preprocessor_of(folder)
    kept = "padded to a square" if settings.get("resize") == PAD else "scaled"
    notes = [f"pictures: whole, {kept} to {size} x {size} without cropping or tiles"]
    if found is None:
        return {}, notes if "image_mean" in settings else [*notes, f"pictures: {NO_PREPROCESSOR.format(folder)}"]
    means = {name: value for name, value in found.settings.items() if name != "image_size"}
    return means, [*notes, *(f"pictures: {note}" for note in found.notes)]

"""Checkpoints of other families of vision-language models, by the names of their weights, as parts of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from embervlm import run_dir
from embervlm.config import BACKBONE
from embervlm.errors import UNREADABLE
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.storage import CheckpointError, load_state, read_weights, resolve_folder

COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias)$")
"""Buffers in older files that every model computes itself."""
_TOWER = "vision_model."
"""A level of names that some versions of transformers have in a vision tower, and others have not."""
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint: how it is recognised, what its names are here, and what model that makes."""

    name: str
    model_types: tuple[str, ...]
    """Of its `config.json`. Others with the same names compute something else and are refused."""
    keys: tuple[str, ...]
    """Each a regular expression that some name matches."""
    names: tuple[tuple[str, str], ...]
    """(Regular expression for the start of a name, what stands there in ours)."""
    settings: Callable[[Any, Path], dict[str, Any]]
    """Of the model that its configuration describes; raises CheckpointError for what ours does not compute."""


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


def import_folder(name: str | Path, reasoning: Mapping[str, Any]) -> Imported:
    """The model that the checkpoint `name` (a folder or hub id) holds, without tokenizer.

    Args:
        reasoning: Sizes of the reasoning module, which no such checkpoint has.

    Raises:
        CheckpointError: what it is cannot be told, or ours does not compute it, or something is missing.
    """
    folder = resolve_folder(name)
    path, state = read_weights(folder)
    family = recognised(state, path)
    config = _configuration(folder, family)
    settings = {**reasoning, **family.settings(config, folder), "stage": 3, "imported_from": family.name}
    renamed = _renamed(family, state, path)
    settings["language"]["built"]["tie_word_embeddings"] = _is_tied(renamed, state, config)
    pictures, notes = picture_settings(folder, settings["image_size"])
    model = build_model({**settings, **pictures}, load_pretrained=False)
    weights: dict[str, Tensor] = {}
    taken: dict[str, list[tuple[str, str]]] = {part: [] for part in BACKBONE}
    dropped: list[tuple[str, str]] = []
    own = model.state_dict().keys()
    for theirs, ours in renamed.items():
        found = next((spelled for spelled in _spellings(ours) if spelled in own), None)
        if found is None and COMPUTED.search(theirs):
            dropped.append((theirs, "computed anew"))
            continue
        weights[found or ours] = state[theirs]
        taken[(found or ours).partition(".")[0]].append((theirs, found or ours))
    load_state(model, weights, BACKBONE, path, advice=f"its weights are not those that {folder}/config.json describes")
    return Imported(model=model, family=family.name, taken=taken, dropped=dropped, notes=notes)


def recognised(names: Iterable[str], path: Path) -> Family:
    """The family whose names these are; CheckpointError for none."""
    names = list(names)
    for family in FAMILIES:
        if all(any(re.match(key, name) for name in names) for key in family.keys):
            return family
    if any(name.startswith("reasoning_module.") for name in names) or {*BACKBONE} == {n.split(".")[0] for n in names}:
        raise CheckpointError(f"{path}: is a checkpoint of EmberVLM already; give its folder to --resume_from")
    shown = ", ".join(names[:3]) or "none"
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{path}: of no known family (its first names are {shown}); known are {known}")


def _configuration(folder: Path, family: Family) -> PretrainedConfig:
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
    for name in state:
        for start, ours in family.names:
            if match := re.match(start, name):
                renamed[name] = ours + name[match.end() :]
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


def _is_tied(renamed: Mapping[str, str], state: Mapping[str, Tensor], config: Any) -> bool:
    """Whether one matrix is input and output embedding; a file of such a model may hold it once or twice."""
    theirs = {ours: name for name, ours in renamed.items()}
    if (head := theirs.get("language_model.backbone.lm_head.weight")) is None:
        return True
    asked = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
    embedding = theirs.get("language_model.backbone.model.embed_tokens.weight")
    return bool(asked and embedding and torch.equal(state[head], state[embedding]))


def _spellings(name: str) -> tuple[str, ...]:
    start, backbone, rest = name.partition("vision_encoder.backbone.")
    if not backbone:
        return (name,)
    return name, start + backbone + rest.removeprefix(_TOWER), start + backbone + _TOWER + rest


def built(config: PretrainedConfig) -> dict[str, Any]:
    """A part's settings from its own configuration, whole."""
    return {"built": config.to_dict()}


def picture_settings(folder: Path, image_size: int) -> tuple[dict[str, Any], list[str]]:
    """Mean and deviation of the pictures from the folder's own preprocessor, and what of it is not followed."""
    file = next((folder / name for name in _PREPROCESSORS if (folder / name).is_file()), None)
    if file is None:
        return {}, [
            f"pictures: no {_PREPROCESSORS[0]} in {folder}, so values are scaled to [-1, 1]; correct image_mean and "
            "image_std in config.json where the encoder was trained with others"
        ]
    given = run_dir.read_object(file)
    given = given.get("image_processor", given)
    notes = [f"pictures: whole, scaled to {image_size} x {image_size} without cropping, padding or tiles"]
    if given.get("do_normalize") is False:
        return {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}, notes
    found = {}
    for name in ("image_mean", "image_std"):
        values = given.get(name)
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
            raise CheckpointError(f"{file}: {name} is {values!r}, not three numbers")
        found[name] = tuple(map(float, values))
    return found, notes


# ---- families


def _llava(config: Any, folder: Path) -> dict[str, Any]:
    vision, layer = config.vision_config, config.vision_feature_layer
    if not isinstance(layer, int):
        raise CheckpointError(f"{folder}/config.json: vision_feature_layer {layer} is several layers; one is read here")
    has_class = vision.model_type == "clip_vision_model"
    if (strategy := config.vision_feature_select_strategy) != ("default" if has_class else "full"):
        raise CheckpointError(
            f"{folder}/config.json: vision_feature_select_strategy {strategy!r} of a {vision.model_type} does not give "
            "a square of visual tokens, which is what is read here"
        )
    return {
        "vision": built(vision),
        "language": built(config.text_config),
        "image_size": vision.image_size,
        "vision_feature_layer": layer,
        "connector": {
            "kind": "mlp",
            "activation": config.projector_hidden_act,
            "bias": config.multimodal_projector_bias,
        },
    }


def _idefics3(config: Any, folder: Path) -> dict[str, Any]:
    return {
        "vision": built(config.vision_config),
        "language": built(config.text_config),
        "image_size": config.vision_config.image_size,
        "connector": {"kind": "pixel_shuffle", "factor": config.scale_factor},
    }


FAMILIES = (
    Family(
        name="LLaVA",
        model_types=("llava",),
        keys=(
            r"(model\.)?vision_tower\.",
            r"(model\.)?multi_modal_projector\.linear_1\.",
            r"(model\.)?language_model\.",
        ),
        names=(
            (r"(model\.)?vision_tower\.", "vision_encoder.backbone."),
            (r"(model\.)?multi_modal_projector\.linear_1\.", "projection.layers.0."),
            (r"(model\.)?multi_modal_projector\.linear_2\.", "projection.layers.2."),
            (r"(language_model\.)?lm_head\.", "language_model.backbone.lm_head."),
            (r"language_model\.model\.|(model\.)?language_model\.", "language_model.backbone.model."),
        ),
        settings=_llava,
    ),
    Family(
        name="SmolVLM/Idefics3",
        model_types=("idefics3", "smolvlm"),
        keys=(r"(model\.)?vision_model\.", r"(model\.)?connector\.modality_projection\.", r"(model\.)?text_model\."),
        names=(
            (r"(model\.)?vision_model\.", "vision_encoder.backbone."),
            (r"(model\.)?connector\.modality_projection\.proj\.", "projection.linear."),
            (r"lm_head\.", "language_model.backbone.lm_head."),
            (r"(model\.)?text_model\.", "language_model.backbone.model."),
        ),
        settings=_idefics3,
    ),
)

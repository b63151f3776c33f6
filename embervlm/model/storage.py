"""Weights on disk: `pytorch_model.bin` and `reasoning_module.bin`, read with `weights_only=True`."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embervlm.errors import UserError
from embervlm.run_dir import closest_path, names_a_path

WEIGHTS = "pytorch_model.bin"
REASONING_WEIGHTS = "reasoning_module.bin"
REASONING_PREFIX = "reasoning_module."


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def resolve_folder(name: Any) -> Path:
    """The local folder of a checkpoint path or hub id."""
    folder = Path(str(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json in it; name a checkpoint folder such as checkpoint-final")
        return folder
    if names_a_path(name) or "/" not in str(name):
        raise CheckpointError(f"{folder}: no such checkpoint folder{closest_path(folder)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client raises a family of unrelated types
        hint = closest_path(folder)
        raise CheckpointError(f"{name}: no such folder, and not to be had from the hub ({error}){hint}") from error


def save_weights(state: Mapping[str, Tensor], folder: Path, with_reasoning: bool) -> None:
    """Write the whole model's weights, and the reasoning module's apart so that it fits onto a Stage 3 backbone."""
    reasoning = {key: value for key, value in state.items() if key.startswith(REASONING_PREFIX)}
    if with_reasoning:
        torch.save(dict(state), folder / WEIGHTS)
        torch.save(
            {key.removeprefix(REASONING_PREFIX): value.clone() for key, value in reasoning.items()},
            folder / REASONING_WEIGHTS,
        )
    else:
        torch.save({key: value for key, value in state.items() if key not in reasoning}, folder / WEIGHTS)


def read_tensors(path: Path) -> Any:
    """The object in a torch file; CheckpointError where it is missing, cut short, or holds anything but data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (
        RuntimeError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        EOFError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cut short or tampered with ({reason[:200]}); use another checkpoint") from error


def _named_tensors(path: Path) -> dict[str, Tensor]:
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: does not hold named tensors")
    return state


def load_checkpoint_into(model: nn.Module, folder: Path, components: Sequence[str]) -> None:
    """Load the weights of `components` from the checkpoint in `folder`, all of them or CheckpointError."""
    path = folder / WEIGHTS
    load_state(model, _named_tensors(path), components, path)


def load_reasoning_module(model: nn.Module, path: Path) -> None:
    """Put the weights of a `reasoning_module.bin` onto `model`, whose backbone stays as it is."""
    state = {REASONING_PREFIX + key: value for key, value in _named_tensors(path).items()}
    load_state(model, state, ("reasoning_module",), path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], components: Sequence[str], path: Path) -> None:
    own = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] in components}
    given = {key: value for key, value in state.items() if key.partition(".")[0] in components}
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is not part of the model" for key in given if key not in own]
    problems += [
        f"{key} has shape {list(given[key].shape)}, the model {list(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(f"{path}: is of another model ({shown}); use the preset it was trained with")
    model.load_state_dict(dict(given), strict=False)

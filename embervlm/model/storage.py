"""Weights on disk: ours in `pytorch_model.bin` and `reasoning_module.bin`, read with `weights_only=True`.

Those of other programs are read too: as safetensors, in several files with an index, inside a trainer's dictionary,
and under the names that a wrapper around the model gives them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embervlm import run_dir
from embervlm.config import BACKBONE, COMPONENTS
from embervlm.errors import UNREADABLE, UserError
from embervlm.paths import closest_path, names_a_path

WEIGHTS = "pytorch_model.bin"
REASONING_WEIGHTS = "reasoning_module.bin"
REASONING_PREFIX = "reasoning_module."
INDEX = ".index.json"
SAFETENSORS = "model.safetensors"
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + INDEX, WEIGHTS, WEIGHTS + INDEX)
"""The weights are in the first that is there, in transformers' order: saving into a folder again leaves an old `.bin`
beside the new safetensors."""
_INSIDE = ("model", "state_dict", "model_state_dict", "module")
"""Where a trainer's dictionary keeps the weights."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of torch.compile, FSDP and activation checkpointing, anywhere in a name."""
_AROUND = ("module.", "model.")
"""Of DDP, and of a module around the model; in front of every name."""
_HALF = (torch.float16, torch.bfloat16)
_OF_TORCH = (RuntimeError, AssertionError, EOFError, struct.error, pickle.UnpicklingError)
"""What `torch.load` raises of a damaged file besides `UNREADABLE`."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


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


def save_safetensors(state: Mapping[str, Tensor], folder: Path, with_reasoning: bool) -> None:
    """Write the weights as transformers does, into `model.safetensors`; of tied weights one, as the format wants it."""
    from safetensors.torch import save_file

    kept: dict[int, tuple[str, Tensor]] = {}
    for key, value in state.items():
        if with_reasoning or not key.startswith(REASONING_PREFIX):
            kept.setdefault(value.data_ptr() if value.numel() else -len(kept), (key, value))
    save_file(dict(kept.values()), folder / SAFETENSORS, metadata={"format": "pt"})


def load_checkpoint_into(model: nn.Module, folder: Path, components: Sequence[str] | None = None) -> None:
    """Load the weights of `components` from the checkpoint in `folder`, all of them or CheckpointError.

    None: of the backbone, and of the reasoning module where the checkpoint has one.
    """
    path, state = read_weights(folder)
    if components is None:
        components = COMPONENTS if any(key.startswith(REASONING_PREFIX) for key in state) else BACKBONE
    load_state(model, state, components, path)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    components: Collection[str],
    path: Path,
    advice: str = "use the preset it was trained with",
) -> None:
    """Put all of `state` that belongs to `components` into `model`, whose every weight must be there."""
    own = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] in components}
    given = {key: value for key, value in state.items() if key.partition(".")[0] in components}
    for key in own.keys() - given.keys():  # safetensors hold of tied weights one
        same = (other for other in given if other in own and own[key].data_ptr() == own[other].data_ptr() != 0)
        if (tied := next(same, None)) is not None:
            given[key] = given[tied]
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is not part of the model" for key in given if key not in own]
    problems += [
        f"{key} has shape {list(given[key].shape)}, the model {list(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(f"{path}: belongs to another model ({shown}); {advice}")
    model.load_state_dict(dict(given), strict=False)


def read_weights(folder: Path, *, int8: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """The file that holds the weights of the checkpoint in `folder`, and the weights under the model's names.

    Half precision is read into float32, which holds every value of it. Weights of 8 bits are an error unless `int8`.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), folder / WEIGHTS)
    state = _named_tensors(path)
    if not int8 and any(value.dtype == torch.int8 for value in state.values()):
        raise CheckpointError(f"{path}: holds int8 weights, which only answer; use the checkpoint they were made from")
    return path, {key: value.float() if value.dtype in _HALF else value for key, value in state.items()}


def _named_tensors(path: Path) -> dict[str, Tensor]:
    """Names as the model has them -> tensors, of one file or of those that an index names."""
    if path.name.endswith(INDEX):
        shards = [_named_tensors(shard) for shard in shards_of(path)]
        return {key: value for shard in shards for key, value in shard.items()}
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    while isinstance(state, dict) and (
        inside := [state[name] for name in _INSIDE if isinstance(state.get(name), dict)]
    ):
        state = inside[0]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: does not contain named tensors")
    return _unwrapped(state)


def shards_of(index: Path) -> list[Path]:
    """The files that an index names; CheckpointError where one is missing."""
    files = run_dir.read_object(index, "weight_map")["weight_map"]
    if not isinstance(files, dict):
        raise CheckpointError(f"{index}: its weight_map is not a JSON object; use another checkpoint")
    names = sorted(set(map(str, files.values())))
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        listed = ", ".join(str(index.with_name(name)) for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{listed}{more}: missing, {len(missing)} of the {len(names)} files of {index.name}; download them again"
        )
    return [index.with_name(name) for name in names]


def read_tensors(path: Path) -> Any:
    """The object in a torch file; CheckpointError where it is missing, cut short, or holds anything but data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or _is_plain_pickle(path):
            raise CheckpointError(
                f"{path}: contains more than weights, and reading the rest could run code; save only the weights, "
                "`torch.save(model.state_dict(), ...)`, or as safetensors"
            ) from error
        raise _damaged(path, error) from error
    except (*UNREADABLE, *_OF_TORCH) as error:
        raise _damaged(path, error) from error


def _is_plain_pickle(path: Path) -> bool:
    """Whether Python's own pickle wrote the file: torch's files begin as a zip, or with protocol 2."""
    with path.open("rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" and start[1:] > b"\x02"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"{path}: cut short or tampered with ({reason[:200]}); use another checkpoint")


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what wrappers have put into the names."""
    for wrapper in _WRAPPERS:
        state = {key.replace(wrapper, ""): value for key, value in state.items()}
    while state and (prefix := next((p for p in _AROUND if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""Of a download, passed on."""


def resolve_folder(name: Any, revision: str | None = None, **hub: Any) -> Path:
    """The local folder of a checkpoint path or hub id. `revision` and `hub` are for `snapshot_download`."""
    folder = Path(str(name))
    if folder.is_dir():
        if revision not in (None, "main"):
            raise CheckpointError(
                f"{folder}: is a folder, and folders have no revision {revision!r}; leave revision out"
            )
        if not (folder / "config.json").is_file():
            inside = sorted(folder.glob("**/checkpoint-*/config.json"), key=lambda path: path.stat().st_mtime)
            example = inside[-1].parent if inside else "checkpoint-final"
            raise CheckpointError(f"{folder}: contains no config.json; give a checkpoint folder such as {example}")
        return folder
    if names_a_path(name) or "/" not in str(name):
        raise CheckpointError(f"{folder}: no such checkpoint folder{closest_path(folder)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, **hub))
    except Exception as error:  # the hub client raises a family of unrelated types
        hint = closest_path(folder)
        raise CheckpointError(f"{name}: no such folder, and cannot be loaded from the hub ({error}){hint}") from error
